"""What runs, and whether the reason says so."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fd_scale.objective import kernels
from fd_scale.objective.kernels.choice import INTERPRETED, MAX_CHANNELS

choice = importlib.import_module("fd_scale.objective.kernels.choice")
pytestmark = pytest.mark.skipif(
    INTERPRETED, reason="asks about an uninterpreted machine: unset TRITON_INTERPRET"
)


class OnGpu:
    """What ``choose`` asks of a tensor, for one that is on a CUDA device."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16, width: int = 768) -> None:
        self.dtype, self.shape, self.device = dtype, (2, 3, width), torch.device("cuda", 0)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    found = SimpleNamespace(name="NVIDIA H200", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: found)


def chosen(prediction: object, teacher: object, target: str = "whiten", **options: bool) -> kernels.Choice:
    return kernels.choose(prediction, teacher, target, **options)  # type: ignore[arg-type]


def test_a_cpu_runs_the_reference() -> None:
    tokens = torch.zeros(1, 2, 8)
    found = chosen(tokens, tokens)
    assert found.name == "reference"
    assert "features are on cpu" in found.reason


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("target", ["whiten", "l2", "channel", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_gpu_runs_the_kernel(dtype: torch.dtype, target: str) -> None:
    found = chosen(OnGpu(dtype), OnGpu(torch.float16, MAX_CHANNELS), target)
    assert found == kernels.Choice("triton", f"{dtype} on cuda:0: one pass over the features")


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("prediction", "teacher", "target", "reason"),
    [
        (OnGpu(torch.float64), OnGpu(), "whiten", "the prediction is torch.float64"),
        (OnGpu(), OnGpu(torch.float64), "whiten", "the teacher is torch.float64"),
        (OnGpu(torch.float16), OnGpu(), "whiten", "unless a loss scale is given"),
        (OnGpu(width=MAX_CHANNELS + 1), OnGpu(), "whiten", "16385 channels are more than the 16384"),
        (OnGpu(), OnGpu(), "pca", "no kernel makes target 'pca' (there are whiten, l2, channel, none)"),
    ],
)
def test_what_the_kernel_does_not_do(prediction: OnGpu, teacher: OnGpu, target: str, reason: str) -> None:
    found = chosen(prediction, teacher, target)
    assert found.name == "reference"
    assert reason in found.reason


@pytest.mark.usefixtures("hopper")
def test_float16_runs_the_kernel_under_a_loss_scale() -> None:
    assert chosen(OnGpu(torch.float16), OnGpu(torch.float16), loss_scaled=True).name == "triton"


def test_an_old_gpu_and_a_missing_triton_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    old = SimpleNamespace(name="Tesla V100", major=7, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: old)
    assert "Tesla V100 has compute capability 7.0, below 8.0" in chosen(OnGpu(), OnGpu()).reason
    monkeypatch.setattr(choice, "_HAS_TRITON", False)
    assert chosen(OnGpu(), OnGpu()) == kernels.Choice(
        "reference", "triton is not installed (pip install triton)"
    )


def test_choosing_traces() -> None:
    def step(tokens: Tensor) -> Tensor:
        return tokens + 1 if kernels.choose(tokens, tokens, "whiten").name == "reference" else tokens

    tokens = torch.zeros(1, 2, 8)
    assert torch.equal(torch.compile(step, fullgraph=True, backend="eager")(tokens), tokens + 1)
