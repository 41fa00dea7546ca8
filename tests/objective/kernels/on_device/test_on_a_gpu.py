"""What only a CUDA device can show: graphs, streams without a wait, memory, repeatability, 64-bit sizes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fd_scale.objective import losses
from fd_scale.objective.kernels import whitened_smooth_l1
from fd_scale.objective.kernels.choice import INTERPRETED
from tests.objective.kernels.cases import features, fused, numbers, relative

if INTERPRETED or not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
pytestmark = pytest.mark.gpu
VIT_B = (64, 197, 768)


def tokens(dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    return features(VIT_B, dtype, "cuda")


@pytest.mark.parametrize("weighted", [False, True])
def test_ten_runs_are_bitwise_equal(weighted: bool) -> None:
    prediction, teacher = tokens()
    weight = torch.linspace(0, 2, 197, device="cuda") if weighted else None
    first, first_gradient = fused(prediction, teacher, token_weight=weight)
    for _ in range(10):
        loss, gradient = fused(prediction, teacher, token_weight=weight)
        assert torch.equal(loss.value, first.value)
        assert torch.equal(loss.per_token, first.per_token)
        assert torch.equal(gradient, first_gradient)


def test_a_whole_batch_against_the_plain_loss_in_float64() -> None:
    prediction, teacher = tokens()
    leaf = prediction.double().requires_grad_()
    expected = losses.whitened_smooth_l1(leaf, teacher.double())
    expected.backward()
    assert leaf.grad is not None
    loss, gradient = fused(prediction, teacher)
    assert relative(loss.value, numbers(expected)) < 1e-6
    rounding = relative(leaf.grad.bfloat16(), numbers(leaf.grad))
    assert relative(gradient, numbers(leaf.grad)) < 1.1 * rounding


def test_nothing_waits_for_the_device() -> None:
    prediction, teacher = tokens()
    prediction.requires_grad_()
    weight = torch.rand(197, device="cuda")
    mask = weight > 0.3

    def step() -> None:
        loss = whitened_smooth_l1(
            prediction, teacher, token_weight=weight, token_mask=mask, normaliser="weighted_mean"
        )
        (loss.value * 2).backward()

    step()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_graph_captures_forward_and_backward() -> None:
    prediction, teacher = tokens()
    static = prediction.clone().requires_grad_()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.autograd.grad(2 * whitened_smooth_l1(static, teacher).value, static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = 2 * whitened_smooth_l1(static, teacher).value
        (gradient,) = torch.autograd.grad(loss, static)
    for factor in (1.0, 0.5):
        with torch.no_grad():
            static.copy_(prediction * factor)
        graph.replay()
        expected, expected_gradient = fused(static.detach(), teacher, 2.0)
        assert torch.equal(loss, 2 * expected.value)
        assert torch.equal(gradient, expected_gradient)


def test_memory_is_the_gradient_and_four_bytes_a_token() -> None:
    prediction, teacher = tokens()
    prediction.requires_grad_()
    torch.autograd.grad(whitened_smooth_l1(prediction, teacher).value, prediction)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.grad(whitened_smooth_l1(prediction, teacher).value, prediction)
    batch, num_tokens, width = VIT_B
    allowed = (
        batch * num_tokens * (2 * width + 4) + 16384
    )  # and a few scalars, which come in blocks of 512 bytes
    assert torch.cuda.max_memory_allocated() - before <= allowed


def test_inductor_gives_the_same() -> None:
    prediction, teacher = tokens()
    prediction.requires_grad_()

    def step(p: Tensor, t: Tensor) -> Tensor:
        return 3 * whitened_smooth_l1(p, t).value

    expected, got = step(prediction, teacher), torch.compile(step, fullgraph=True)(prediction, teacher)
    assert torch.equal(got, expected)
    gradients = [torch.autograd.grad(loss, prediction)[0] for loss in (expected, got)]
    # One rounding of the product by 3, made in float32 or in bfloat16: half an ulp of bfloat16 each.
    assert relative(gradients[1], numbers(gradients[0])) < 2**-8


def test_more_elements_than_32_bits_count() -> None:
    shape = (3, 750_000, 1024)  # 2.3e9
    prediction = torch.zeros(shape, dtype=torch.bfloat16, device="cuda")
    teacher = torch.zeros(shape, dtype=torch.bfloat16, device="cuda")
    values, taught = features((1, 1, 1024), torch.bfloat16, "cuda")
    prediction[-1, -1], teacher[-1, -1] = values[0, 0], taught[0, 0]
    denominator = torch.tensor(1024.0, device="cuda")
    expected, expected_gradient = fused(values, taught, 2.0, normaliser=denominator)
    loss, gradient = fused(prediction, teacher, 2.0, normaliser=denominator)
    assert torch.equal(loss.value, expected.value)
    assert torch.equal(gradient[-1, -1], expected_gradient[0, 0])
    assert not gradient[0, 0].any()


def test_a_second_device_is_launched_on() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    prediction, teacher = features((2, 3, 96), torch.float32, "cuda:1")
    expected, _ = fused(prediction.to("cuda:0"), teacher.to("cuda:0"))
    assert torch.equal(fused(prediction, teacher)[0].value.to("cuda:0"), expected.value)
