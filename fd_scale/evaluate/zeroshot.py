"""Does the network still know what words mean? Classes told by text alone, for CLIP and for its students.

Class names are told through templates, open_clip's or the user's; how an image is embedded is the business of
``clip.py``.

Shape letters: B images, E the joint embedding, C classes.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor

from fd_scale.data.index import ShardSet
from fd_scale.evaluate import accuracy
from fd_scale.evaluate.clip import Clip, Embed, Question
from fd_scale.evaluate.features import EvaluationError, data_record
from fd_scale.evaluate.job import launch
from fd_scale.evaluate.record import Record
from fd_scale.run.folder import environment
from fd_scale.run.world import World

_WNID = re.compile(r"n\d{8}")


@torch.no_grad()
def text_weights(clip: Clip, classes: Sequence[str], templates: Sequence[Any]) -> Tensor:
    """(E, C): for every class the mean over templates of normalised text embeddings, normalised."""
    device = next(clip.model.parameters()).device
    return open_clip.build_zero_shot_classifier(clip.model, clip.tokenizer, classes, templates, device=device)


def logits(embeddings_BE: Tensor, weights_EC: Tensor) -> Tensor:
    """Cosines (B, C) times 100, CLIP's largest scale, which does not change an order."""
    return 100 * F.normalize(embeddings_BE, dim=1) @ weights_EC


def class_names(shards: ShardSet, file: Path | None) -> list[str]:
    """The classes in words, by label: a file's lines, open_clip's for ImageNet-1K, or the shards' own.

    Raises ``EvaluationError`` for another number of classes than the shards have, or where nothing names
    them.
    """
    if file is not None:
        found = _lines(file, "--classes")
    elif shards.classes is None:
        raise EvaluationError(
            "the test shards do not name their classes: give a file, one per line (--classes)"
        )
    elif all(_WNID.fullmatch(name) for name in shards.classes):
        found = list(open_clip.IMAGENET_CLASSNAMES)
    else:
        found = [name.replace("_", " ") for name in shards.classes]
    if shards.classes is not None and len(found) != len(shards.classes):
        raise EvaluationError(
            f"{len(found)} classes are named in words and the test shards have {len(shards.classes)}: give a "
            "file of as many lines, in the order of their labels (--classes)"
        )
    return found


def templates_of(file: Path | None) -> list[Any]:
    """CLIP's 80 templates for ImageNet, or a file's lines with ``{}`` for the class."""
    if file is None:
        return list(open_clip.OPENAI_IMAGENET_TEMPLATES)
    lines = _lines(file, "--templates")
    if wrong := next(
        (line for line in lines if line.count("{}") != 1 or line.count("{") + line.count("}") > 2), None
    ):
        raise EvaluationError(f"{file}: {wrong!r} does not hold one {{}} for the class (--templates)")
    return lines


def _lines(file: Path, option: str) -> list[str]:
    """Those of a text file that hold anything; raises ``EvaluationError`` where there are none."""
    try:
        found = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{file} cannot be read as text: {error} ({option})") from None
    if not found:
        raise EvaluationError(f"{file} is empty ({option})")
    return found


def zeroshot(question: Question, *, classes: Path | None, templates: Path | None) -> None:
    """Measure CLIPs (``open_clip:NAME@WEIGHTS``) and students of a CLIP, print a table and write records;
    ends the process and never returns."""

    def action(world: World) -> None:
        shards = world.together(lambda: ShardSet.open(question.test))
        names = world.together(lambda: class_names(shards, classes))
        phrases = world.together(lambda: templates_of(templates))
        records = []
        for begin, tower, network in question.answering(world):
            weights_EC = text_weights(tower, names, phrases)
            for mode, embed in network.modes.items():
                found = accuracy.measure(
                    partial(_predict, embed, weights_EC),
                    shards,
                    world,
                    size=network.input_size,
                    crop_pct=question.crop_pct,
                    batch=question.batch,
                    workers=question.workers,
                )
                protocol = {"templates": len(phrases), "classes": names, "crop_pct": question.crop_pct}
                records.append(
                    Record(
                        task="zeroshot",
                        model=network.name,
                        feature="cls",
                        network=network.record,
                        protocol=protocol,
                        data={"test": data_record(shards)},
                        metrics={f"{name}_{mode}": values for name, values in found.metrics.items()},
                        headline=f"top1_{mode}",
                        num_test=found.num_images,
                        facts={"mode": mode, "clip": tower.name, "num_left_out": found.num_left_out},
                        environment=environment(),
                        wall_s=time.perf_counter() - begin,
                    )
                )
        question.tell(records, world)

    launch(action)


def _predict(embed: Embed, weights_EC: Tensor, pixels: Tensor) -> Tensor:
    return logits(embed(pixels), weights_EC)
