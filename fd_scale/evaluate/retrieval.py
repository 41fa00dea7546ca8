"""Which image does a caption mean, and which captions an image? Recall among the first 1, 5 and 10.

Images and captions of one set of shards are looked up among each other by the cosine in CLIP's joint
embedding, for CLIP itself and for its students (``clip.py``). A sample's captions are the lines of its .txt,
or ``captions`` or ``caption`` in its .json.

Shape letters: N images, M captions, E the joint embedding.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fd_scale.data.index import ShardSet
from fd_scale.data.loader import evaluation_batches
from fd_scale.data.reader import Batch
from fd_scale.evaluate.clip import Asked, Clip, Question
from fd_scale.evaluate.features import EvaluationError, data_record
from fd_scale.evaluate.job import launch
from fd_scale.evaluate.record import Record
from fd_scale.run.folder import environment
from fd_scale.run.world import World

KS = (1, 5, 10)
CHUNK = 512
"""Rows of similarities that are held at once."""
HEADLINE = "text_to_image_r1"


@dataclass(frozen=True, eq=False)
class Embedded:
    """Images and captions of a data set, or of one process's part of it."""

    images_NE: Tensor
    """Of unit length, on the CPU."""
    texts_ME: Tensor
    owners_M: Tensor
    """int64: the image that each caption belongs to."""
    num_left_out: int
    """Images that could not be read."""

    @staticmethod
    def together(parts: Sequence[Embedded]) -> Embedded:
        """Those of all processes, in their order. Raises ``EvaluationError`` where no image was read."""
        if not any(len(part.images_NE) for part in parts):
            raise EvaluationError(f"none of the {sum(p.num_left_out for p in parts)} images could be read")
        firsts = itertools.accumulate([0, *(len(part.images_NE) for part in parts[:-1])])
        owners = [part.owners_M + first for part, first in zip(parts, firsts, strict=True)]
        return Embedded(
            torch.cat([part.images_NE for part in parts]),
            torch.cat([part.texts_ME for part in parts]),
            torch.cat(owners),
            sum(part.num_left_out for part in parts),
        )


def recalls(found: Embedded, ks: Sequence[int] = KS) -> dict[str, float]:
    """``text_to_image_r<k>``: the share of captions whose image is among the k nearest images;
    ``image_to_text_r<k>``: the share of images with one of their captions among the k nearest captions.

    Among equally near ones the right one counts as last, so that a network that tells nothing apart has
    nothing for it. Computed in float32.
    """
    rank_M = torch.cat([_ranks_of_images(found, rows) for rows in _chunks(len(found.texts_ME))])
    rank_N = torch.cat([_ranks_of_captions(found, rows) for rows in _chunks(len(found.images_NE))])
    directions = {"text_to_image": rank_M, "image_to_text": rank_N}
    return {
        f"{name}_r{k}": float((ranks < k).double().mean()) for name, ranks in directions.items() for k in ks
    }


def captions_of(members: Mapping[str, bytes], key: str) -> list[str]:
    """The captions among a sample's members. Raises ``EvaluationError`` where there are none."""
    found: Any = members.get("txt", b"").decode("utf-8", errors="replace").splitlines()
    if not any(line.strip() for line in found) and "json" in members:
        try:
            record = json.loads(members["json"])
        except ValueError:
            record = None
        record = record if isinstance(record, dict) else {}
        found = record.get("captions", record.get("caption", []))
        found = [found] if isinstance(found, str) else found
    texts = [str(line).strip() for line in found if str(line).strip()]
    if not texts:
        raise EvaluationError(
            f"sample {key} has no caption: neither lines in a .txt nor caption or captions in a .json"
        )
    return texts


def retrieval(question: Question) -> None:
    """Measure CLIPs (``open_clip:NAME@WEIGHTS``) and students of a CLIP, print a table and write records;
    ends the process and never returns."""

    def action(world: World) -> None:
        shards = world.together(lambda: ShardSet.open(question.test))
        records = []
        for begin, tower, network in question.answering(world):
            for mode in network.modes:
                look = partial(
                    embed,
                    shards,
                    network,
                    mode,
                    tower,
                    world,
                    crop_pct=question.crop_pct,
                    batch=question.batch,
                    workers=question.workers,
                )
                found = Embedded.together(world.gather(world.together(look)))
                records.append(
                    Record(
                        **_record(found, network, mode, tower),
                        protocol={"ks": list(KS), "crop_pct": question.crop_pct},
                        data={"test": data_record(shards)},
                        environment=environment(),
                        wall_s=time.perf_counter() - begin,
                    )
                )
        question.tell(records, world)

    launch(action)


def embed(
    shards: ShardSet,
    network: Asked,
    mode: str,
    tower: Clip,
    world: World,
    *,
    crop_pct: float,
    batch: int,
    workers: int = 0,
) -> Embedded:
    """This process's part of the images and their captions.

    Raises ``EvaluationError`` for a sample without captions, for shards that can only be streamed, and for
    embeddings that are not finite.
    """
    if shards.needs_telling:
        raise EvaluationError(
            "captions are read beside the images, which streamed shards do not allow: copy them to a disk"
        )
    size, look = network.input_size, network.modes[mode]
    images: list[Tensor] = []
    texts: list[Tensor] = []
    owners: list[int] = []
    num_left_out = 0
    for part, lines in _captioned(shards, world, size=size, crop_pct=crop_pct, batch=batch, workers=workers):
        num_left_out += int((~part.valid).sum())
        if not lines:
            continue
        images += F.normalize(look(part.pixels[size][part.valid].to(world.device)).float(), dim=1).cpu()
        captions = list(itertools.chain(*lines))
        texts += F.normalize(tower.embed_texts(captions).float(), dim=1).cpu()
        first = len(images) - len(lines)
        owners += [first + number for number, of_image in enumerate(lines) for _ in of_image]
    return Embedded(
        _whole(images, tower, network.name),
        _whole(texts, tower, tower.name),
        torch.tensor(owners, dtype=torch.int64),
        num_left_out,
    )


def _whole(rows: list[Tensor], tower: Clip, name: str) -> Tensor:
    """Embeddings as one tensor; a NaN is near to nothing, and would be found by nobody or by all."""
    found = torch.stack(rows) if rows else torch.zeros(0, tower.width)
    if wrong := int((~torch.isfinite(found).all(dim=1)).sum()):
        raise EvaluationError(
            f"{name} gives {wrong} of {len(found)} embeddings that are not finite: its weights are damaged, "
            "or it diverged"
        )
    return found


def _captioned(
    shards: ShardSet, world: World, *, size: int, crop_pct: float, batch: int, workers: int
) -> Iterator[tuple[Batch, list[list[str]]]]:
    """This process's batches, with the captions of every image that could be read."""
    batches = evaluation_batches(
        shards,
        size=size,
        crop_pct=crop_pct,
        batch=batch,
        rank=world.rank,
        world_size=world.size,
        labels=False,
        workers=workers,
    )
    places = _places(shards, world)
    for part in batches:
        here = list(itertools.islice(places, len(part)))
        yield (
            part,
            [
                captions_of(shards.read_members(*place), key)
                for key, place, valid in zip(part.keys, here, part.valid.tolist(), strict=True)
                if valid
            ],
        )


def _places(shards: ShardSet, world: World) -> Iterator[tuple[int, int]]:
    """(shard, index) of this process's samples, in the order of ``evaluation_batches``."""
    first, last = (shards.num_samples * part // world.size for part in (world.rank, world.rank + 1))
    everywhere = ((shard, index) for shard, count in enumerate(shards.counts) for index in range(int(count)))
    return itertools.islice(everywhere, first, last)


def _ranks_of_images(found: Embedded, rows: slice) -> Tensor:
    """By caption: how many images other than its own are as near as its own."""
    similar_mN = found.texts_ME[rows] @ found.images_NE.T
    own_m1 = similar_mN.gather(1, found.owners_M[rows, None])
    return (similar_mN >= own_m1).sum(dim=1) - 1


def _ranks_of_captions(found: Embedded, rows: slice) -> Tensor:
    """By image: how many captions of others are as near as the nearest of its own."""
    similar_nM = found.images_NE[rows] @ found.texts_ME.T
    numbers_n1 = torch.arange(len(found.images_NE))[rows, None]
    own_nM = found.owners_M[None] == numbers_n1
    nearest_n1 = similar_nM.masked_fill(~own_nM, -torch.inf).amax(dim=1, keepdim=True)
    return ((similar_nM >= nearest_n1) & ~own_nM).sum(dim=1)


def _chunks(count: int) -> list[slice]:
    return [slice(first, first + CHUNK) for first in range(0, count, CHUNK)]


def _record(found: Embedded, network: Asked, mode: str, tower: Clip) -> dict[str, Any]:
    """What a record says of it; its metrics name the mode, so that each mode has a file and a row."""
    return {
        "task": "retrieval",
        "model": network.name,
        "feature": "cls",
        "network": network.record,
        "metrics": {f"{name}_{mode}": [value] for name, value in recalls(found).items()},
        "headline": f"{HEADLINE}_{mode}",
        "num_test": len(found.texts_ME),
        "facts": {
            "mode": mode,
            "clip": tower.name,
            "num_images": len(found.images_NE),
            "num_captions": len(found.texts_ME),
            "num_left_out": found.num_left_out,
        },
    }
