"""How fast do images reach a training process? Our loader, ImageFolder and webdataset with PIL, in CPU time.

    python -m benchmarks.data PHOTOS.tar      writes results/data.json; needs no GPU, about ten minutes
    python -m benchmarks.data --table         prints the table of docs/data.md from it

The photographs of the tar are resized (Lanczos, fitted into the shape, upright ones turned) to 500 x 375 and
to 1500 x 1125 pixels and written as JPEG of quality 90; the larger ones are thus soft, as they are enlarged.
Each is used several times, so that starting workers weighs little.

End to end, two workers make batches of 50 views of 224 pixels; every way draws crops of 8 to 100 % of the
area and resamples bicubically, antialiased. A round runs in a process of its own, and its CPU seconds are
those of that process and its workers; the ways take turns, and the best of the rounds counts, as other work
on the machine only slows a round down. All files are in the page cache. Beside them stand one process
without a loader (views alone), the limit (decoding nothing but each crop's region, resampling nothing), and
plain reading: samples without decoding through webdataset's iterator and through ours.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import math
import resource
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
from fd_scale.data.decode import read
from fd_scale.data.index import ShardSet
from fd_scale.data.jpeg import Decoder
from fd_scale.data.loader import TrainLoader
from fd_scale.data.pack import pack
from fd_scale.data.plan import Plan
from fd_scale.data.view import apply, draw
from fd_scale.run.sections import View

SIZE, BATCH, WORKERS, QUALITY = 224, 50, 2, 90
ROUNDS = 3
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Kind:
    """A data set: its pictures' shape, and how many samples it has."""

    name: str
    width: int
    height: int
    samples: int


KINDS = (Kind("500x375", 500, 375, 800), Kind("1500x1125", 1500, 1125, 300))
PASSES = 10
"""Over the samples, where nothing but reading is measured."""
BASELINE = "ImageFolder + PIL"
GOALS = {
    # kind, way: how many times the baseline it should reach
    ("500x375", "ours, simplejpeg"): 1.9,
    ("500x375", "ours, nvimgcodec"): 2.2,
    ("1500x1125", "ours, simplejpeg"): 2.8,
    ("1500x1125", "ours, nvimgcodec"): 3.9,
}
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
    protocol = {"view": SIZE, "batch": BATCH, "workers": WORKERS, "rounds": ROUNDS, "quality": QUALITY}
    found: dict[str, Any] = {"protocol": protocol, "kinds": {}}
    for kind in KINDS:
        say(f"{kind.name}: {kind.samples} samples of {len(photographs)} photographs")
        images = [_resized(photograph, kind) for photograph in photographs]
        folder, shards = _data_set(images, kind, scratch / kind.name)
        end_to_end = _in_turns(_ways(folder, shards), kind.samples, say)
        alone = _in_turns(_views(images), len(images), say)
        found["kinds"][kind.name] = {
            "samples": kind.samples,
            "mean_bytes": float(np.mean([len(image) for image in images])),
            "end_to_end": end_to_end,
            "ratios": _ratios(end_to_end),
            "one_process": alone,
            "share_of_limit": _share_of_limit(alone),
        }
        if kind is KINDS[0]:
            reading = _in_turns(_readers(shards), PASSES * kind.samples, say)
            rates = {name: way["images_per_cpu_s"] for name, way in reading.items()}
            found["reading"] = reading | {"ratio": rates["ours"] / rates["webdataset"]}
    return found


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    kinds = results["kinds"]
    lines = [
        "| images per CPU-second, end to end | " + " | ".join(kinds) + " |",
        "|---|" + "--:|" * len(kinds),
    ]
    for way in next(iter(kinds.values()))["end_to_end"]:
        cells = [
            f"{kind['end_to_end'][way]['images_per_cpu_s']:,.0f} ({kind['ratios'][way]:.2f}x)"
            for kind in kinds.values()
        ]
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    shares = [f"{kind['share_of_limit']:.0%}" for kind in kinds.values()]
    lines.append("| views alone, share of what decoding the region takes | " + " | ".join(shares) + " |")
    reading = results["reading"]
    rates = [f"{reading[name]['images_per_cpu_s']:,.0f}" for name in ("webdataset", "ours")]
    cpu, versions = results["facts"]["cpu"], results["facts"]["versions"]
    processor = cpu.get("model", "unknown") if isinstance(cpu, dict) else cpu
    lines += [
        "",
        f"Samples read without decoding, per CPU-second: webdataset's iterator {rates[0]}, ours {rates[1]} "
        f"({reading['ratio']:.1f}x).",
        "",
        f"Machine: {processor}; torch {versions['torch']}. Two workers, views of {SIZE} pixels; "
        "written by `python -m benchmarks.data`.",
    ]
    return "\n".join(lines)


def goals(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """By name: what was reached, and what should be."""
    found = {
        f"{kind}, {way}": (results["kinds"][kind]["ratios"][way], goal)
        for (kind, way), goal in GOALS.items()
        if way in results["kinds"][kind]["ratios"]
    }
    found["reading"] = (results["reading"]["ratio"], READING_GOAL)
    for name, kind in results["kinds"].items():
        found[f"{name}, share of the limit"] = (kind["share_of_limit"], LIMIT_GOAL)
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
    fast: list[Decoder] = ["nvimgcodec"] if jpeg.resolve("auto") == "nvimgcodec" else []
    return ["simplejpeg", *fast]


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


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)


def _image_folder(folder: Path) -> int:
    data = datasets.ImageFolder(str(folder), _pil_view())
    loader = torch.utils.data.DataLoader(
        data, BATCH, shuffle=True, num_workers=WORKERS, worker_init_fn=_one_thread
    )
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
    loader = webdataset.WebLoader(data, batch_size=None, num_workers=WORKERS, worker_init_fn=_one_thread)
    return sum(len(pixels) for (pixels,) in loader)


def _ours(shards: Path, decoder: Decoder) -> int:
    found = ShardSet.open(shards)
    plan = Plan(found.counts, seed=0, global_batch=BATCH, fingerprint=found.fingerprint)
    loader = TrainLoader(
        found, plan, View(), [SIZE], rank=0, world_size=1, micro_batch=BATCH, accumulation=1,
        stop_step=plan.steps_per_epoch, workers=WORKERS, decoder=decoder,
    )  # fmt: skip
    return sum(len(batch) for batch in loader)


# One process, images in memory.


def _views(images: Sequence[bytes]) -> dict[str, Callable[[], int]]:
    """Views by the fastest decoder, and its limit: the region of the same crops, and nothing else."""
    decoder = _decoders()[-1]
    return {
        f"views, {decoder}": functools.partial(_make_views, images, decoder),
        f"limit: regions, {decoder}": functools.partial(_decode_regions, images, decoder),
    }


def _boxes(images: Sequence[bytes]) -> Iterator[tuple[Any, Any]]:
    for number, image in enumerate(images):
        picture = read(image, decoder=_decoders()[-1])
        key = philox.as_array([philox.key("fd.bench", number)])[0]
        yield picture, draw(View(), key, picture.height, picture.width)


def _make_views(images: Sequence[bytes], decoder: Decoder) -> int:
    for picture, box in _boxes(images):
        apply(picture, box, [SIZE], "bicubic", shrink=True)
    return len(images)


def _decode_regions(images: Sequence[bytes], decoder: Decoder) -> int:
    for picture, box in _boxes(images):
        picture.region(*box[:4])
    return len(images)


# Reading alone.


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
    ways: dict[str, Callable[[], int]], expected: int, say: Callable[[str], None]
) -> dict[str, dict[str, float]]:
    """The best of all rounds for each way, the ways taking turns."""
    best: dict[str, dict[str, float]] = {}
    for number in range(ROUNDS):
        for name, way in ways.items():
            count, cpu_s, wall_s = _apart(way)
            if count != expected:
                raise RuntimeError(f"{name} gave {count} samples of {expected}")
            figures = {
                "images_per_cpu_s": count / cpu_s, "images_per_s": count / wall_s, "cpu_s": cpu_s
            }  # fmt: skip
            if name not in best or cpu_s < best[name]["cpu_s"]:
                best[name] = figures
            say(f"  round {number + 1}: {name}: {count / cpu_s:,.0f} images/CPU-s")
    return best


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


def _ratios(ways: dict[str, dict[str, float]]) -> dict[str, float]:
    baseline = ways[BASELINE]["images_per_cpu_s"]
    return {name: way["images_per_cpu_s"] / baseline for name, way in ways.items()}


def _share_of_limit(alone: dict[str, dict[str, float]]) -> float:
    views, limit = (way["images_per_cpu_s"] for way in alone.values())
    return views / limit


# The data.


def _photographs(path: Path) -> list[bytes]:
    with tarfile.open(path) as tar:
        members = [member for member in tar if member.isfile()]
        named = [member for member in members if member.name.lower().endswith((".jpg", ".jpeg"))]
        found = [tar.extractfile(member).read() for member in named]  # type: ignore[union-attr]
    if not found:
        raise SystemExit(f"{path} holds no .jpg among its {len(members)} files")
    return found


def _resized(photograph: bytes, kind: Kind) -> bytes:
    image = Image.open(io.BytesIO(photograph)).convert("RGB")
    if image.height > image.width:
        image = image.transpose(Image.Transpose.ROTATE_90)
    written = io.BytesIO()
    image.resize((kind.width, kind.height), Image.Resampling.LANCZOS).save(written, "JPEG", quality=QUALITY)
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
