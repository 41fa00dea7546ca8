"""Which keys a scale may hold, against the installed DeepSpeed: none it lacks, none of its own forgotten."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from fd_scale.run.ds_keys import ALLOWED, OWN_SECTION, REFUSED, Keys, Kind, problems

README = Path(__file__).parents[2] / "ds_configs" / "README.md"


def leaves(keys: Keys, prefix: str = "") -> Iterator[str]:
    for key, kind in keys.items():
        if isinstance(kind, Kind):
            yield prefix + key
        else:
            yield from leaves(kind, f"{prefix}{key}.")


def known(model: type) -> set[str]:
    """The names by which a configuration class of DeepSpeed takes its fields, as it documents them."""
    return {field.alias or name for name, field in model.model_fields.items()}


@pytest.fixture(scope="module")
def sections():
    """DeepSpeed's classes by the section they read; the import takes seconds."""
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig

    return {
        "bf16": DeepSpeedBF16Config,
        "comms_logger": CommsLoggerConfig,
        "zero_optimization": DeepSpeedZeroConfig,
        "zero_optimization.offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
    }


@pytest.mark.parametrize(
    "section", ["bf16", "comms_logger", "zero_optimization", "zero_optimization.offload_optimizer"]
)
def test_every_field_of_deepspeed_is_allowed_or_refused_for_a_reason(sections, section):
    fields = known(sections[section])
    keys = ALLOWED
    for part in section.split("."):
        keys = keys[part]
    refused = {place.removeprefix(f"{section}.") for place in REFUSED if place.startswith(f"{section}.")}
    assert keys.keys() <= fields
    assert fields - keys.keys() <= refused


def test_every_top_level_key_is_read_by_deepspeed():
    import deepspeed

    package = Path(deepspeed.__file__).parent
    files = ("runtime/config.py", "runtime/constants.py", "runtime/precision_config.py", "comm/config.py")
    source = "".join((package / file).read_text() for file in files)
    for key in ALLOWED.keys() - {OWN_SECTION, "zero_optimization"}:
        assert f"'{key}'" in source or f'"{key}"' in source, key


def test_what_deepspeed_removed_is_refused_with_that_reason():
    from deepspeed.runtime import config

    removed = {*config._REMOVED_TOP_LEVEL_CONFIG_KEYS}
    removed |= {f"zero_optimization.{key}" for key in config._REMOVED_ZERO_CONFIG_KEYS}
    assert removed <= REFUSED.keys()
    assert {REFUSED[place] for place in removed} == {"DeepSpeed has removed it"}


def test_deepspeed_would_take_a_typing_error_in_silence():
    """Why the lists exist: if this fails, DeepSpeed has begun to check its top level itself."""
    from deepspeed.runtime.config import DeepSpeedConfig

    config = DeepSpeedConfig({"train_micro_batch_size_per_gpu": 1, "gradient_cliping": 5.0})
    assert config.gradient_clipping == 1.0


def test_nothing_is_both_allowed_and_refused():
    assert not {*leaves(ALLOWED)} & REFUSED.keys()


def test_the_readme_explains_every_key():
    text = README.read_text()
    missing = [
        place
        for place in leaves(ALLOWED)
        if not any(f"`{name}`" in text for name in (place, shortened(place)))
    ]
    assert missing == []


def shortened(place: str) -> str:
    for section in ("zero_optimization.", f"{OWN_SECTION}."):
        place = place.removeprefix(section)
    return place


LEGAL = {
    "train_micro_batch_size_per_gpu": [1, 64, 5e1],
    "bf16.enabled": [True, False],
    "communication_data_type": ["fp32", "bf16"],
    "zero_optimization.stage": [0, 1, 2, 3],
    "zero_optimization.reduce_bucket_size": [1, 5e8],
    "zero_optimization.stage3_max_live_parameters": [0, 1e9],
    "comms_logger.prof_ops": [[], ["all_reduce"]],
}

ILLEGAL = [
    ("train_micro_batch_size_per_gpu", 0, "must be a whole number, 1 or more"),
    ("train_micro_batch_size_per_gpu", 1.5, "=1.5 must be a whole number, 1 or more"),
    ("train_micro_batch_size_per_gpu", True, "=true must be a whole number"),
    ("train_micro_batch_size_per_gpu", "64", '="64" must be a whole number'),
    ("train_micro_batch_size_per_gpu", float("nan"), "must be a whole number"),
    ("train_micro_batch_size_per_gpu", float("inf"), "must be a whole number"),
    ("bf16.enabled", 1, "=1 must be true or false"),
    ("bf16.enabled", None, "=null must be true or false"),
    ("bf16", True, "bf16=true must be an object with keys among enabled, immediate_grad_update"),
    ("communication_data_type", "fp16", '="fp16" must be "fp32" or "bf16"'),
    ("zero_optimization.stage", 4, "=4 must be 0, 1, 2 or 3"),
    ("zero_optimization.stage", True, "=true must be 0, 1, 2 or 3"),
    ("zero_optimization.stage", {}, "={} must be 0, 1, 2 or 3"),
    ("zero_optimization.reduce_bucket_size", -1, "=-1 must be a whole number"),
    ("zero_optimization.offload_optimizer.device", "nvme", '="nvme" must be "none" or "cpu" (fd_scale'),
    ("zero_optimization.offload_param.device", "nvme", "could not find what is kept on NVMe"),
    ("zero_optimization.offload_param.device", ["cpu"], 'must be "none" or "cpu"'),
    ("comms_logger.prof_ops", "all_reduce", "must be a list of names"),
    ("comms_logger.prof_ops", [1], "must be a list of names"),
]


def nested(place: str, value: object) -> dict:
    for part in reversed(place.split(".")):
        value = {part: value}
    return value


@pytest.mark.parametrize(("place", "value"), [(place, value) for place in LEGAL for value in LEGAL[place]])
def test_a_legal_value_passes(place, value):
    assert [*problems(nested(place, value))] == []


@pytest.mark.parametrize(("place", "value", "said"), ILLEGAL)
def test_an_illegal_value_is_named(place, value, said):
    (problem,) = problems(nested(place, value))
    assert problem.startswith(place)
    assert said in problem


@pytest.mark.parametrize("place", [place for place in leaves(ALLOWED) if place != "fd_scale.teacher"])
def test_auto_is_refused_where_deepspeed_would_read_it(place):
    (problem,) = problems(nested(place, "auto"))
    assert (
        problem == f'{place}="auto" is refused: DeepSpeed would take its default in silence; write the value'
    )


@pytest.mark.parametrize("place", [*REFUSED])
def test_a_refused_key_comes_with_its_reason(place):
    (problem,) = problems(nested(place, {}))
    assert problem == f"{place} may not be in a scale: {REFUSED[place]}; remove it"


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("bf16_enabled", "unknown key 'bf16_enabled'; did you mean "),
        ("bf16.enable", "unknown key 'bf16.enable'; did you mean enabled? (keys of bf16: enabled,"),
        ("zero_optimization.stage3_prefetch_buckets", "did you mean stage3_prefetch_bucket_size"),
        ("zero_optimization.prefetch_bucket_size", "did you mean stage3_prefetch_bucket_size"),
        ("zero_optimization.offload_optimizer.devise", "did you mean device?"),
        ("fd_scale.activation_checkpoint", "did you mean activation_checkpointing?"),
        ("qqq", "unknown key 'qqq' (top-level keys: train_micro_batch_size_per_gpu,"),
    ],
)
def test_an_unknown_key_is_refused_at_any_level(place, said):
    (problem,) = problems(nested(place, 1))
    assert said in problem


def test_all_problems_are_told():
    values = json.loads(
        '{"optimizer": {}, "zero_optimization": {"stage": 9, "foo": 1}, "fp16": {"enabled": true}}'
    )
    assert len([*problems(values)]) == 4
