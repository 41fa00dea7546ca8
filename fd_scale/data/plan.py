"""Which samples make up a global batch? A pure function of (seed, epoch, step, samples per shard).

Neither the number of processes, nor of workers, nor the step a run starts from has a say, so a checkpoint
needs a few numbers and resuming is arithmetic. Reading the samples is left to ``reader``.

A batch takes the next few samples of each of up to 1024 streams, and a rank owns whole streams. The streams
are stretches of the data set's order (``ring``), so that one batch draws on that many places of it. Where
data sets are mixed, each has a fixed share of the streams, evenly spread: their proportions are the same in
every step, each goes round at its own pace, and the state stays arithmetic.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from fd_scale.data import philox
from fd_scale.data.ring import Ring, Span, Tail
from fd_scale.errors import RecipeError, ScaleError, ShardError
from fd_scale.run.recipe import streams_of

STATE_VERSION = 2
BLOCK = 256
"""Samples of a stream that are shuffled among themselves; it may be small, as mixing comes from streams."""
_FETCHED_BY = 0.75
"""Share of a block's life by whose end the next blocks of all streams are being fetched."""


@dataclass(frozen=True)
class Samples:
    """Some samples of one step, in order: B places in the data set and the key of each one's augmentation."""

    step: int
    """Running global step."""
    epoch: np.ndarray
    """int64 (B,), how often its data set had gone round before."""
    shard: np.ndarray
    """int64 (B,), position of the shard in the index."""
    index: np.ndarray
    """int64 (B,), position of the sample in its shard."""
    key: np.ndarray
    """uint64 (B, 2), Philox key of (seed, epoch, shard, index): who reads it changes nothing."""

    def __len__(self) -> int:
        return len(self.shard)


@dataclass(frozen=True)
class Need:
    """What a reader without random access must hold for some samples of a step, and fetch ahead for later."""

    now: tuple[Span, ...]
    soon: tuple[Span, ...]


@dataclass(frozen=True)
class _Origin:
    """Where the count of epochs begins: at this step every data set began this epoch of its own."""

    step: int
    epochs: tuple[int, ...]


class Plan:
    """The order of the data for one run (design decision E).

    ``counts`` are the samples of every shard, in index order. ``mix`` gives the number of shards and the
    sampling weight of each data set in turn; one data set by default. ``tail='drop'`` leaves out the last
    samples of an epoch that fill no step (other ones in every epoch); ``'pad'`` takes the first ones again.
    ``fingerprint`` is the data's (``ShardSet.fingerprint``), kept in the state.

    Raises ``ShardError`` when a data set has too few samples for its part of one global batch (under
    ``tail='drop'``; none at all under ``'pad'``), and ``RecipeError`` when its weight rounds to no stream.
    """

    def __init__(
        self,
        counts: Sequence[int] | np.ndarray,
        *,
        seed: int,
        global_batch: int,
        mix: Sequence[tuple[int, float]] | None = None,
        tail: Tail = "drop",
        block: int = BLOCK,
        fingerprint: str | None = None,
    ) -> None:
        self.counts = np.asarray(counts, dtype=np.int64)
        mix = tuple(mix or [(len(self.counts), 1.0)])
        if (
            global_batch < 1
            or block < 1
            or seed < 0
            or tail not in ("drop", "pad")
            or np.any(self.counts < 0)
            or sum(shards for shards, _ in mix) != len(self.counts)
            or not all(0 < weight < float("inf") for _, weight in mix)
        ):
            raise ValueError(f"no plan for {global_batch=}, {block=}, {seed=}, {tail=}, {mix=}, these counts")
        self.seed, self.global_batch, self.mix, self.tail, self.block = seed, global_batch, mix, tail, block
        self.num_samples = int(self.counts.sum())
        self.fingerprint = fingerprint or hashlib.sha256(self.counts.astype("<i8").tobytes()).hexdigest()
        self.streams = streams_of(global_batch)
        self.per_step = global_batch // self.streams
        self.streams_per_source = _shares(self.streams, [weight for _, weight in mix])
        self._source_of = _spread(self.streams_per_source)
        self._first_shards = [0, *itertools.accumulate(shards for shards, _ in mix)]
        self._place_in_source = np.empty(self.streams, dtype=np.int64)
        for number, count in enumerate(self.streams_per_source):
            self._place_in_source[self._source_of == number] = np.arange(count)
        self._rings = [self._ring(number) for number in range(len(mix))]
        self._origin = _Origin(0, (0,) * len(mix))
        self._share = functools.lru_cache(maxsize=2)(self._locate_share)

    @property
    def steps_per_epoch(self) -> int:
        """Steps until every data set has gone round at least once."""
        return max(ring.steps for ring in self._rings)

    def allowed_world_sizes(self) -> tuple[int, ...]:
        """The numbers of processes that can share this plan, rising: the divisors of ``streams``."""
        return tuple(size for size in range(1, self.streams + 1) if self.streams % size == 0)

    def epochs(self, step: int) -> tuple[int, ...]:
        """How often each data set has gone round before a running global step."""
        return tuple(self._locate(number, step)[0] for number in range(len(self._rings)))

    def samples(
        self, step: int, rank: int = 0, world_size: int = 1, micro: tuple[int, int] = (0, 1)
    ) -> Samples:
        """Micro-batch ``micro = (which, of how many)`` of one rank's part of a running global step.

        The parts of all micro-batches and ranks, end to end in that order, are the global batch, whatever
        their numbers. Raises ``ScaleError`` for a world size or a number of micro-batches that does not
        divide.
        """
        return self._samples(step, rank, world_size, *self._rows(step, rank, world_size, micro))

    def chunks(
        self, step: int, rank: int, world_size: int, micro: tuple[int, int], of: int
    ) -> list[tuple[Samples, Need]]:
        """A micro-batch in ``of`` pieces of whole streams, some perhaps empty, and what each piece needs.

        The same piece of the same micro-batch draws on the same streams in every step, so whoever makes it
        finds there most of what it needed before.
        """
        begin, end = self._rows(step, rank, world_size, micro)
        first, stop = begin // self.per_step, -(-end // self.per_step)
        cuts = [first + (stop - first) * piece // of for piece in range(of + 1)]
        rows = [min(max(cut * self.per_step, begin), end) for cut in cuts]
        return [
            (self._samples(step, rank, world_size, *piece), self._need(step, range(*streams)))
            for piece, streams in zip(itertools.pairwise(rows), itertools.pairwise(cuts), strict=True)
        ]

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint keeps for the data to go on at running global step ``step``; plain JSON."""
        origin = {"origin_step": self._origin.step, "origin_epochs": list(self._origin.epochs)}
        return {**self._identity(), **origin, "step": step, "epochs": list(self.epochs(step))}

    def resumed(
        self, state: Mapping[str, Any], *, on_change: Literal["refuse", "next_epoch"] = "refuse"
    ) -> Plan:
        """The plan to go on with from a saved state: this one, its epochs counted as the saved run did.

        Under ``on_change='next_epoch'`` other data than the saved run's are taken from the beginning of the
        next epoch. Raises ``ShardError`` that names all that differs and may not.
        """
        may_change = ("shards", "samples", "fingerprint", "mix", "block", "tail")
        differing = self.differences(state)
        if not differing:
            origin = _Origin(int(state["origin_step"]), tuple(state["origin_epochs"]))
        elif on_change == "next_epoch" and all(name in may_change for name in differing):
            done = [int(epoch) for epoch in state["epochs"]]
            following = [epoch + 1 for epoch in done[: len(self.mix)]]
            following += [max(done) + 1] * (len(self.mix) - len(following))
            origin = _Origin(int(state["step"]), tuple(following))
        else:
            raise ShardError(self._refusal(state, differing))
        again = Plan(
            self.counts,
            seed=self.seed,
            global_batch=self.global_batch,
            mix=self.mix,
            tail=self.tail,
            block=self.block,
            fingerprint=self.fingerprint,
        )
        again._origin = origin
        return again

    def differences(self, state: Mapping[str, Any]) -> list[str]:
        """The names of all that is not as in a saved state, the step aside."""
        return [name for name, value in self._identity().items() if state.get(name) != value]

    def _ring(self, number: int) -> Ring:
        counts = self.counts[self._first_shards[number] : self._first_shards[number + 1]]
        streams = self.streams_per_source[number]
        which = f"data set {number + 1} of the mix" if len(self.mix) > 1 else "the shards"
        if streams == 0:
            raise RecipeError(
                f"{which} has weight {self.mix[number][1]:g} among {[weight for _, weight in self.mix]}, "
                f"less than one of the {self.streams} streams of global_batch={self.global_batch}: "
                "raise its weight in data.sources, or global_batch"
            )
        ring = Ring(
            counts,
            seed=self.seed,
            number=number,
            streams=streams,
            per_step=self.per_step,
            tail=self.tail,
            block=self.block,
        )
        if ring.steps == 0:
            part = f"its part of one global batch of {self.global_batch:,}" if len(self.mix) > 1 else "one"
            raise ShardError(
                f"{which} hold {ring.num_samples:,} samples, but {part} global batch takes "
                f"{streams * self.per_step:,}: give more images, or lower global_batch in the recipe"
            )
        return ring

    def _locate(self, number: int, step: int) -> tuple[int, int]:
        """(epoch, step in that epoch) of a data set at a running global step."""
        epoch, inside = divmod(step - self._origin.step, self._rings[number].steps)
        return self._origin.epochs[number] + epoch, inside

    def _rows(self, step: int, rank: int, world_size: int, micro: tuple[int, int]) -> tuple[int, int]:
        """First row of a micro-batch in the global batch, and the one after its last."""
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
        if not (0 <= rank < world_size and 0 <= which < of and step >= self._origin.step):
            raise ValueError(f"no such part: {step=}, {rank=} of {world_size}, {micro=}")
        return rank * share + which * share // of, rank * share + (which + 1) * share // of

    def _samples(self, step: int, rank: int, world_size: int, begin: int, end: int) -> Samples:
        """Rows ``begin`` .. ``end - 1`` of the global batch, all of them one rank's."""
        cut = slice(*(row - rank * self.global_batch // world_size for row in (begin, end)))
        epoch_B, shard_B, index_B = (part[cut] for part in self._share(step, rank, world_size))
        places = zip(epoch_B.tolist(), shard_B.tolist(), index_B.tolist(), strict=True)
        keys = [philox.key("fd.sample", self.seed, *place) for place in places]
        return Samples(step, epoch_B, shard_B, index_B, philox.as_array(keys))

    def _locate_share(self, step: int, rank: int, world_size: int) -> tuple[np.ndarray, ...]:
        """(epoch, shard, index in shard) of every sample of one rank's part of a step, stream by stream."""
        owned = self.streams // world_size
        streams = slice(rank * owned, (rank + 1) * owned)
        found = np.empty((3, owned, self.per_step), dtype=np.int64)
        for number, ring in enumerate(self._rings):
            mine = self._source_of[streams] == number
            if not mine.any():
                continue
            first = int(self._place_in_source[streams][mine][0])
            epoch, inside = self._locate(number, step)
            shard, index = ring.places(epoch, inside, first, first + int(mine.sum()))
            found[0, mine] = epoch
            found[1, mine] = shard.reshape(-1, self.per_step) + self._first_shards[number]
            found[2, mine] = index.reshape(-1, self.per_step)
        return tuple(found.reshape(3, -1))

    def _need(self, step: int, streams: range) -> Need:
        """The blocks of these streams, and those to fetch while they last, stream after stream."""
        now: list[Span] = []
        soon: list[Span] = []
        for stream in streams:
            number, place = int(self._source_of[stream]), int(self._place_in_source[stream])
            ring, (epoch, inside) = self._rings[number], self._locate(number, step)
            now += self._shifted(number, ring.spans(epoch, inside, place))
            if stream - streams.start < len(streams) * ring.progress(inside) / _FETCHED_BY:
                soon += self._shifted(number, ring.next_spans(epoch, inside, place))
        return Need(tuple(now), tuple(soon))

    def _shifted(self, number: int, spans: Sequence[Span]) -> Iterator[Span]:
        first = self._first_shards[number]
        return (Span(span.shard + first, span.first, span.stop) for span in spans)

    def _identity(self) -> dict[str, Any]:
        return {
            "version": STATE_VERSION,
            "shards": len(self.counts),
            "samples": self.num_samples,
            "fingerprint": self.fingerprint,
            "mix": [
                [shards, streams]
                for (shards, _), streams in zip(self.mix, self.streams_per_source, strict=True)
            ],
            "seed": self.seed,
            "global_batch": self.global_batch,
            "streams": self.streams,
            "block": self.block,
            "tail": self.tail,
        }

    def _refusal(self, state: Mapping[str, Any], differing: Sequence[str]) -> str:
        now = self._identity()
        lines = [
            f"  {name}: {state.get(name, 'absent')} at the checkpoint, {now[name]} now" for name in differing
        ]
        if list(differing) == ["fingerprint"]:
            lines.append(
                "  as many shards and samples as before, but other names, sizes or another order of shards"
            )
        return (
            "the order of the data is not the one that the checkpoint was made with:\n"
            + "\n".join(lines)
            + "\npoint data.shards at the data set of the run; or set data.on_change=next_epoch to take "
            "changed data from the next epoch on; or begin a new run"
        )


def _shares(streams: int, weights: Sequence[float]) -> tuple[int, ...]:
    """Whole streams in proportion to the weights, by largest remainder; the first of equals gets more."""
    exact = [streams * weight / sum(weights) for weight in weights]
    shares = [int(part) for part in exact]
    order = sorted(range(len(weights)), key=lambda number: (shares[number] - exact[number], number))
    for number in order[: streams - sum(shares)]:
        shares[number] += 1
    return tuple(shares)


def _spread(streams_per_source: Sequence[int]) -> np.ndarray:
    """The source of every stream: each source evenly over the row, so that every rank has a fair part."""
    places = [
        ((2 * place + 1) / (2 * count), number)
        for number, count in enumerate(streams_per_source)
        for place in range(count)
    ]
    return np.array([number for _, number in sorted(places)], dtype=np.int64)
