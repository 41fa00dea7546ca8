"""From a recipe to its shards and their order; want of room is said before the first batch."""

from pathlib import Path

import psutil
import pytest

from fd_scale.data import manifest, sets
from fd_scale.data.index import Access, ShardSet
from fd_scale.data.manifest import Shard
from fd_scale.data.plan import Plan
from fd_scale.errors import RecipeError, ShardError
from fd_scale.run import recipes
from fd_scale.run.recipe import Recipe, derive
from tests.data.test_manifest import write_set
from tests.spawn import spawn


def recipe_of(**changes: object) -> Recipe:
    return derive(recipes.demo(), **changes)


@pytest.fixture
def two(tmp_path):
    """Two sets of nine samples."""
    for name in "ab":
        (tmp_path / name).mkdir()
        write_set(tmp_path / name)
    return tmp_path / "a", tmp_path / "b"


def test_one_folder(two):
    recipe = recipe_of(**{"data.shards": str(two[0]), "global_batch": 4, "data.block": 2})
    shards = sets.open_shards(recipe)
    plan = sets.plan_of(recipe, shards)
    assert (plan.counts.tolist(), plan.seed, plan.block) == ([4, 3, 2], recipe.seed, 2)
    assert plan.mix == ((3, 1.0),)
    assert plan.fingerprint == shards.fingerprint


def test_several_folders_with_weights(two):
    recipe = recipe_of(**{"data.sources": {str(two[0]): 3.0, str(two[1]): 1.0}, "global_batch": 4})
    shards = sets.open_shards(recipe)
    plan = sets.plan_of(recipe, shards)
    assert plan.mix == ((3, 3.0), (3, 1.0))
    for step in range(5):
        assert [shard < 3 for shard in plan.samples(step).shard.tolist()].count(True) == 3


def test_no_folder():
    with pytest.raises(RecipeError, match=r"data\.shards is not set.*shards pack"):
        sets.open_shards(recipe_of())


def test_the_habits_say_how_remote_shards_are_reached():
    assert sets.access_of(recipe_of()) == Access()
    asked = recipe_of(**{"run.cache": "/scratch", "run.cache_gib": 1.5, "run.allow_pipe": True})
    access = sets.access_of(asked)
    assert (str(access.cache), access.cache_bytes, access.allow_pipe) == ("/scratch", 3 * 2**29, True)


def open_then_lose(world, folder: str) -> tuple[str, str]:
    recipe = recipe_of(**{"data.shards": folder})
    opened = sets.open_together(recipe, world).fingerprint
    world.barrier()
    Path(folder, f"part-{world.rank}.tar").unlink()
    world.barrier()
    with pytest.raises(ShardError) as refused:
        sets.open_together(recipe, world)
    return opened, str(refused.value)


def test_ranks_look_at_the_files_together(two):
    whole = ShardSet.open(two[0]).fingerprint
    (opened, refused), again = spawn(open_then_lose, 2, str(two[0]))
    assert (opened, refused) == again
    assert opened == whole
    assert refused.split("\n  ")[1:] == [f"part-{n}.tar: No such file or directory" for n in (0, 1)]


def far_set(folder, access: Access, shard_bytes: int) -> ShardSet:
    folder.mkdir(exist_ok=True)
    lines = [Shard(f"https://host/{n}.tar", 1000, shard_bytes, f"offsets/{n}") for n in range(100)]
    manifest.write(folder, lines, None)
    return ShardSet.open(folder, access=access, check=False)


def test_want_of_room_is_refused(tmp_path, monkeypatch):
    memory = type("Memory", (), {"total": 16 * 2**30})()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    streamed = far_set(tmp_path, Access(), 10**8)
    plan = Plan(streamed.counts, seed=0, global_batch=1024)
    sets.refuse_want_of_room(streamed, plan, 8)
    with pytest.raises(
        RecipeError, match=r"1024 streams per process with data\.block=256 holds up to 48\.8 GiB"
    ):
        sets.refuse_want_of_room(streamed, plan, 1)
    cached = far_set(tmp_path, Access(tmp_path / "cache", 12 * 10**9), 10**8)
    sets.refuse_want_of_room(cached, plan, 16)
    with pytest.raises(RecipeError, match=r"run\.cache_gib=11\.\d+ cannot hold the 128 shards .* 11\.9 GiB"):
        sets.refuse_want_of_room(cached, plan, 8)
    sets.refuse_want_of_room(far_set(tmp_path, Access(tmp_path / "cache"), 10**8), plan, 1)
