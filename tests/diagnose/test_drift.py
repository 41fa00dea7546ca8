"""The checkpoints of a run set against its last one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fd_scale.diagnose.drift import drift
from fd_scale.diagnose.subjects import load_pair, student_of, student_weights
from fd_scale.engine.checkpoint import committed
from tests.diagnose.tiny import pixels


def test_distance_similarity_and_loss_of_every_checkpoint(run: Path) -> None:
    found_run = load_pair(str(run), None).run
    assert found_run is not None
    values = pixels(9)
    told: list[int] = []
    batches = [{32: batch} for batch in values.split(4)]
    found = drift(found_run, batches, torch.device("cpu"), on_checkpoint=told.append)
    assert list(found.steps) == [0, 2, 4, 6]
    assert told == [1, 2, 3, 4]
    assert found.num_images == 9
    weights = [student_weights(one) for one in committed(run / "checkpoints")]
    names = [name for name in weights[-1] if name.startswith("backbone.")]
    flat = [torch.cat([state[name].double().flatten() for name in names]) for state in weights]
    expected = [float((one - flat[-1]).norm() / flat[-1].norm()) for one in flat]
    assert found.weight_distance[1:] == pytest.approx(expected, rel=1e-6)
    assert found.weight_distance[0] > found.weight_distance[1] > found.weight_distance[2] > 0
    assert found.cka_to_last[-1] == pytest.approx(1)
    first = student_of(found_run, None, torch.device("cpu"))
    assert first.distillation is not None
    assert found.loss[0] == pytest.approx(float(first.distillation({32: values})) / 9, rel=1e-5)
    assert found.loss[-1] < found.loss[0]


def test_without_a_teacher_there_is_no_loss(run: Path) -> None:
    found_run = load_pair(str(run), "none", step=4).run
    assert found_run is not None
    found = drift(found_run, [{32: pixels(5)}], torch.device("cpu"))
    assert list(found.steps) == [0, 2, 4]
    assert not found.loss
