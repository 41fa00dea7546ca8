"""How fast can this machine make views of these images, and how many cores does a rate take?

One process and one thread, on images that are in memory already: images per second of CPU time, which is
what one free core gives. How fast the shards themselves are read is said apart, as no decoder changes it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO

import numpy as np
import PIL.Image
import torch
from rich.progress import Progress
from rich.table import Table
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as geometry

from fd_scale.data import jpeg, philox
from fd_scale.data.decode import read
from fd_scale.data.faults import SampleError
from fd_scale.data.index import ShardSet
from fd_scale.data.jpeg import Decoder
from fd_scale.data.pool import bar
from fd_scale.data.view import apply, draw
from fd_scale.errors import ShardError
from fd_scale.run.sections import View

DECODERS: tuple[Decoder, ...] = ("turbojpeg", "nvimgcodec", "simplejpeg", "pillow")
ROUNDS = 3
"""The best of so many counts: other work on the machine only ever slows a round down."""


@dataclass(frozen=True)
class Rates:
    """What was measured."""

    images_per_cpu_s: dict[str, float]
    """By decoder, views in one process."""
    baseline_per_cpu_s: float
    """Decoding whole by Pillow, crop, resampling to a float tensor: as torchvision's ImageFolder does it."""
    num_images: int
    mean_bytes: float
    mean_pixels: float
    unusable: int
    read_mib_per_s: float
    """Of the shards, by one process, in wall time; from memory where the system has them there."""


def bench(
    shards: ShardSet,
    places: Sequence[tuple[int, int]],
    view: View,
    sizes: Sequence[int],
    progress: Progress | None = None,
) -> Rates:
    """Measure every decoder that is installed on these samples; raises ``ShardError`` if none is usable."""
    images, read_mib_per_s = _read(shards, places)
    usable = [image for image in images if _is_usable(image)]
    if not usable:
        raise ShardError(f"none of the {len(places)} samples that were drawn can be decoded")
    keys = [philox.as_array([philox.key("fd.bench", number)])[0] for number in range(len(usable))]
    jobs: dict[str, Callable[[bytes, np.ndarray], object]] = {
        name: _ours(name, view, sizes) for name in DECODERS if _is_installed(name)
    }
    jobs["baseline"] = _baseline(view, max(sizes))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    best = dict.fromkeys(jobs, math.inf)
    try:
        with bar(progress, "measuring", ROUNDS * len(jobs)) as advance:
            for _ in range(ROUNDS):  # in turn, so that what slows the machine down slows all of them
                for name, job in jobs.items():
                    best[name] = min(best[name], _cpu_s(job, usable, keys))
                    advance(1)
    finally:
        torch.set_num_threads(threads)
    rates = {name: len(usable) / seconds for name, seconds in best.items()}
    pixels = [picture.height * picture.width for picture in map(read, usable)]
    return Rates(
        images_per_cpu_s={name: rates[name] for name in jobs if name != "baseline"},
        baseline_per_cpu_s=rates["baseline"],
        num_images=len(usable),
        mean_bytes=float(np.mean([len(image) for image in usable])),
        mean_pixels=float(np.mean(pixels)),
        unusable=len(images) - len(usable),
        read_mib_per_s=read_mib_per_s,
    )


def table(found: Rates, target_images_per_s: float) -> Table:
    """The rates, and the cores that a wanted rate takes."""
    shown = Table(
        title=f"{found.num_images:,} images of {found.mean_pixels / 1e6:.2f} MP and "
        f"{found.mean_bytes / 1024:.0f} KiB in the mean",
        title_justify="left",
    )
    shown.add_column("decoder")
    shown.add_column("images / CPU-s", justify="right")
    shown.add_column("ratio", justify="right")
    shown.add_column(f"cores for {target_images_per_s:,.0f} images/s", justify="right")
    rows = {"ImageFolder's way": found.baseline_per_cpu_s, **found.images_per_cpu_s}
    for name, rate in rows.items():
        cores = f"{target_images_per_s / rate:,.1f}"
        shown.add_row(name, f"{rate:,.0f}", f"{rate / found.baseline_per_cpu_s:.2f}", cores)
    return shown


def _read(shards: ShardSet, places: Sequence[tuple[int, int]]) -> tuple[list[bytes], float]:
    begin = time.perf_counter()
    images = []
    for shard, index in places:
        try:
            images.append(shards.read(shard, index, label=False).image)
        except SampleError:
            images.append(b"")
    elapsed = max(time.perf_counter() - begin, 1e-9)
    return images, sum(map(len, images)) / 2**20 / elapsed


def _is_usable(image: bytes) -> bool:
    try:
        read(image).whole()
    except SampleError:
        return False
    return True


def _is_installed(decoder: Decoder) -> bool:
    try:
        return jpeg.resolve(decoder) == decoder
    except ValueError:
        return False


def _cpu_s(job: Callable[[bytes, np.ndarray], object], images: list[bytes], keys: list[np.ndarray]) -> float:
    begin = time.process_time()
    for image, key in zip(images, keys, strict=True):
        job(image, key)
    return time.process_time() - begin


def _ours(decoder: Decoder, view: View, sizes: Sequence[int]) -> Callable[[bytes, np.ndarray], object]:
    def make(image: bytes, key: np.ndarray) -> object:
        picture = read(image, exif=view.exif, decoder=decoder)
        box = draw(view, key, picture.height, picture.width)
        return apply(picture, box, sizes, view.interpolation, shrink=view.shrink)

    return make


def _baseline(view: View, size: int) -> Callable[[bytes, np.ndarray], object]:
    """The same crops, the way of torchvision and timm: Pillow all along, normalised floats at the end."""
    resampling = {"bicubic": InterpolationMode.BICUBIC, "bilinear": InterpolationMode.BILINEAR}

    def make(image: bytes, key: np.ndarray) -> object:
        picture = PIL.Image.open(BytesIO(image)).convert("RGB")
        box = draw(view, key, picture.height, picture.width)
        cropped = geometry.resized_crop(picture, *box[:4], [size, size], resampling[view.interpolation])
        if box.flip:
            cropped = geometry.horizontal_flip(cropped)
        pixels = geometry.to_dtype(geometry.pil_to_tensor(cropped), torch.float32, scale=True)
        return geometry.normalize(pixels, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])

    return make
