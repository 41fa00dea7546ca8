"""The order of the data: exactly once, equal for every world size and start, refused for changed data."""

import itertools
import json
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fd_scale.data import philox
from fd_scale.data.plan import Plan, Samples
from fd_scale.errors import RecipeError, ScaleError, ShardError

COUNTS = [int(n) for n in np.random.default_rng(0).integers(0, 132, 37)]
SOME_COUNTS = st.lists(st.integers(0, 131), min_size=1, max_size=12).filter(lambda counts: sum(counts) > 0)


def places(samples: Samples) -> list[tuple[int, int]]:
    return list(zip(samples.shard.tolist(), samples.index.tolist(), strict=True))


def epoch_places(plan: Plan, epoch: int) -> list[tuple[int, int]]:
    steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
    return [place for step in steps for place in places(plan.samples(step))]


def reference_epoch(
    counts: list[int], seed: int, batch: int, streams: int, block: int, tail: str, epoch: int
) -> list[list[tuple[int, int]]]:
    """The definition of the order written out with lists: one list of places per step."""
    total = sum(counts)
    steps = total // batch if tail == "drop" else math.ceil(total / batch)
    order = philox.permutation(philox.key("fd.shards", seed, epoch, 0), len(counts))
    ring = [(shard, index) for shard in order.tolist() for index in range(counts[shard])]
    offset = int(philox.words(philox.key("fd.offset", seed, epoch, 0), 1)[0]) % total
    length, per_step = steps * batch // streams, batch // streams
    stretches = []
    for stream in range(streams):
        positions = list(range(stream * length, (stream + 1) * length))
        shuffled = []
        for number, begin in enumerate(range(0, length, block)):
            part = positions[begin : begin + block]
            words = philox.words(philox.key("fd.block", seed, epoch, 0, stream, number), len(part)).tolist()
            shuffled += [part[i] for i in sorted(range(len(part)), key=words.__getitem__)]
        stretches.append([ring[(position + offset) % total] for position in shuffled])
    return [
        [place for stretch in stretches for place in stretch[step * per_step : (step + 1) * per_step]]
        for step in range(steps)
    ]


@pytest.mark.parametrize("tail", ["drop", "pad"])
@pytest.mark.parametrize(
    ("counts", "batch", "block"),
    [
        (COUNTS, 64, 256),
        (COUNTS, 64, 5),
        (COUNTS, 37, 7),
        ([1], 1, 1),
        ([0, 9, 0, 4, 0], 3, 2),
        ([5000], 2039, 256),
    ],
)
def test_order_is_the_written_definition(counts, batch, block, tail):
    plan = Plan(counts, seed=11, global_batch=batch, tail=tail, block=block)
    for epoch in (0, 3):
        expected = reference_epoch(counts, 11, batch, plan.streams, block, tail, epoch)
        first = epoch * plan.steps_per_epoch
        assert [places(plan.samples(first + step)) for step in range(plan.steps_per_epoch)] == expected


@settings(max_examples=60, deadline=None)
@given(
    counts=SOME_COUNTS,
    batch=st.integers(1, 48),
    block=st.sampled_from([1, 2, 7, 256]),
    seed=st.integers(0, 2**32 - 1),
    epoch=st.integers(0, 3),
    tail=st.sampled_from(["drop", "pad"]),
)
def test_every_sample_exactly_once_per_epoch(counts, batch, block, seed, epoch, tail):
    total = sum(counts)
    if tail == "drop" and total < batch:
        with pytest.raises(ShardError):
            Plan(counts, seed=seed, global_batch=batch)
        return
    plan = Plan(counts, seed=seed, global_batch=batch, tail=tail, block=block)
    seen = epoch_places(plan, epoch)
    everything = {(shard, index) for shard, count in enumerate(counts) for index in range(count)}
    assert set(seen) <= everything
    if tail == "drop":
        assert len(seen) == len(set(seen)) == total // batch * batch
    else:
        assert len(seen) == math.ceil(total / batch) * batch
        assert set(seen) == everything
        assert max(map(seen.count, set(seen[:20]))) <= math.ceil(len(seen) / total)


@settings(max_examples=40, deadline=None)
@given(counts=SOME_COUNTS, batch=st.sampled_from([1, 6, 16, 24, 35]), seed=st.integers(0, 9), data=st.data())
def test_ranks_and_micro_batches_end_to_end_are_the_global_batch(counts, batch, seed, data):
    plan = Plan(counts, seed=seed, global_batch=batch, tail="pad", block=4)
    step = data.draw(st.integers(0, 3 * plan.steps_per_epoch))
    world = data.draw(st.sampled_from(plan.allowed_world_sizes()))
    share = batch // world
    of = data.draw(st.sampled_from([n for n in range(1, share + 1) if share % n == 0]))
    fresh = Plan(counts, seed=seed, global_batch=batch, tail="pad", block=4)
    parts = [fresh.samples(step, rank, world, (m, of)) for rank in range(world) for m in range(of)]
    whole = plan.samples(step)
    assert list(itertools.chain(*map(places, parts))) == places(whole)
    np.testing.assert_array_equal(np.concatenate([part.key for part in parts]), whole.key)
    assert {part.step for part in parts} == {step}


def test_a_plan_that_starts_late_goes_on_as_one_that_ran():
    ran = Plan(COUNTS, seed=5, global_batch=64)
    through = [places(ran.samples(step)) for step in range(100)]
    for start in (0, 1, 45, 46, 99):  # 46 steps are one epoch
        fresh = Plan(COUNTS, seed=5, global_batch=64)
        assert [places(fresh.samples(step)) for step in range(start, 100)] == through[start:]


def test_streams_and_world_sizes():
    for batch, streams in ((1, 1), (2048, 1024), (1536, 768), (1000, 1000), (1025, 205), (2039, 1)):
        plan = Plan([4096], seed=0, global_batch=batch)
        assert plan.streams == streams
        assert plan.allowed_world_sizes() == tuple(n for n in range(1, streams + 1) if streams % n == 0)


def test_epochs_are_counted():
    plan = Plan([100], seed=0, global_batch=30)
    assert plan.steps_per_epoch == 3
    assert [plan.epochs(step) for step in (0, 2, 3, 7)] == [(0,), (0,), (1,), (2,)]
    assert plan.samples(7).epoch.tolist() == [2] * 30
    assert Plan([100], seed=0, global_batch=30, tail="pad").steps_per_epoch == 4
    assert Plan([90], seed=0, global_batch=30, tail="pad").steps_per_epoch == 3


def test_epochs_and_seeds_differ():
    plan = Plan(COUNTS, seed=0, global_batch=64)
    other = Plan(COUNTS, seed=1, global_batch=64)
    assert epoch_places(plan, 0) != epoch_places(plan, 1)
    assert epoch_places(plan, 0) != epoch_places(other, 0)
    first, again = plan.samples(0).key, other.samples(0).key
    assert not (first == again).all(axis=1).any()


@pytest.mark.parametrize("counts", [[100], [50, 50]])
def test_the_dropped_tail_moves_even_with_few_shards(counts):
    plan = Plan(counts, seed=0, global_batch=64)
    seen = set(itertools.chain(*(epoch_places(plan, epoch) for epoch in range(12))))
    assert len(seen) == 100


def test_the_key_of_a_sample_depends_on_seed_epoch_and_place_alone():
    plan = Plan(COUNTS, seed=3, global_batch=48)
    step = 2 * plan.steps_per_epoch + 4
    samples = plan.samples(step, rank=1, world_size=4)
    expected = [philox.key("fd.sample", 3, 2, shard, index) for shard, index in places(samples)]
    np.testing.assert_array_equal(samples.key, philox.as_array(expected))
    assert (samples.epoch.tolist(), samples.step, len(samples)) == ([2] * 12, step, 12)


def test_a_batch_draws_on_the_whole_data_set():
    counts = [1000] * 200
    plan = Plan(counts, seed=0, global_batch=512)
    # 512 streams over 200 shards: by chance a few shards have no stream at this point of their stretch.
    assert len(set(plan.samples(0).shard.tolist())) > 180


def test_impossible_requests_say_what_would_work():
    with pytest.raises(ShardError, match=r"hold 31 samples, but one global batch takes 32.*global_batch"):
        Plan([20, 11], seed=0, global_batch=32)
    with pytest.raises(ShardError, match="hold 0 samples"):
        Plan([0, 0], seed=0, global_batch=1, tail="pad")
    plan = Plan([100], seed=0, global_batch=24)
    with pytest.raises(
        ScaleError, match=r"5 processes cannot share .*24.* numbers that can: 1, 2, 3, 4, 6, 8, 12, 24"
    ):
        plan.samples(0, 0, 5)
    with pytest.raises(ScaleError, match=r"12 samples .* 5 equal micro-batches"):
        plan.samples(0, 0, 2, (0, 5))
    for wrong in ({"rank": 2, "world_size": 2}, {"rank": -1}, {"micro": (3, 3)}):
        with pytest.raises(ValueError, match="no such part"):
            plan.samples(0, **wrong)
    with pytest.raises(ValueError, match="no such part"):
        plan.samples(-1)
    for wrong in (
        {"global_batch": 0},
        {"block": 0},
        {"seed": -1},
        {"tail": "keep"},
        {"counts": [3, -1]},
        {"mix": [(2, 1.0)]},
        {"mix": [(1, 0.0)]},
        {"mix": [(1, -1.0)]},
    ):
        with pytest.raises(ValueError, match="no plan for"):
            Plan(**{"counts": [9], "seed": 0, "global_batch": 1, **wrong})


def test_state_survives_json_and_gives_the_step_back():
    plan = Plan(COUNTS, seed=3, global_batch=48, fingerprint="f" * 64)
    state = json.loads(json.dumps(plan.state(1234)))
    assert state["step"] == 1234
    assert plan.resumed(state).state(1234) == state
    assert state["epochs"] == [1234 // plan.steps_per_epoch]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"counts": [*COUNTS, 0]}, r"shards: 37 at the checkpoint, 38 now"),
        ({"counts": [COUNTS[0] + 1, *COUNTS[1:]]}, r"samples: \d+ at the checkpoint, \d+ now"),
        ({"fingerprint": "b"}, r"fingerprint: a at .*\n.*other names, sizes or another order"),
        ({"seed": 4}, r"seed: 3 at the checkpoint, 4 now"),
        ({"global_batch": 96}, r"global_batch: 48 at the checkpoint, 96 now\n  streams: 48"),
        ({"tail": "pad"}, r"tail: drop at the checkpoint, pad now"),
        ({"block": 64}, r"block: 256 at the checkpoint, 64 now"),
    ],
)
def test_a_changed_data_set_is_refused_by_name(changes, said):
    asked = {"counts": COUNTS, "seed": 3, "global_batch": 48, "fingerprint": "a"}
    state = Plan(**asked).state(7)
    with pytest.raises(ShardError, match=said):
        Plan(**{**asked, **changes}).resumed(state)


def test_a_state_without_a_field_is_refused():
    plan = Plan(COUNTS, seed=3, global_batch=48)
    state = plan.state(7)
    del state["fingerprint"]
    with pytest.raises(ShardError, match="fingerprint: absent at the checkpoint"):
        plan.resumed(state)


def test_without_a_fingerprint_the_counts_are_compared():
    state = Plan([5, 6], seed=0, global_batch=4).state(0)
    with pytest.raises(ShardError, match="fingerprint"):
        Plan([6, 5], seed=0, global_batch=4).resumed(state)


MIX_COUNTS = [40, 0, 33, 7, 19, 60, 2]
MIX = [(3, 6.0), (2, 1.0), (2, 3.0)]  # 73, 26 and 62 samples


def mixed(global_batch: int = 20, **changes) -> Plan:
    return Plan(MIX_COUNTS, **{"seed": 4, "global_batch": global_batch, "mix": MIX, "block": 3, **changes})


def source_of(shard: int) -> int:
    return 0 if shard < 3 else 1 if shard < 5 else 2


def test_a_mix_has_its_exact_proportions_in_every_step():
    plan = mixed()
    assert plan.streams_per_source == (12, 2, 6)
    for step in range(40):
        sources = [source_of(shard) for shard in plan.samples(step).shard.tolist()]
        assert [sources.count(number) for number in range(3)] == [12, 2, 6]


@pytest.mark.parametrize(
    ("weights", "streams", "shares"),
    [
        ((1.0,), 7, (7,)),
        ((1.0, 1.0), 7, (4, 3)),
        ((0.5, 0.3, 0.2), 8, (4, 2, 2)),
        ((70.0, 30.0), 1024, (717, 307)),
        ((1.0, 1.0, 1.0), 1024, (342, 341, 341)),
    ],
)
def test_streams_are_shared_by_largest_remainder(weights, streams, shares):
    mix = [(1, weight) for weight in weights]
    plan = Plan([5000] * len(weights), seed=0, global_batch=streams, mix=mix)
    assert plan.streams_per_source == shares


def test_the_sources_of_a_mix_are_spread_evenly_over_ranks():
    plan = Plan([9000] * 3, seed=0, global_batch=256, mix=[(1, 4.0), (1, 2.0), (1, 2.0)])
    for rank in range(32):
        sources = plan.samples(0, rank, 32).shard.tolist()
        assert [sources.count(number) for number in range(3)] == [4, 2, 2]


def test_every_source_of_a_mix_goes_round_exactly_at_its_own_pace():
    plan = mixed()
    places_of = [[], [], []]
    for step in range(60):
        samples = plan.samples(step)
        for epoch, place in zip(samples.epoch.tolist(), places(samples), strict=True):
            places_of[source_of(place[0])].append((epoch, place))
    for number, (total, per_step) in enumerate(((73, 12), (26, 2), (62, 6))):
        steps = total // per_step
        for epoch in range(60 // steps):
            seen = [place for when, place in places_of[number] if when == epoch]
            assert len(seen) == len(set(seen)) == steps * per_step
    assert plan.epochs(59) == (59 // 6, 59 // 13, 59 // 10)
    assert plan.steps_per_epoch == 13


def test_a_mix_is_the_same_for_any_world_and_start():
    whole = [places(mixed().samples(step)) for step in range(30)]
    for world in mixed().allowed_world_sizes():
        fresh = mixed()
        for step in (0, 17, 29):
            parts = [fresh.samples(step, rank, world) for rank in range(world)]
            assert list(itertools.chain(*map(places, parts))) == whole[step]


def test_a_source_that_gets_nothing_is_refused():
    with pytest.raises(
        RecipeError, match=r"data set 2 of the mix has weight 0\.01 .* 8 streams .*data\.sources"
    ):
        Plan([100, 100], seed=0, global_batch=8, mix=[(1, 1.0), (1, 0.01)])
    with pytest.raises(ShardError, match=r"data set 2 of the mix hold 3 samples.*its part .* takes 4"):
        Plan([100, 3], seed=0, global_batch=8, mix=[(1, 1.0), (1, 1.0)])
    assert (
        Plan([100, 3], seed=0, global_batch=8, mix=[(1, 1.0), (1, 1.0)], tail="pad").samples(9).shard.size
        == 8
    )


def test_another_mix_is_refused_by_name():
    with pytest.raises(
        ShardError, match=r"mix: \[\[3, 12\], \[2, 2\], \[2, 6\]\] at the checkpoint, \[\[3, 8\]"
    ):
        mixed(mix=[(3, 2.0), (2, 1.0), (2, 2.0)]).resumed(mixed().state(3))


def test_unchanged_data_go_on_where_they_were():
    for on_change in ("refuse", "next_epoch"):
        resumed = mixed().resumed(json.loads(json.dumps(mixed().state(31))), on_change=on_change)
        assert [places(resumed.samples(s)) for s in (31, 50)] == [
            places(mixed().samples(s)) for s in (31, 50)
        ]


def test_changed_data_go_on_from_their_next_epoch_when_asked():
    before = Plan(COUNTS, seed=3, global_batch=48, fingerprint="a")
    state = json.loads(json.dumps(before.state(100)))
    assert state["epochs"] == [2]
    changed = Plan([*COUNTS, 70], seed=3, global_batch=48, fingerprint="b")
    with pytest.raises(ShardError, match=r"shards: 37 at.*\n.*samples(.|\n)*data\.on_change=next_epoch"):
        changed.resumed(state)
    resumed = changed.resumed(state, on_change="next_epoch")
    steps = changed.steps_per_epoch
    assert places(resumed.samples(100)) == places(changed.samples(3 * steps))
    assert places(resumed.samples(100 + steps)) == places(changed.samples(4 * steps))
    # And once more, after a stop in that epoch: the count of epochs travels with the state.
    again = changed.resumed(json.loads(json.dumps(resumed.state(105))))
    assert places(again.samples(105)) == places(changed.samples(3 * steps + 5))
    assert again.epochs(105) == (3,)
    with pytest.raises(ValueError, match="no such part"):
        resumed.samples(99)


def test_a_source_may_join_and_leave_at_the_next_epoch():
    state = mixed().state(31)
    assert state["epochs"] == [5, 2, 3]
    joined = Plan([*MIX_COUNTS, 50], seed=4, global_batch=20, mix=[*MIX, (1, 2.0)], block=3)
    assert joined.resumed(state, on_change="next_epoch").epochs(31) == (6, 3, 4, 6)
    left = Plan(MIX_COUNTS[:5], seed=4, global_batch=20, mix=MIX[:2], block=3)
    assert left.resumed(state, on_change="next_epoch").epochs(31) == (6, 3)


@pytest.mark.parametrize("changes", [{"seed": 5}, {"global_batch": 40}])
def test_what_is_not_the_data_may_not_change(changes):
    with pytest.raises(ShardError, match="at the checkpoint"):
        mixed(**changes).resumed(mixed().state(31), on_change="next_epoch")


def test_resuming_deep_in_a_large_epoch_takes_no_time():
    counts = np.full(100_000, 10_000)
    begin = time.process_time()
    plan = Plan(counts, seed=0, global_batch=4096)
    plan.samples(plan.steps_per_epoch * 3 - 1, rank=7, world_size=128)
    # 0.03 s measured on one core; the limit only has to tell arithmetic from walking through 10^9 samples.
    assert time.process_time() - begin < 1
