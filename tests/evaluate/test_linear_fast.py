"""The fast linear probe against scikit-learn's logistic regression."""

import json

import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from fd_scale.evaluate import linear_fast
from fd_scale.evaluate.features import EvaluationError, LabelledFeatures
from fd_scale.evaluate.linear_fast import evaluate, fit
from tests.evaluate.test_knn import clouds


def correlated(seed: int, count: int, width: int, classes: int) -> tuple[Tensor, Tensor]:
    """Clouds whose channels are strongly correlated and of different scale, as those of networks are."""
    points, labels = clouds(seed, count, width, classes)
    mixing = torch.randn(width, width, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    mixing = mixing @ torch.diag(torch.logspace(0, -2, width, dtype=torch.float64)) @ mixing.T
    return (points @ mixing * torch.logspace(-1, 2, width) + 3).float(), labels


def of(features: Tensor, labels: Tensor) -> LabelledFeatures:
    return LabelledFeatures("model", {"gap": features}, labels, 0, {"data": "made"})


def sklearn(features: Tensor, labels: Tensor, l2: float) -> tuple[StandardScaler, LogisticRegression]:
    scaler = StandardScaler().fit(features.double())
    model = LogisticRegression(C=1 / (len(labels) * l2), solver="newton-cholesky", tol=1e-10)
    return scaler, model.fit(scaler.transform(features.double()), labels)


@pytest.mark.parametrize("l2", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize(("count", "width", "classes"), [(40, 1, 3), (301, 10, 3), (150, 24, 6)])
def test_the_optimum_is_that_of_scikit_learn(count, width, classes, l2):
    train, labels = correlated(0, count, width, classes)
    test, _ = correlated(1, 97, width, classes)
    classifier = fit(train, labels, num_classes=classes, l2=l2)
    scaler, model = sklearn(train, labels, l2)
    expected = torch.from_numpy(model.predict_proba(scaler.transform(test.double())))
    # The search ends at a small gradient, and weak penalties leave the optimum flat: worst seen 1.2e-4 at
    # 1e-4, and 6e-6 at the others.
    torch.testing.assert_close(classifier.logits(test).softmax(1), expected, rtol=0, atol=5e-4)


@pytest.mark.parametrize("l2", [1e-1, 1e-5])
def test_the_gradient_vanishes_at_the_optimum(l2):
    train, labels = correlated(2, 200, 30, 4)
    found = fit(train, labels, num_classes=4, l2=l2)
    weight, bias = found.weight.clone().requires_grad_(), found.bias.clone().requires_grad_()
    inputs = (train.double() - train.double().mean(0)) / train.double().std(0, correction=0)
    cost = F.cross_entropy(F.linear(inputs, weight, bias), labels) + l2 / 2 * weight.square().sum()
    for gradient in torch.autograd.grad(cost, (weight, bias)):
        assert gradient.abs().max() < 1e-5  # 1e-7 in the coordinates of the search; worst seen 4e-7


def test_a_constant_channel_changes_nothing():
    train, labels = correlated(3, 120, 6, 3)
    with_constant = torch.cat((train, torch.full((120, 1), 7.0)), 1)
    plain, more = (fit(x, labels, num_classes=3, l2=1e-3) for x in (train, with_constant))
    torch.testing.assert_close(
        more.logits(with_constant), plain.logits(train), rtol=0, atol=1e-9
    )  # worst seen 3e-14
    assert more.weight[:, -1].abs().max() < 1e-6


def test_the_penalty_is_chosen_on_training_images_alone():
    train, labels = correlated(4, 400, 12, 5)
    test, asked = correlated(5, 200, 12, 5)
    result = evaluate(of(train, labels), of(test, asked))[0]
    fitting, validating = linear_fast._split(labels, 0)
    assert len(validating) == 80
    assert sorted(torch.cat((fitting, validating)).tolist()) == list(range(400))
    for l2, accuracy in result.validation.items():
        scaler, model = sklearn(train[fitting], labels[fitting], l2)
        expected = model.score(scaler.transform(train[validating].double()), labels[validating])
        assert accuracy == pytest.approx(expected, abs=1.01 / 80)  # one image near a border; none seen
    assert result.l2 == max(l2 for l2, a in result.validation.items() if a == max(result.validation.values()))
    scaler, model = sklearn(train, labels, result.l2)
    assert result.accuracy == pytest.approx(
        model.score(scaler.transform(test.double()), asked), abs=1.01 / 200
    )


def test_a_result_is_repeatable_and_says_how_it_came_about():
    train, labels = correlated(6, 100, 8, 3)
    first, again = (evaluate(of(train, labels), of(train, labels), l2_grid=(1e-3, 1e-1)) for _ in range(2))
    assert first == again
    assert evaluate(of(train, labels), of(train, labels), seed=1)[0].validation != first[0].validation
    result = first[0]
    assert result.l2_at_edge
    assert result.headline == result.accuracy
    record = json.loads(result.to_json())
    assert record["protocol"].startswith("fast: L-BFGS on cached features")
    assert (record["num_train"], record["num_classes"], record["seed"]) == (100, 3, 0)
    assert record["standard_error"] == result.standard_error


@pytest.mark.parametrize(
    ("labels", "message"),
    [([0, 1], "2 training images are too few"), ([0] * 9 + [1], None)],
)
def test_too_few_images_are_refused(labels, message):
    """A class with one example is refused when the split takes it."""
    features = torch.randn(len(labels), 2)
    data = of(features, torch.tensor(labels))
    if message is None:
        held_out = next(s for s in range(100) if _splits_off(torch.tensor(labels), s))
        with pytest.raises(EvaluationError, match="class 1 has no other example"):
            evaluate(data, data, seed=held_out)
    else:
        with pytest.raises(EvaluationError, match=message):
            evaluate(data, data)


def _splits_off(labels: Tensor, seed: int) -> bool:
    try:
        linear_fast._split(labels, seed)
    except EvaluationError:
        return True
    return False
