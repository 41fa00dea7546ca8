"""What landscapes are of: a map against itself, the run's own loss, and a linear head on other images."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF

from fd_scale.data.index import ShardSet
from fd_scale.data.pack import pack
from fd_scale.diagnose import tasks
from fd_scale.diagnose.images import Images
from fd_scale.diagnose.landscape import direction, evaluate
from fd_scale.diagnose.subjects import DiagnoseError, Subject, load_pair
from fd_scale.errors import TeacherError
from fd_scale.run.world import World
from tests.data.pictures import image_folder
from tests.diagnose.tiny import ALONE, SMALL, own_subject, pixels, timm_subject
from tests.teachers.tiny import saved, shaken

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


@pytest.fixture(scope="module")
def fine_tuned(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """A network of timm whose file has a classifier of three classes."""
    torch.manual_seed(0)
    network = shaken(timm.create_model("test_vit", num_classes=3))
    path = saved(network.state_dict(), tmp_path_factory.mktemp("weights") / "fine.safetensors")
    return load_pair(f"timm:test_vit.r160_in1k@{path}", None).subject


@torch.no_grad()
def test_a_fine_tuned_network_is_measured_by_its_own_classifier(fine_tuned: Subject) -> None:
    side = fine_tuned.backbone.input_size
    batches = [pixels(3, side), pixels(2, side, seed=1)]
    labels = [torch.tensor([0, 1, 2]), torch.tensor([2, 2])]
    task = tasks.fine_tuned(fine_tuned, batches, labels, {}, num_classes=3)
    line = direction(task.parameters, seed=0, number=0)
    assert {"network.head.weight", "network.blocks.0.attn.qkv.weight"} < line.keys()
    found = evaluate(task, batches, {0: line}, [{}, {0: 0.5}], ALONE)
    network = task.module.network
    for row, alpha in zip(found, (0.0, 0.5), strict=True):
        for name, parameter in network.named_parameters():
            parameter += alpha * line.get(f"network.{name}", torch.zeros(()))
        settings = network.pretrained_cfg
        values = TF.normalize(torch.cat(batches) / 255, settings["mean"], settings["std"])
        logits, wanted = network.double()(values.double()), torch.cat(labels)
        network.float()
        assert float(row[0]) == pytest.approx(float(F.cross_entropy(logits, wanted) * 5), rel=1e-5)
        assert float(row[1]) == float((logits.argmax(dim=1) == wanted).sum())


def test_a_fine_tuned_network_must_know_the_classes_of_the_data(fine_tuned: Subject) -> None:
    batches = [pixels(2, fine_tuned.backbone.input_size)]
    with pytest.raises(DiagnoseError, match="tells 3 classes apart, and the data have 4: give --data"):
        tasks.fine_tuned(fine_tuned, batches, [torch.tensor([0, 3])], {})
    with pytest.raises(DiagnoseError, match="tells 3 classes apart, and the data have 2"):
        tasks.fine_tuned(fine_tuned, batches, [torch.tensor([0, 1])], {}, num_classes=2)
    with pytest.raises(DiagnoseError, match="vit_micro_patch8 has no classifier of its own"):
        tasks.fine_tuned(own_subject("vit_micro_patch8"), [], [], {})
    bare = load_pair("timm:test_vit@random", None).subject
    with pytest.raises(TeacherError, match="weights random of test_vit bring no classifier"):
        tasks.fine_tuned(bare, [], [], {})
