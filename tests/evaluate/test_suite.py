"""The table of before and after: signs, noise, and rows that must not meet."""

from dataclasses import replace

import pytest

from fd_scale.evaluate.record import Record, RecordError, write
from fd_scale.evaluate.suite import compare, console_table, markdown, page, read_all, write_reports

KNN = Record(
    task="knn",
    model="teacher",
    feature="cls",
    network={"sha256": "a"},
    protocol={"crop_pct": 1.0},
    data={"test": {"sha256": "t"}},
    metrics={"top1_k20": [0.60]},
    headline="top1_k20",
    num_test=10_000,
    seeds=[0],
)
TUNED = replace(
    KNN,
    task="finetune",
    feature="gap",
    metrics={"top1": [0.8000, 0.8020, 0.8010]},
    headline="top1",
    seeds=[0, 1, 2],
    trained=True,
)


def after(record: Record, *values: float) -> Record:
    return replace(record, model="student", network={"sha256": "b"}, metrics={record.headline: list(values)})


def test_gains_losses_and_noise_are_told_apart():
    """kNN: 2 points at a standard error of 0.49 each, noise 1.38. Fine-tuning: seeds of 0.1 / sqrt 3 points,
    noise 0.16; 0.1 points are within it, 0.5 are not."""
    found = compare([after(KNN, 0.62), KNN, TUNED, after(TUNED, 0.8010, 0.8030, 0.8020)], "teacher")
    text = markdown(found)
    assert list(found.rows) == ["teacher", "student"]
    assert found.columns == ["knn cls", "finetune gap"]
    lines = text.splitlines()
    assert lines[2] == "| teacher | 60.00 +- 0.49 | 80.10 +- 0.06 (3 seeds) |"
    assert lines[4] == "| difference | +2.00 | +0.10 ~ |"
    worse = compare([KNN, TUNED, after(KNN, 0.595), after(TUNED, 0.795, 0.797, 0.796)], "teacher")
    assert "| difference | -0.50 ~ | -0.50 |" in markdown(worse)


def test_what_was_not_run_is_said():
    text = markdown(compare([KNN, TUNED, after(KNN, 0.7)], "teacher"))
    assert "| student | 70.00 +- 0.46 | n.r. |" in text
    assert "| difference | +10.00 | n.r. |" in text


def test_rows_that_differ_in_more_than_the_network_are_refused():
    other = replace(after(KNN, 0.62), protocol={"crop_pct": 0.875})
    with pytest.raises(RecordError, match=r"(?s)knn cls of teacher and student .*protocol.crop_pct: 1.0"):
        compare([KNN, other], "teacher")
    with pytest.raises(RecordError, match="was measured in two ways"):
        compare([KNN, replace(KNN, data={"test": {"sha256": "u"}})], "teacher")
    with pytest.raises(RecordError, match="no record of elsewhere to compare with; measured were teacher"):
        compare([KNN], "elsewhere")


def test_the_two_linear_probes_never_share_a_column():
    fast, slow = replace(KNN, task="linear_fast"), replace(KNN, task="linear")
    assert compare([fast, slow], "teacher").columns == ["linear_fast cls", "linear cls"]


def test_reports_are_written_and_read_back(tmp_path):
    for record in (KNN, after(KNN, 0.62)):
        write(record, tmp_path)
    (tmp_path / "other.json").write_text("{}")
    found = compare(read_all([tmp_path, tmp_path]), "teacher")
    assert console_table(found).row_count == 3
    written = write_reports(found, tmp_path)
    assert [path.name for path in written] == ["classification.md", "classification.html"]
    assert written[0].read_text() == markdown(found)
    assert "<td>+2.00</td>" in page(found)
    escaped = compare([replace(KNN, model="<b>")], "<b>")
    assert "&lt;b&gt;" in page(escaped)
