"""Pieces of micro-batches, and what a reader without random access is told about them."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fd_scale.data.plan import Plan
from fd_scale.data.ring import Span
from tests.data.test_plan import SOME_COUNTS, mixed, places


def members(spans: tuple[Span, ...]) -> list[tuple[int, int]]:
    return [(span.shard, index) for span in spans for index in range(span.first, span.stop)]


@settings(max_examples=40, deadline=None)
@given(
    counts=SOME_COUNTS,
    batch=st.sampled_from([1, 6, 24, 35, 2039]),
    block=st.sampled_from([1, 2, 7, 256]),
    tail=st.sampled_from(["drop", "pad"]),
    data=st.data(),
)
def test_chunks_are_the_micro_batch_and_need_what_holds_them(counts, batch, block, tail, data):
    if tail == "drop" and sum(counts) < batch:
        return
    plan = Plan(counts, seed=1, global_batch=batch, tail=tail, block=block)
    step = data.draw(st.integers(0, 2 * plan.steps_per_epoch))
    world = data.draw(st.sampled_from(plan.allowed_world_sizes()[:4]))
    of = data.draw(st.sampled_from([n for n in (1, 2, 3) if batch // world % n == 0]))
    pieces = data.draw(st.integers(1, 5))
    for which in range(of):
        part = plan.samples(step, world - 1, world, (which, of))
        chunks = plan.chunks(step, world - 1, world, (which, of), pieces)
        assert len(chunks) == pieces
        assert list(itertools.chain(*(places(samples) for samples, _ in chunks))) == places(part)
        np.testing.assert_array_equal(np.concatenate([samples.key for samples, _ in chunks]), part.key)
        for samples, need in chunks:
            assert set(places(samples)) <= set(members(need.now))


@pytest.mark.parametrize("make", [mixed, lambda: Plan([90, 5, 60], seed=2, global_batch=10, block=8)])
def test_what_a_chunk_needs_was_announced_before(make):
    plan = make()
    for piece in range(3):
        known: set[Span] = set()
        for step in range(60):
            _, need = plan.chunks(step, 0, 1, (0, 1), 3)[piece]
            assert step == 0 or set(need.now) <= known
            known = {*need.now, *need.soon}
            assert len(members(need.now)) <= 2 * plan.block * (plan.streams // 3 + 1)
