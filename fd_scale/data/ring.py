"""In which order does one data set go round? Epoch after epoch, each its own ring, cut into streams.

An epoch permutes the shards, lays their samples end to end and turns that ring by a random offset. The ring
is cut into stretches of equal length, one per stream; a stretch is shuffled in blocks. Which streams a global
batch draws on, and how several data sets are mixed, is the business of ``plan``.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from fd_scale.data import philox

Tail = Literal["drop", "pad"]


class Span(NamedTuple):
    """Neighbouring samples of one shard: ``first`` to ``stop - 1``."""

    shard: int
    first: int
    stop: int


@dataclass(frozen=True)
class _Epoch:
    """The ring of one epoch: shards in their order, where each begins, and how far the ring is turned."""

    shards: np.ndarray
    starts: np.ndarray
    offset: int


class Ring:
    """The order of one data set of ``counts`` samples per shard, cut into ``streams`` streams.

    A step takes ``per_step`` samples of every stream. ``number`` tells the data sets of a mix apart. An epoch
    has ``steps`` steps; under ``tail='drop'`` it leaves out the last samples that fill no step (other ones in
    every epoch), under ``'pad'`` it takes the first ones again.
    """

    def __init__(
        self,
        counts: np.ndarray,
        *,
        seed: int,
        number: int,
        streams: int,
        per_step: int,
        tail: Tail,
        block: int,
    ) -> None:
        self.counts, self.seed, self.number, self.block = counts, seed, number, block
        self.num_samples = int(counts.sum())
        self.per_step = per_step
        whole, rest = divmod(self.num_samples, streams * per_step)
        self.steps = whole + (tail == "pad" and rest > 0)
        self._length = self.steps * per_step  # of a stretch
        self._epoch = functools.lru_cache(maxsize=2)(self._draw_epoch)
        self._block = functools.lru_cache(maxsize=4)(self._draw_block)

    def places(self, epoch: int, step: int, first: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """(shard, index in shard), stream by stream, of what streams first .. stop - 1 give to a step.

        ``step`` counts within the epoch.
        """
        begin = step * self.per_step
        blocks = self._blocks(step)
        shuffled = np.concatenate([self._block(epoch, block, first, stop) for block in blocks], axis=1)
        skip = begin - blocks[0] * self.block
        position = shuffled[:, skip : skip + self.per_step] + np.arange(first, stop)[:, None] * self._length
        ring = self._epoch(epoch)
        place = (position.ravel() + ring.offset) % self.num_samples
        # 'right' steps over empty shards, which begin where the next one does.
        which = np.searchsorted(ring.starts, place, side="right") - 1
        return ring.shards[which], place - ring.starts[which]

    def spans(self, epoch: int, step: int, stream: int) -> list[Span]:
        """Where the blocks lie that a stream draws on in a step: all that a reader must hold for them."""
        blocks = self._blocks(step)
        begin, end = blocks[0] * self.block, min((blocks[-1] + 1) * self.block, self._length)
        return list(self._cover(epoch, stream * self._length + begin, stream * self._length + end))

    def next_spans(self, epoch: int, step: int, stream: int) -> list[Span]:
        """The same of the first step that will need another block."""
        following = -(-(self._blocks(step)[-1] + 1) * self.block // self.per_step)
        if following < self.steps:
            return self.spans(epoch, following, stream)
        return self.spans(epoch + 1, 0, stream)

    def progress(self, step: int) -> float:
        """How much of its last block every stream has given after this step, above 0 to 1."""
        end, last = (step + 1) * self.per_step, self._blocks(step)[-1] * self.block
        return (end - last) / min(self.block, self._length - last)

    def _blocks(self, step: int) -> range:
        begin = step * self.per_step
        return range(begin // self.block, (begin + self.per_step - 1) // self.block + 1)

    def _cover(self, epoch: int, begin: int, end: int) -> Iterator[Span]:
        """The positions from ``begin`` to ``end`` of an epoch, before its turn, as places in the shards."""
        ring = self._epoch(epoch)
        while begin < end:
            place = (begin + ring.offset) % self.num_samples
            which = int(np.searchsorted(ring.starts, place, side="right")) - 1
            first = place - int(ring.starts[which])
            stop = min(int(ring.starts[which + 1] - ring.starts[which]), first + end - begin)
            yield Span(int(ring.shards[which]), first, stop)
            begin += stop - first

    def _draw_epoch(self, epoch: int) -> _Epoch:
        shards = philox.permutation(philox.key("fd.shards", self.seed, epoch, self.number), len(self.counts))
        starts = np.concatenate([[0], np.cumsum(self.counts[shards])])
        # Turning the ring makes the dropped tail, and the cuts between streams, fall elsewhere in every epoch
        # even where shards are few and of equal size.
        turn = philox.words(philox.key("fd.offset", self.seed, epoch, self.number), 1)[0]
        return _Epoch(shards, starts, int(turn % np.uint64(self.num_samples)))

    def _draw_block(self, epoch: int, block: int, first: int, stop: int) -> np.ndarray:
        """A block of streams first .. stop - 1: shuffled positions inside each, (streams, length)."""
        length = min(self.block, self._length - block * self.block)
        numbers = (self.seed, epoch, self.number)
        keys = (philox.key("fd.block", *numbers, stream, block) for stream in range(first, stop))
        drawn = np.stack([philox.words(key, length) for key in keys])
        return np.argsort(drawn, axis=1, kind="stable") + block * self.block
