"""How fast is the fused loss? Ours, eager PyTorch and torch.compile, against what the device can copy.

    python -m benchmarks.loss              writes results/loss-DEVICE.json; about two minutes on a GPU
    python -m benchmarks.loss --chunked    the loss in pieces: results/loss_chunked-DEVICE.json
    ... --smoke                            tiny, in seconds, written nowhere

Every case is a map of features as a teacher gives it, bfloat16 on a GPU and float32 on a CPU. Device time is
that of CUDA graphs, which hold forward and backward over several sets of random features, together larger
than any L2 cache; ``call_us`` is the time of plain calls, where launches from the host count. Medians and
quantiles are over all runs (``clock.py``). At last the gradients are filled with NaN, computed again and
compared with those of eager float32.

GB/s counts the bytes that must move, 6 per element in bfloat16, less what is masked. The ceiling is the best
of two copies of a large buffer, reads and writes counted, before and after all cases.

``--chunked`` sets the loss in pieces (``fd_scale.objective.chunked``), projectors and their gradients
included, against the same with whole maps: time, and the most memory held beyond what was there before.

Shape letters: B images, N tokens, C channels.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import clock, record
from benchmarks.clock import Protocol
from fd_scale.objective import Objective, kernels, whitened_smooth_l1
from fd_scale.objective.chunked import ChunkedLoss
from fd_scale.objective.losses import Normaliser
from fd_scale.run import recipe as recipes
from models.projector import Projector

Keep = Callable[[dict[str, Any]], object]

SETS_BYTES = {"cuda": 2**30, "cpu": 2**26}
"""Prediction and teacher of all sets of a case; more than any cache."""

COPY_BYTES = {"cuda": 2**30, "cpu": 2**28}
"""Buffer whose copy is the ceiling."""

DTYPE = {"cuda": torch.bfloat16, "cpu": torch.float32}
CPU = Protocol(warm_up=1, runs=5, passes=2)

Pair = tuple[Tensor, Tensor]
Step = Callable[[Tensor, Tensor, "Case"], Tensor]


@dataclass(frozen=True)
class Case:
    """One teacher's map, and how its tokens count: all alike, by a weight, or some of them only."""

    name: str
    shape_BNC: tuple[int, int, int]
    weight_N: Tensor | None = None
    mask_N: Tensor | None = None

    def num_bytes(self, dtype: torch.dtype) -> int:
        """What must move: two reads where a token is kept, a write everywhere."""
        batch, num_tokens, width = self.shape_BNC
        kept = num_tokens if self.mask_N is None else int(self.mask_N.sum())
        return dtype.itemsize * batch * width * (2 * kept + num_tokens)


def cases(device: str, share: int) -> list[Case]:
    """Maps of the paper's teachers at a batch of one GPU divided by ``share``, the first of them also
    weighted and masked."""
    weight_N = torch.ones(197, device=device)
    weight_N[0] = 10.0
    mask_N = torch.arange(197, device=device) % 4 == 0
    vit_b = (256 // share, 197, 768)
    return [
        Case("ViT-B/16", vit_b),
        Case("ViT-B/16, class token x10", vit_b, weight_N=weight_N),
        Case("ViT-B/16, 3 of 4 tokens masked", vit_b, mask_N=mask_N),
        Case("ViT-L/14", (128 // share, 257, 1024)),
        Case("SwinV2-G 256", (max(32 // share, 1), 64, 4096)),
    ]


def tiny_cases(device: str) -> list[Case]:
    """One of each kind, for a look at whether they run."""
    mask_N = torch.tensor([True, False, False, True], device=device)
    weight_N = torch.tensor([10.0, 1, 1, 1], device=device)
    shape = (2, 4, 8)
    return [Case("plain", shape), Case("weighted", shape, weight_N), Case("masked", shape, None, mask_N)]


def fused(prediction_BNC: Tensor, teacher_BNC: Tensor, case: Case) -> Tensor:
    """Our kernel; on a CPU the plain form of its operator."""
    return kernels.whitened_smooth_l1(
        prediction_BNC, teacher_BNC, token_weight=case.weight_N, token_mask=case.mask_N
    ).value


def public(prediction_BNC: Tensor, teacher_BNC: Tensor, case: Case) -> Tensor:
    """``fd_scale.objective``'s loss, whatever it runs here; it takes a mask as weights."""
    weight_N: Tensor | None = case.weight_N
    normaliser: Normaliser = "mean"
    if case.mask_N is not None:
        weight_N, normaliser = case.mask_N, "weighted_mean"
    return whitened_smooth_l1(prediction_BNC, teacher_BNC, token_weight=weight_N, normaliser=normaliser)


def eager(prediction_BNC: Tensor, teacher_BNC: Tensor, case: Case) -> Tensor:
    """The loss as autocast runs it: whitening and smooth L1 in float32."""
    predicted_BNC, teacher_BNC = prediction_BNC.float(), teacher_BNC.float()
    target_BNC = F.layer_norm(teacher_BNC, teacher_BNC.shape[-1:])
    if case.weight_N is not None:
        loss_BNC = F.smooth_l1_loss(predicted_BNC, target_BNC, beta=2.0, reduction="none")
        return (loss_BNC * case.weight_N[:, None]).mean()
    if case.mask_N is not None:
        loss_BNC = F.smooth_l1_loss(predicted_BNC, target_BNC, beta=2.0, reduction="none")
        return (loss_BNC * case.mask_N[:, None]).sum() / (case.mask_N.sum() * loss_BNC[:, 0].numel())
    return F.smooth_l1_loss(predicted_BNC, target_BNC, beta=2.0)


def measure(
    device: str, protocol: Protocol, given: Sequence[Case], sets_bytes: int, keep: Keep = lambda found: None
) -> dict[str, Any]:
    """All cases and implementations as plain values for a results file; ``keep`` is handed what there is
    after each case."""
    copied = max(min(sets_bytes, COPY_BYTES[device]), 2**16)
    ceilings = [clock.copy_gb_per_s(device, protocol, copied)]
    found: dict[str, Any] = {
        "question": "whitened smooth L1, forward and backward: ours, compiled, eager",
        "device": device,
        "dtype": str(DTYPE[device]),
        "protocol": asdict(protocol) | {"features_bytes": sets_bytes},
        "copy_gb_per_s": [],
        "results": [],
        "left_out": [],
    }

    def so_far() -> None:
        found["copy_gb_per_s"] = [round(ceiling, 1) for ceiling in ceilings]
        for row in found["results"]:
            row["share_of_copy"] = round(row["gb_per_s"] / max(ceilings), 4)
        keep(found)

    for case in clock.in_time(given, lambda case: case.name, found["left_out"]):
        found["results"] += compare(case, device, protocol, sets_bytes)
        so_far()
    ceilings.append(clock.copy_gb_per_s(device, protocol, copied))
    so_far()
    return found


def compare(case: Case, device: str, protocol: Protocol, sets_bytes: int) -> list[dict[str, Any]]:
    """One row per implementation, with how many times the fused loss is faster than it."""
    sets = features(case.shape_BNC, device, sets_bytes)
    expected = gradients(eager, sets, case)
    torch.compiler.reset()  # one compilation per case, for its shape alone
    steps = {"fused": fused, "public": public, "eager": eager}
    if device == "cuda":  # on a CPU inductor asks for a C++ compiler
        steps["torch.compile"] = torch.compile(eager, fullgraph=True, dynamic=False)
    rows = []
    for name, step in steps.items():
        times, found = measured(step, sets, case, device, protocol)
        device_us = times["forward_and_backward_us"]["median"]
        rows.append(
            {
                "case": case.name,
                "shape": list(case.shape_BNC),
                "implementation": name,
                **times,
                "gb_per_s": round(case.num_bytes(DTYPE[device]) / device_us / 1e3, 3),
                "gradient_error_against_eager": largest_error(found, expected),
            }
        )
    for row in rows:
        fastest_us = rows[0]["forward_and_backward_us"]["median"]
        row["fused_is_faster"] = round(row["forward_and_backward_us"]["median"] / fastest_us, 3)
    return rows


def features(shape_BNC: tuple[int, int, int], device: str, sets_bytes: int) -> list[Pair]:
    """Predictions, which require a gradient, and teachers: as many pairs as fill ``sets_bytes``, at least
    two."""
    generator = torch.Generator(device).manual_seed(0)
    pair_bytes = 2 * DTYPE[device].itemsize * math.prod(shape_BNC)
    count = max(2, math.ceil(sets_bytes / pair_bytes))

    def drawn(mean: float) -> Tensor:
        return (torch.randn(shape_BNC, generator=generator, device=device) + mean).to(DTYPE[device])

    return [(drawn(0.0).requires_grad_(), drawn(3.0)) for _ in range(count)]


def gradients(step: Step, sets: Iterable[Pair], case: Case) -> list[Tensor]:
    """One forward and backward per pair."""
    return [torch.autograd.grad(step(p_BNC, t_BNC, case), p_BNC)[0] for p_BNC, t_BNC in sets]


def measured(
    step: Step, sets: Sequence[Pair], case: Case, device: str, protocol: Protocol
) -> tuple[dict[str, Any], list[Tensor]]:
    """Times per pair and memory, and the gradients of one last time over poisoned outputs."""
    memory = clock.peak_bytes(lambda: gradients(step, sets[:1], case), device)
    count = len(sets)
    calls = clock.timed(lambda: gradients(step, sets, case), device, protocol, calls=count)
    forward, _ = clock.captured(lambda: [step(p_BNC, t_BNC, case) for p_BNC, t_BNC in sets], device)
    forward_us = clock.timed(forward, device, protocol, calls=count)
    both, outputs = clock.captured(lambda: gradients(step, sets, case), device)
    both_us = clock.timed(both, device, protocol, calls=count)
    for gradient in outputs:
        gradient.fill_(math.nan)
    both()
    times = {
        "forward_us": forward_us,
        "forward_and_backward_us": both_us,
        "call_us": calls,
        "extra_memory_mib": round(memory / 2**20, 3),
    }
    return times, outputs


def largest_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest relative L2 error over the pairs; NaN where an output was not written."""
    errors = [
        ((got.float() - wanted.float()).norm() / wanted.float().norm()).item()
        for got, wanted in zip(found, expected, strict=True)
    ]
    return max(errors, key=lambda error: math.inf if math.isnan(error) else error)


@dataclass(frozen=True)
class Heads:
    """A student's map and the teachers that it is projected for."""

    name: str
    shape_BND: tuple[int, int, int]
    widths: tuple[int, ...]
    chunks: tuple[int, ...]
    """Tokens of a piece."""


def heads_cases(share: int) -> list[Heads]:
    """One head, three, and one of a long map (1024 pixels in patches of 16)."""
    chunks = (4096, 16384, 65536) if share == 1 else (128, 512, 2048)
    return [
        Heads("ViT-B/16, 1 head", (256 // share, 197, 768), (768,), chunks),
        Heads("ViT-B/16, 3 heads", (256 // share, 197, 768), (768, 1024, 1536), chunks),
        Heads("ViT-L/16 at 1024 px, 1 head", (max(32 // share, 1), 4097, 1024), (1024,), chunks),
    ]


TINY_HEADS = [Heads("tiny, 2 heads", (3, 5, 8), (16, 12), (4,))]


def measure_chunked(
    device: str, protocol: Protocol, given: Sequence[Heads], keep: Keep = lambda found: None
) -> dict[str, Any]:
    """Whole maps and pieces side by side: time, memory, and how far the gradients differ; ``keep`` as in
    ``measure``."""
    found: dict[str, Any] = {
        "question": "projectors and loss, forward and backward: whole maps, or some tokens at a time",
        "device": device,
        "dtype": str(DTYPE[device]),
        "protocol": asdict(protocol),
        "results": [],
        "left_out": [],
    }
    for heads in clock.in_time(given, lambda heads: heads.name, found["left_out"]):
        found["results"] += compare_heads(heads, device, protocol)
        keep(found)
    keep(found)
    return found


def compare_heads(heads: Heads, device: str, protocol: Protocol) -> list[dict[str, Any]]:
    """A row for whole maps, and one for each size of pieces."""
    dtype, (batch, num_tokens, width) = DTYPE[device], heads.shape_BND
    torch.manual_seed(0)
    tokens_BND = torch.randn(heads.shape_BND, device=device).to(dtype).requires_grad_()
    taught = [torch.randn(batch, num_tokens, c, device=device).to(dtype) for c in heads.widths]
    projectors = [
        Projector(width, c, from_grid=(1, 1), to_grid=(1, 1), num_prefix_tokens=0, resample="exact")
        for c in heads.widths
    ]
    projectors = [projector.to(device, dtype) for projector in projectors]
    leaves = [tokens_BND, *(p for projector in projectors for p in projector.parameters())]
    objective = Objective(recipes.Objective())
    valid_B = torch.ones(batch, dtype=torch.bool, device=device)

    def whole() -> tuple[Tensor, ...]:
        predicted = [projector(tokens_BND) for projector in projectors]
        loss = objective(predicted, taught, valid_B)
        del predicted
        return torch.autograd.grad(loss, leaves)

    def in_pieces(chunk_tokens: int) -> Callable[[], tuple[Tensor, ...]]:
        loss = ChunkedLoss(objective, taught, valid_B, chunk_tokens)
        return lambda: torch.autograd.grad(loss(tokens_BND, projectors), leaves)

    works: dict[str, Callable[[], tuple[Tensor, ...]]] = {"whole": whole}
    works |= {str(chunk): in_pieces(chunk) for chunk in heads.chunks}
    times = clock.interleaved(dict(works), device, protocol)
    expected = whole()
    rows = []
    for name, work in works.items():
        memory = clock.peak_bytes(work, device)
        rows.append(
            {
                "case": heads.name,
                "shape": list(heads.shape_BND),
                "widths": list(heads.widths),
                "chunk_tokens": None if name == "whole" else int(name),
                "forward_and_backward_us": times[name],
                "extra_memory_mib": round(memory / 2**20, 3),
                "gradient_difference": largest_error(work(), expected),
            }
        )
    for row in rows:
        row["time_over_whole"] = round(
            times[str(row["chunk_tokens"] or "whole")]["median"] / times["whole"]["median"], 3
        )
        row["memory_over_whole"] = round(row["extra_memory_mib"] / max(rows[0]["extra_memory_mib"], 1e-9), 3)
    return rows


def lines(found: dict[str, Any]) -> list[str]:
    """The results for a terminal."""
    said = []
    for row in found["results"]:
        us, memory = row["forward_and_backward_us"]["median"], f"{row['extra_memory_mib']:9.1f} MiB"
        if "chunk_tokens" in row:
            pieces = "whole maps" if row["chunk_tokens"] is None else f"{row['chunk_tokens']} tokens"
            ratio = f"{row['time_over_whole']:.2f} of the time, {row['memory_over_whole']:.2f} of the memory"
            said.append(f"{row['case']:32} {pieces:14} {us:11.1f} us {memory}, {ratio}")
        else:
            rest = f"{row['share_of_copy']:7.1%} of copy {memory}, ours {row['fused_is_faster']} x as fast"
            said.append(f"{row['case']:32} {row['implementation']:14} {us:11.1f} us {rest}")
    return said


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and write unless it was only a look."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chunked", action="store_true", help="the loss in pieces against whole maps")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, seconds; writes nothing")
    clock.add_within(parser)
    asked = parser.parse_args(arguments)
    clock.begin(asked.within)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    protocol = clock.SMOKE if asked.smoke else {"cuda": clock.FULL, "cpu": CPU}[device]
    share = 1 if device == "cuda" else 64
    name = f"loss{'_chunked' if asked.chunked else ''}-{device}"

    def keep(found: dict[str, Any]) -> None:
        if not asked.smoke:
            record.write(name, found | {"load_average": round(os.getloadavg()[0], 1)})

    if asked.chunked:
        found = measure_chunked(device, protocol, TINY_HEADS if asked.smoke else heads_cases(share), keep)
    elif asked.smoke:
        found = measure(device, protocol, tiny_cases(device), 1, keep)
    else:
        found = measure(device, protocol, cases(device, share), SETS_BYTES[device], keep)
    print(*lines(found), *clock.named(found["left_out"]), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
