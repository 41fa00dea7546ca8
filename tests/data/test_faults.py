"""The books of bad samples: counted, written once, and bounded."""

import json
import pickle
from pathlib import Path

import pytest

from fd_scale.data.decode import DecodeError
from fd_scale.data.faults import GRACE_SAMPLES, Budget, Fault, LabelError, Ledger, LostShardError, Totals
from fd_scale.errors import ShardError


def fault(key: str, *, stage: str = "decode", step: int = 3) -> Fault:
    return Fault(1, step, "s.tar", key, stage, "it is damaged")


def test_a_bad_sample_is_written_once(tmp_path):
    path = tmp_path / "run" / "quarantine.jsonl"
    ledger = Ledger(path, Budget(1), rank=5)
    ledger.record(4, [])
    assert not path.exists()
    ledger.record(4, [fault("a"), fault("b"), fault("a")])
    ledger.record(4, [fault("a", step=9), fault("a", stage="read")])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["key"], line["stage"]) for line in lines] == [
        ("a", "decode"),
        ("b", "decode"),
        ("a", "read"),
    ]
    assert set(lines[0]) == {"time", "rank", "epoch", "step", "shard", "key", "stage", "error"}
    assert (lines[0]["rank"], lines[0]["epoch"], lines[0]["step"], lines[0]["error"]) == (
        5,
        1,
        3,
        "it is damaged",
    )
    assert ledger.totals == Totals(12, 5)


def test_what_an_earlier_start_wrote_is_not_written_again(tmp_path):
    path = tmp_path / "quarantine.jsonl"
    for keys in ("ab", "bc"):
        Ledger(path, Budget(1)).record(2, [fault(key) for key in keys])
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == ["a", "b", "c"]


def test_names_that_are_no_text_can_be_written(tmp_path):
    path = tmp_path / "quarantine.jsonl"
    Ledger(path, Budget(1)).record(1, [fault(b"\xff\xfe".decode("utf-8", "surrogateescape"))])
    assert json.loads(path.read_text())["key"] == "\udcff\udcfe"


def test_a_few_are_borne_whatever_their_share():
    ledger = Ledger(None, Budget(1e-3))
    for number in range(GRACE_SAMPLES):
        ledger.record(1, [fault(str(number))])
    with pytest.raises(
        ShardError, match=rf"{GRACE_SAMPLES + 1} of {GRACE_SAMPLES + 1} samples .*max_bad_fraction=0\.001"
    ):
        ledger.record(1, [fault("last")])


def test_the_share_is_judged_over_all_samples_seen(tmp_path):
    ledger = Ledger(tmp_path / "q.jsonl", Budget(0.01))
    ledger.record(2000, [fault(str(n)) for n in range(20)])
    with pytest.raises(ShardError) as caught:
        ledger.record(1, [fault("one too many", stage="read")])
    assert str(caught.value) == (
        "21 of 2,001 samples could not be used, more than data.max_bad_fraction=0.01 allows; the last one: "
        f"shard s.tar, key one too many, read: it is damaged; all are listed in {tmp_path}/q.jsonl. "
        "Look into it with: fd-scale shards verify s.tar\n"
        "With --exclude it leaves bad samples out of the data set; or repair the shard, or raise "
        "data.max_bad_fraction"
    )


def test_nothing_is_borne_at_zero_and_everything_at_one():
    with pytest.raises(ShardError, match="1 of 500 samples"):
        Ledger(None, Budget(0)).record(500, [fault("a")])
    everything = Ledger(None, Budget(1))
    everything.record(50, [fault(str(n)) for n in range(50)])
    assert everything.totals.bad == 50


def lost(shard: str, key: str = "a") -> Fault:
    return Fault(0, 3, shard, key, LostShardError.stage, "it is gone")


def test_a_lost_shard_is_judged_by_itself():
    with pytest.raises(
        ShardError,
        match=r"^1 shards were lost .* data\.max_bad_shards=0 allows \(x\.tar\); the last one: shard x\.tar, "
        r"key a, shard: it is gone\. Look into it with: fd-scale shards verify x\.tar\n.*max_bad_shards$",
    ):
        Ledger(None, Budget(1)).record(500, [lost("x.tar")])
    ledger = Ledger(None, Budget(0, max_bad_shards=2))
    ledger.record(500, [lost("x.tar", str(n)) for n in range(300)])
    ledger.record(500, [lost("x.tar"), lost("y.tar")])
    assert ledger.totals == Totals(1000, 302, 302, ("x.tar", "y.tar"))
    with pytest.raises(ShardError, match=r"^3 shards were lost .*\(x\.tar, y\.tar, z\.tar\)"):
        ledger.record(1, [lost("z.tar")])


def settle(ledgers: list[Ledger]) -> list[Totals | ShardError]:
    """What each of these ranks gets from settling together."""
    books = [(ledger.totals, ledger._pending, ledger._last) for ledger in ledgers]
    outcomes: list[Totals | ShardError] = []
    for ledger in ledgers:
        try:
            outcomes.append(ledger.settle(lambda _: books))
        except ShardError as error:
            outcomes.append(error)
    return outcomes


def ranks(path: Path | None, budget: Budget, count: int) -> list[Ledger]:
    return [Ledger(path, budget, rank=rank, world_size=count) for rank in range(count)]


def test_ranks_settle_their_books_and_one_writes(tmp_path):
    path = tmp_path / "quarantine.jsonl"
    ledgers = ranks(path, Budget(0.5), 3)
    ledgers[0].record(10, [fault("a")])
    ledgers[1].record(10, [fault("b"), fault("a")])
    ledgers[2].record(10, [])
    assert not path.exists()
    assert settle(ledgers) == [Totals(30, 3)] * 3
    ledgers[2].record(10, [fault("c")])
    assert settle(ledgers) == [Totals(40, 4)] * 3
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["rank"], line["key"]) for line in lines] == [(0, "a"), (1, "b"), (2, "c")]


def test_ranks_stop_together_when_all_of_them_spent_too_much():
    ledgers = ranks(None, Budget(0.01), 2)
    ledgers[0].record(500, [fault(str(n)) for n in range(9)])  # 1.8 % here, 0.9 % of what both have seen
    ledgers[1].record(500, [])
    assert settle(ledgers) == [Totals(1000, 9)] * 2
    ledgers[1].record(50, [fault("x"), fault("y")])
    outcomes = settle(ledgers)
    assert all(str(outcome).startswith("11 of 1,050 samples") for outcome in outcomes)
    assert len({str(outcome) for outcome in outcomes}) == 1


def test_a_rank_stops_alone_when_the_budget_of_all_is_spent_for_certain(tmp_path):
    path = tmp_path / "quarantine.jsonl"
    ledger = Ledger(path, Budget(0.01), rank=1, world_size=2)
    ledger.record(500, [fault(str(n)) for n in range(10)])
    with pytest.raises(ShardError, match=r"^11 of 1,000 samples"):
        ledger.record(0, [fault("one more")])
    assert len(path.read_text().splitlines()) == 11


@pytest.mark.parametrize(
    ("kind", "stage"), [(LostShardError, "shard"), (LabelError, "label"), (DecodeError, "decode")]
)
def test_errors_of_samples_travel_between_processes(kind, stage):
    error = pickle.loads(pickle.dumps(kind("why")))
    assert (type(error), str(error), error.stage) == (kind, "why", stage)
