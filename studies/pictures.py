"""Which images does a study see, and in which of its parts? CIFAR-10 from a file or folder, scenes otherwise.

Everything fits in memory as uint8 and may lie on the device. The parts are disjoint: what a teacher was told
of an image is never of one that its students are fine-tuned or tested on.

Shape letters: N images, S the side of an image, pixels.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fd_scale.data import philox
from fd_scale.data.decode import decode
from fd_scale.data.scenes import SHAPES, scene, scene_seed
from fd_scale.errors import ShardError
from studies.settings import Sizes

SCENE_SIDE = 32
SCENE_CUE = 0.8
"""Share of scenes whose colour tells their class."""
TRAIN, TEST = "train", "test"


@dataclass(frozen=True, eq=False)
class Pictures:
    """Labelled images."""

    pixels: Tensor
    """uint8 (N, 3, S, S)."""
    labels: Tensor
    """int64 (N,)."""

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index_N: Tensor) -> Pictures:
        """Some of them."""
        return Pictures(self.pixels[index_N], self.labels[index_N])

    def to(self, device: torch.device) -> Pictures:
        """On a device."""
        return Pictures(self.pixels.to(device), self.labels.to(device))


@dataclass(frozen=True, eq=False)
class Parts:
    """The images of a study, apart."""

    taught: Pictures
    unlabelled: Pictures
    """Labels are kept for nobody: all -1."""
    labelled: Pictures
    held_out: Pictures
    test: Pictures
    classes: tuple[str, ...]
    fingerprint: str
    """Twelve hex digits of all pixels and labels."""

    @property
    def distilled(self) -> Tensor:
        """Pixels of all images that students may see without labels."""
        return torch.cat((self.taught.pixels, self.unlabelled.pixels))

    def to(self, device: torch.device) -> Parts:
        """On a device."""
        names = ("taught", "unlabelled", "labelled", "held_out", "test")
        return Parts(*(getattr(self, n).to(device) for n in names), self.classes, self.fingerprint)


def load(source: Path | None, sizes: Sizes, cache: Path) -> Parts:
    """The parts, from CIFAR-10's ``train/CLASS/*`` and ``test/CLASS/*`` in a .tar.gz or a folder, or drawn
    where ``source`` is None.

    Decoded images are kept in ``cache``. Raises ``ShardError`` for a source without such folders, with images
    of several sizes, or with too few.
    """
    if source is None:
        return _cut(_scenes(sizes), SHAPES, sizes)
    if not source.exists():
        raise ShardError(
            f"--data {source} does not exist: give CIFAR-10 as .tar.gz or folder, or leave it out"
        )
    kept = cache / f"pictures-{hashlib.sha256(str(source.resolve()).encode()).hexdigest()[:12]}.npz"
    if not kept.is_file():
        _keep(source, kept)
    with np.load(kept) as file:
        sets = {
            split: Pictures(
                torch.from_numpy(file[f"{split}_pixels"]), torch.from_numpy(file[f"{split}_labels"])
            )
            for split in (TRAIN, TEST)
        }
        classes = tuple(str(name) for name in file["classes"])
    return _cut(sets, classes, sizes)


def outline(sizes: Sizes) -> Parts:
    """Parts of the right sizes without images, to plan with."""
    blank = {
        name: Pictures(torch.zeros(number, 0, dtype=torch.uint8), torch.zeros(number, dtype=torch.int64))
        for name, number in sizes.model_dump().items()
    }
    return Parts(**blank, classes=SHAPES, fingerprint="none")


def _cut(sets: dict[str, Pictures], classes: tuple[str, ...], sizes: Sizes) -> Parts:
    """Parts of a shuffled training set, and the first of a shuffled test set."""
    wanted = {name: getattr(sizes, name) for name in ("taught", "unlabelled", "labelled", "held_out")}
    for split, number in ((TRAIN, sum(wanted.values())), (TEST, sizes.test)):
        if len(sets[split]) < number:
            raise ShardError(f"{split} has {len(sets[split]):,} images, and data asks for {number:,} of them")
    train, test = (
        sets[split].take(
            torch.from_numpy(philox.permutation(philox.key("fd.studies", number), len(sets[split])))
        )
        for number, split in enumerate((TRAIN, TEST))
    )
    bounds = np.cumsum([0, *wanted.values()]).tolist()
    parts = {
        name: train.take(torch.arange(bounds[place], bounds[place + 1])) for place, name in enumerate(wanted)
    }
    hidden = parts["unlabelled"]
    parts["unlabelled"] = Pictures(hidden.pixels, torch.full_like(hidden.labels, -1))
    parts[TEST] = test.take(torch.arange(sizes.test))
    digest = hashlib.sha256()
    for part in parts.values():
        digest.update(part.pixels.numpy().tobytes() + part.labels.numpy().tobytes())
    return Parts(**parts, classes=classes, fingerprint=digest.hexdigest()[:12])


def _scenes(sizes: Sizes) -> dict[str, Pictures]:
    train = sizes.taught + sizes.unlabelled + sizes.labelled + sizes.held_out
    return {TRAIN: _drawn(train, 0), TEST: _drawn(sizes.test, 1)}


def _drawn(number: int, seed: int) -> Pictures:
    drawn = [scene(scene_seed(seed, n), SCENE_SIDE, SCENE_CUE, 1) for n in range(number)]
    pixels = torch.from_numpy(np.stack([one.image for one in drawn])).permute(0, 3, 1, 2).contiguous()
    return Pictures(pixels, torch.tensor([one.label for one in drawn]))


def _keep(source: Path, kept: Path) -> None:
    """Decode everything once."""
    found: dict[str, list[tuple[str, np.ndarray]]] = {TRAIN: [], TEST: []}
    for path, content in _files(source):
        split, label = path.split("/")[-3:-1]
        if split in found:
            found[split].append((label, decode(content)))
    classes = sorted({label for label, _ in found[TRAIN]})
    shapes = {image.shape for images in found.values() for _, image in images}
    if not found[TRAIN] or not found[TEST] or len(shapes) != 1:
        raise ShardError(
            f"--data {source} must hold train/CLASS/IMAGE and test/CLASS/IMAGE of one size; found "
            f"{len(found[TRAIN])} and {len(found[TEST])} images of {len(shapes)} sizes"
        )
    arrays = {"classes": np.array(classes)}
    for split, images in found.items():
        arrays[f"{split}_pixels"] = np.stack([image for _, image in images]).transpose(0, 3, 1, 2).copy()
        arrays[f"{split}_labels"] = np.array([classes.index(label) for label, _ in images], np.int64)
    kept.parent.mkdir(parents=True, exist_ok=True)
    partial = kept.with_suffix(".partial.npz")
    np.savez(partial, **arrays)
    partial.replace(kept)


def _files(source: Path) -> Iterator[tuple[str, bytes]]:
    """Path and content of every image, in the order of paths."""
    if source.is_dir():
        for path in sorted(source.rglob("*/*/*.*")):
            yield path.as_posix(), path.read_bytes()
        return
    with tarfile.open(source) as archive:
        # Read in the order of the archive, which seeks nowhere, and sorted after.
        found = {m.name: archive.extractfile(m).read() for m in archive if m.isfile()}  # type: ignore[union-attr]
    yield from sorted((name, content) for name, content in found.items() if name.count("/") >= 2)
