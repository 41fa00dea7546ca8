"""The forms of attention against loops in float64 and against each other, at the sizes that models have, and
the choice between them."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from models.attention import (
    attention,
    choose,
    explain,
    explicit_attention,
    flex_attention,
    fused_attention,
)
from models.errors import ModelError
from models.ops import DEFAULT_OPS, gather_bias, relative_position_index, relative_position_rows


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


def test_the_forms_compile_whole():
    tensors = inputs(2, 2, 9, 9, 8, dtype=torch.float32)
    for form in (attention, fused_attention):
        for given in (tensors, (*tensors[:3], None)):
            compiled = torch.compile(form, fullgraph=True, backend="aot_eager")
            assert torch.equal(compiled(*given, scale=0.5), form(*given, scale=0.5))


# What models make of it, at their sizes.

SWIN = {49: (7, 7), 64: (8, 8), 144: (12, 12), 192: (12, 16), 256: (16, 16)}
"""Windows: scaled cosine attention, and a bias per head that a CPB MLP gives, between 0 and 16."""
VIT = {197: (14, 14), 257: (16, 16)}
"""Grids with a class token: a bias gathered from the shared table."""


def as_models_have_it(num_tokens, device="cpu"):
    """Query, key, value and bias in float64, and the scale: two heads of 32 channels, three images."""
    query, key, value, bias = inputs(3, 2, num_tokens, num_tokens, 32, device=device)
    if num_tokens in VIT:
        grid = VIT[num_tokens]
        generator = torch.Generator().manual_seed(num_tokens)
        table = torch.randn(relative_position_rows(grid), 2, generator=generator, dtype=torch.float64)
        return (
            query,
            key,
            value,
            gather_bias(table.to(device), relative_position_index(grid).to(device)),
            32**-0.5,
        )
    lengths = torch.tensor([10.0, 100.0], dtype=torch.float64, device=device).view(1, 2, 1, 1)
    query, key = F.normalize(query, dim=-1) * lengths, F.normalize(key, dim=-1)
    return query, key, value, 16 * bias.sigmoid(), 1.0


def results(form, tensors, scale, dtype, learnt):
    """The values and all gradients of a form in a dtype; the bias stays in float32, as it is made."""
    *heads, bias = (tensor.detach() for tensor in tensors)
    heads = [tensor.bfloat16().to(dtype).requires_grad_() for tensor in heads]
    bias = bias.float().to(torch.promote_types(dtype, torch.float32)).requires_grad_(learnt)
    out = form(*heads, bias, scale=scale)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out.device, out.dtype)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), [*heads, bias] if learnt else heads)]


def relative_error(value, exact):
    return ((value.double() - exact.double()).norm() / exact.double().norm()).item()


def check_as_models_have_it(form, num_tokens, learnt, device="cpu"):
    *tensors, scale = as_models_have_it(num_tokens, device)
    exact = results(explicit_attention, tensors, scale, torch.float64, learnt)
    plain = results(explicit_attention, tensors, scale, torch.bfloat16, learnt)
    found = results(form, tensors, scale, torch.bfloat16, learnt)
    for value, same_dtype, reference in zip(found, plain, exact, strict=True):
        # flash-attention's rule, at most twice the error of the plain form in the same dtype, and half an ulp
        # of bfloat16 for the bias that a fused form rounds.
        assert relative_error(value, reference) < 2 * relative_error(same_dtype, reference) + 2**-9


@pytest.mark.parametrize("learnt", [True, False])
@pytest.mark.parametrize("num_tokens", [*SWIN, *VIT])
def test_the_plain_form_in_bfloat16_against_float64(num_tokens, learnt):
    *tensors, scale = as_models_have_it(num_tokens)
    exact = results(explicit_attention, tensors, scale, torch.float64, learnt)
    found = results(explicit_attention, tensors, scale, torch.bfloat16, learnt)
    for value, reference in zip(found, exact, strict=True):
        # Cosine logits of up to 100 are rounded to bfloat16, by up to 0.25. Seen: 4.9e-2, the gradient of
        # keys; 1.7e-2 in values, and 5e-3 with the shared table, whose logits are small.
        assert relative_error(value, reference) < (0.01 if num_tokens in VIT else 0.07)


@pytest.mark.parametrize("learnt", [True, False])
@pytest.mark.parametrize("num_tokens", [*SWIN, *VIT])
def test_the_fused_form_in_bfloat16_against_float64(num_tokens, learnt):
    check_as_models_have_it(fused_attention, num_tokens, learnt)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("num_tokens", [1, 49, 197])
def test_flex_attention_gives_the_same(num_tokens):
    tensors = inputs(2, 2, num_tokens, num_tokens, 16, dtype=torch.float32)
    query, key, value, bias = (tensor.detach() for tensor in tensors)
    for given in (bias, bias.squeeze(0), bias.mean(1, keepdim=True), None):
        expected = explicit_attention(query, key, value, given, scale=0.25)
        found = flex_attention(query, key, value, given, scale=0.25)
        # Two orders of float32 sums. Seen: 6e-7.
        torch.testing.assert_close(found, expected, rtol=0, atol=5e-6)


def test_flex_attention_says_what_it_cannot():
    query, key, value, bias = inputs(2, 2, 4, 4, 16, dtype=torch.float32)
    with pytest.raises(ModelError, match="no backward pass on a CPU"):
        flex_attention(query, key, value, bias, scale=1.0)
    with pytest.raises(ModelError, match=r"\(2, 2, 4, 4\) differs from image to image"):
        flex_attention(query, key, value, bias.expand(2, 2, 4, 4), scale=1.0)


# The choice.


def chosen(*, width=32, dtype=torch.bfloat16, heads_learn=True, bias_learns=True, bias=True):
    heads = [torch.empty(2, 3, 9, width, dtype=dtype, device="meta", requires_grad=heads_learn)] * 3
    added = torch.empty(1, 3, 9, 9, device="meta", requires_grad=bias_learns) if bias else None
    return choose(*heads, added), explain(*heads, added)


@pytest.mark.parametrize(
    ("asked", "form", "backend", "said"),
    [
        ({}, "fused", "efficient", "a learnt bias, whose gradient cuDNN does not give"),
        ({"dtype": torch.float32}, "fused", "efficient", "a learnt bias"),
        ({"bias_learns": False}, "fused", "efficient", "a fixed bias, without cuDNN"),
        ({"heads_learn": False, "bias_learns": False}, "fused", "efficient", "a fixed bias"),
        ({"heads_learn": False}, "fused", "math", "the bias alone needs a gradient"),
        ({"width": 20}, "fused", "math", "heads of 20 channels are no multiple of 8"),
        ({"dtype": torch.float64}, "fused", "math", "torch.float64 is computed by no other kernel"),
        ({"bias": False}, "fused", None, "it takes its fastest"),
    ],
)
def test_the_choice_on_a_gpu_and_its_reason(asked, form, backend, said):
    choice, line = chosen(**asked)
    assert (choice.form, choice.backend) == (form, backend)
    assert said in choice.reason
    assert line.startswith(f"{form} attention" + (f", held to {backend}: " if backend else ": "))


def test_a_bias_whose_gradient_nobody_takes_counts_as_fixed():
    with torch.no_grad():
        assert chosen(heads_learn=False)[0].backend == "efficient"


def test_the_choice_on_a_cpu():
    tensors = inputs(1, 2, 6, 6, 4)
    assert choose(*tensors).form == "explicit"
    assert explain(*tensors).startswith("explicit attention: on a CPU one form serves all")


def test_the_default_runs_what_is_chosen(monkeypatch):
    monkeypatch.setattr("models.attention.explicit_attention", lambda *_, scale: ("explicit", scale))
    monkeypatch.setattr("models.attention.fused_attention", lambda *_, scale: ("fused", scale))
    tensors = inputs(1, 2, 6, 6, 4)
    assert DEFAULT_OPS.attention(*tensors, scale=0.5) == ("explicit", 0.5)
    assert DEFAULT_OPS.attention(*(tensor.to("meta") for tensor in tensors), scale=0.5) == ("fused", 0.5)


@pytest.mark.parametrize(("heads_learn", "expected"), [(True, "EFFICIENT_ATTENTION"), (False, "MATH")])
def test_pytorch_is_held_to_the_chosen_kernel(monkeypatch, heads_learn, expected):
    from torch.nn import attention as kernels

    held = []
    real = kernels.sdpa_kernel

    def recording(backends, *rest):
        held.append(backends[0].name)
        return real(backends, *rest)

    monkeypatch.setattr("models.attention.sdpa_kernel", recording)
    *heads, bias = inputs(1, 2, 6, 6, 8, dtype=torch.float32)
    heads = [tensor.detach().requires_grad_(heads_learn) for tensor in heads]
    fused_attention(*heads, bias, scale=0.5)
    assert held == [expected]


# On a GPU.


@needs_gpu
@pytest.mark.parametrize("learnt", [True, False])
@pytest.mark.parametrize("num_tokens", [*SWIN, *VIT])
def test_the_chosen_form_on_a_gpu(num_tokens, learnt):
    check_as_models_have_it(attention, num_tokens, learnt, "cuda")


@needs_gpu
def test_a_bias_that_alone_needs_a_gradient_on_a_gpu():
    *heads, bias = (t.detach().bfloat16() for t in inputs(4, 2, 197, 197, 64, device="cuda"))
    exact = bias.double().requires_grad_()
    bias.requires_grad_()
    weight = torch.randn(heads[0].shape, device="cuda")
    (found,) = torch.autograd.grad((attention(*heads, bias, scale=0.125) * weight).sum(), bias)
    doubled = (tensor.double() for tensor in heads)
    out = explicit_attention(*doubled, exact, scale=0.125)
    (expected,) = torch.autograd.grad((out * weight).sum(), exact)
    # Sums over images of products of 8 bits.
    assert relative_error(found, expected) < 2e-2


@needs_gpu
@pytest.mark.parametrize("num_tokens", [64, 197])
def test_flex_attention_learns_its_bias_on_a_gpu(num_tokens):
    check_as_models_have_it(torch.compile(flex_attention), num_tokens, True, "cuda")
