"""Retrieval against a written float64 reference, and over processes; captions from shards."""

from __future__ import annotations

import io
import tarfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F

from fd_scale.data import indexing
from fd_scale.data.index import ShardSet
from fd_scale.data.loader import evaluation_batches
from fd_scale.evaluate import retrieval
from fd_scale.evaluate.clip import Asked, Clip, clip_for
from fd_scale.evaluate.features import EvaluationError
from fd_scale.evaluate.naming import SourceError
from fd_scale.evaluate.record import Record
from fd_scale.evaluate.retrieval import Embedded, captions_of, embed, recalls
from tests.evaluate.test_zeroshot import SIDE, clip  # noqa: F401


def reference(images: np.ndarray, texts: np.ndarray, owners: list[int], k: int) -> tuple[float, float]:
    """Text to image and image to text, one query after the other, in float64."""
    images, texts = images.astype(np.float64), texts.astype(np.float64)
    hits = 0
    for number, owner in enumerate(owners):
        order = sorted(range(len(images)), key=lambda i: (-float(texts[number] @ images[i]), i == owner))
        hits += owner in order[:k]
    found = 0
    for image in range(len(images)):
        order = sorted(
            range(len(texts)), key=lambda t: (-float(images[image] @ texts[t]), owners[t] == image)
        )
        found += any(owners[t] == image for t in order[:k])
    return hits / len(owners), found / len(images)


@pytest.mark.parametrize(("num_images", "most_captions"), [(1, 1), (7, 1), (30, 5), (613, 3)])
def test_recalls_are_those_of_the_reference(num_images: int, most_captions: int) -> None:
    """613 images and their captions are more than one chunk."""
    generator = torch.Generator().manual_seed(num_images)
    counts = torch.randint(1, most_captions + 1, (num_images,), generator=generator)
    owners = torch.repeat_interleave(torch.arange(num_images), counts)
    images = F.normalize(torch.randn(num_images, 8, generator=generator), dim=1)
    noise = torch.randn(len(owners), 8, generator=generator)
    texts = F.normalize(images[owners] + 0.5 * noise, dim=1)
    found = recalls(Embedded(images, texts, owners, 0))
    for k in (1, 5, 10):
        expected = reference(images.numpy(), texts.numpy(), owners.tolist(), k)
        assert (found[f"text_to_image_r{k}"], found[f"image_to_text_r{k}"]) == pytest.approx(expected)


def test_a_network_that_tells_nothing_apart_finds_nothing() -> None:
    alike = F.normalize(torch.ones(12, 4), dim=1)
    found = recalls(Embedded(alike, alike.repeat_interleave(2, 0), torch.arange(12).repeat_interleave(2), 0))
    assert set(found.values()) == {0.0}


@pytest.mark.parametrize(
    ("members", "texts"),
    [
        ({"txt": b"a red disc\n\n a star \n"}, ["a red disc", "a star"]),
        ({"txt": b" ", "json": b'{"captions": ["one", "two"]}'}, ["one", "two"]),
        ({"json": b'{"caption": "one"}'}, ["one"]),
    ],
)
def test_captions_are_lines_or_fields(members: dict[str, bytes], texts: list[str]) -> None:
    assert captions_of(members, "k") == texts


@pytest.mark.parametrize("members", [{}, {"txt": b"\n"}, {"json": b"[1]"}, {"json": b"{"}])
def test_a_sample_without_captions_is_named(members: dict[str, bytes]) -> None:
    with pytest.raises(EvaluationError, match=r"sample a/7 has no caption: neither lines in a \.txt"):
        captions_of(members, "a/7")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """Seven images in two tars, the third of them damaged, with one to three captions."""
    folder: Path = tmp_path_factory.mktemp("captioned")
    for tar, numbers in (("a.tar", range(4)), ("b.tar", range(4, 7))):
        with tarfile.open(folder / tar, "w") as file:
            for number in numbers:
                pixels = np.random.default_rng(number).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
                image = io.BytesIO()
                PIL.Image.fromarray(pixels).save(image, "png")
                captions = "\n".join(f"word{number} other{c}" for c in range(1 + number % 3))
                content = b"broken" if number == 2 else image.getvalue()
                for extension, part in (("png", content), ("txt", captions.encode())):
                    info = tarfile.TarInfo(f"{number}.{extension}")
                    info.size = len(part)
                    file.addfile(info, io.BytesIO(part))
    indexing.build_index([folder / "a.tar", folder / "b.tar"], folder)
    return ShardSet.open(folder)


def world(rank: int, size: int) -> Any:
    return SimpleNamespace(rank=rank, size=size, device=torch.device("cpu"))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_parts_of_processes_are_the_whole(
    shards: ShardSet,
    clip: Clip,  # noqa: F811
    size: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # One of seven images is damaged, more than the usual budget.
    monkeypatch.setattr(retrieval, "evaluation_batches", partial(evaluation_batches, max_bad_fraction=1.0))
    network = Asked("tiny", {}, SIDE, {"clip": clip.embed})
    how: dict[str, Any] = {"crop_pct": 1.0, "batch": 2}
    parts = [embed(shards, network, "clip", clip, world(rank, size), **how) for rank in range(size)]
    found = Embedded.together(parts)
    assert found.num_left_out == 1
    good = [0, 1, 3, 4, 5, 6]
    expected = [place for place, number in enumerate(good) for _ in range(1 + number % 3)]
    assert found.owners_M.tolist() == expected
    sentences = [f"word{number} other{c}" for number in good for c in range(1 + number % 3)]
    texts = F.normalize(clip.embed_texts(sentences), dim=1)
    torch.testing.assert_close(found.texts_ME, texts, rtol=0, atol=2e-6)
    images = [np.random.default_rng(n).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8) for n in good]
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    # Batches of other shapes in float32: worst seen 4e-7.
    torch.testing.assert_close(found.images_NE, F.normalize(clip.embed(pixels), dim=1), rtol=0, atol=2e-6)


def test_a_network_that_diverged_is_told(
    shards: ShardSet,
    clip: Clip,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(retrieval, "evaluation_batches", partial(evaluation_batches, max_bad_fraction=1.0))
    network = Asked("lost", {}, SIDE, {"direct": lambda seen: clip.embed(seen) * float("nan")})
    with pytest.raises(EvaluationError, match="lost gives 6 of 6 embeddings that are not finite"):
        embed(shards, network, "direct", clip, world(0, 1), crop_pct=1.0, batch=4)


def test_what_cannot_be_asked_is_refused() -> None:
    nothing = Embedded(torch.zeros(0, 4), torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), 3)
    with pytest.raises(EvaluationError, match="none of the 6 images could be read"):
        Embedded.together([nothing, nothing])
    with pytest.raises(SourceError, match="a_run has no text tower: name its teacher's, as --clip"):
        clip_for("a_run", None)


def test_every_mode_has_a_record_of_its_own() -> None:
    found = Embedded(torch.eye(2), torch.eye(2), torch.tensor([0, 1]), 0)
    network: Any = SimpleNamespace(name="student", record={"sha256": "0"})
    tower: Any = SimpleNamespace(name="clip")
    records = [
        Record(**retrieval._record(found, network, mode, tower), protocol={}, data={})
        for mode in ("projected", "direct")
    ]
    assert [record.headline for record in records] == [
        "text_to_image_r1_projected",
        "text_to_image_r1_direct",
    ]
    assert len({record.file_name for record in records}) == 2
    assert all(record.mean == 1.0 for record in records)
