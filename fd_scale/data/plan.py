"""Which samples make up a global batch? A pure function of (seed, epoch, step, samples per shard).

Neither the number of processes, nor of workers, nor the step a run starts from has a say, so a checkpoint
needs a few numbers and resuming is arithmetic. Reading the samples is left to ``reader``.

An epoch permutes the shards, lays their samples end to end and turns that ring by a random offset. The ring
is cut into ``streams`` stretches of equal length. Every step takes the next few samples of every stream;
inside a stream the order is shuffled in blocks, so that a reader without random access needs to hold no more
than one block per stream. A rank owns whole streams. Mixing comes from the streams: one batch draws on up to
1024 places of the data set.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from fd_scale.data import philox
from fd_scale.errors import ScaleError, ShardError
from fd_scale.run.recipe import streams_of

STATE_VERSION = 1


@dataclass(frozen=True)
class Samples:
    """Some samples of one step, in order: B places in the data set and the key of each one's augmentation."""

    epoch: int
    step: int
    """Running global step."""
    shard: np.ndarray
    """int64 (B,), position of the shard in the index."""
    index: np.ndarray
    """int64 (B,), position of the sample in its shard."""
    key: np.ndarray
    """uint64 (B, 2), Philox key of (seed, epoch, shard, index): who reads it changes nothing."""

    def __len__(self) -> int:
        return len(self.shard)


@dataclass(frozen=True)
class _Epoch:
    """The ring of one epoch: shards in their order, where each begins, and how far the ring is turned."""

    shards: np.ndarray
    starts: np.ndarray
    offset: int


class Plan:
    """The order of a data set for one run (design decision E).

    ``counts`` are the samples of every shard, in index order. ``tail='drop'`` leaves out the last samples of
    an epoch that fill no global batch (other ones in every epoch); ``'pad'`` fills the last batch with the
    first ones again. ``fingerprint`` is the data set's (``ShardSet.fingerprint``), kept in the state.

    Raises ``ShardError`` when there are no samples, or too few for one global batch under ``tail='drop'``.
    """

    def __init__(
        self,
        counts: Sequence[int] | np.ndarray,
        *,
        seed: int,
        global_batch: int,
        tail: Literal["drop", "pad"] = "drop",
        block: int = 256,
        fingerprint: str | None = None,
    ) -> None:
        self.counts = np.asarray(counts, dtype=np.int64)
        if (
            global_batch < 1
            or block < 1
            or seed < 0
            or tail not in ("drop", "pad")
            or np.any(self.counts < 0)
        ):
            raise ValueError(f"no plan for {global_batch=}, {block=}, {seed=}, {tail=} and these counts")
        self.seed, self.global_batch, self.tail, self.block = seed, global_batch, tail, block
        self.num_samples = int(self.counts.sum())
        self.fingerprint = fingerprint or hashlib.sha256(self.counts.astype("<i8").tobytes()).hexdigest()
        whole, rest = divmod(self.num_samples, global_batch)
        self.steps_per_epoch = whole + (tail == "pad" and rest > 0)
        if self.steps_per_epoch == 0:
            raise ShardError(
                f"the shards hold {self.num_samples:,} samples, but one global batch takes {global_batch:,}: "
                "give more images, or lower global_batch in the recipe"
            )
        self.streams = streams_of(global_batch)
        self._per_step = global_batch // self.streams
        self._per_epoch = self.steps_per_epoch * self._per_step
        self._epoch = functools.lru_cache(maxsize=2)(self._draw_epoch)
        self._block = functools.lru_cache(maxsize=4)(self._draw_block)
        self._share = functools.lru_cache(maxsize=2)(self._locate_share)

    def allowed_world_sizes(self) -> tuple[int, ...]:
        """The numbers of processes that can share this plan, rising: the divisors of ``streams``."""
        return tuple(size for size in range(1, self.streams + 1) if self.streams % size == 0)

    def locate(self, step: int) -> tuple[int, int]:
        """(epoch, step in that epoch) of a running global step."""
        return divmod(step, self.steps_per_epoch)

    def samples(
        self, step: int, rank: int = 0, world_size: int = 1, micro: tuple[int, int] = (0, 1)
    ) -> Samples:
        """Micro-batch ``micro = (which, of how many)`` of one rank's part of a running global step.

        The parts of all micro-batches and ranks, end to end in that order, are the global batch, whatever
        their numbers. Raises ``ScaleError`` for a world size or a number of micro-batches that does not
        divide.
        """
        which, of = micro
        if self.streams % world_size:
            raise ScaleError(
                f"{world_size} processes cannot share the {self.streams:,} streams of a global batch of "
                f"{self.global_batch:,}; numbers that can: {', '.join(map(str, self.allowed_world_sizes()))}"
            )
        share = self.global_batch // world_size
        if share % of:
            raise ScaleError(
                f"{share} samples of a rank per step cannot be cut into {of} equal micro-batches"
            )
        if not (0 <= rank < world_size and 0 <= which < of and step >= 0):
            raise ValueError(f"no such part: {step=}, {rank=} of {world_size}, {micro=}")
        epoch, _ = self.locate(step)
        cut = slice(which * share // of, (which + 1) * share // of)
        shard_B, index_B = (part[cut] for part in self._share(step, rank, world_size))
        places = zip(shard_B.tolist(), index_B.tolist(), strict=True)
        keys = [philox.key("fd.sample", self.seed, epoch, shard, index) for shard, index in places]
        return Samples(epoch, step, shard_B, index_B, philox.as_array(keys))

    def state(self, step: int) -> dict[str, int | str]:
        """What a checkpoint keeps for the data to go on at running global step ``step``; plain JSON."""
        return {**self._identity(), "step": step, "epoch": self.locate(step)[0]}

    def check_state(self, state: Mapping[str, Any]) -> int:
        """The step to go on from; raises ``ShardError`` that names all that differs from the saved run."""
        now, before = self._identity(), dict(state)
        differing = [name for name in now if before.get(name) != now[name]]
        if not differing:
            return int(before["step"])
        lines = [
            f"  {name}: {before.get(name, 'absent')} at the checkpoint, {now[name]} now" for name in differing
        ]
        if differing == ["fingerprint"]:
            lines.append(
                "  as many shards and samples as before, but other names, sizes or another order of shards"
            )
        raise ShardError(
            "the order of the data is not the one that the checkpoint was made with:\n"
            + "\n".join(lines)
            + "\npoint data.shards at the data set of the run, or begin a new run"
        )

    def _identity(self) -> dict[str, int | str]:
        return {
            "version": STATE_VERSION,
            "shards": len(self.counts),
            "samples": self.num_samples,
            "fingerprint": self.fingerprint,
            "seed": self.seed,
            "global_batch": self.global_batch,
            "streams": self.streams,
            "block": self.block,
            "tail": self.tail,
        }

    def _draw_epoch(self, epoch: int) -> _Epoch:
        shards = philox.permutation(philox.key("fd.shards", self.seed, epoch), len(self.counts))
        starts = np.concatenate([[0], np.cumsum(self.counts[shards])])
        # Turning the ring makes the dropped tail, and the cuts between streams, fall elsewhere in every epoch
        # even where shards are few and of equal size.
        offset = int(
            philox.words(philox.key("fd.offset", self.seed, epoch), 1)[0] % np.uint64(self.num_samples)
        )
        return _Epoch(shards, starts, offset)

    def _draw_block(self, epoch: int, block: int, first: int, last: int) -> np.ndarray:
        """A block of streams first .. last - 1: shuffled positions inside each, (streams, length)."""
        length = min(self.block, self._per_epoch - block * self.block)
        keys = (philox.key("fd.block", self.seed, epoch, stream, block) for stream in range(first, last))
        drawn = np.stack([philox.words(key, length) for key in keys])
        return np.argsort(drawn, axis=1, kind="stable") + block * self.block

    def _locate_share(self, step: int, rank: int, world_size: int) -> tuple[np.ndarray, np.ndarray]:
        """(shard, index in shard) of every sample of one rank's part of a step, stream by stream."""
        epoch, inside = self.locate(step)
        owned = self.streams // world_size
        first, last = rank * owned, (rank + 1) * owned
        begin = inside * self._per_step
        blocks = range(begin // self.block, (begin + self._per_step - 1) // self.block + 1)
        shuffled = np.concatenate([self._block(epoch, block, first, last) for block in blocks], axis=1)
        skip = begin - blocks[0] * self.block
        position = (
            shuffled[:, skip : skip + self._per_step] + np.arange(first, last)[:, None] * self._per_epoch
        )
        ring = self._epoch(epoch)
        place = (position.ravel() + ring.offset) % self.num_samples
        # 'right' steps over empty shards, which begin where the next one does.
        which = np.searchsorted(ring.starts, place, side="right") - 1
        return ring.shards[which], place - ring.starts[which]
