"""From a scale and a recipe to DeepSpeed's dict: arithmetic, ownership, refusals, DeepSpeed's own opinion."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fd_scale.data.plan import Plan
from fd_scale.errors import ScaleError
from fd_scale.run import recipes, scale
from fd_scale.run.recipe import Recipe, derive

NAMES = [
    "cpu",
    "cpu_bf16",
    "probe",
    "swinv2g",
    "swinv2g_1gpu",
    "swinv2g_1node",
    "vitb_1gpu",
    "vitb_1node",
    "vitb_multinode",
    "vitl_1gpu",
    "vitl_1node",
    "vitl_multinode",
]

every_scale = pytest.mark.parametrize("name", NAMES)


def with_batch(global_batch: int, **changes: object) -> Recipe:
    schedule = {"schedule.images": 10 * global_batch, "schedule.warmup_images": 0}
    return derive(recipes.demo(), **{"global_batch": global_batch, **schedule, **changes})


@pytest.fixture
def write(tmp_path):
    """Write a scale and return its path."""

    def _write(content: object, name: str = "trial.json") -> str:
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return str(path)

    return _write


def refusal(path: str) -> str:
    with pytest.raises(ScaleError) as caught:
        scale.load(path)
    return str(caught.value)


# The files.


def test_the_scales_are_these():
    assert scale.names() == NAMES


@every_scale
def test_a_file_says_no_more_than_it_must(name):
    """No value of the recipe, none that is derived: ``load`` checks; and the section of ours is complete."""
    values = json.loads((Path(__file__).parents[2] / "ds_configs" / f"{name}.json").read_text())
    loaded = scale.load(name)
    assert loaded.name == name
    assert loaded.deepspeed == {key: value for key, value in values.items() if key != "fd_scale"}
    assert loaded.activation_checkpointing is values["fd_scale"]["activation_checkpointing"]


@pytest.mark.parametrize(
    ("name", "stage", "bf16", "checkpointing"),
    [
        ("cpu", 3, False, False),
        ("cpu_bf16", 3, True, True),
        ("vitb_1gpu", 1, True, False),
        ("vitb_1node", 1, True, False),
        ("vitb_multinode", 1, True, False),
        ("vitl_1gpu", 1, True, True),
        ("vitl_1node", 2, True, True),
        ("vitl_multinode", 2, True, True),
        ("swinv2g_1gpu", 3, True, True),
        ("swinv2g_1node", 3, True, True),
        ("swinv2g", 3, True, True),
    ],
)
def test_a_scale_is_what_the_readme_says(name, stage, bf16, checkpointing):
    resolved = scale.resolve(scale.load(name), with_batch(2048), 1)
    assert (resolved.zero_stage, resolved.bf16, resolved.activation_checkpointing) == (
        stage,
        bf16,
        checkpointing,
    )
    readme = (Path(__file__).parents[2] / "ds_configs" / "README.md").read_text()
    (row,) = [line for line in readme.splitlines() if line.startswith(f"| `{name}.json`")]
    *_, zero, micro_batch, checkpointed, _ = (cell.strip() for cell in row.split("|"))
    assert zero.startswith(str(stage))
    assert int(micro_batch) == resolved.micro_batch
    assert checkpointed == ("yes" if checkpointing else "no")


@every_scale
def test_deepspeed_takes_the_file_as_it_is(name):
    from deepspeed.runtime.config import DeepSpeedConfig

    DeepSpeedConfig(str(Path(__file__).parents[2] / "ds_configs" / f"{name}.json"))


@pytest.mark.parametrize("name", recipes.names())
def test_deepspeed_takes_every_resolved_recipe(name):
    """Its own class for one process, where it checks that the three batch sizes agree."""
    from deepspeed.runtime.config import DeepSpeedConfig

    recipe = recipes.get(name)
    resolved = scale.resolve(scale.load(recipe.scale), recipe, 1)
    config = DeepSpeedConfig(resolved.ds_config)
    assert config.train_batch_size == recipe.global_batch
    assert config.train_micro_batch_size_per_gpu == resolved.micro_batch
    assert config.gradient_accumulation_steps == resolved.accumulation
    assert config.gradient_clipping == recipe.optim.clip_norm
    assert config.zero_config.stage == resolved.zero_stage
    assert config.bfloat16_config.enabled is resolved.bf16
    assert config.optimizer_name is None
    assert config.scheduler_name is None
    assert config.zero_allow_untested_optimizer
    assert not config.zero_force_ds_cpu_optimizer
    assert not config.timers_config.enabled


# Arithmetic.


def test_a_share_larger_than_the_micro_batch_is_accumulated(write):
    path = write({"train_micro_batch_size_per_gpu": 64})
    resolved = scale.resolve(scale.load(path), with_batch(2048), 1)
    assert (resolved.micro_batch, resolved.accumulation) == (64, 32)
    assert resolved.ds_config == {
        "train_micro_batch_size_per_gpu": 64,
        "gradient_accumulation_steps": 32,
        "train_batch_size": 2048,
        "gradient_clipping": 3.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1_000_000_000,
        "timers": {"throughput": {"enabled": False}},
    }
    assert (resolved.zero_stage, resolved.bf16, resolved.activation_checkpointing) == (0, False, False)


@pytest.mark.parametrize(
    ("asked", "recomputes", "granularity"),
    [
        (True, True, {}),
        (False, False, {}),
        ({"every": 2}, True, {"every": 2}),
        ({"stages": [0, 1]}, True, {"stages": [0, 1]}),
        ({"every": 3, "stages": [2]}, True, {"every": 3, "stages": [2]}),
    ],
)
def test_which_blocks_are_recomputed(write, asked, recomputes, granularity):
    path = write({"train_micro_batch_size_per_gpu": 1, "fd_scale": {"activation_checkpointing": asked}})
    resolved = scale.resolve(scale.load(path), with_batch(4), 1)
    assert (resolved.activation_checkpointing, resolved.granularity) == (recomputes, granularity)


@pytest.mark.parametrize("asked", [1, "yes", {}, {"every": 0}, {"each": 2}, {"stages": 1}, {"stages": [-1]}])
def test_blocks_that_cannot_be_meant(write, asked):
    path = write({"train_micro_batch_size_per_gpu": 1, "fd_scale": {"activation_checkpointing": asked}})
    assert "must be true, false, or which blocks" in refusal(path)


def test_what_a_scale_leaves_out(write):
    """The teacher is whole on every process, nothing is compiled, and maps are whole."""
    resolved = scale.resolve(scale.load(write({"train_micro_batch_size_per_gpu": 1})), with_batch(4), 1)
    assert (resolved.teacher, resolved.compile, resolved.loss_chunk_tokens) == ("replicate", False, None)
    for own, expected in (
        ({"teacher": "shard"}, ("shard", False, None)),
        ({"teacher": "auto"}, ("auto", False, None)),
        ({"compile": True}, ("replicate", True, None)),
        ({"loss_chunk_tokens": 4096}, ("replicate", False, 4096)),
    ):
        path = write({"train_micro_batch_size_per_gpu": 1, "fd_scale": own})
        resolved = scale.resolve(scale.load(path), with_batch(4), 1)
        assert (resolved.teacher, resolved.compile, resolved.loss_chunk_tokens) == expected
        assert own.items() <= resolved.own.items(), "what a start records"


@pytest.mark.parametrize("asked", [0, -1, 1.5, "all", True])
def test_pieces_of_the_loss_that_cannot_be_meant(write, asked):
    path = write({"train_micro_batch_size_per_gpu": 1, "fd_scale": {"loss_chunk_tokens": asked}})
    assert "fd_scale.loss_chunk_tokens" in refusal(path)
    assert "must be a whole number, 1 or more" in refusal(path)


@pytest.mark.parametrize(
    "pair",
    [
        {"zero_optimization": {"stage": 3}, "fd_scale": {"compile": True}},
        {"fd_scale": {"compile": True, "teacher": "shard"}},
        {"fd_scale": {"compile": True, "teacher": "auto"}},
    ],
)
def test_compiled_blocks_need_whole_parameters(write, pair):
    assert "fd_scale.compile=true goes with whole parameters" in refusal(
        write({"train_micro_batch_size_per_gpu": 1, **pair})
    )


def test_parameters_leave_the_device_at_stage_3_alone(write):
    zero = {"stage": 2, "offload_param": {"device": "cpu"}}
    path = write({"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero})
    assert "zero_optimization.offload_param needs stage 3, not stage=2" in refusal(path)


def test_no_clip_is_zero_for_deepspeed(write):
    path = write({"train_micro_batch_size_per_gpu": 1})
    resolved = scale.resolve(scale.load(path), with_batch(4, **{"optim.clip_norm": None}), 2)
    assert resolved.ds_config["gradient_clipping"] == 0.0


def test_resolving_gives_a_dict_of_ones_own(write):
    """DeepSpeed and the engine may write into it."""
    loaded = scale.load(write({"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 1}}))
    first = scale.resolve(loaded, with_batch(4), 1).ds_config
    first["zero_optimization"]["stage"] = 2
    first["timers"]["throughput"]["enabled"] = True
    second = scale.resolve(loaded, with_batch(4), 1).ds_config
    assert second["zero_optimization"] == {"stage": 1}
    assert not second["timers"]["throughput"]["enabled"]


@settings(deadline=None, max_examples=200)
@given(global_batch=st.integers(1, 300), micro_batch=st.integers(1, 40), world_size=st.integers(1, 40))
def test_what_is_accepted_is_exactly_what_divides(global_batch, micro_batch, world_size):
    """Against the definition and the data's own plan; and what a refusal recommends is accepted."""
    loaded = scale.Scale("trial", "trial.json", {"train_micro_batch_size_per_gpu": micro_batch}, False)
    recipe = with_batch(global_batch)
    plan = Plan([10 * global_batch], seed=0, global_batch=global_batch)
    divides = global_batch % (micro_batch * world_size) == 0 and world_size in plan.allowed_world_sizes()
    try:
        resolved = scale.resolve(loaded, recipe, world_size)
    except ScaleError as error:
        assert not divides
        _check_recommendations(str(error), loaded, recipe, world_size)
    else:
        assert divides
        assert resolved.micro_batch * resolved.accumulation * world_size == global_batch


def _check_recommendations(message: str, loaded: scale.Scale, recipe: Recipe, world_size: int) -> None:
    _, worlds, micro_batches, _ = message.splitlines()

    def sizes(line: str) -> list[int]:
        listed = line.rpartition(": ")[2]
        return [] if listed == "none" else [int(size) for size in listed.split(", ")]

    for size in sizes(worlds):
        scale.resolve(loaded, recipe, size)
    for size in sizes(micro_batches):
        other = scale.Scale("trial", "trial.json", {"train_micro_batch_size_per_gpu": size}, False)
        scale.resolve(other, recipe, world_size)


def test_an_impossible_triple_lists_what_works(write):
    path = write({"train_micro_batch_size_per_gpu": 64})
    with pytest.raises(ScaleError) as caught:
        scale.resolve(scale.load(path), with_batch(2048), 3)
    assert str(caught.value) == (
        "global_batch=2048 cannot be shared evenly by 3 processes with "
        f"train_micro_batch_size_per_gpu=64 ({path})\n"
        "  with this micro-batch, numbers of processes that work: 1, 2, 4, 8, 16, 32\n"
        "  with 3 processes, micro-batches that work: none\n"
        "change the number of processes, the micro-batch in that file, or the recipe's scale or global_batch"
    )


def test_a_micro_batch_above_the_share_is_not_cut_in_silence(write):
    path = write({"train_micro_batch_size_per_gpu": 64})
    with pytest.raises(ScaleError, match="with 8 processes, micro-batches that work: 1, 2, 4, 8\n"):
        scale.resolve(scale.load(path), with_batch(64), 8)


def test_a_world_that_the_data_cannot_be_dealt_to_is_refused(write):
    """2500 = 4 x 625, its largest divisor up to 1024: four processes divide the batch, but not the data."""
    loaded = scale.load(write({"train_micro_batch_size_per_gpu": 1}))
    with pytest.raises(ScaleError, match="numbers of processes that work: 1, 5, 25, 125, 625\n"):
        scale.resolve(loaded, with_batch(2500), 4)
    assert scale.resolve(loaded, with_batch(2500), 5).accumulation == 500


@pytest.mark.parametrize(("world_size", "works"), [(1, True), (2, True), (8, True), (24, True), (12, False)])
def test_two_level_sharding_needs_whole_groups(write, world_size, works):
    zero = {"stage": 3, "zero_hpz_partition_size": 8}
    loaded = scale.load(write({"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}))
    if works:
        assert scale.resolve(loaded, with_batch(48), world_size).accumulation == 48 // world_size
    else:
        with pytest.raises(ScaleError, match="processes that work: 1, 2, 3, 4, 6, 8, 16, 24, 48\n"):
            scale.resolve(loaded, with_batch(48), world_size)


# Refusals of a file.


def test_an_unknown_name_is_refused_with_near_misses():
    message = refusal("vitb_1gpus")
    assert "unknown scale 'vitb_1gpus'; did you mean vitb_1gpu" in message
    assert "scales: cpu, cpu_bf16," in message


def test_a_missing_file_is_told(tmp_path):
    assert "does not exist (scales by name: cpu," in refusal(str(tmp_path / "none.json"))
    assert "does not exist" in refusal(str(tmp_path / "folder.json" / "x.json"))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "is not proper JSON: Expecting value"),
        ("{'a': 1}", "is not proper JSON"),
        ("[]", "holds list, expected an object"),
        ('{"bf16": {}, "bf16": {}}', "key 'bf16' occurs twice in one object"),
        ('{"zero_optimization": {"stage": 1, "stage": 3}}', "key 'stage' occurs twice in one object"),
        ("{}", "train_micro_batch_size_per_gpu is missing: images per process in one forward pass"),
    ],
)
def test_a_file_that_is_no_scale_is_refused(write, content, said):
    path = write(content)
    message = refusal(path)
    assert path in message
    assert said in message


@pytest.mark.parametrize(
    ("key", "owner"),
    [
        ("train_batch_size", "derived from the recipe"),
        ("gradient_accumulation_steps", "derived from the recipe"),
        ("gradient_clipping", "set in the recipe (optim.clip_norm)"),
        ("optimizer", "set in the recipe (optim)"),
        ("scheduler", "set in the recipe (schedule)"),
        ("activation_checkpointing", "use fd_scale.activation_checkpointing"),
    ],
)
def test_what_has_another_owner_is_refused(write, key, owner):
    path = write({"train_micro_batch_size_per_gpu": 1, key: 1})
    message = refusal(path)
    assert message.startswith(f"{path}: {key} may not be in a scale: ")
    assert owner in message


def test_every_problem_is_told_with_the_file(write):
    path = write({"gradient_cliping": 1.0, "zero_optimization": {"stage": "auto", "mics_shard_size": 8}})
    lines = refusal(path).splitlines()
    assert len(lines) == 4
    assert all(line.startswith(f"{path}: ") for line in lines)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"zero_optimization": {"stage": 2, "zero_hpz_partition_size": 8}}, "needs stage=3, not stage=2"),
        ({"zero_optimization": {"zero_hpz_partition_size": 8}}, "needs stage=3, not stage=0"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            "needs stage 1, 2 or 3, not stage=0",
        ),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "needs bf16.enabled=true"),
        (
            {"data_types": {"grad_accum_dtype": "fp32"}, "bf16": {"enabled": True}},
            "needs stage 1, 2 or 3, not stage=0",
        ),
    ],
)
def test_values_that_do_not_go_together_are_refused(write, values, said):
    assert said in refusal(write({"train_micro_batch_size_per_gpu": 1, **values}))


def test_a_whole_number_may_be_written_as_a_power(write):
    path = write('{"train_micro_batch_size_per_gpu": 4e0, "zero_optimization": {"reduce_bucket_size": 5e7}}')
    resolved = scale.resolve(scale.load(path), with_batch(8), 1)
    assert resolved.micro_batch == 4
    assert isinstance(resolved.ds_config["train_micro_batch_size_per_gpu"], int)


def test_this_layer_does_not_import_deepspeed():
    """Its import takes seconds, and a dry run needs none of it."""
    for file in Path(scale.__file__).parent.glob("*.py"):
        assert "import deepspeed" not in file.read_text()
        assert "from deepspeed" not in file.read_text()
