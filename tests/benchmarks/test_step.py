"""The benchmark of the step, whole and tiny, in a process of its own, as DeepSpeed asks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import alternatives, clock, step, step_setup
from fd_scale.run.world import World
from tests.spawn import spawn


def whole(world: World, folder: str) -> tuple[dict[str, Any], list[str], list[int]]:
    """The results at tiny sizes, what is said of them, and how many rows were kept each time."""
    kept: list[int] = []
    found = step.run(
        world,
        step_setup.SMOKE_MODELS,
        ["eager", "recomputed"],
        alternatives=True,
        protocol=clock.SMOKE,
        keep=lambda found: kept.append(len(found["results"]) + len(found["parts"])),
    )
    return found, list(step.lines(found)), kept


@pytest.mark.slow
def test_the_whole_of_it_tiny(tmp_path: Path) -> None:
    ((found, said, kept),) = spawn(whole, 1, str(tmp_path))
    assert [row["variant"] for row in found["results"]] == ["eager", "recomputed"]
    for row in found["results"]:
        seconds = row["step_us"]["median"] / 1e6
        assert row["images_per_s"] == pytest.approx(2 / seconds, rel=1e-3, abs=0.01)
        counted = sum(row["gflop_per_image"].values())
        assert row["tflop_per_s"] == pytest.approx(2 * counted / seconds / 1e3, rel=1e-2, abs=1e-3)
        assert list(row["part_share"]) == list(step_setup.PARTS)
        assert sum(row["part_share"].values()) == pytest.approx(1, abs=1e-3)
        # 4 blocks of 128 channels and 65 tokens: 12 D^2 multiply-adds of the linear maps per token and block,
        # 2 D for each pair of tokens; and 64 patches of 192 numbers. A projector comes on top.
        products = 2 * (4 * 65 * (12 * 128**2 + 2 * 65 * 128) + 64 * 192 * 128) / 1e9
        assert row["gflop_per_image"]["forward"] == pytest.approx(products, rel=0.05)
        # Each product twice on the way back, but for the pixels' gradient, which nobody takes.
        backward = 2 * row["gflop_per_image"]["forward"]
        assert row["gflop_per_image"]["backward"] == pytest.approx(backward, rel=0.05)
    by_name = {(row["part"], row["name"]): row for row in found["parts"]}
    assert by_name["optimizer", "apex FusedAdam"]["left_out"] == "needs a CUDA device"
    assert by_name["optimizer", "torch, fused"]["us"]["median"] > 0
    assert by_name["teacher", "inference mode"]["target_error"] == 0
    for network in ("swinv2_tiny of models", "swinv2_tiny_window8_256 of timm"):
        row = by_name["position bias", f"{network}, kept"]
        assert row["same_features"]
        assert row["kept_mib"] > 0
        assert by_name["position bias", f"{network}, the bias alone"]["us"]["median"] > 0
    assert kept[:2] == [1, 2]
    assert kept[-1] == 2 + len(by_name)
    assert sorted(kept) == kept
    assert found["left_out"] == []
    assert [row["waits_per_step"] for row in found["results"]] == [0, 0]
    assert len(said) == kept[-1]


def test_the_models_of_a_gpu_are_runs(tmp_path: Path) -> None:
    """What one call on a GPU would spend its time on is at least a recipe and a scale that fit."""
    for model in step_setup.GPU_MODELS + step_setup.CPU_MODELS:
        flops = step.useful_flops(model, tmp_path) if model.name == "vitb" else {}
        case = step_setup.case_of(model, step_setup.VARIANTS["compiled, recomputed"])
        _, resolved = case.build(tmp_path, 1)
        assert (resolved.compile, resolved.activation_checkpointing) == (True, True)
        assert resolved.micro_batch == model.micro_batch
        if flops:  # teacher and student of 35.1 GFLOP each, and a projector
            assert flops["teacher"] / 1e9 == pytest.approx(35.1, rel=0.02)
            assert flops["backward"] / flops["forward"] == pytest.approx(2, rel=0.02)


def test_every_adamw_that_is_there_takes_a_step() -> None:
    for name, make in alternatives.optimizers([torch.ones(3, requires_grad=True)], "cpu").items():
        assert isinstance(make, str) == name.endswith("FusedAdam"), name
        if not isinstance(make, str):
            make()
