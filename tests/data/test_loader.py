"""Batches: equal pixels for any processes, workers, start, micro-batches; bad samples masked and booked."""

import hashlib
import itertools
import json
import multiprocessing
import os
import re
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fd_scale.data import color, reader
from fd_scale.data import jpeg as jpeg_decoders
from fd_scale.data.decode import Picture, decode, of_pixels, read
from fd_scale.data.index import ShardSet
from fd_scale.data.indexing import build_index
from fd_scale.data.loader import TrainLoader, evaluation_batches
from fd_scale.data.pack import pack
from fd_scale.data.plan import Plan
from fd_scale.data.reader import Batch
from fd_scale.data.view import centre_view, training_view
from fd_scale.data.writer import write_shards
from fd_scale.errors import RecipeError, ScaleError, ShardError
from fd_scale.run import recipe
from fd_scale.run.sections import Color
from tests.data.pictures import encoded, image_folder, jpeg, picture

VIEW = recipe.View()
GLOBAL_BATCH = 8
Hashed = tuple[str, tuple[str, ...]]
PHOTOS = Path(__file__).parents[2].parent / "shared" / "data" / "photos.tar"


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> ShardSet:
    folder = tmp_path_factory.mktemp("data")
    pack(image_folder(folder / "in", 29, classes=3), folder / "out", max_count=7)
    return ShardSet.open(folder / "out")


def plan_of(shards: ShardSet, **changes) -> Plan:
    options = {"seed": 1, "global_batch": GLOBAL_BATCH, "block": 3, **changes}
    return Plan(shards.counts, fingerprint=shards.fingerprint, **options)


def loader_of(
    shards: ShardSet, rank: int = 0, world: int = 1, accumulation: int = 1, **changes
) -> TrainLoader:
    options = {
        "micro_batch": GLOBAL_BATCH // world // accumulation,
        "sizes": (16, 24),
        "stop_step": 5,
        **changes,
    }
    sizes, view = options.pop("sizes"), options.pop("view", VIEW)
    plan = options.pop("plan", None) or plan_of(shards)
    return TrainLoader(
        shards, plan, view, sizes, rank=rank, world_size=world, accumulation=accumulation, **options
    )


def global_batches(shards: ShardSet, world: int, accumulation: int = 1, **changes) -> list[Hashed]:
    """SHA-256 of all pixels, and the keys, of every global batch, from all its ranks and micro-batches."""
    ranks = [list(loader_of(shards, rank, world, accumulation, **changes)) for rank in range(world)]
    batches = []
    for step in range(len(ranks[0]) // accumulation):
        parts = [batch for rank in ranks for batch in rank[step * accumulation : (step + 1) * accumulation]]
        whole = hashlib.sha256()
        for size in (16, 24):
            whole.update(torch.cat([part.pixels[size] for part in parts]).contiguous().numpy().tobytes())
        whole.update(torch.cat([part.valid for part in parts]).numpy().tobytes())
        batches.append((whole.hexdigest(), tuple(itertools.chain(*(part.keys for part in parts)))))
    return batches


@pytest.fixture(scope="module")
def reference(shards) -> list[Hashed]:
    return global_batches(shards, world=1)


@pytest.mark.parametrize(
    ("world", "workers", "accumulation"),
    [(1, 2, 1), (1, 0, 4), (1, 2, 2), (2, 1, 1), (2, 2, 1), (2, 2, 2), (4, 0, 1), (4, 2, 1), (8, 0, 1)],
)
def test_global_batches_are_pixel_identical(shards, reference, world, workers, accumulation):
    assert global_batches(shards, world, accumulation, workers=workers) == reference


@pytest.mark.parametrize("start", [1, 2, 3, 4])
def test_a_late_start_gives_the_same_batches(shards, reference, start):
    # Three steps are one epoch, so step 4 lies in the second.
    assert global_batches(shards, 2, start_step=start) == reference[start:]


def test_batches_are_what_the_plan_and_the_view_say(shards):
    plan = plan_of(shards)
    for step, batch in enumerate(loader_of(shards, plan=plan, sizes=[24, 16, 24], labels=True)):
        samples = plan.samples(step)
        assert isinstance(batch, Batch)
        assert len(batch) == GLOBAL_BATCH
        assert list(batch.pixels) == [16, 24]
        assert batch.valid.all()
        for row, (shard, index) in enumerate(zip(samples.shard, samples.index, strict=True)):
            sample = shards.read(shard, index)
            expected = training_view(read(sample.image), samples.key[row], (16, 24), view=VIEW)
            assert batch.keys[row] == sample.key
            assert batch.labels[row] == sample.label == int(sample.key[len("class_")])
            for size in (16, 24):
                assert torch.equal(batch.pixels[size][row], expected[size])


def test_without_labels_there_are_none(shards):
    assert next(iter(loader_of(shards))).labels is None


def test_the_view_of_the_recipe_is_used(shards):
    plain, bilinear = (
        next(iter(loader_of(shards, view=recipe.View(interpolation=mode))))
        for mode in ("bicubic", "bilinear")
    )
    assert plain.keys == bilinear.keys
    assert not torch.equal(plain.pixels[16], bilinear.pixels[16])


def test_exif_follows_the_recipe(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    write_shards([("a", {"jpg": encoded(picture(0, 30, 40), "JPEG", exif=exif)})], tmp_path)
    turned = ShardSet.open(tmp_path)
    plan = Plan(turned.counts, seed=0, global_batch=1)
    # No part of the size: the reference has pixels alone, which cannot be decoded at half their size.
    whole = {"crop_scale": (1.0, 1.0), "crop_ratio": (1e-3, 1e3), "flip": 0.0, "shrink": False}
    for policy in ("ignore", "apply"):
        view = recipe.View(**whole, exif=policy)
        batch = next(iter(loader_of(turned, plan=plan, view=view, sizes=[8], micro_batch=1)))
        image = decode(turned.read(0, 0).image, exif=policy)
        assert torch.equal(
            batch.pixels[8][0], training_view(of_pixels(image), plan.samples(0).key[0], [8], view=view)[8]
        )


def with_damage(folder: Path, bad: dict[int, bytes], count: int = 24) -> ShardSet:
    """A set whose samples of these numbers hold these bytes instead of an image."""
    samples = ((f"s{n:02d}", {"jpg": bad.get(n, jpeg(n)), "cls": b"1"}) for n in range(count))
    write_shards(samples, folder, max_count=9)
    return ShardSet.open(folder)


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_are_masked_counted_and_named(tmp_path, workers):
    shards = with_damage(tmp_path / "set", {2: b"", 11: jpeg(1)[:500], 20: b"<html>"})
    path = tmp_path / "quarantine.jsonl"
    loader = loader_of(shards, stop_step=3, workers=workers, quarantine_path=path, labels=True, sizes=[16])
    batches = list(loader)
    valid = {key: bool(ok) for batch in batches for key, ok in zip(batch.keys, batch.valid, strict=True)}
    assert {key for key, ok in valid.items() if not ok} == {"s02", "s11", "s20"}
    assert len(valid) == 24
    for batch in batches:
        assert (batch.pixels[16][~batch.valid] == 0).all()
        assert (batch.pixels[16][batch.valid].flatten(1).sum(1) > 0).all()
        assert batch.labels.tolist() == [1 if ok else -1 for ok in batch.valid]
    assert (loader.seen, loader.bad) == (24, 3)
    lines = {line["key"]: line for line in map(json.loads, path.read_text().splitlines())}
    assert {key: (line["shard"], line["stage"]) for key, line in lines.items()} == {
        "s02": ("shard-000000.tar", "decode"),
        "s11": ("shard-000001.tar", "decode"),
        "s20": ("shard-000002.tar", "decode"),
    }
    assert lines["s02"]["error"] == "the file is empty"
    assert set(valid) == {f"s{n:02d}" for n in range(24)}


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_bad_samples_stop_the_run(tmp_path, workers):
    shards = with_damage(tmp_path / "set", dict.fromkeys(range(0, 24, 2), b""))
    loader = loader_of(shards, stop_step=None, workers=workers, quarantine_path=tmp_path / "q.jsonl")
    with pytest.raises(
        ShardError, match=r"samples could not be used.*shard shard-00000\d\.tar, key s\d\d, decode: the file"
    ):
        for _ in loader:
            pass
    assert 9 <= loader.bad <= 16  # over the grace of 8 by the end of some batch of 8


def test_no_bad_sample_is_borne_at_zero(tmp_path):
    shards = with_damage(tmp_path / "set", {5: b""})
    with pytest.raises(ShardError, match=r"1 of \d+ samples"):
        list(loader_of(shards, stop_step=3, max_bad_fraction=0))


def test_a_missing_label_is_a_fault_only_where_labels_are_asked_for(tmp_path):
    write_shards([(f"s{n}", {"jpg": jpeg(n), **({"cls": b"2"} if n else {})}) for n in range(8)], tmp_path)
    shards = ShardSet.open(tmp_path)
    assert next(iter(loader_of(shards))).valid.all()
    batch = next(iter(loader_of(shards, labels=True)))
    assert dict(zip(batch.keys, batch.labels.tolist(), strict=True)) == {
        f"s{n}": 2 if n else -1 for n in range(8)
    }
    assert batch.valid.sum() == 7


@pytest.mark.parametrize("workers", [0, 1])
def test_a_table_that_breaks_in_use_is_one_clear_message(tmp_path, workers):
    shards = with_damage(tmp_path / "set", {})
    for table in (tmp_path / "set" / "offsets").iterdir():
        table.write_bytes(b"")
    with pytest.raises(ShardError, match=r"^the table of offsets .* cannot be used"):
        next(iter(loader_of(shards, workers=workers)))


def test_numbers_that_are_not_the_global_batch_are_refused(shards):
    with pytest.raises(
        ScaleError, match="micro-batch 3 x accumulation 2 x 1 processes is 6, not the global batch of 8"
    ):
        loader_of(shards, accumulation=2, micro_batch=3)
    plan = plan_of(shards, global_batch=6)
    with pytest.raises(
        ScaleError, match=r"4 processes cannot share the 6 streams .* numbers that can: 1, 2, 3, 6"
    ):
        loader_of(shards, world=4, plan=plan, micro_batch=1)


@pytest.mark.parametrize("workers", [0, 2])
def test_random_numbers_of_the_training_process_are_not_touched(shards, workers):
    torch.manual_seed(3)
    np.random.seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    list(loader_of(shards, workers=workers))
    assert torch.equal(before[0], torch.get_rng_state())
    np.testing.assert_array_equal(before[1], np.random.get_state()[1])


SLEEPER = b"\xff\xd8\xff sleeps"
KILLER = b"\xff\xd8\xff kills"


@dataclass(frozen=True)
class Trap:
    """Stands in for the reading of an image: two images are the end of the worker that meets them."""

    def __call__(self, image: bytes, **options: object) -> Picture:
        if image == SLEEPER:
            time.sleep(600)
        if image == KILLER:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(image, **options)


@pytest.mark.parametrize(
    ("image", "said"),
    [(SLEEPER, "DataLoader timed out after 3"), (KILLER, r"DataLoader worker \(pid.*exited unexpectedly")],
)
def test_a_dead_or_silent_worker_is_reported_with_its_sample(tmp_path, monkeypatch, image, said):
    shards = with_damage(tmp_path, {11: image})
    monkeypatch.setattr(reader, "read", Trap())
    loader = loader_of(shards, stop_step=3, workers=2, timeout_s=3)
    before = signal.getsignal(signal.SIGCHLD)
    with pytest.raises(ShardError) as caught:
        list(loader)
    assert re.match(said, str(caught.value))
    _, *lines = str(caught.value).split("\n  ")
    assert [line.partition(":")[0] for line in lines] == ["worker 0", "worker 1"]
    assert any("shard shard-000001.tar, key s11" in line for line in lines)
    assert "fd-scale shards verify --decode" in lines[-1]
    assert signal.getsignal(signal.SIGCHLD) == before
    assert not multiprocessing.active_children()


def test_colours_are_drawn_for_every_sample_and_change_no_crop(shards, reference):
    view = recipe.View(color=Color(jitter=1.0, grey=0.5))
    plan = plan_of(shards)
    assert global_batches(shards, 2, view=view) == reference
    batches = list(loader_of(shards, plan=plan, view=view))
    for step, batch in enumerate(batches):
        expected = np.stack([color.draw(view.color, key) for key in plan.samples(step).key])
        np.testing.assert_array_equal(batch.colors.numpy(), expected)
    halves = [list(loader_of(shards, rank, 2, view=view, workers=1)) for rank in (0, 1)]
    for step, batch in enumerate(batches):
        assert torch.equal(batch.colors, torch.cat([half[step].colors for half in halves]))
    assert next(iter(loader_of(shards))).colors is None


def sizes_at(step: int) -> tuple[int, ...]:
    return (16,) if step < 2 else (16, 40)


@pytest.mark.parametrize("workers", [0, 2])
def test_sizes_may_change_with_the_step_and_change_no_crop(shards, workers):
    view = recipe.View(shrink=False)  # a larger view needs more of the picture than one of 16 pixels alone
    fixed = list(loader_of(shards, sizes=[16], view=view))
    scheduled = list(loader_of(shards, sizes=sizes_at, workers=workers, view=view))
    assert [list(batch.pixels) for batch in scheduled] == [[16]] * 2 + [[16, 40]] * 3
    for one, other in zip(fixed, scheduled, strict=True):
        assert one.keys == other.keys
        assert torch.equal(one.pixels[16], other.pixels[16])


@pytest.mark.parametrize("decoder", ["turbojpeg", "nvimgcodec", "simplejpeg", "pillow"])
def test_every_decoder_gives_the_same_batches(shards, reference, decoder):
    try:
        jpeg_decoders.resolve(decoder)
    except ValueError as error:
        pytest.skip(str(error))
    loader = loader_of(shards, decoder=decoder)
    assert loader.decoder == decoder
    assert global_batches(shards, 1, decoder=decoder) == reference


def test_a_decoder_that_is_not_installed_is_refused(shards, monkeypatch):
    monkeypatch.setattr(jpeg_decoders, "_has_nvimgcodec", lambda: False)
    with pytest.raises(RecipeError, match=r"run\.decoder='nvimgcodec' is not installed"):
        loader_of(shards, decoder="nvimgcodec")


@pytest.mark.parametrize(
    ("world", "batch", "workers"), [(1, 4, 0), (1, 100, 0), (3, 5, 0), (2, 4, 2), (40, 1, 0)]
)
def test_evaluation_sees_every_sample_once_in_order(shards, world, batch, workers):
    options = {"size": 16, "crop_pct": 0.9, "batch": batch, "world_size": world, "workers": workers}
    parts = [list(evaluation_batches(shards, rank=rank, **options)) for rank in range(world)]
    whole = list(itertools.chain(*parts))
    assert all(len(b) <= batch for b in whole)
    sizes = [sum(map(len, part)) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    everything = [shards.read(s, i) for s, count in enumerate(shards.counts) for i in range(count)]
    assert list(itertools.chain(*(b.keys for b in whole))) == [sample.key for sample in everything]
    assert torch.cat([b.labels for b in whole]).tolist() == [sample.label for sample in everything]
    expected = torch.stack(
        [centre_view(decode(sample.image), size=16, crop_pct=0.9) for sample in everything]
    )
    assert torch.equal(torch.cat([b.pixels[16] for b in whole]), expected)


@pytest.mark.parametrize(("limit", "seen"), [(1, 1), (7, 7), (1000, 29)])
def test_evaluation_of_the_first_so_many_is_shared_alike(shards, limit, seen):
    everything = [shards.key(s, i) for s, count in enumerate(shards.counts) for i in range(count)]
    options = {"size": 16, "crop_pct": 0.9, "batch": 3, "world_size": 2, "limit": limit}
    parts = [list(evaluation_batches(shards, rank=rank, **options)) for rank in range(2)]
    assert [key for part in parts for b in part for key in b.keys] == everything[:seen]
    first, second = (sum(map(len, part)) for part in parts)
    assert abs(first - second) <= 1


def test_evaluation_passes_over_empty_shards_and_masks_damage(tmp_path):
    shards = with_damage(tmp_path, {3: b""}, count=10)
    batches = list(evaluation_batches(shards, size=16, crop_pct=1.0, batch=4))
    assert torch.cat([b.valid for b in batches]).tolist() == [n != 3 for n in range(10)]
    assert torch.cat([b.labels for b in batches]).tolist() == [1, 1, 1, -1, *[1] * 6]


def test_evaluation_without_labels(tmp_path):
    write_shards([(f"s{n}", {"jpg": jpeg(n)}) for n in range(12)], tmp_path)
    shards = ShardSet.open(tmp_path)
    batch = next(evaluation_batches(shards, size=16, crop_pct=1.0, batch=4, labels=False))
    assert batch.labels is None
    assert batch.valid.all()
    with pytest.raises(ShardError, match="label: the sample has no label"):
        list(evaluation_batches(shards, size=16, crop_pct=1.0, batch=4))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_arrive_in_page_locked_memory(shards, reference, workers):
    for batch in loader_of(shards, workers=workers, pin_memory=True, labels=True):
        assert all(part.is_pinned() for part in (*batch.pixels.values(), batch.valid, batch.labels))
    assert global_batches(shards, 1, workers=workers, pin_memory=True) == reference


@pytest.mark.skipif(not PHOTOS.exists(), reason=f"needs the photographs of {PHOTOS}")
def test_real_photographs_from_an_existing_tar(tmp_path):
    report = build_index([PHOTOS], tmp_path)
    assert (report.num_samples, report.ignored) == (250, ())
    photos = ShardSet.open(tmp_path)
    plan = Plan(photos.counts, seed=0, global_batch=16)
    one = next(iter(loader_of(photos, plan=plan, sizes=[64], micro_batch=16, max_bad_fraction=0)))
    half = [
        next(iter(loader_of(photos, r, 2, plan=plan, sizes=[64], micro_batch=8, workers=1))) for r in (0, 1)
    ]
    assert one.valid.all()
    assert torch.equal(one.pixels[64], torch.cat([part.pixels[64] for part in half]))
