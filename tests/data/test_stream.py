"""Remote sets of shards: the same batches as local ones by stream, cache or command; faults and outcomes."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch

from fd_scale.data import manifest
from fd_scale.data.index import Access, ShardSet
from fd_scale.data.loader import evaluation_batches
from fd_scale.data.manifest import Shard
from fd_scale.data.pack import pack
from fd_scale.data.plan import Plan
from fd_scale.errors import ShardError
from tests.data.pictures import image_folder
from tests.data.server import HASTE, serving
from tests.data.test_loader import GLOBAL_BATCH, global_batches, loader_of, plan_of

FAST = Access(patience=HASTE)


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> ShardSet:
    folder = tmp_path_factory.mktemp("local")
    pack(image_folder(folder / "in", 29, classes=3), folder / "set", max_count=7)
    return ShardSet.open(folder / "set")


def index_of(local: ShardSet, folder: Path, url: str) -> Path:
    """An index in ``folder`` of the same shards at another place; ``url`` is filled with their names."""
    source = local.folders[0]
    (folder / "offsets").mkdir(parents=True)
    lines = []
    for name, count, size, table in zip(
        source.urls, source.num_samples, source.file_sizes, source.offsets, strict=True
    ):
        (folder / table).write_bytes((source.folder / table).read_bytes())
        lines.append(Shard(url.format(name), int(count), int(size), table))
    manifest.write(folder, lines, source.classes)
    return folder


@pytest.fixture
def server(local):
    with serving(local.folders[0].folder) as running:
        yield running


@pytest.fixture
def far(local, server, tmp_path) -> Path:
    return index_of(local, tmp_path / "far", server.url + "/{}")


@pytest.fixture(scope="module")
def reference(local):
    return global_batches(local, 1)


@pytest.mark.parametrize(
    ("world", "workers", "accumulation"),
    [(1, 0, 1), (1, 2, 1), (1, 2, 2), (2, 0, 1), (2, 1, 2), (2, 2, 1), (4, 2, 1), (8, 0, 1)],
)
def test_streamed_batches_are_pixel_identical(far, reference, world, workers, accumulation):
    shards = ShardSet.open(far, access=FAST)
    assert shards.needs_telling
    assert global_batches(shards, world, accumulation, workers=workers) == reference


@pytest.mark.parametrize(("start", "workers"), [(1, 0), (2, 2), (3, 2), (4, 0)])
def test_a_late_start_streams_the_same_batches(far, reference, start, workers):
    shards = ShardSet.open(far, access=FAST)
    assert global_batches(shards, 2, start_step=start, workers=workers) == reference[start:]


@pytest.mark.parametrize(("world", "workers"), [(1, 2), (2, 0)])
def test_cached_batches_are_pixel_identical(far, server, reference, tmp_path, world, workers):
    shards = ShardSet.open(far, access=Access(cache=tmp_path / "cache", patience=HASTE))
    assert not shards.needs_telling
    asked = len(server.requests)
    assert global_batches(shards, world, workers=workers) == reference
    assert len(server.requests) == asked + len(shards.names)
    assert global_batches(shards, world, workers=workers) == reference
    assert len(server.requests) == asked + len(shards.names)


@pytest.mark.parametrize("workers", [0, 2])
def test_streaming_lives_with_a_bad_network_and_servers_without_ranges(far, server, reference, workers):
    shards = ShardSet.open(far, access=FAST)
    server.ranges, server.cut_after, server.cuts, server.refuse_first = False, 30_000, 3, 2
    assert global_batches(shards, 1, workers=workers) == reference


def test_commands_are_streamed_where_they_are_allowed(local, reference, tmp_path):
    index = index_of(local, tmp_path / "far", f"pipe:cat {local.folders[0].folder}/{{}}")
    with pytest.raises(ShardError, match=r"run\.allow_pipe=true"):
        ShardSet.open(index)
    shards = ShardSet.open(index, access=Access(allow_pipe=True, patience=HASTE))
    assert global_batches(shards, 1, workers=2) == reference


def test_blocks_are_fetched_once_and_ahead(far, local, server):
    shards = ShardSet.open(far, access=FAST)
    plan = Plan(
        shards.counts, seed=1, global_batch=4, block=7
    )  # one stream of 7 images per image in the batch
    before = len(server.requests)
    for _ in loader_of(shards, plan=plan, micro_batch=4, stop_step=plan.steps_per_epoch):
        pass
    # Four streams of seven images, each cut in two at most by the end of a shard, and the blocks after them.
    assert 4 <= len(server.requests) - before <= 16


def test_evaluation_streams_too(far, local):
    shards = ShardSet.open(far, access=FAST)
    options = {"size": 16, "crop_pct": 0.9, "batch": 5, "workers": 2}
    theirs, ours = (list(evaluation_batches(one, **options)) for one in (local, shards))
    assert [batch.keys for batch in ours] == [batch.keys for batch in theirs]
    assert all(torch.equal(a.pixels[16], b.pixels[16]) for a, b in zip(ours, theirs, strict=True))


def test_a_sample_can_be_read_without_telling(far, local):
    shards = ShardSet.open(far, access=FAST)
    assert shards.read(1, 3)[2:] == local.read(1, 3)[2:]
    copy = pickle.loads(pickle.dumps(shards))
    assert copy.read(1, 3) == shards.read(1, 3)
    assert copy.access == FAST


def test_missing_and_changed_remote_shards_are_listed_before_the_start(local, server, tmp_path):
    far = index_of(local, tmp_path / "far", server.url + "/{}?x")
    lines = json.loads((far / "index.json").read_text())
    lines["shardlist"][0]["url"] = f"{server.url}/absent.tar"
    lines["shardlist"][2]["filesize"] += 1
    (far / "index.json").write_text(json.dumps(lines))
    (far / "offsets" / "000003").unlink()
    with pytest.raises(ShardError) as caught:
        ShardSet.open(far, access=FAST)
    first, *rest = str(caught.value).split("\n  ")
    assert first.startswith("3 of 5 shards of")
    assert [line.rpartition("/")[2] for line in rest[:2]] == [
        "absent.tar: HTTP 404 Not Found",
        "shard-000002.tar?x: 30,720 bytes, 30,721 when it was indexed",
    ]
    assert rest[2].endswith("its table offsets/000003 is missing")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_lost_on_the_way_stops_the_run_or_is_borne(local, tmp_path, workers):
    for name in ("a", "b"):
        folder = tmp_path / name
        folder.mkdir()
        for url in local.folders[0].urls:
            os.link(local.folders[0].folder / url, folder / url)
        with serving(folder) as server:
            shards = ShardSet.open(index_of(local, tmp_path / f"far_{name}", server.url + "/{}"), access=FAST)
            (folder / "shard-000001.tar").unlink()
            borne = {"max_bad_shards": 1} if name == "b" else {}
            loader = loader_of(shards, workers=workers, stop_step=3, quarantine_path=tmp_path / "q", **borne)
            if name == "a":
                with pytest.raises(
                    ShardError,
                    match=r"1 shards were lost .*shard-000001\.tar\).*HTTP 404.*\n.*max_bad_shards",
                ):
                    list(loader)
                continue
            batches = list(loader)
            bad = [key for b in batches for key, ok in zip(b.keys, b.valid, strict=True) if not ok]
            assert len(batches) * GLOBAL_BATCH == 24
            assert set(bad) <= {local.key(1, n) for n in range(7)}
            assert loader.bad == len(bad) > 0
            assert loader.settle(lambda books: [books]).lost_shards == (f"{server.url}/shard-000001.tar",)


def test_excluded_samples_are_streamed_past(far, local, tmp_path):
    (far / "excluded.jsonl").write_text(
        json.dumps({"shard": ShardSet.open(far, access=FAST).names[0], "index": 2, "key": local.key(0, 2)})
        + "\n"
    )
    shards = ShardSet.open(far, access=FAST)
    plan = plan_of(shards, global_batch=4)
    keys = [key for batch in loader_of(shards, plan=plan, micro_batch=4, stop_step=7) for key in batch.keys]
    everything = {local.key(shard, n) for shard, count in enumerate(local.counts) for n in range(count)}
    assert set(keys) == everything - {local.key(0, 2)}
