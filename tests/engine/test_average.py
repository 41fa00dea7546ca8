"""The moving average of sharded weights against its formula in float64; averages and LARS across a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fd_scale.engine import checkpoint, saving
from fd_scale.engine.adamw import adamw
from fd_scale.engine.checkpoint import AVERAGE, Pieces
from fd_scale.engine.fragments import fragments
from fd_scale.engine.lars import lars
from fd_scale.engine.zero import Engine
from fd_scale.run import scale
from fd_scale.run.world import World
from tests.engine import problem
from tests.engine.problem import Network, Setting
from tests.spawn import spawn

DECAY = 0.7
SETTINGS = [
    Setting(0),
    Setting(1, bf16=True),
    Setting(2, option="optimizer on the host"),
    Setting(3),
    Setting(3, option="all on the host"),
]


def make(world: World, setting: Setting, folder: str, **options: Any) -> tuple[Engine, scale.Resolved]:
    plain, resolved = problem.make_engine(world, setting, folder)
    plain.deepspeed.destroy()
    return Engine(Network(setting), problem.recipe(setting), resolved, world, **options), resolved


def averaged(world: World, folder: str) -> dict[str, Any]:
    """Per setting: the worst distance from the formula, and whether a swap and a resume are exact."""
    results = {}
    for setting in SETTINGS:
        engine, resolved = make(world, setting, folder, average_decay=DECAY)
        assert engine.average is not None
        weights = {f.name: f.of(f.buffer).double() for f in fragments(engine.deepspeed)}
        expected = {name: value.clone() for name, value in weights.items()}
        for stop in range(1, 5):
            problem.advance(engine, resolved, world, stop, poison=2)
            if stop != 3:  # a step that was skipped is not followed
                for f in fragments(engine.deepspeed):
                    expected[f.name].mul_(DECAY).add_(f.of(f.buffer).double(), alpha=1 - DECAY)
        worst = max(float((engine.average.values[n].double() - v).abs().max()) for n, v in expected.items())
        before = {f.name: f.of(f.buffer).clone() for f in fragments(engine.deepspeed)}
        with engine.average.in_place():
            inside = all(
                torch.allclose(f.of(f.buffer).double(), expected[f.name], atol=1e-6)
                for f in fragments(engine.deepspeed)
            )
        restored = all(torch.equal(f.of(f.buffer), before[f.name]) for f in fragments(engine.deepspeed))
        root = Path(folder) / f"saved-{setting.label()}"
        saving.save(root, engine, world, {})
        kept = {name: value.clone() for name, value in engine.average.values.items()}
        engine.deepspeed.destroy()
        again, _ = make(world, setting, folder, average_decay=DECAY)
        found = checkpoint.newest(root, world, print)
        assert found is not None
        checkpoint.load(found, again)
        assert again.average is not None
        results[setting.label()] = {
            "worst": worst,
            "swap": inside and restored,
            "resumed": all(torch.equal(again.average.values[n], v) for n, v in kept.items()),
            "whole": {n: Pieces(found).whole(AVERAGE, n).shape for n in found.manifest["parameters"]},
        }
        again.deepspeed.destroy()
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("average")


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    return spawn(averaged, 2, str(folder))


@pytest.mark.parametrize("setting", SETTINGS, ids=Setting.label)
def test_it_is_the_average_of_the_float32_weights(setting: Setting, found: list[dict[str, Any]]) -> None:
    for rank in found:
        result = rank[setting.label()]
        # Four steps of float32 lerp on weights below 1: worst seen 6e-8.
        assert result["worst"] < 1e-6
        assert result["swap"]
        assert result["resumed"]
        network = dict(Network(setting).named_parameters())
        assert result["whole"] == {name: p.shape for name, p in network.items()}


def elsewhere(world: World, folder: str) -> dict[str, bool]:
    """Whether one process takes up what two saved, by another stage."""
    results = {}
    for setting in SETTINGS:
        found = checkpoint.newest(Path(folder) / f"saved-{setting.label()}", world, print)
        assert found is not None
        other = Setting(3 if setting.stage == 0 else 0, bf16=setting.bf16)
        engine, _ = make(world, other, folder, average_decay=DECAY)
        checkpoint.load(found, engine)
        assert engine.average is not None
        pieces = Pieces(found)
        results[setting.label()] = all(
            torch.equal(value, pieces.whole(AVERAGE, name).flatten())
            for name, value in engine.average.values.items()
        )
        engine.deepspeed.destroy()
    return results


def test_it_goes_on_with_another_number_of_processes_and_stage(
    folder: Path, found: list[dict[str, Any]]
) -> None:
    (results,) = spawn(elsewhere, 1, str(folder))
    assert results == dict.fromkeys(map(Setting.label, SETTINGS), True)


def lars_interrupted(world: World, folder: str) -> tuple[dict[str, Any], dict[str, Any]]:
    setting = Setting(0, clip_norm=None)
    engine, resolved = make(world, setting, folder, make_optimizer=lars)
    whole = problem.advance(engine, resolved, world, 6)
    engine.deepspeed.destroy()
    engine, resolved = make(world, setting, folder, make_optimizer=lars)
    problem.advance(engine, resolved, world, 3)
    saved = saving.save(Path(folder) / "lars", engine, world, {})
    engine.deepspeed.destroy()
    engine, resolved = make(world, setting, folder, make_optimizer=lars)
    checkpoint.load(saved, engine)
    return whole, problem.advance(engine, resolved, world, 6)


def test_lars_goes_on_exactly(tmp_path: Path) -> None:
    for whole, resumed in spawn(lars_interrupted, 2, str(tmp_path)):
        assert resumed["loss"] == whole["loss"][3:]
        assert resumed["norm"] == whole["norm"][3:]
        assert len(set(whole["loss"])) == 6


def scaled(world: World, folder: str) -> list[list[float]]:
    """Learning rates of two groups at each step: one scaled whole, one with absolute floors."""
    setting = Setting(0)
    _, resolved = problem.make_engine(world, setting, folder)
    network = Network(setting)
    rest = list(network.backbone.parameters())
    names = [f"backbone.{name}" for name, _ in network.backbone.named_parameters()]
    head = list(network.projector.parameters())
    groups = [
        {
            "name": "a",
            "params": rest,
            "names": names,
            "weight_decay": 0.0,
            "lr_scale": 0.1,
            "floor_scale": 0.1,
        },
        {
            "name": "b",
            "params": head,
            "names": ["w", "b"],
            "weight_decay": 0.0,
            "lr_scale": 0.1,
            "floor_scale": 1,
        },
    ]
    engine = Engine(network, problem.recipe(setting), resolved, world, groups=groups, make_optimizer=adamw)
    rates = []
    for step in (0, 3, 19):
        engine.move_to(step)
        rates.append([group["lr"] for group in engine.deepspeed.basic_optimizer.param_groups])
    return rates


def test_first_and_last_learning_rates_are_scaled_by_layer_or_not(tmp_path: Path) -> None:
    """Peak 2e-3, first 1e-4, last towards 1e-5."""
    first, peak, last = spawn(scaled, 1, str(tmp_path))[0]
    assert first == pytest.approx([1e-5, 1e-4])
    assert peak == pytest.approx([2e-4, 2e-4])
    assert last[0] < last[1]
    assert last[1] > 1e-5
