"""Fine-tuning and the probe as runs: resumed exactly, measured as declared, refused where they must be."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from fd_scale import training
from fd_scale.data.index import ShardSet
from fd_scale.data.loader import evaluation_batches
from fd_scale.data.scenes import write_scenes
from fd_scale.engine.checkpoint import AVERAGE, MASTER, Pieces, committed
from fd_scale.errors import RecipeError, RunError
from fd_scale.evaluate import finetune, linear
from fd_scale.evaluate.features import EvaluationError
from fd_scale.evaluate.finetune import Sets, normalisations, record_of
from fd_scale.evaluate.start import prepare
from fd_scale.pixels import IMAGENET_MEAN, normalise
from fd_scale.run import presets
from fd_scale.run.recipe import derive
from fd_scale.run.transfer import TransferRecipe
from fd_scale.run.world import World
from tests.spawn import spawn

SIDE, STEPS = 32, 6


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes to learn from, to select by and to measure on, and scales of ZeRO-3 and of whole parameters."""
    folder = tmp_path_factory.mktemp("scenes")
    for seed, (name, count) in enumerate({"train": 40, "held_out": 18, "test": 27}.items()):
        write_scenes(folder / name, num_images=count, size=SIDE, seed=seed, max_count=16)
    for stage in (0, 3):
        scale = {"train_micro_batch_size_per_gpu": 8, "zero_optimization": {"stage": stage}}
        (folder / f"stage{stage}.json").write_text(json.dumps(scale))
    return folder


def recipe(data: Path, root: Path, preset: str = "fd_base", **changes: Any) -> TransferRecipe:
    asked = presets.recipe_of(preset, images=40, global_batch=16)
    task_changes = {"optim.average_decay": 0.9} if preset == "fd_base" else {}
    fields = {
        "start.network": "timm:test_vit@random",
        "start.input_size": SIDE,
        "data.shards": str(data / "train"),
        "data.test": str(data / "test"),
        "schedule.images": STEPS * 16,
        "schedule.warmup_images": 16,
        "measure.crop_pct": 1.0,
        "scale": str(data / ("stage3.json" if preset == "fd_base" else "stage0.json")),
        "run.root": str(root),
        "run.workers": 0,
        "run.log_every_steps": 1,
        "run.save_every_steps": 2,
        "run.keep_last": 9,
        "run.async_save": False,
    }
    return derive(asked, **fields | task_changes | changes)


def whole_and_resumed(world: World, asked: TransferRecipe, other_root: str) -> dict[str, Any]:
    """A run to its end, and the same one from its second checkpoint on, in a copy of its directory."""
    module: Any = finetune if asked.task == "finetune" else linear
    outcomes = {}
    first: list[Any] = []
    assert training.drive(partial(module._prepared, asked, first), world) == 0
    again = derive(asked, **{"run.root": other_root})
    if world.is_main:
        shutil.copytree(Path(asked.run.root) / asked.run_name, Path(other_root) / again.run_name)
        for saved in committed(Path(other_root) / again.run_name / "checkpoints"):
            if saved.step > 2:
                shutil.rmtree(saved.path)
    world.barrier()
    second: list[Any] = []
    assert training.drive(partial(module._prepared, again, second), world) == 0
    for name, asked_now, done in (("whole", asked, first[0]), ("resumed", again, second[0])):
        folder = Path(asked_now.run.root) / asked_now.run_name
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        result = done.results if asked.task == "finetune" else {"top1": done.result}
        made = record_of(done) if asked.task == "finetune" else done.record(done.result)
        outcomes[name] = {
            "losses": {row["step"]: (row["loss"], row["grad_norm"]) for row in rows if "loss" in row},
            "held_out": {row["step"]: row["held_out_top1"] for row in rows if "held_out_top1" in row},
            "top1": {kind: found.top1 for kind, found in result.items()},
            "record": json.loads(made.to_json()),
        }
    return outcomes


def whole(world: World, asked: TransferRecipe) -> None:
    """A run to its end."""
    assert training.drive(partial(finetune._prepared, asked, []), world) == 0


def predicted(data: Path, asked: TransferRecipe, kind: str, step: int) -> float:
    """Accuracy of a checkpoint's weights on the test scenes, without engine or loop."""
    run = Path(asked.run.root) / asked.run_name
    saved = next(one for one in committed(run / "checkpoints") if one.step == step)
    pieces = Pieces(saved)
    module = finetune.classifier(asked, prepare(asked.start), Sets(asked))
    module.load_state_dict({name: pieces.whole(kind, name) for name in saved.manifest["parameters"]})
    shards = ShardSet.open(data / "test")
    hits = 0
    for batch in evaluation_batches(shards, size=SIDE, crop_pct=1.0, batch=27):
        start = prepare(asked.start)
        with torch.no_grad():
            logits = module.eval()(normalise(batch.pixels[SIDE], start.mean, start.std, torch.float32))
        hits += int((logits.argmax(1) == batch.labels).sum())
    return hits / shards.num_samples


@pytest.mark.slow
def test_fine_tuning_resumes_exactly_and_measures_what_was_declared(data: Path, tmp_path: Path) -> None:
    """Two processes under ZeRO-3, with RandAug, erasing, mixing, drop path and EMA, selected on held-out
    scenes."""
    asked = recipe(
        data,
        tmp_path / "whole",
        **{"data.held_out": str(data / "held_out"), "measure.select": "held_out", "optim.lr": 3e-3},
    )
    for outcomes in spawn(whole_and_resumed, 2, asked, str(tmp_path / "again")):
        whole, resumed = outcomes["whole"], outcomes["resumed"]
        assert sorted(whole["losses"]) == list(range(1, STEPS + 1))
        assert resumed["losses"] == whole["losses"]
        assert resumed["held_out"] == whole["held_out"]
        assert resumed["top1"] == whole["top1"]
        assert sorted(whole["held_out"]) == [2, 4, 6]
    best = whole["record"]["facts"]["best"]
    assert best["top1"] == max(whole["held_out"].values())
    assert whole["top1"]["top1"] == pytest.approx(predicted(data, asked, AVERAGE, int(best["step"])))
    assert whole["top1"]["top1_raw"] == pytest.approx(predicted(data, asked, MASTER, int(best["step"])))
    record = whole["record"]
    assert record["data"].keys() == {"train", "test", "held_out"}
    assert record["protocol"]["optim"]["layer_decay"] == 0.65
    assert record["facts"]["effective_lr"]["layer_0_decay"] < record["facts"]["effective_lr"]["layer_7_decay"]
    assert record["facts"]["normalisation"]["train"] == record["facts"]["normalisation"]["test"]


def test_the_probe_resumes_exactly_under_lars(data: Path, tmp_path: Path) -> None:
    asked = recipe(data, tmp_path / "whole", "linear")
    for outcomes in spawn(whole_and_resumed, 2, asked, str(tmp_path / "again")):
        assert outcomes["resumed"]["losses"] == outcomes["whole"]["losses"]
        assert outcomes["resumed"]["top1"] == outcomes["whole"]["top1"]
    record = outcomes["whole"]["record"]
    assert (record["task"], record["feature"]) == ("linear", "cls")
    assert record["facts"]["effective_lr"] == pytest.approx(0.1 * 16 / 256)


def test_released_code_trains_and_measures_by_different_statistics(data: Path, tmp_path: Path) -> None:
    asked = recipe(data, tmp_path, **{"compat.released_code": True})
    train, test = normalisations(asked, prepare(asked.start))
    assert train[0] == IMAGENET_MEAN
    assert test[0] == pytest.approx((0.48145466, 0.4578275, 0.40821073))
    own = normalisations(recipe(data, tmp_path), prepare(asked.start))
    assert own[0] == own[1]


def test_a_second_stage_begins_at_the_first_one(data: Path, tmp_path: Path) -> None:
    """From a fine-tuned run: its weights, its head by the names of classes, at another size."""
    first = recipe(data, tmp_path / "first", **{"schedule.images": 32})
    spawn(whole, 1, first)
    run = tmp_path / "first" / first.run_name
    second = recipe(data, tmp_path / "second", **{"start.network": str(run), "head.init": "mapped"})
    start = prepare(second.start)
    pieces = Pieces(committed(run / "checkpoints")[-1])
    module = finetune.classifier(second, start, Sets(second))
    assert torch.equal(module.head.weight, pieces.whole(MASTER, "head.weight"))
    name = "blocks.1.mlp.fc1.weight"
    assert torch.equal(start.network.state_dict()[name], pieces.whole(MASTER, f"network.{name}"))
    averaged = prepare(second.start.model_copy(update={"weights": "average"}))
    assert torch.equal(averaged.network.state_dict()[name], pieces.whole(AVERAGE, f"network.{name}"))
    manifest = pieces.checkpoint.path / "manifest.json"
    manifest.write_text(json.dumps(pieces.checkpoint.manifest | {"average_decay": None}))
    with pytest.raises(RunError, match=r"holds no average of the weights, for its recipe has none"):
        prepare(second.start.model_copy(update={"weights": "average"}))
    larger = prepare(second.start.model_copy(update={"input_size": 48}))
    assert larger.network(torch.zeros(1, 3, 48, 48)).shape[1] == 1 + 9


def test_sets_that_cannot_be_used_are_refused(data: Path, tmp_path: Path) -> None:
    asked = recipe(data, tmp_path)
    same = derive(asked, **{"data.held_out": str(data / "test"), "measure.select": "held_out"})
    with pytest.raises(RecipeError, match=r"data.held_out is the test set"):
        Sets(same)
    shutil.copytree(data / "train", tmp_path / "nameless")
    index = tmp_path / "nameless" / "index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"classes": None}))
    with pytest.raises(EvaluationError, match="training shards do not name their classes: pack images"):
        Sets(derive(asked, **{"data.shards": str(tmp_path / "nameless")}))
    shutil.copytree(data / "test", tmp_path / "other")
    index = tmp_path / "other" / "index.json"
    content = json.loads(index.read_text())
    for classes, message in (
        (content["classes"][:-1], "6 classes and the test shards 5"),
        (["x", *content["classes"][1:]], "label 0 is 'disc' in the training shards and 'x'"),
    ):
        index.write_text(json.dumps(content | {"classes": classes}))
        with pytest.raises(EvaluationError, match=message):
            Sets(derive(asked, **{"data.test": str(tmp_path / "other")}))
