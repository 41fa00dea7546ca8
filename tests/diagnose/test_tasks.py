"""What landscapes are of: a map against itself, the run's own loss, and a linear head on other images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fd_scale.data.index import ShardSet
from fd_scale.data.pack import pack
from fd_scale.diagnose import tasks
from fd_scale.diagnose.images import Images
from fd_scale.diagnose.landscape import direction, evaluate
from fd_scale.diagnose.subjects import DiagnoseError, load_pair
from fd_scale.run.world import World
from tests.data.pictures import image_folder
from tests.diagnose.tiny import ALONE, SMALL, own_subject, pixels, timm_subject

BATCHES = list(pixels(5).split(2))


def test_the_map_shifts_by_nothing_at_0_and_by_the_papers_loss_elsewhere() -> None:
    subject = timm_subject("vit_tiny_patch16_224", **SMALL)
    task = tasks.shift(subject, BATCHES, {})
    line = direction(task.parameters, seed=0, number=0)
    found = evaluate(task, BATCHES, {0: line}, [{}, {0: 0.3}], ALONE)
    assert float(found[0]) == 0
    still = torch.cat([subject.backbone.tokens(b).tokens_BND for b in BATCHES]).double()
    with torch.no_grad():
        for name, parameter in subject.network.named_parameters():
            parameter += 0.3 * line.get(f"network.{name}", torch.zeros(()))
    moved = torch.cat([subject.backbone.tokens(b).tokens_BND for b in BATCHES]).double()
    one, other = (F.layer_norm(x, x.shape[-1:]) for x in (moved, still))
    expected = F.smooth_l1_loss(one, other, beta=2.0)
    assert float(found[1]) / 5 == pytest.approx(float(expected), rel=1e-5)


@torch.no_grad()
def test_the_distillation_loss_is_that_of_the_run(run: Path) -> None:
    subject = load_pair(str(run), None).subject
    held = subject.distillation
    assert held is not None
    by_size = [{32: batch} for batch in BATCHES]
    task = tasks.distillation(subject, by_size, {})
    assert {name.split(".")[0] for name in task.parameters} == {"backbone"}
    found = evaluate(task, BATCHES, {}, [{}], ALONE)
    assert float(found) == pytest.approx(float(held({32: pixels(5)})), rel=1e-6)


def test_a_network_without_a_teacher_has_no_distillation_loss() -> None:
    with pytest.raises(DiagnoseError, match="vit_micro_patch8 has no teacher here"):
        tasks.distillation(own_subject("vit_micro_patch8"), [], {})


def test_a_head_is_fitted_on_other_images_than_it_is_measured_on(shards: Path, world: World) -> None:
    subject = own_subject("vit_micro_patch8")
    data = tasks.fit_head(subject, Images(ShardSet.open(shards), 40, batch=7), 10, world)
    assert data.num_fitted == 30
    assert sum(len(batch) for batch in data.batches) == 10
    task = tasks.head(subject, data, {})
    found = evaluate(task, data.batches, {}, [{}], ALONE)[0]
    tokens = [subject.backbone.tokens(batch).patches_BND.mean(dim=1) for batch in data.batches]
    logits, labels = data.classifier.logits(torch.cat(tokens)), torch.cat(data.labels)
    assert float(found[0]) == pytest.approx(float(F.cross_entropy(logits, labels, reduction="sum")), rel=1e-6)
    assert float(found[1]) == int((logits.argmax(dim=1) == labels).sum())


def test_a_head_needs_two_classes(tmp_path: Path, world: World) -> None:
    pack(image_folder(tmp_path / "images", 6, classes=1), tmp_path / "shards")
    with pytest.raises(DiagnoseError, match="the 3 labelled ones have 1"):
        tasks.fit_head(
            own_subject("vit_micro_patch8"), Images(ShardSet.open(tmp_path / "shards"), 6), 3, world
        )
