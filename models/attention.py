"""How is softmax attention with a position bias computed, and why so? Its forms, and the one choice between
them.

``attention`` is what architectures call: it asks ``choose`` and runs the form that it names. ``explain`` says
in a sentence what was chosen and why. The choice looks at devices, dtypes, shapes and at what needs a
gradient, never at values, so that it waits for nothing and traces under ``torch.compile``.

Every attention of this package has one shape, ``softmax(scale * q k^T + bias) v``: a shared table of relative
positions is a bias (1, H, N, N) that all blocks are handed; scaled cosine attention is unit queries and keys,
the queries multiplied by the logit scale of their head, and ``scale=1``.

Shapes: B batch, H heads, N query tokens, M key tokens, D width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.errors import ModelError

ALIGNMENT = 8
"""Elements of a head's width of which the memory-efficient kernel needs a multiple."""

HALVES = (torch.bfloat16, torch.float16)


class Attention(Protocol):
    """Softmax attention with an optional additive bias: ``softmax(scale * q k^T + bias) v``."""

    def __call__(
        self, query_BHND: Tensor, key_BHMD: Tensor, value_BHMD: Tensor, bias: Tensor | None, *, scale: float
    ) -> Tensor:
        """(B, H, N, D) in the query's dtype. ``bias`` broadcasts to (B, H, N, M), in any floating dtype; it
        may need a gradient. ``scale`` multiplies the logits before the bias is added."""


@dataclass(frozen=True)
class Choice:
    """``form`` is the function that computes, ``backend`` the kernel of PyTorch's scaled dot product that it
    is held to, None where there is none to hold; ``reason`` says in a sentence why."""

    form: Literal["explicit", "fused"]
    backend: Literal["efficient", "math"] | None
    reason: str


def explicit_attention(
    query_BHND: Tensor, key_BHMD: Tensor, value_BHMD: Tensor, bias: Tensor | None, *, scale: float
) -> Tensor:
    """``Attention`` written out, the reference of the other forms. The bias and the softmax are in float32
    for half-precision inputs, else in the input's own dtype."""
    logits_BHNM = (query_BHND * scale) @ key_BHMD.transpose(-2, -1)
    logits_BHNM = logits_BHNM.to(torch.promote_types(logits_BHNM.dtype, torch.float32))
    if bias is not None:
        logits_BHNM = logits_BHNM + bias
    return logits_BHNM.softmax(dim=-1).to(value_BHMD.dtype) @ value_BHMD


def fused_attention(
    query_BHND: Tensor, key_BHMD: Tensor, value_BHMD: Tensor, bias: Tensor | None, *, scale: float
) -> Tensor:
    """``Attention`` by PyTorch's scaled dot product, with the bias cast to the query's dtype and the kernel
    that ``choose`` names for these tensors, were they on a GPU."""
    if bias is None:
        return F.scaled_dot_product_attention(query_BHND, key_BHMD, value_BHMD, scale=scale)
    # "math" stands behind, for what the memory-efficient kernel refuses on an older GPU, and on a CPU.
    pinned = [SDPBackend.MATH]
    if _bias_backend(query_BHND, key_BHMD, value_BHMD, bias).backend == "efficient":
        pinned.insert(0, SDPBackend.EFFICIENT_ATTENTION)
    with sdpa_kernel(pinned):
        return F.scaled_dot_product_attention(
            query_BHND, key_BHMD, value_BHMD, attn_mask=bias.to(query_BHND.dtype), scale=scale
        )


def flex_attention(
    query_BHND: Tensor, key_BHMD: Tensor, value_BHMD: Tensor, bias: Tensor | None, *, scale: float
) -> Tensor:
    """``Attention`` by PyTorch's FlexAttention, which ``choose`` never takes: hand it in by ``Ops``.

    Compile what contains it: uncompiled, it writes the scores out. It has no backward pass on a CPU, and on a
    GPU it adds up the gradient of the bias by atomic operations, in an order that varies from run to run. The
    bias must be the same for all images. Raises ``ModelError`` where these two are not met.
    """
    # Imported here: it takes seconds, and nothing else needs it.
    from torch.nn.attention.flex_attention import flex_attention as flex

    if bias is None:
        return flex(query_BHND, key_BHMD, value_BHMD, scale=scale)
    heads, num_queries, num_keys = query_BHND.shape[1], query_BHND.shape[2], key_BHMD.shape[2]
    if bias.ndim == 4 and bias.shape[0] != 1:
        raise ModelError(
            f"a bias of shape {tuple(bias.shape)} differs from image to image, which flex_attention is not "
            "written for: use models.attention.attention"
        )
    learnt = any(tensor.requires_grad for tensor in (query_BHND, key_BHMD, value_BHMD, bias))
    if query_BHND.device.type == "cpu" and learnt:
        raise ModelError("flex_attention has no backward pass on a CPU: use models.attention.attention there")
    bias_HNM = bias.reshape(bias.shape[-3:]).expand(heads, num_queries, num_keys)

    def with_bias(score: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + bias_HNM[h, query, key]

    return flex(query_BHND, key_BHMD, value_BHMD, score_mod=with_bias, scale=scale)


def choose(query_BHND: Tensor, key_BHMD: Tensor, value_BHMD: Tensor, bias: Tensor | None) -> Choice:
    """What computes the attention of these tensors, and why."""
    if query_BHND.device.type == "cpu":
        return Choice("explicit", None, "on a CPU one form serves all: the fused one is slower with a bias")
    if bias is None:
        return Choice(
            "fused", None, "without a bias every kernel of PyTorch is sound, and it takes its fastest"
        )
    return _bias_backend(query_BHND, key_BHMD, value_BHMD, bias)


def explain(query_BHND: Tensor, key_BHMD: Tensor, value_BHMD: Tensor, bias: Tensor | None) -> str:
    """The choice in a line, for logs and reports."""
    choice = choose(query_BHND, key_BHMD, value_BHMD, bias)
    held = "" if choice.backend is None else f", held to {choice.backend}"
    return f"{choice.form} attention{held}: {choice.reason}"


def attention(
    query_BHND: Tensor, key_BHMD: Tensor, value_BHMD: Tensor, bias: Tensor | None, *, scale: float
) -> Tensor:
    """``Attention``, by the form that ``choose`` names."""
    explicit = choose(query_BHND, key_BHMD, value_BHMD, bias).form == "explicit"
    form = explicit_attention if explicit else fused_attention
    return form(query_BHND, key_BHMD, value_BHMD, bias, scale=scale)


def _bias_backend(query_BHND: Tensor, key_BHMD: Tensor, value_BHMD: Tensor, bias: Tensor) -> Choice:
    """The kernel for an attention with a bias.

    Left to itself PyTorch may take cuDNN, which misreads a bias of another dtype (pytorch #191612), gives the
    bias no gradient, and on Hopper returned NaN gradients where the tokens fill half a block of 128, as a
    window of 8 x 8 does (#196678). The memory-efficient kernel has none of these faults, and one of its own:
    an illegal access where of all inputs the bias alone needs a gradient (#188302, #148476).
    """
    inputs = (query_BHND, key_BHMD, value_BHMD)
    if query_BHND.dtype not in (*HALVES, torch.float32):
        return Choice("fused", "math", f"{query_BHND.dtype} is computed by no other kernel")
    if query_BHND.shape[-1] % ALIGNMENT or value_BHMD.shape[-1] % ALIGNMENT:
        return Choice(
            "fused",
            "math",
            f"heads of {query_BHND.shape[-1]} channels are no multiple of {ALIGNMENT}, which the "
            "memory-efficient kernel needs",
        )
    learnt = torch.is_grad_enabled() and bias.requires_grad
    if learnt and not any(tensor.requires_grad for tensor in inputs):
        return Choice(
            "fused",
            "math",
            "the bias alone needs a gradient, at which the memory-efficient kernel crashes",
        )
    what = "a learnt bias, whose gradient cuDNN does not give" if learnt else "a fixed bias, without cuDNN"
    return Choice("fused", "efficient", what)
