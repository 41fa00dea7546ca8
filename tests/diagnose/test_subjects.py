"""Networks by their names: runs, exported files, timm; and what is no network."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from fd_scale.data.index import ShardSet
from fd_scale.diagnose.images import Images
from fd_scale.diagnose.subjects import Pair, load_pair, student_of
from fd_scale.errors import RunError, UserError
from fd_scale.evaluate.source import open_source
from fd_scale.evaluate.start import find
from fd_scale.export import choose, export, load_student
from fd_scale.run.folder import RunFolder
from fd_scale.run.transfer import Start
from fd_scale.student import build_student
from tests.diagnose.tiny import ALONE, pixels


@pytest.fixture(scope="module")
def pair(run: Path) -> Pair:
    return load_pair(str(run), None)


def test_a_run_is_its_newest_student_against_its_teacher(run: Path, pair: Pair) -> None:
    assert [subject.name for subject in pair.both] == ["teacher", "student, step 6"]
    expected = load_student(export(run).weights)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(tensor, pair.subject.network.state_dict()[name])
    assert not pair.subject.network.training
    assert pair.against is not None
    assert pair.against.facts["library"] == "timm"
    assert pair.against.backbone.tokens(pixels(1)).tokens_BND.shape == (1, 17, 24)


def test_a_step_of_a_run(run: Path) -> None:
    found = load_pair(str(run), "none", step=4)
    assert found.subject.name == "student, step 4"
    assert found.against is None
    assert found.both == [found.subject]
    assert found.subject.distillation is None
    with pytest.raises(RunError, match=r"no checkpoint of step 5; it has 2, 4, 6 \(--step\)"):
        load_pair(str(run), None, step=5)


def test_the_average_of_a_runs_weights_by_every_name(run: Path) -> None:
    written = export(run, step=4, average=True)
    assert written.weights.name == "step-00000004-ema.safetensors"
    assert "moving average, decay 0.8 per step" in written.card.read_text()
    expected = load_student(written.weights).state_dict()
    raw = load_student(export(run, step=4).weights).state_dict()
    assert any(not torch.equal(raw[name], tensor) for name, tensor in expected.items())
    pair = load_pair(f"{run}#ema", str(run), step=4)
    assert [subject.name for subject in pair.both] == ["student, step 6", "student (EMA), step 4"]
    seen = pair.subject.network.state_dict()
    assert all(torch.equal(seen[name], tensor) for name, tensor in expected.items())
    source = open_source(f"{run}#ema", step=4)
    assert source.name == f"{run.name}#ema@4"
    assert torch.equal(
        source.tokens(pixels(1)).tokens_BND, pair.subject.backbone.tokens(pixels(1)).tokens_BND
    )
    for start in (Start(network=f"{run}#ema", step=4), Start(network=str(run), weights="average", step=4)):
        found = find(start)
        assert found.label == source.name
        assert all(torch.equal(found.tensors[name], tensor) for name, tensor in expected.items())


def test_the_beginning_of_a_run_is_made_again_from_its_seed(pair: Pair) -> None:
    assert pair.run is not None
    state = torch.random.get_rng_state()
    first = student_of(pair.run, None, torch.device("cpu"))
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(pair.run.recipe.seed)
    expected = build_student(pair.run.recipe, pair.run.teachers).backbone.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in first.network.state_dict().items())


def test_the_runs_own_loss(run: Path, pair: Pair) -> None:
    """On the images of the last step the loss is near the one that the run logged there."""
    held = pair.subject.distillation
    assert held is not None
    assert held.sizes == {32}
    seen = torch.cat(list(Images(ShardSet.open(_shards(run)), 40).batches(32, ALONE)))
    with torch.no_grad():
        mean = float(held({32: seen})) / 40
    logged = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    # Other crops of the same images; the loss fell by more over the run.
    assert mean == pytest.approx(logged[-1], rel=0.2)


def _shards(run: Path) -> str:
    return str(json.loads((run / "recipe.json").read_text())["data"]["shards"])


def test_an_exported_file_against_a_run_and_a_network_of_timm(run: Path) -> None:
    weights = export(run, step=4).weights
    found = load_pair(str(weights), str(run))
    assert [subject.name for subject in found.both] == ["student, step 6", "step-00000004"]
    assert found.run is None
    other = load_pair(str(weights), "timm:vit_tiny_patch16_224@random")
    assert [subject.name for subject in other.both] == ["vit_tiny_patch16_224", "step-00000004"]
    assert load_pair(str(weights), None).against is None
    same = load_pair(str(weights), str(weights))
    assert [subject.name for subject in same.both] == ["step-00000004 (before)", "step-00000004"]


def test_a_local_file_of_timms(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = timm.create_model("test_vit", num_classes=0)
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    found = load_pair(f"timm:test_vit@{tmp_path / 'weights.safetensors'}", None).subject
    assert all(
        torch.equal(tensor, network.state_dict()[n]) for n, tensor in found.network.state_dict().items()
    )
    with pytest.raises(RunError, match="a file of timm's weights is named timm:NAME@"):
        load_pair(str(tmp_path / "weights.safetensors"), None)


@pytest.mark.parametrize(
    ("target", "against", "step", "message"),
    [
        ("nowhere", None, None, "nowhere does not exist; a network is a run directory"),
        ("timm:vit_tiny_patch16_224", None, None, "names no weights: append @ and a tag, a file, or random"),
        ("timm:vit_tinny_patch16_224@random", None, None, "did you mean vit_tiny_patch16_224"),
        ("timm:test_vit@random", "teacher", None, "--against teacher is the teacher of a distillation"),
        ("timm:test_vit@random", None, 3, "--step 3 is for runs, and timm:test_vit@random is none"),
        ("/tmp", None, None, "is no run directory"),
    ],
)
def test_what_is_no_network_is_refused(
    target: str, against: str | None, step: int | None, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        load_pair(target, against, step=step)


def test_another_teacher_and_damaged_checkpoints_are_refused(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / run.name
    shutil.copytree(run, copy)
    newest = choose(RunFolder.at(copy), None)
    manifest = json.loads((newest.path / "manifest.json").read_text())
    manifest["facts"]["teacher"]["sha256"] = "0" * 64
    (newest.path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(RunError, match="was made with another teacher: the weights themselves"):
        load_pair(str(copy), None)
    (newest.path / manifest["files"][0]["name"]).write_bytes(b"cut")
    with pytest.raises(RunError, match=r"step-00000006 is damaged: .* another with --step"):
        load_pair(str(copy), None)
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(RunError, match="has no checkpoint yet"):
        load_pair(str(copy), None)
