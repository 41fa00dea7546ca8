"""kNN against a loop in float64, and against scikit-learn's."""

import json
import math

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from fd_scale.evaluate import knn
from fd_scale.evaluate.features import EvaluationError, LabelledFeatures
from fd_scale.evaluate.knn import classify, evaluate
from tests.evaluate.ranks import over_ranks


def clouds(seed: int, count: int, width: int, classes: int) -> tuple[Tensor, Tensor]:
    """Gaussian clouds that overlap, in float64, with lengths that mean nothing."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (count,), generator=generator)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    points = centres[labels] + torch.randn(count, width, generator=generator, dtype=torch.float64)
    return points * torch.rand(count, 1, generator=generator, dtype=torch.float64).add(0.1), labels


def by_hand(
    train: Tensor, labels: Tensor, test: Tensor, classes: int, k: int, temperature: float
) -> list[int]:
    """The protocol, word by word."""
    answers = []
    for asked in test.tolist():
        similarity = []
        for known in train.tolist():
            dot = sum(a * b for a, b in zip(asked, known, strict=True))
            similarity.append(dot / math.sqrt(sum(a * a for a in asked) * sum(b * b for b in known)))
        nearest = sorted(range(len(similarity)), key=lambda i: -similarity[i])[:k]
        votes = [0.0] * classes
        for i in nearest:
            votes[int(labels[i])] += math.exp(similarity[i] / temperature)
        answers.append(votes.index(max(votes)))
    return answers


def of(features: Tensor, labels: Tensor, **pooled: Tensor) -> LabelledFeatures:
    return LabelledFeatures("model", {"gap": features.float(), **pooled}, labels, 1, {"data": "made"})


@pytest.mark.parametrize(("count", "width", "classes"), [(1, 1, 2), (57, 5, 4), (128, 16, 7)])
@pytest.mark.parametrize("chunk", [1, 7, 1024])
def test_votes_equal_a_loop(count, width, classes, chunk):
    train, labels = clouds(0, count, width, classes)
    test, _ = clouds(1, 23, width, classes)
    ks = sorted({1, min(3, count), min(20, count), count})
    predicted = classify(train, labels, test, num_classes=classes, ks=ks, chunk=chunk)
    for k in ks:
        assert predicted[k].tolist() == by_hand(train, labels, test, classes, k, knn.TEMPERATURE)


@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_answers_are_those_of_scikit_learn(temperature):
    train, labels = clouds(2, 500, 12, 6)
    test, asked = clouds(3, 300, 12, 6)
    results = evaluate(of(train, labels), of(test, asked), temperature=temperature)
    predicted = classify(train, labels, test, num_classes=6, temperature=temperature)
    for k in knn.KS:
        other = KNeighborsClassifier(
            k, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / temperature)
        ).fit(train, labels)
        assert predicted[k].tolist() == other.predict(test).tolist()
        # The result is from float32 features; one image in 300 could fall on the other side, none did.
        assert results[0].accuracy[k] == pytest.approx(other.score(test, asked), abs=1 / 300)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_training_features_spread_over_ranks_give_the_same_answers(size):
    """Parts of unequal size, some smaller than k."""
    train, labels = clouds(7, 58, 6, 4)
    test, asked = clouds(8, 31, 6, 4)
    expected = evaluate(of(train, labels), of(test, asked), ks=(1, 3, 20, 40))

    def on_rank(rank, gather):
        part = slice(len(train) * rank // size, len(train) * (rank + 1) // size)
        return evaluate(of(train[part], labels[part]), of(test, asked), ks=(1, 3, 20, 40), gather=gather)

    for results in over_ranks(on_rank, size):
        assert results[0].accuracy == expected[0].accuracy
        assert (results[0].num_train, results[0].num_left_out) == (58, 1 + size)


def test_of_equal_votes_the_lower_class_wins():
    train = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    predicted = classify(train, torch.tensor([2, 1]), torch.ones(1, 2), num_classes=3, ks=(2,))
    assert predicted[2].tolist() == [1]


def test_a_result_says_how_it_came_about():
    train, labels = clouds(4, 60, 8, 3)
    test, asked = clouds(5, 50, 8, 3)
    cls_train, cls_test = torch.randn(60, 4), torch.randn(50, 4)
    results = evaluate(of(train, labels, cls=cls_train), of(test, asked, cls=cls_test))
    assert [result.pooling for result in results] == ["gap", "cls"]
    result = results[0]
    assert list(result.accuracy) == [10, 20]  # 100 and 200 neighbours there are not
    assert result.headline == result.accuracy[20]
    assert result.standard_error == pytest.approx(math.sqrt(result.headline * (1 - result.headline) / 50))
    record = json.loads(result.to_json())
    assert record["accuracy"]["20"] == record["headline"] == result.headline
    assert record["temperature"] == 0.07
    assert (record["num_train"], record["num_test"], record["num_classes"]) == (60, 50, 3)
    assert (record["num_left_out"], record["train"]) == (2, {"data": "made"})


def test_too_few_images_are_refused():
    train, labels = clouds(6, 9, 4, 2)
    with pytest.raises(EvaluationError, match=r"k in \(10, 20, 100, 200\) needs at least 10 training images"):
        evaluate(of(train, labels), of(train, labels))
    small = evaluate(of(train, labels), of(train, labels), ks=(1, 5))
    assert small[0].accuracy[1] == 1.0
    assert small[0].headline == small[0].accuracy[5]
