"""The books of bad samples: counted, written once, and bounded."""

import json
import pickle

import pytest

from fd_scale.data.decode import DecodeError
from fd_scale.data.faults import GRACE_SAMPLES, Fault, LabelError, Ledger, ReadError
from fd_scale.errors import ShardError


def fault(key: str, *, stage: str = "decode", step: int = 3) -> Fault:
    return Fault(1, step, "s.tar", key, stage, "it is damaged")


def test_a_bad_sample_is_written_once(tmp_path):
    path = tmp_path / "run" / "quarantine.jsonl"
    ledger = Ledger(path, max_bad_fraction=1, rank=5)
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
    assert (ledger.seen, ledger.bad) == (12, 5)


def test_two_ledgers_share_a_file(tmp_path):
    path = tmp_path / "quarantine.jsonl"
    for rank in (0, 1):
        Ledger(path, max_bad_fraction=1, rank=rank).record(1, [fault("a")])
    assert [json.loads(line)["rank"] for line in path.read_text().splitlines()] == [0, 1]


def test_names_that_are_no_text_can_be_written(tmp_path):
    path = tmp_path / "quarantine.jsonl"
    Ledger(path, max_bad_fraction=1).record(1, [fault(b"\xff\xfe".decode("utf-8", "surrogateescape"))])
    assert json.loads(path.read_text())["key"] == "\udcff\udcfe"


def test_a_few_are_borne_whatever_their_share():
    ledger = Ledger(None, max_bad_fraction=1e-3)
    for number in range(GRACE_SAMPLES):
        ledger.record(1, [fault(str(number))])
    with pytest.raises(
        ShardError, match=rf"{GRACE_SAMPLES + 1} of {GRACE_SAMPLES + 1} samples .*max_bad_fraction=0\.001"
    ):
        ledger.record(1, [fault("last")])


def test_the_share_is_judged_over_all_samples_seen(tmp_path):
    ledger = Ledger(tmp_path / "q.jsonl", max_bad_fraction=0.01)
    ledger.record(2000, [fault(str(n)) for n in range(20)])
    with pytest.raises(ShardError) as caught:
        ledger.record(1, [fault("one too many", stage="read")])
    assert str(caught.value) == (
        "21 of 2,001 samples could not be used, more than data.max_bad_fraction=0.01 allows; the last one: "
        f"shard s.tar, key one too many, read: it is damaged; all are listed in {tmp_path}/q.jsonl. "
        "Repair or replace these images, or raise data.max_bad_fraction"
    )


def test_nothing_is_borne_at_zero_and_everything_at_one():
    with pytest.raises(ShardError, match="1 of 500 samples"):
        Ledger(None, max_bad_fraction=0).record(500, [fault("a")])
    everything = Ledger(None, max_bad_fraction=1)
    everything.record(50, [fault(str(n)) for n in range(50)])
    assert everything.bad == 50


@pytest.mark.parametrize(
    ("kind", "stage"), [(ReadError, "read"), (LabelError, "label"), (DecodeError, "decode")]
)
def test_errors_of_samples_travel_between_processes(kind, stage):
    error = pickle.loads(pickle.dumps(kind("why")))
    assert (type(error), str(error), error.stage) == (kind, "why", stage)
