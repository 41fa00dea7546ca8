"""A fine-tuned run as a frozen network: its features are those that its own head reads."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from fd_scale import training
from fd_scale.diagnose import tasks
from fd_scale.diagnose.landscape import direction, evaluate
from fd_scale.diagnose.session import Request, diagnose
from fd_scale.diagnose.subjects import load_pair
from fd_scale.diagnose.teller import SILENT
from fd_scale.engine.checkpoint import AVERAGE, MASTER, Pieces, committed
from fd_scale.evaluate import finetune
from fd_scale.evaluate.naming import LabelledRun, SourceError, meaning
from fd_scale.evaluate.source import open_source
from fd_scale.evaluate.start import prepare
from fd_scale.evaluate.tuned import load
from fd_scale.run.transfer import Start, TransferRecipe
from fd_scale.run.watchdog import Watchdog
from fd_scale.run.world import World
from tests.diagnose.conftest import world as alone  # noqa: F401
from tests.diagnose.tiny import ALONE
from tests.evaluate.test_backbone import pixels
from tests.evaluate.test_finetune import SIDE, data, recipe  # noqa: F401
from tests.spawn import spawn


def tune(world: World, asked: TransferRecipe) -> None:
    """A run, whose measurements between its steps feed the watchdog of the steps."""
    heard: list[str] = []
    with mock.patch.object(Watchdog, "beat", lambda _, where: heard.append(where)):
        assert training.drive(partial(finetune._prepared, asked, []), world) == 0
    assert heard.count("batch 1 of a measurement") == 1
    assert heard.index("batch 1 of a measurement") < heard.index("the last step")


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """Norm before pooling, averaged weights, two steps at a rate that moves them."""
    changes: dict[str, Any] = {
        "head.order": "norm_pool",
        "schedule.images": 32,
        "schedule.warmup_images": 0,
        "optim.lr": 1e-2,
        "data.held_out": str(data / "held_out"),
    }
    asked = recipe(data, tmp_path_factory.mktemp("tuned"), **changes)
    spawn(tune, 1, asked)
    return Path(asked.run.root) / asked.run_name


def test_the_head_on_the_mean_patch_gives_the_run_s_own_logits(run: Path) -> None:
    backbone = open_source(f"{run}#ema")
    named = meaning(f"{run}#ema")
    assert isinstance(named, LabelledRun)
    whole = load(named)
    pair = load_pair(f"{run}#ema", None)
    with torch.no_grad():
        mean = backbone.pooled(pixels(5, SIDE))["gap"]
        ours = whole.classifier.head(mean)
        assert pair.subject.classifier is not None
        expected = pair.subject.classifier()(pixels(5, SIDE))
    # The same float32 products in batches of other shapes: worst seen 0.
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)
    assert expected.std() > 1e-4
    assert backbone.name == f"{run.name}#ema@2"
    assert backbone.fingerprint["fine_tuned"] == "average"


@torch.no_grad()
def test_a_diagnosis_takes_it_for_its_fine_tuned_stage(run: Path) -> None:
    """All its filters move, the head's too; where they are, loss and hits are those of the logits."""
    subject = load_pair(str(run), None).subject
    seen, labels = pixels(5, SIDE), torch.tensor([0, 1, 2, 3, 4])
    assert subject.classifier is not None
    logits = subject.classifier()(seen)
    task = tasks.fine_tuned(subject, [seen], [labels], {}, num_classes=logits.shape[1])
    line = direction(task.parameters, seed=0, number=0)
    assert {"network.head.weight", "network.network.blocks.0.attn.qkv.weight"} < line.keys()
    ((cost, hits),) = evaluate(task, [seen], {}, [{}], ALONE)
    # One float32 sum of five terms: worst seen 0.
    assert float(cost) == pytest.approx(float(F.cross_entropy(logits, labels, reduction="sum")), rel=1e-6)
    assert float(hits) == float((logits.argmax(1) == labels).sum())


def test_the_weights_are_the_average_of_the_checkpoint(run: Path) -> None:
    pieces = Pieces(committed(run / "checkpoints")[-1])
    network: Any = open_source(f"{run}#ema").network
    raw: Any = open_source(str(run)).network
    for ours, name in (("blocks.1.mlp.fc1.weight", "network.blocks.1.mlp.fc1.weight"), ("norm.bias",) * 2):
        assert torch.equal(network.state_dict()[ours], pieces.whole(AVERAGE, name))
        assert torch.equal(raw.state_dict()[ours], pieces.whole(MASTER, name))


def test_a_second_stage_that_keeps_the_norm_begins_at_the_first_one_s(run: Path) -> None:
    start = prepare(Start(network=str(run), weights="average", position="keep"))
    pieces = Pieces(committed(run / "checkpoints")[-1])
    assert torch.equal(start.network.state_dict()["norm.bias"], pieces.whole(AVERAGE, "norm.bias"))


def test_an_input_size_is_not_for_measuring(run: Path) -> None:
    with pytest.raises(SourceError, match="is measured at the size that it was trained at"):
        open_source(str(run), input_size=48)


def test_a_diagnosis_looks_at_its_test_images_and_lies_in_its_reports(
    run: Path,
    data: Path,  # noqa: F811
    alone: World,  # noqa: F811
) -> None:
    asked = Request(str(run), against=str(run), images=4, with_landscape=False)
    page = diagnose(asked, alone, teller=SILENT)
    assert page == run / "reports" / "diagnose" / "report.html"
    record = json.loads(page.with_name("report.json").read_text())
    assert record["about"]["Data"] == str(data / "test")
    assert f"{run}, fd_base of timm:test_vit@random" in page.read_text()
