"""Several ranks as threads of this process, for code that only gathers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any


def over_ranks(function: Callable[[int, Callable[[Any], list[Any]]], Any], size: int) -> list[Any]:
    """``function(rank, gather)`` on each rank; the results in rank order."""
    words: list[Any] = [None] * size
    barrier = threading.Barrier(size, timeout=60)

    def on_rank(rank: int) -> Any:
        def gather(value: Any) -> list[Any]:
            words[rank] = value
            barrier.wait()
            said = list(words)
            barrier.wait()
            return said

        return function(rank, gather)

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(on_rank, range(size)))
