"""Top-1 and top-5 against scikit-learn's; no top-5 where there are fewer than five classes to be among."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sklearn.metrics import top_k_accuracy_score
from torch import Tensor

from fd_scale.data.index import ShardSet
from fd_scale.data.pack import pack
from fd_scale.evaluate.accuracy import measure
from fd_scale.evaluate.features import EvaluationError
from tests.data.pictures import image_folder

ALONE: Any = SimpleNamespace(rank=0, size=1, device=torch.device("cpu"), gather=lambda value: [value])
SIDE = 8


@pytest.mark.parametrize(("num_classes", "batch"), [(3, 4), (5, 7), (7, 1)])
def test_accuracies_are_scikit_learns(tmp_path: Path, num_classes: int, batch: int) -> None:
    pack(image_folder(tmp_path / "in", 22, classes=num_classes), tmp_path / "set", max_count=9)
    shards = ShardSet.open(tmp_path / "set")
    matrix = torch.randn(3, num_classes, generator=torch.Generator().manual_seed(0))
    seen: list[Tensor] = []

    def predict(pixels: Tensor) -> Tensor:
        seen.append(pixels.float().mean((2, 3)) @ matrix)
        return seen[-1]

    found = measure(predict, shards, ALONE, size=SIDE, crop_pct=1.0, batch=batch)
    labels = [shards.read(shard, i).label for shard, count in enumerate(shards.counts) for i in range(count)]
    scores, classes = torch.cat(seen).numpy(), list(range(num_classes))
    expected = {"top1": [top_k_accuracy_score(labels, scores, k=1, labels=classes)]}
    if num_classes > 5:
        expected["top5"] = [top_k_accuracy_score(labels, scores, k=5, labels=classes)]
    elif num_classes == 5:
        expected["top5"] = [1.0]  # scikit-learn warns of it
    assert found.metrics == expected
    assert (found.num_images, found.num_left_out) == (22, 0)


def test_labels_without_a_logit_are_refused(tmp_path: Path) -> None:
    pack(image_folder(tmp_path / "in", 6, classes=3), tmp_path / "set")
    with pytest.raises(
        EvaluationError, match="labels from 0 to 2 were met, and there are logits for 2 classes"
    ):
        measure(
            lambda pixels: torch.zeros(len(pixels), 2),
            ShardSet.open(tmp_path / "set"),
            ALONE,
            size=SIDE,
            crop_pct=1.0,
            batch=6,
        )
