"""Which form of attention is fastest at the shapes of the models, and how exact is each?

    python -m benchmarks.attention            writes results/attention-DEVICE.json
    python -m benchmarks.attention --smoke    tiny, in seconds, written nowhere

Every case is one layer's attention at a batch of one GPU, forward and backward, with the bias that its model
has: learnt (a student), fixed (a teacher) or none. The forms are those of ``models.attention``, and PyTorch's
kernels one by one where they take the case. ``error`` is the largest relative L2 error of the values and the
gradients against float64, on a few images; ``chosen`` is what ``models.attention.choose`` takes.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import clock, record
from benchmarks.clock import Protocol
from models.attention import (
    Attention,
    attention,
    choose,
    explain,
    explicit_attention,
    flex_attention,
    fused_attention,
)

GPU = Protocol(warm_up=5, runs=20, passes=2)
CPU = Protocol(warm_up=1, runs=5, passes=2)
DTYPE = {"cuda": torch.bfloat16, "cpu": torch.float32}
EXACT_IMAGES = 2
KERNELS = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
}


@dataclass(frozen=True)
class Case:
    """The attention of one layer."""

    name: str
    batch: int
    heads: int
    num_tokens: int
    width: int
    bias: str
    """``learnt``, ``fixed`` or ``none``."""

    def tensors(self, device: str, dtype: torch.dtype, batch: int) -> list[Tensor | None]:
        """Query, key, value, which need gradients, and the bias."""
        generator = torch.Generator(device).manual_seed(0)

        def drawn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        shape = (batch, self.heads, self.num_tokens, self.width)
        qkv = [drawn(*shape).to(dtype).requires_grad_() for _ in range(3)]
        if self.bias == "none":
            return [*qkv, None]
        bias = drawn(1, self.heads, self.num_tokens, self.num_tokens)
        return [
            *qkv,
            bias.to(torch.promote_types(dtype, torch.float32)).requires_grad_(self.bias == "learnt"),
        ]


def cases(share: int) -> list[Case]:
    """Layers of the models at a batch of one GPU, divided by ``share``: windows are further images."""
    layers = [
        ("ViT-B/16", 256, 12, 197, 64),
        ("ViT-L/14", 128, 16, 257, 64),
        ("SwinV2-B stage 1, window 16", 128 * 16, 4, 256, 32),
        ("SwinV2-B stage 4, window 8", 128, 32, 64, 32),
        ("SwinV2-G stage 3, window 16", 32, 64, 256, 32),
        ("window 7", 2048, 12, 49, 32),
        ("window 12", 512, 12, 144, 32),
        ("window 12 x 16", 512, 12, 192, 32),
    ]
    found = [
        Case(name, max(batch // share, 1), heads, num_tokens, width, "learnt")
        for name, batch, heads, num_tokens, width in layers
    ]
    vit = layers[0]
    return [*found, *(Case(vit[0], max(vit[1] // share, 1), *vit[2:], bias) for bias in ("fixed", "none"))]


TINY = [Case("tiny", 2, 2, 9, 8, bias) for bias in ("learnt", "fixed", "none")]


def forms(case: Case, device: str) -> dict[str, Attention]:
    """The forms to compare; a kernel that does not take the case says so when it is run."""
    found: dict[str, Attention] = {"chosen": attention, "explicit": explicit_attention}
    if device != "cuda":
        return found | {"scaled dot product": fused_attention}
    found["FlexAttention"] = torch.compile(flex_attention)
    found["explicit, compiled"] = torch.compile(explicit_attention)
    return found | {name: held_to(backend) for name, backend in KERNELS.items()}


def held_to(backend: SDPBackend) -> Attention:
    """The scaled dot product by one kernel of PyTorch, or an error."""

    def run(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, *, scale: float) -> Tensor:
        with sdpa_kernel([backend]):
            mask = None if bias is None else bias.to(query.dtype)
            return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)

    return run


def results(form: Attention, tensors: Sequence[Tensor | None], scale: float) -> list[Tensor]:
    """The values, and the gradients of all that need one."""
    query, key, value, bias = tensors
    assert query is not None and key is not None and value is not None  # noqa: PT018 - for mypy
    out = form(query, key, value, bias, scale=scale)
    leaves = [tensor for tensor in tensors if tensor is not None and tensor.requires_grad]
    return [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))]


def measure(
    given: Sequence[Case],
    device: str,
    protocol: Protocol,
    keep: Callable[[dict[str, Any]], object] = lambda found: None,
) -> dict[str, Any]:
    """A row for each case and form; ``keep`` is handed what there is after each case."""
    found: dict[str, Any] = {
        "question": "attention of one layer, forward and backward, by form",
        "device": device,
        "dtype": str(DTYPE[device]),
        "protocol": asdict(protocol),
        "results": [],
        "left_out": [],
    }
    for case in clock.in_time(given, lambda case: f"{case.name}, bias {case.bias}", found["left_out"]):
        found["results"] += compare(case, device, protocol)
        keep(found)
    keep(found)
    return found


def compare(case: Case, device: str, protocol: Protocol) -> list[dict[str, Any]]:
    """A row for each form; where a kernel refuses the case, why."""
    torch.compiler.reset()  # one compilation per case, for its shape alone
    dtype, scale = DTYPE[device], case.width**-0.5
    tensors = case.tensors(device, dtype, case.batch)
    few = case.tensors(device, dtype, min(EXACT_IMAGES, case.batch))
    exact = [None if x is None else x.detach().double().requires_grad_(x.requires_grad) for x in few]
    expected = results(explicit_attention, exact, scale)
    query, key, value, bias = tensors
    assert query is not None and key is not None and value is not None  # noqa: PT018 - for mypy
    choice = choose(query, key, value, bias)
    rows = []
    for name, form in forms(case, device).items():
        row = asdict(case) | {"form": name}
        try:
            found = results(form, few, scale)
            times = clock.timed(lambda form=form: results(form, tensors, scale), device, protocol)
            peak = clock.peak_bytes(lambda form=form: results(form, tensors, scale), device)
        except RuntimeError as error:
            rows.append(row | {"left_out": str(error).splitlines()[0][:200]})
            continue
        errors = [
            ((got.double() - want).norm() / want.norm()).item()
            for got, want in zip(found, expected, strict=True)
        ]
        row |= {"forward_and_backward_us": times, "extra_memory_mib": round(peak / 2**20, 2)}
        row |= {"error": max(errors), "finite": all(bool(got.isfinite().all()) for got in found)}
        if name == "chosen":
            row |= {"form_chosen": choice.form, "why": explain(query, key, value, bias)}
        rows.append(row)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and write unless it was only a look."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, seconds; writes nothing")
    clock.add_within(parser)
    asked = parser.parse_args(arguments)
    clock.begin(asked.within)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    protocol = clock.SMOKE if asked.smoke else {"cuda": GPU, "cpu": CPU}[device]

    def keep(found: dict[str, Any]) -> None:
        if not asked.smoke:
            record.write(f"attention-{device}", found | {"load_average": round(os.getloadavg()[0], 1)})

    found = measure(TINY if asked.smoke else cases(1 if device == "cuda" else 64), device, protocol, keep)
    for row in found["results"]:
        said = row.get("left_out") or (
            f"{row['forward_and_backward_us']['median']:11.1f} us {row['extra_memory_mib']:9.1f} MiB, "
            f"error {row['error']:.1e}"
        )
        print(f"{row['name']:28} {row['num_tokens']:4} {row['bias']:7} {row['form']:20} {said}")
    for line in clock.named(found["left_out"]):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
