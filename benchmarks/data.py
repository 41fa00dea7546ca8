"""How fast do images reach a training process? Our loader, ImageFolder and webdataset with PIL, in CPU time.

    python -m benchmarks.data PHOTOS.tar      writes results/data.json; needs no GPU, about six minutes
    python -m benchmarks.data --table         prints the table of docs/data.md from it

The photographs of the tar are taken as they are, and written anew as JPEG of quality 90 at 500 x 375 and
1500 x 1125 pixels (Lanczos, upright ones turned), the larger ones soft, as they are enlarged.

End to end, two workers make batches of 50 views of 224 pixels; every way draws crops of 8 to 100 % of the
area and resamples bicubically, antialiased. Every time a way is run, it is in a process of its own, and its
CPU seconds are those of that process and its workers, with samples enough for their start not to count. The
ways take turns, round after round; a ratio is the median over the rounds of what two ways took in the same
one, so that what slows the machine down for a while slows both. All files are in the page cache. Beside them
stand one process without a loader (views alone), its limit (decoding each crop's region at full size,
resampling nothing), and plain reading: samples without decoding through webdataset's iterator and through
ours.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import math
import resource
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from PIL import Image
from rich.console import Console
from torchvision import datasets, transforms

from benchmarks import record
from fd_scale.data import jpeg, philox
from fd_scale.data.decode import Picture, read
from fd_scale.data.index import ShardSet
from fd_scale.data.jpeg import Decoder
from fd_scale.data.loader import TrainLoader
from fd_scale.data.pack import pack
from fd_scale.data.plan import Plan
from fd_scale.data.view import Box, apply, draw
from fd_scale.run.sections import View

SIZE, BATCH, WORKERS, QUALITY = 224, 50, 2, 90
ROUNDS, ALONE_ROUNDS = 3, 9
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Kind:
    """A data set: how many samples it has, and its pictures' shape; ``None`` leaves the files as they are."""

    name: str
    samples: int
    shape: tuple[int, int] | None = None
    """Width and height, pixels."""


KINDS = (
    Kind("as they are", 800),
    Kind("500x375", 800, (500, 375)),
    Kind("1500x1125", 1200, (1500, 1125)),
)
ALONE = 250
"""Photographs of each kind of which one process makes views."""
READ, PASSES = "500x375", 20
"""Where nothing but reading is measured: of which kind, and how often over its samples."""
BASELINE = "ImageFolder + PIL"
SMALL = {"ours, simplejpeg": 1.9, "ours, nvimgcodec": 2.2, "ours, turbojpeg": 2.2}
LARGE = {"ours, simplejpeg": 2.8, "ours, nvimgcodec": 3.9, "ours, turbojpeg": 3.9}
GOALS = {"as they are": SMALL, "500x375": SMALL, "1500x1125": LARGE}
"""By kind and way: how many times the baseline it should reach."""
READING_GOAL, LIMIT_GOAL = 5.0, 0.75


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("photos", nargs="?", type=Path, help="a tar of JPEGs")
    parser.add_argument("--table", action="store_true", help="print the table of the last results")
    asked = parser.parse_args(words)
    if asked.table:
        print(table(json.loads((record.RESULTS / "data.json").read_text())))
        return 0
    if asked.photos is None:
        parser.error("give a tar of photographs")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="fd_scale-bench-") as scratch:
        results = measure(_photographs(asked.photos), Path(scratch))
    path = record.write("data", results | {"photographs": asked.photos.name, "goals": goals(results)})
    print(table(json.loads(path.read_text())))
    return 0


def measure(photographs: Sequence[bytes], scratch: Path) -> dict[str, Any]:
    """All that there is to measure, as plain values."""
    say = Console(stderr=True).print
    protocol = {
        "view": SIZE,
        "batch": BATCH,
        "workers": WORKERS,
        "rounds": ROUNDS,
        "rounds_alone": ALONE_ROUNDS,
        "quality": QUALITY,
    }
    found: dict[str, Any] = {"protocol": protocol, "kinds": {}}
    for kind in KINDS:
        say(f"{kind.name}: {kind.samples} samples of {len(photographs)} photographs")
        images = [_shaped(photograph, kind) for photograph in photographs]
        folder, shards = _data_set(images, kind, scratch / kind.name)
        end_to_end = _in_turns(_ways(folder, shards), kind.samples, say)
        alone = _in_turns(_alone(images[:ALONE]), len(images[:ALONE]), say, ALONE_ROUNDS)
        found["kinds"][kind.name] = {
            "samples": kind.samples,
            "mean_bytes": float(np.mean([len(image) for image in images])),
            "end_to_end": end_to_end,
            "ratios": {way: _ratio(end_to_end[BASELINE], end_to_end[way]) for way in end_to_end},
            "one_process": alone,
            "shares_of_limit": {
                decoder: _ratio(alone[f"regions, {decoder}"], alone[f"views, {decoder}"])
                for decoder in _decoders()
            },
        }
        if kind.name == READ:
            reading = _in_turns(_readers(shards), PASSES * kind.samples, say)
            found["reading"] = reading | {"ratio": _ratio(reading["webdataset"], reading["ours"])}
    return found


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    kinds = results["kinds"]
    lines = [
        "| images per CPU-second, end to end | " + " | ".join(kinds) + " |",
        "|---|" + "--:|" * len(kinds),
    ]
    for way in next(iter(kinds.values()))["end_to_end"]:
        rates = [kind["end_to_end"][way]["images_per_cpu_s"] for kind in kinds.values()]
        ratios = [kind["ratios"][way] for kind in kinds.values()]
        cells = [f"{rate:,.0f} ({ratio:.2f}x)" for rate, ratio in zip(rates, ratios, strict=True)]
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    for decoder in next(iter(kinds.values()))["shares_of_limit"]:
        cells = [f"{kind['shares_of_limit'][decoder]:.0%}" for kind in kinds.values()]
        lines.append(
            f"| decoding the regions, share of making views, {decoder} | " + " | ".join(cells) + " |"
        )
    reading = results["reading"]
    rates = [f"{reading[name]['images_per_cpu_s']:,.0f}" for name in ("webdataset", "ours")]
    cpu, versions = results["facts"]["cpu"], results["facts"]["versions"]
    processor = cpu.get("model", "unknown") if isinstance(cpu, dict) else cpu
    lines += [
        "",
        f"Samples of {READ} read without decoding, per CPU-second: webdataset's iterator {rates[0]}, ours "
        f"{rates[1]} ({reading['ratio']:.1f}x).",
        "",
        f"Machine: {processor}; torch {versions['torch']}. Two workers, views of {SIZE} pixels; "
        "written by `python -m benchmarks.data`.",
    ]
    return "\n".join(lines)


def goals(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """By name: what was reached, and what should be."""
    found = {"reading": (results["reading"]["ratio"], READING_GOAL)}
    for name, kind in results["kinds"].items():
        for way, goal in GOALS[name].items():
            if way in kind["ratios"]:
                found[f"{name}, {way}"] = (kind["ratios"][way], goal)
        for decoder, share in kind["shares_of_limit"].items():
            found[f"{name}, share of the limit, {decoder}"] = (share, LIMIT_GOAL)
    return {name: {"reached": reached, "goal": goal} for name, (reached, goal) in found.items()}


# The ways from files to batches; each gives samples until there are no more.


def _ways(folder: Path, shards: Path) -> dict[str, Callable[[], int]]:
    ways: dict[str, Callable[[], int]] = {
        BASELINE: functools.partial(_image_folder, folder),
        "webdataset + PIL": functools.partial(_webdataset, shards),
    }
    for decoder in _decoders():
        ways[f"ours, {decoder}"] = functools.partial(_ours, shards, decoder)
    return ways


def _decoders() -> list[Decoder]:
    """Those that are measured: what is always there, and what else is installed."""
    found: list[Decoder] = ["simplejpeg"]
    for decoder in ("nvimgcodec", "turbojpeg"):
        with contextlib.suppress(ValueError):
            found.append(jpeg.resolve(decoder))
    return found


def _pil_view() -> Callable[[Image.Image], torch.Tensor]:
    """As timm trains without further augmentation: crop, bicubic, flip, float, normalise."""
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )


def _image_folder(folder: Path) -> int:
    data = datasets.ImageFolder(str(folder), _pil_view())
    loader = torch.utils.data.DataLoader(data, BATCH, shuffle=True, num_workers=WORKERS)
    return sum(len(pixels) for pixels, _ in loader)


def _webdataset(shards: Path) -> int:
    urls = sorted(map(str, shards.glob("*.tar")))
    data = (
        webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)
        .shuffle(500)
        .decode("pil")
        .to_tuple("jpg")
        .map_tuple(_pil_view())
        .batched(BATCH)
    )
    loader = webdataset.WebLoader(data, batch_size=None, num_workers=WORKERS)
    return sum(len(pixels) for (pixels,) in loader)


def _ours(shards: Path, decoder: Decoder) -> int:
    found = ShardSet.open(shards)
    plan = Plan(found.counts, seed=0, global_batch=BATCH, fingerprint=found.fingerprint)
    loader = TrainLoader(
        found, plan, View(), [SIZE], rank=0, world_size=1, micro_batch=BATCH, accumulation=1,
        stop_step=plan.steps_per_epoch, workers=WORKERS, decoder=decoder,
    )  # fmt: skip
    return sum(len(batch) for batch in loader)


def _alone(images: Sequence[bytes]) -> dict[str, Callable[[], int]]:
    """Views by each decoder, and its limit: the regions of the same crops, and nothing else."""
    ways: dict[str, Callable[[], int]] = {}
    for decoder in _decoders():
        ways[f"views, {decoder}"] = functools.partial(_make_views, images, decoder)
        ways[f"regions, {decoder}"] = functools.partial(_decode_regions, images, decoder)
    return ways


def _boxes(images: Sequence[bytes], decoder: Decoder) -> Iterator[tuple[Picture, Box]]:
    for number, image in enumerate(images):
        picture = read(image, decoder=decoder)
        key = philox.as_array([philox.key("fd.bench", number)])[0]
        yield picture, draw(View(), key, picture.height, picture.width)


def _make_views(images: Sequence[bytes], decoder: Decoder) -> int:
    for picture, box in _boxes(images, decoder):
        apply(picture, box, [SIZE], "bicubic", shrink=True)
    return len(images)


def _decode_regions(images: Sequence[bytes], decoder: Decoder) -> int:
    for picture, box in _boxes(images, decoder):
        picture.region(*box[:4])
    return len(images)


def _readers(shards: Path) -> dict[str, Callable[[], int]]:
    return {
        "webdataset": functools.partial(_read_by_webdataset, shards),
        "ours": functools.partial(_read_by_plan, shards),
    }


def _read_by_webdataset(shards: Path) -> int:
    urls = sorted(map(str, shards.glob("*.tar")))
    data = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)
    return sum(1 for _ in range(PASSES) for sample in data if sample["jpg"] and sample["cls"])


def _read_by_plan(shards: Path) -> int:
    """In the shuffled order of a plan, which the iterator is spared."""
    found = ShardSet.open(shards)
    plan = Plan(found.counts, seed=0, global_batch=BATCH, fingerprint=found.fingerprint)
    count = 0
    for step in range(PASSES * plan.steps_per_epoch):
        samples = plan.samples(step)
        for shard, index in zip(samples.shard.tolist(), samples.index.tolist(), strict=True):
            count += bool(found.read(shard, index).image)
    return count


# How it is measured.


def _in_turns(
    ways: dict[str, Callable[[], int]], expected: int, say: Callable[[str], None], rounds: int = ROUNDS
) -> dict[str, dict[str, Any]]:
    """What each way took in every round, the ways taking turns; rates are those of the median round."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for number in range(rounds):
        for name, way in ways.items():
            count, cpu_s, wall_s = _apart(way)
            if count != expected:
                raise RuntimeError(f"{name} gave {count} samples of {expected}")
            found[name].append((cpu_s, wall_s))
            say(f"  round {number + 1}: {name}: {count / cpu_s:,.0f} images/CPU-s")
    return {
        name: {
            "images_per_cpu_s": expected / statistics.median(cpu_s for cpu_s, _ in taken),
            "images_per_s": expected / statistics.median(wall_s for _, wall_s in taken),
            "cpu_s": [cpu_s for cpu_s, _ in taken],
        }
        for name, taken in found.items()
    }


def _ratio(one: dict[str, Any], other: dict[str, Any]) -> float:
    """How many times as much CPU time one way takes as another: the median of what the rounds say."""
    return statistics.median(a / b for a, b in zip(one["cpu_s"], other["cpu_s"], strict=True))


def _apart(way: Callable[[], int]) -> tuple[int, float, float]:
    """Run a way in a process of its own: samples, CPU seconds of it and its workers, wall seconds."""
    ours, theirs = get_context("fork").Pipe()
    process = get_context("fork").Process(target=_timed, args=(way, theirs))
    process.start()
    theirs.close()
    try:
        count, cpu_s, wall_s = ours.recv()
    except EOFError:
        raise RuntimeError("a way ended without an answer") from None
    finally:
        process.join()
    return count, cpu_s, wall_s


def _timed(way: Callable[[], int], answer: Connection) -> None:
    begin, wall = _cpu_s(), time.perf_counter()
    count = way()  # the loader is gone when it returns, and its workers have been waited for
    answer.send((count, _cpu_s() - begin, time.perf_counter() - wall))


def _cpu_s() -> float:
    total = 0.0
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        used = resource.getrusage(who)
        total += used.ru_utime + used.ru_stime
    return total


# The data.


def _photographs(path: Path) -> list[bytes]:
    with tarfile.open(path) as tar:
        members = [member for member in tar if member.isfile()]
        named = [member for member in members if member.name.lower().endswith((".jpg", ".jpeg"))]
        found = [tar.extractfile(member).read() for member in named]  # type: ignore[union-attr]
    if not found:
        raise SystemExit(f"{path} holds no .jpg among its {len(members)} files")
    return found


def _shaped(photograph: bytes, kind: Kind) -> bytes:
    if kind.shape is None:
        return photograph
    image = Image.open(io.BytesIO(photograph)).convert("RGB")
    if image.height > image.width:
        image = image.transpose(Image.Transpose.ROTATE_90)
    written = io.BytesIO()
    image.resize(kind.shape, Image.Resampling.LANCZOS).save(written, "JPEG", quality=QUALITY)
    return written.getvalue()


def _data_set(images: Sequence[bytes], kind: Kind, scratch: Path) -> tuple[Path, Path]:
    """The same samples as class folders and as shards, with two classes."""
    folder, shards = scratch / "images", scratch / "shards"
    for number in range(kind.samples):
        place = folder / str(number % 2)
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number:05d}.jpg").write_bytes(images[number % len(images)])
    pack(folder, shards, max_count=math.ceil(kind.samples / (4 * WORKERS)))
    return folder, shards


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
