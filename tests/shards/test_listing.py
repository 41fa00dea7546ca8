"""The plan by name: the keys of all ranks are those that the training processes are given."""

import pytest

from fd_scale.data.index import ShardSet
from fd_scale.data.loader import TrainLoader
from fd_scale.data.pack import pack
from fd_scale.data.plan import Plan
from fd_scale.data.sets import open_shards, plan_of
from fd_scale.errors import RecipeError, ScaleError, ShardError
from fd_scale.run.sections import View
from fd_scale.shards.listing import run_of, samples
from tests.data.pictures import image_folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> ShardSet:
    folder = tmp_path_factory.mktemp("set")
    pack(image_folder(folder / "in", 19), folder / "out", max_count=5)
    return ShardSet.open(folder / "out")


def order_of(shards: ShardSet) -> Plan:
    return Plan(shards.counts, seed=5, global_batch=6, fingerprint=shards.fingerprint)


@pytest.mark.parametrize("rank", [0, 1])
def test_the_keys_are_those_of_the_loader(shards, rank):
    plan = order_of(shards)
    loader = TrainLoader(
        shards, plan, View(), [8], rank=rank, world_size=2, micro_batch=3, accumulation=1, stop_step=7
    )
    for running, batch in enumerate(loader):
        epoch, step = divmod(running, 3)
        listed = list(samples(shards, plan, epoch=epoch, step=step, rank=rank, world_size=2))
        assert [one.key for one in listed] == batch.keys
        for one in listed:
            assert shards.key(shards.names.index(one.shard), one.place) == one.key


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"step": 3}, ShardError, r"--step 3: an epoch has 3 steps of 6 samples, 0 to 2"),
        ({"rank": 2, "world_size": 2}, ShardError, r"--rank 2: 2 processes have ranks 0 to 1"),
        ({"world_size": 4}, ScaleError, r"4 processes cannot share .* numbers that can: 1, 2, 3, 6"),
    ],
)
def test_what_there_is_not_is_refused(shards, changes, error, said):
    with pytest.raises(error, match=said):
        list(samples(shards, order_of(shards), **{"epoch": 0, "step": 0, **changes}))


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    """Two data sets to mix, 3 to 1; the first one's name could be taken for a weight."""
    folder = tmp_path_factory.mktemp("sets")
    for name, count in (("a=1", 31), ("b", 17)):
        pack(image_folder(folder / f"in {name}", count), folder / name, max_count=6)
    return [f"{folder / 'a=1'}=3", f"{folder / 'b'}=1.0"]


FIELDS = {"global_batch": 8, "seed": 5, "data.block": 4}
NOTHING = dict.fromkeys(FIELDS)


def listed(run, step: int) -> list:
    shards = open_shards(run)
    return list(samples(shards, plan_of(run, shards), epoch=0, step=step))


def test_weighted_folders_are_mixed_as_a_run_mixes_them(words):
    run = run_of(words, None, [], FIELDS)
    shards = open_shards(run)
    plan = Plan(
        shards.counts, seed=5, global_batch=8, block=4, fingerprint=shards.fingerprint,
        mix=[(shards.shards_per_folder[0], 3.0), (shards.shards_per_folder[1], 1.0)],
    )  # fmt: skip
    loader = TrainLoader(
        shards, plan, View(), [8], rank=0, world_size=1, micro_batch=8, accumulation=1, stop_step=5
    )
    for step, batch in enumerate(loader):
        found = listed(run, step)
        assert [one.key for one in found] == batch.keys
        assert sum("/b/" in one.shard for one in found) == 2  # of 8, at 3 to 1


def test_a_recipe_and_its_folders_by_themselves_give_one_order(words):
    weights = {folder: float(weight) for folder, _, weight in (word.rpartition("=") for word in words)}
    changes = [f"data.sources={weights}", *(f"{name}={value}" for name, value in FIELDS.items())]
    assert listed(run_of([], "fd_clip_vitb16", changes, NOTHING), 3) == listed(
        run_of(words, None, [], FIELDS), 3
    )


def test_one_folder_needs_no_weight(words, tmp_path):
    folder = words[0].rpartition("=")[0]
    assert run_of([folder], None, [], FIELDS).data.shards == folder
    assert run_of([f"{folder}=2"], None, [], FIELDS).data.sources == {folder: 2.0}
    assert run_of([str(tmp_path)], None, [], FIELDS | {"seed": None}).seed == 0


@pytest.mark.parametrize(
    ("folders", "recipe", "changes", "fields", "said"),
    [
        ([], None, [], FIELDS, r"give FOLDER .* and --global-batch, or --recipe"),
        (["a"], None, [], NOTHING, r"give FOLDER .* and --global-batch, or --recipe"),
        (["a", "b=1"], None, [], FIELDS, r"'a' is not FOLDER=WEIGHT with a weight above 0"),
        (["a=1", "b=0"], None, [], FIELDS, r"'b=0' is not FOLDER=WEIGHT"),
        (["a=1", "b=x"], None, [], FIELDS, r"'b=x' is not FOLDER=WEIGHT"),
        (["a=1", "a=2"], None, [], FIELDS, r"a is given twice: add up its weights"),
        (["a"], None, ["seed=3"], FIELDS, r"--set seed=3 changes a recipe: name one with --recipe"),
        (
            ["a"], "demo", [], NOTHING | {"seed": 3},
            r"--recipe demo says .* with --set data\.shards=FOLDER --set seed=3",
        ),
        ([], "demmo", [], NOTHING, r"unknown recipe 'demmo'"),
        ([], "fd_clip_vitb16", ["seed=x"], NOTHING, r"seed"),
    ],
)  # fmt: skip
def test_words_that_name_no_run_are_refused(folders, recipe, changes, fields, said):
    with pytest.raises(RecipeError, match=said):
        run_of(folders, recipe, changes, fields)


def test_a_recipe_without_data_is_refused():
    with pytest.raises(RecipeError, match=r"data\.shards is not set"):
        open_shards(run_of([], "fd_clip_vitb16", [], NOTHING))
