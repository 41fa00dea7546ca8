"""How long does work take on this device, how much memory, and what is the most that the device can do?

On a GPU times are those of CUDA events, so that only the device counts, and memory is that of PyTorch's
allocator. On a CPU they are those of the wall clock, and memory is that of the storages which operations
make. Every figure is over several runs after a warm-up, in two passes, whose difference is reported.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fd_scale.plan.ledger import Ledger

Work = Callable[[], object]
T = TypeVar("T")

WAITING = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.lift_fresh.default,
}
"""Operations whose answer a host needs before it goes on, and the one by which numbers of Python's become a
tensor: on its way to a device it waits for what was asked of that device before."""


@dataclass(frozen=True)
class Protocol:
    """How often: ``warm_up`` runs that do not count, then ``runs`` that do, all of it ``passes`` times."""

    warm_up: int = 10
    runs: int = 50
    passes: int = 2


LEAST_RUNS = 3
"""Runs of each pass in any case, after one to warm up, when the time is over."""

FULL = Protocol()
SMOKE = Protocol(warm_up=1, runs=3, passes=2)
"""For a look at whether a benchmark runs; its figures say nothing."""


LEFT_OUT = "left out, the time was over: "
_until = math.inf
"""When this process is to have measured enough, by the monotonic clock."""


def add_within(parser: argparse.ArgumentParser) -> None:
    """The flag for ``begin``."""
    parser.add_argument(
        "--within",
        type=float,
        help="seconds after which there are fewer runs, and cases not begun are left out by name (no limit)",
    )


def begin(within_s: float | None) -> None:
    """Let this process have so many seconds from now; None for as many as it takes."""
    global _until
    _until = math.inf if within_s is None else time.monotonic() + within_s


def is_late() -> bool:
    """Whether they are over."""
    return time.monotonic() > _until


def in_time(cases: Iterable[T], name: Callable[[T], str], left_out: list[str]) -> Iterator[T]:
    """The cases that can be begun in time; the names of the others are added to ``left_out``."""
    for case in cases:
        if is_late():
            left_out.append(name(case))
        else:
            yield case


def named(left_out: Sequence[str]) -> list[str]:
    """Cases that were left out, for a terminal."""
    return [LEFT_OUT + name for name in left_out]


def timed(work: Work, device: str, protocol: Protocol, *, calls: int = 1) -> dict[str, float]:
    """Microseconds per call, where ``work`` makes so many: median, quintiles, and how far the medians of the
    passes differ, as a share."""
    return interleaved({"": work}, device, protocol, calls=calls)[""]


def interleaved(
    works: dict[str, Work], device: str, protocol: Protocol, *, calls: int = 1
) -> dict[str, dict[str, float]]:
    """``timed`` of several works by name, turn by turn, so that what disturbs one disturbs all."""
    passes: dict[str, list[list[float]]] = {name: [] for name in works}
    for _ in range(protocol.passes):
        for work in works.values():
            for _ in range(min(protocol.warm_up, 1) if is_late() else protocol.warm_up):
                work()
        rows: dict[str, list[float]] = {name: [] for name in works}
        clocks = {name: Clock(device) for name in works}
        for run in range(protocol.runs):
            if run >= LEAST_RUNS and is_late():
                break
            for name, work in works.items():
                clocks[name].begin()
                work()
                clocks[name].end()
        for name, clock in clocks.items():
            rows[name] = [seconds * 1e6 / calls for seconds in clock.seconds()]
            passes[name].append(rows[name])
    return {name: summary(found) for name, found in passes.items()}


def summary(passes: Sequence[Sequence[float]]) -> dict[str, float]:
    """Median and quintiles over all passes, of how many runs, and the spread of the passes' medians."""
    every = [value for values in passes for value in values]
    fifths = statistics.quantiles(every, n=5, method="inclusive")
    medians = [statistics.median(values) for values in passes]
    return {
        "median": round(statistics.median(every), 3),
        "q20": round(fifths[0], 3),
        "q80": round(fifths[-1], 3),
        "spread_of_passes": round((max(medians) - min(medians)) / min(medians), 4),
        "num_runs": len(every),
    }


class Clock:
    """Stretches of time on a device, begun and ended without waiting for it."""

    def __init__(self, device: str) -> None:
        self.on_gpu = device == "cuda"
        self._stretches: list[tuple[Any, Any]] = []
        self._begun: Any = None

    def begin(self) -> None:
        """Begin a stretch."""
        self._begun = self._now()

    def end(self) -> None:
        """End the stretch that was begun."""
        self._stretches.append((self._begun, self._now()))

    def seconds(self) -> list[float]:
        """Of each stretch; waits for the device."""
        if not self.on_gpu:
            return [end - begin for begin, end in self._stretches]
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) / 1e3 for begin, end in self._stretches]

    def _now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def captured(work: Callable[[], list[Tensor]], device: str) -> tuple[Work, list[Tensor]]:
    """``work`` as a CUDA graph to be replayed, and the tensors that it writes; elsewhere a function that
    computes again and copies into the tensors of the first time."""
    if device != "cuda":
        outputs = work()

        def again() -> None:
            for output, value in zip(outputs, work(), strict=True):
                output.data.copy_(value.data)

        return again, outputs
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


def peak_bytes(work: Work, device: str) -> int:
    """Most memory that ``work`` holds at once beyond what was there before; on a CPU without what an
    operation takes inside."""
    if device != "cuda":
        with Ledger() as ledger:
            work()
        return ledger.peak_bytes
    work()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


class _Reads(TorchDispatchMode):
    """Counts where a host would wait for its device: see ``WAITING``."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in WAITING:
            self.found.append(_caller())
        return func(*args, **(kwargs or {}))


def _caller() -> str:
    """The place in the program that asked, this file left out: ``file:line``."""
    own = (__file__, "torch/_dynamo/eval_frame.py", "torch/_compile.py", "torch/utils/_python_dispatch.py")
    frames = [frame for frame in traceback.extract_stack() if not frame.filename.endswith(own)]
    return f"{frames[-1].filename}:{frames[-1].lineno}"


def waits(work: Work, device: str) -> list[str]:
    """Where the host waits for the device while ``work`` runs, ``file:line`` once for each time: by PyTorch's
    own warnings on a GPU; on a CPU where it would (``WAITING``)."""
    if device != "cuda":
        with _Reads() as reads:
            work()
        return reads.found
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return [f"{w.filename}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]


def wall_seconds(work: Work, device: str) -> float:
    """Wall time of one run, compilation and all."""
    begin = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def copy_gb_per_s(device: str, protocol: Protocol, num_bytes: int) -> float:
    """What a copy of a buffer of so many bytes moves, bytes read and written."""
    source = torch.randn(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / timed(lambda: target.copy_(source), device, protocol)["median"] / 1e3


def matmul_tflops(device: str, protocol: Protocol, side: int, dtype: torch.dtype) -> float:
    """What a square product of this side does, TFLOP/s."""
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    work = timed(lambda: torch.mm(left, right, out=out), device, protocol)
    return 2 * side**3 / work["median"] / 1e6
