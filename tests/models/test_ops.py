"""The plain operations against loops in float64, and the fused ones against the plain."""

from __future__ import annotations

import math

import pytest
import torch

from models.ops import (
    DEFAULT_OPS,
    explicit_attention,
    fused_attention,
    gather_bias,
    relative_position_index,
    relative_position_rows,
)

GRIDS = [(1, 1), (1, 4), (3, 2), (5, 7), (14, 14)]


def needs_gpu(test):
    """Mark and skip in one."""
    skip = pytest.mark.skipif(not torch.cuda.is_available(), reason="runs on a machine with a CUDA device")
    return pytest.mark.gpu(skip(test))


def inputs(batch, heads, queries, keys, width, *, dtype=torch.float64, bias=True, device="cpu"):
    generator = torch.Generator().manual_seed(queries * 1000 + keys)
    shapes = [(batch, heads, queries, width), (batch, heads, keys, width), (batch, heads, keys, width)]
    if bias:
        shapes.append((1, heads, queries, keys))
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    tensors = [tensor.to(device, dtype).requires_grad_() for tensor in tensors]
    return (*tensors, None) if not bias else tuple(tensors)


@torch.no_grad()
def attention_by_loops(query, key, value, bias, scale):
    out = torch.zeros(*query.shape[:3], value.shape[-1], dtype=torch.float64)
    for b, h, n in torch.cartesian_prod(*(torch.arange(size) for size in query.shape[:3])).tolist():
        logits = [scale * float(query[b, h, n] @ key[b, h, m]) for m in range(key.shape[2])]
        if bias is not None:
            logits = [logit + float(bias[0, h, n, m]) for m, logit in enumerate(logits)]
        weights = [math.exp(logit - max(logits)) for logit in logits]
        for m, weight in enumerate(weights):
            out[b, h, n] += weight / sum(weights) * value[b, h, m]
    return out


@pytest.mark.parametrize("grid", GRIDS)
def test_index_is_the_offset_of_query_from_key(grid):
    height, width = grid
    index = relative_position_index(grid)
    rows = (2 * height - 1) * (2 * width - 1) + 3
    assert relative_position_rows(grid) == rows
    assert index.dtype == torch.long
    assert index.shape == (1 + height * width, 1 + height * width)
    for query in range(1 + height * width):
        for key in range(1 + height * width):
            if query == 0 and key == 0:
                expected = rows - 1
            elif query == 0:
                expected = rows - 3
            elif key == 0:
                expected = rows - 2
            else:
                dy = (query - 1) // width - (key - 1) // width
                dx = (query - 1) % width - (key - 1) % width
                expected = (dy + height - 1) * (2 * width - 1) + (dx + width - 1)
            assert index[query, key] == expected


@pytest.mark.parametrize(("grid", "rows"), [((14, 14), 732), ((16, 16), 964)])
def test_tables_have_the_published_number_of_rows(grid, rows):
    assert relative_position_rows(grid) == rows
    # One patch has one class -> patch pair, so every row serves some pair in any grid.
    assert relative_position_index(grid).unique().tolist() == list(range(rows))


def test_bias_is_the_table_row_of_each_pair_and_its_gradient_the_sum_over_pairs():
    index = relative_position_index((2, 3))
    table = torch.randn(relative_position_rows((2, 3)), 3, dtype=torch.float64, requires_grad=True)
    bias = gather_bias(table, index)
    assert bias.shape == (1, 3, 7, 7)
    assert bias.is_contiguous()
    weight = torch.randn_like(bias)
    (bias * weight).sum().backward()
    expected = torch.zeros_like(table)
    for head in range(3):
        for query in range(7):
            for key in range(7):
                assert bias[0, head, query, key] == table[index[query, key], head]
                expected[index[query, key], head] += weight[0, head, query, key]
    # Sums of at most 12 float64 terms of size 1, in another order: 12 roundings of 2e-16. Seen: 0.
    torch.testing.assert_close(table.grad, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "sizes", [(1, 1, 1, 1, 1), (2, 3, 5, 5, 7), (1, 2, 4, 9, 3)], ids=lambda sizes: "x".join(map(str, sizes))
)
def test_explicit_attention_equals_loops(sizes, bias):
    query, key, value, added = inputs(*sizes, bias=bias)
    computed = explicit_attention(query, key, value, added, scale=0.37)
    expected = attention_by_loops(query, key, value, added, 0.37)
    # float64 sums of up to 9 terms. Seen: 4.4e-16.
    torch.testing.assert_close(computed, expected, rtol=0, atol=1e-14)


def test_explicit_attention_has_the_gradients_of_finite_differences():
    assert torch.autograd.gradcheck(lambda *t: explicit_attention(*t, scale=0.6), inputs(2, 2, 3, 4, 3))


@pytest.mark.parametrize("bias", [True, False])
def test_fused_attention_equals_explicit_in_values_and_gradients(bias):
    tensors = inputs(2, 3, 10, 10, 8, bias=bias)
    given = [tensor for tensor in tensors if tensor is not None]
    results = []
    for form in (explicit_attention, fused_attention):
        out = form(*tensors, scale=0.25)
        results.append((out, *torch.autograd.grad(out.square().sum(), given)))
    for plain, fused in zip(*results, strict=True):
        # Two orders of float64 sums of 10 terms; gradients are sums over 20 pairs. Seen: 9e-16.
        torch.testing.assert_close(fused, plain, rtol=0, atol=1e-13)


@pytest.mark.parametrize("form", [explicit_attention, fused_attention])
def test_half_precision_queries_take_a_float32_bias(form):
    query, key, value, bias = inputs(2, 2, 9, 9, 16, dtype=torch.bfloat16)
    bias = bias.detach().float().requires_grad_()
    out = form(query, key, value, bias, scale=0.25)
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert bias.grad.dtype == torch.float32
    exact = explicit_attention(query.double(), key.double(), value.double(), bias.double(), scale=0.25)
    # Values of up to 3 are rounded to 8 bits several times (unit 2^-8, so 0.008 each). Seen: 0.006.
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=0.02)


def test_explicit_attention_keeps_half_precision_logits_apart_in_the_bias():
    # In bfloat16 100.0 and 100.2 are one number; added in float32, the bias still tells the two keys apart.
    query = torch.full((1, 1, 1, 1), 10.0, dtype=torch.bfloat16)
    key = torch.full((1, 1, 2, 1), 10.0, dtype=torch.bfloat16)
    value = torch.tensor([[[[0.0], [1.0]]]], dtype=torch.bfloat16)
    bias = torch.tensor([[[[0.0, 0.2]]]])
    out = explicit_attention(query, key, value, bias, scale=1.0)
    assert out.item() == pytest.approx(torch.sigmoid(torch.tensor(0.2)).item(), abs=2**-9)


def test_default_is_the_explicit_form_on_the_cpu_and_the_fused_one_elsewhere(monkeypatch):
    monkeypatch.setattr("models.ops.explicit_attention", lambda *_, scale: ("explicit", scale))
    monkeypatch.setattr("models.ops.fused_attention", lambda *_, scale: ("fused", scale))
    tensors = inputs(1, 2, 6, 6, 4)
    assert DEFAULT_OPS.attention(*tensors, scale=0.5) == ("explicit", 0.5)
    assert DEFAULT_OPS.attention(*(tensor.to("meta") for tensor in tensors), scale=0.5) == ("fused", 0.5)


@needs_gpu
@pytest.mark.parametrize("tokens", [49, 64, 144, 192, 197, 256, 257])
def test_fused_attention_on_a_gpu_is_as_good_as_the_plain_form_there(tokens):
    """The rule of flash-attention's tests: at most twice the plain form's error in the same precision."""
    exact_inputs = inputs(4, 2, tokens, tokens, 64, device="cuda")
    exact_inputs = tuple(tensor.detach().bfloat16().double().requires_grad_() for tensor in exact_inputs)

    def run(form, tensors):
        out = form(*tensors, scale=0.125)
        return [out, *torch.autograd.grad(out.double().square().sum(), tensors)]

    exact = run(explicit_attention, exact_inputs)
    half = tuple(tensor.detach().bfloat16().requires_grad_() for tensor in exact_inputs[:3])
    half = (*half, exact_inputs[3].detach().float().requires_grad_())
    for fused, plain, truth in zip(
        run(fused_attention, half), run(explicit_attention, half), exact, strict=True
    ):
        error = (fused.double() - truth).abs().max()
        assert error <= 2 * (plain.double() - truth).abs().max() + 1e-3 * truth.abs().max()
