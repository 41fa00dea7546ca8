"""Records: what they hold, which may be compared, and how far apart two must be to differ."""

import json
import math
import statistics
from dataclasses import replace

import pytest

from fd_scale.evaluate.record import ONE_SEED_STD, Record, RecordError, change, differences, read, write

KNN = Record(
    task="knn",
    model="one",
    feature="cls",
    network={"sha256": "abc", "input_size": 32},
    protocol={"k": [10, 20], "crop_pct": 1.0},
    data={"train": {"sha256": "t"}, "test": {"sha256": "u"}},
    metrics={"top1_k10": [0.5], "top1_k20": [0.6]},
    headline="top1_k20",
    num_test=400,
    seeds=[0],
    wall_s=2.5,
)
TUNED = replace(
    KNN, task="finetune", metrics={"top1": [0.80, 0.82, 0.84]}, headline="top1", seeds=[0, 1, 2], trained=True
)


def test_a_record_comes_back_as_it_was_written(tmp_path):
    path = write(KNN, tmp_path / "reports")
    again = read(path)
    assert again == KNN
    assert (again.protocol_hash, again.data_hash) == (KNN.protocol_hash, KNN.data_hash)
    stored = json.loads(path.read_text())
    assert stored["weights_sha256"] == "abc"
    assert (stored["mean"], stored["std"]) == (0.6, None)
    assert write(KNN, tmp_path / "reports") == path
    assert len(list((tmp_path / "reports").iterdir())) == 1


def test_two_modes_of_one_evaluation_are_two_files(tmp_path):
    other = replace(KNN, metrics={"top1_direct": [0.4]}, headline="top1_direct")
    assert write(KNN, tmp_path) != write(other, tmp_path)


def test_seeds_are_summed_up():
    assert TUNED.mean == pytest.approx(0.82)
    assert TUNED.std == pytest.approx(statistics.stdev([0.80, 0.82, 0.84])) == pytest.approx(0.02)
    assert TUNED.uncertainty == pytest.approx(0.02 / math.sqrt(3))


def test_a_single_seed_has_the_error_of_its_test_set_and_no_less_than_seeds_are_known_to_differ():
    binomial = math.sqrt(0.6 * 0.4 / 400)
    assert KNN.uncertainty == pytest.approx(binomial)
    assert replace(KNN, trained=True).uncertainty == pytest.approx(binomial)
    assert replace(KNN, trained=True, num_test=10**8).uncertainty == ONE_SEED_STD


def test_a_change_has_two_standard_errors_of_noise():
    after = replace(KNN, model="two", metrics={"top1_k20": [0.7]})
    gain, noise = change(KNN, after)
    assert gain == pytest.approx(0.1)
    assert noise == pytest.approx(2 * math.sqrt(0.6 * 0.4 / 400 + 0.7 * 0.3 / 400))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "linear"}, "task: 'knn' of one, 'linear' of two"),
        ({"feature": "gap"}, "feature: 'cls' of one, 'gap' of two"),
        ({"protocol": {"k": [10, 20], "crop_pct": 0.875}}, "protocol.crop_pct: 1.0 of one, 0.875 of two"),
        ({"data": {"train": {"sha256": "t"}, "test": {"sha256": "v"}}}, "data.test.sha256: 'u' of one"),
        ({"seeds": [1]}, r"seeds: \[0\] of one, \[1\] of two"),
    ],
)
def test_what_differs_is_not_compared(changes, message):
    with pytest.raises(RecordError, match=message):
        change(KNN, replace(KNN, model="two", **changes))


def test_another_network_is_what_is_compared():
    other = replace(KNN, model="two", network={"sha256": "def", "input_size": 64}, wall_s=9.0)
    assert differences(KNN, other) == []
    assert other.file_name != KNN.file_name


def test_a_foreign_file_is_refused(tmp_path):
    path = tmp_path / "other.json"
    path.write_text('{"format": 1}')
    with pytest.raises(RecordError, match=r"other.json is no record of an evaluation"):
        read(path)
    path.write_text(KNN.to_json().replace('"format": 1', '"format": 9'))
    with pytest.raises(RecordError, match="has format 9; this version reads 1"):
        read(path)
