"""How fast is the fused loss? Ours, eager PyTorch and torch.compile, against what the card can copy.

    python -m benchmarks.loss        writes results/loss.json; needs a CUDA device, about two minutes

Every case is a map of bfloat16 features as a teacher gives it. Device time is that of CUDA graphs, which
hold forward and backward over several sets of random features, together larger than any L2 cache;
``call_us`` is the time of plain calls, where launches from the host count. Ten runs warm up, fifty are
timed with events; median and 20 / 80 % quantiles are over those, and everything is timed twice. At last
the gradients are filled with NaN, replayed and compared with those of eager float32.

GB/s counts the bytes that must move, 6 per element, less what is masked. The ceiling is the best of two
copies of a buffer of 1 GiB, reads and writes counted, before and after all cases.

Shape letters: B images, N tokens, C channels.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import record
from fd_scale.objective import kernels

WARM_UP, RUNS, PASSES = 10, 50, 2
SETS_BYTES = 2**30
"""Prediction and teacher of all sets of a case."""

COPY_BYTES = 2**30
"""Buffer whose copy is the ceiling."""

NO_GPU = "benchmarks/loss.py times a GPU, and this machine has no CUDA device: run it where there is one"

Pair = tuple[Tensor, Tensor]
Step = Callable[[Tensor, Tensor, "Case"], Tensor]


@dataclass(frozen=True)
class Case:
    """One teacher's map, and how its tokens count: all alike, by a weight, or some of them only."""

    name: str
    shape_BNC: tuple[int, int, int]
    weight_N: Tensor | None = None
    mask_N: Tensor | None = None

    def num_bytes(self) -> int:
        """What must move: two reads where a token is kept, a write everywhere, all in bfloat16."""
        batch, num_tokens, width = self.shape_BNC
        kept = num_tokens if self.mask_N is None else int(self.mask_N.sum())
        return 2 * batch * width * (2 * kept + num_tokens)


def cases(device: str) -> list[Case]:
    """Maps of the paper's teachers at a batch of one GPU, the first of them also weighted and masked."""
    weight_N = torch.ones(197, device=device)
    weight_N[0] = 10.0
    mask_N = torch.arange(197, device=device) % 4 == 0
    return [
        Case("ViT-B/16", (256, 197, 768)),
        Case("ViT-B/16, class token x10", (256, 197, 768), weight_N=weight_N),
        Case("ViT-B/16, 3 of 4 tokens masked", (256, 197, 768), mask_N=mask_N),
        Case("ViT-L/14", (128, 257, 1024)),
        Case("SwinV2-G 256", (32, 64, 4096)),
    ]


def fused(prediction_BNC: Tensor, teacher_BNC: Tensor, case: Case) -> Tensor:
    """Our kernel."""
    return kernels.whitened_smooth_l1(
        prediction_BNC, teacher_BNC, token_weight=case.weight_N, token_mask=case.mask_N
    ).value


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


def measure(device: str = "cuda") -> dict[str, Any]:
    """All cases and implementations as plain values for a results file."""
    ceilings = [copy_gb_per_s(device)]
    results = [row for case in cases(device) for row in compare(case, device)]
    ceilings.append(copy_gb_per_s(device))
    for row in results:
        row["share_of_copy"] = round(row["gb_per_s"] / max(ceilings), 4)
    return {
        "question": "whitened smooth L1 in bfloat16, forward and backward: fused, compiled, eager",
        "protocol": {"warm_up": WARM_UP, "runs": RUNS, "passes": PASSES, "features_bytes": SETS_BYTES},
        "copy_gb_per_s": [round(ceiling, 1) for ceiling in ceilings],
        "results": results,
    }


def compare(case: Case, device: str) -> list[dict[str, Any]]:
    """One row per implementation, with how many times the fused loss is faster than it."""
    sets = features(case.shape_BNC, device)
    expected = gradients(eager, sets, case)
    torch.compiler.reset()  # one compilation per case, for its shape alone
    compiled = torch.compile(eager, fullgraph=True, dynamic=False)
    rows = []
    for name, step in (("fused", fused), ("torch.compile", compiled), ("eager", eager)):
        times, found = measured(step, sets, case)
        device_us = times["forward_and_backward_us"]["median"]
        rows.append(
            {
                "case": case.name,
                "shape": list(case.shape_BNC),
                "implementation": name,
                **times,
                "gb_per_s": round(case.num_bytes() / device_us / 1e3, 1),
                "gradient_error_against_eager": largest_error(found, expected),
            }
        )
    for row in rows:
        fastest_us = rows[0]["forward_and_backward_us"]["median"]
        row["fused_is_faster"] = round(row["forward_and_backward_us"]["median"] / fastest_us, 3)
    return rows


def features(shape_BNC: tuple[int, int, int], device: str) -> list[Pair]:
    """Predictions, which require a gradient, and teachers: as many pairs as fill ``SETS_BYTES``, at least
    two."""
    generator = torch.Generator(device).manual_seed(0)
    count = max(2, math.ceil(SETS_BYTES / (4 * math.prod(shape_BNC))))

    def drawn(mean: float) -> Tensor:
        return (torch.randn(shape_BNC, generator=generator, device=device) + mean).bfloat16()

    return [(drawn(0.0).requires_grad_(), drawn(3.0)) for _ in range(count)]


def gradients(step: Step, sets: Iterable[Pair], case: Case) -> list[Tensor]:
    """One forward and backward per pair."""
    return [torch.autograd.grad(step(p_BNC, t_BNC, case), p_BNC)[0] for p_BNC, t_BNC in sets]


def measured(step: Step, sets: Sequence[Pair], case: Case) -> tuple[dict[str, Any], list[Tensor]]:
    """Times per pair and memory, and the gradients of one last replay over poisoned outputs."""
    memory = extra_bytes(lambda: gradients(step, sets[:1], case))
    calls = timed(lambda: gradients(step, sets, case), len(sets))
    forward, _ = captured(lambda: [step(p_BNC, t_BNC, case) for p_BNC, t_BNC in sets])
    forward_us = timed(forward, len(sets))
    both, outputs = captured(lambda: gradients(step, sets, case))
    both_us = timed(both, len(sets))
    for gradient in outputs:
        gradient.fill_(math.nan)
    both()
    times = {
        "forward_us": forward_us,
        "forward_and_backward_us": both_us,
        "call_us": calls,
        "extra_memory_mib": round(memory / 2**20, 2),
    }
    return times, outputs


def captured(work: Callable[[], list[Tensor]]) -> tuple[Callable[[], object], list[Tensor]]:
    """A function that replays ``work`` as a CUDA graph, and the tensors that it writes."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles and allocates what must not happen while capturing
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = work()
    return graph.replay, outputs


def timed(work: Callable[[], object], calls: int) -> dict[str, float]:
    """Microseconds per call: quantiles over the runs of all passes, and how far the passes' medians
    differ."""
    passes = [_pass(work, calls) for _ in range(PASSES)]
    every = [time for times in passes for time in times]
    fifths = statistics.quantiles(every, n=5, method="inclusive")
    medians = [statistics.median(times) for times in passes]
    return {
        "median": round(statistics.median(every), 3),
        "q20": round(fifths[0], 3),
        "q80": round(fifths[-1], 3),
        "spread_of_passes": round((max(medians) - min(medians)) / min(medians), 4),
    }


def extra_bytes(work: Callable[[], object]) -> int:
    """Most memory that a call holds beyond what was there before."""
    work()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def copy_gb_per_s(device: str) -> float:
    """What a device copy moves, bytes read and written."""
    source = torch.randn(COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / timed(lambda: target.copy_(source), 1)["median"] / 1e3


def largest_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest relative L2 error over the pairs; NaN where an output was not written."""
    errors = [
        ((got.float() - wanted.float()).norm() / wanted.float().norm()).item()
        for got, wanted in zip(found, expected, strict=True)
    ]
    return max(errors, key=lambda error: math.inf if math.isnan(error) else error)


def _pass(work: Callable[[], object], calls: int) -> list[float]:
    """Microseconds per call of each timed run."""
    for _ in range(WARM_UP):
        work()
    events = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(RUNS)
    ]
    for start, end in events:
        start.record()
        work()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1e3 / calls for start, end in events]


def main() -> int:
    """Measure and write, or say what is missing."""
    if not torch.cuda.is_available():
        print(NO_GPU)
        return 2
    results = measure()
    path = record.write("loss", results)
    for row in results["results"]:
        times = f"{row['forward_and_backward_us']['median']:9.1f} us {row['share_of_copy']:7.1%} of copy"
        rest = f"{row['extra_memory_mib']:8.1f} MiB, fused is {row['fused_is_faster']} times as fast"
        print(f"{row['case']:32} {row['implementation']:14} {times}, {rest}")
    print(f"written to {path.relative_to(record.RESULTS.parent.parent)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
