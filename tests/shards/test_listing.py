"""The plan by name: the keys of all ranks are those that the training processes are given."""

import pytest

from fd_scale.data.index import ShardSet
from fd_scale.data.loader import TrainLoader
from fd_scale.data.pack import pack
from fd_scale.data.plan import Plan
from fd_scale.errors import ScaleError, ShardError
from fd_scale.run.sections import View
from fd_scale.shards.listing import samples
from tests.data.pictures import image_folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> ShardSet:
    folder = tmp_path_factory.mktemp("set")
    pack(image_folder(folder / "in", 19), folder / "out", max_count=5)
    return ShardSet.open(folder / "out")


def plan_of(shards: ShardSet) -> Plan:
    return Plan(shards.counts, seed=5, global_batch=6, fingerprint=shards.fingerprint)


@pytest.mark.parametrize("rank", [0, 1])
def test_the_keys_are_those_of_the_loader(shards, rank):
    plan = plan_of(shards)
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
        list(samples(shards, plan_of(shards), **{"epoch": 0, "step": 0, **changes}))
