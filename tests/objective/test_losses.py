"""The loss against stored fixtures, against a slow float64 reference, and against what must never happen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fd_scale.objective import Objective, whitened_smooth_l1
from fd_scale.run import recipe as recipes
from tests.reference import objective as reference

FIXTURES = sorted((Path(__file__).parents[1] / "reference").glob("fd_case_*.npz"))
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "cls10": {"token_weight": True},
    "cls10wm": {"token_weight": True, "normaliser": "weighted_mean"},
}

# Worst error of a value or gradient, relative to the largest entry of its tensor: 6e-16 in float64, 3.1e-7 in
# float32 (a handful of roundings: a product of six terms, a variance, a sum of eighty).
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}


def relative(got: Tensor, expected: Any) -> float:
    """Largest error in units of the largest expected entry."""
    expected = np.asarray(expected, np.float64)
    return float(np.abs(got.detach().double().numpy() - expected).max() / max(np.abs(expected).max(), 1e-300))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("path", FIXTURES, ids=lambda p: p.stem)
def test_fixtures_value_and_all_gradients(path: Path, variant: str, dtype: torch.dtype) -> None:
    case = dict(np.load(path))
    student, weight, bias = (
        torch.tensor(case[f"in_{name}"], dtype=dtype, requires_grad=True) for name in ("s", "weight", "bias")
    )
    choices = dict(VARIANTS[variant])
    if "token_weight" in choices:
        choices["token_weight"] = torch.tensor([10.0, 1, 1, 1, 1], dtype=dtype)
    prediction = nn.functional.linear(student, weight, bias)
    prediction.retain_grad()
    loss = whitened_smooth_l1(prediction, torch.tensor(case["in_t"], dtype=dtype), **choices)
    loss.backward()
    assert loss.dtype == dtype
    assert loss.ndim == 0
    found = {
        "loss": loss,
        "pred": prediction,
        "d_pred": prediction.grad,
        "d_weight": weight.grad,
        "d_bias": bias.grad,
        "d_s": student.grad,
    }
    errors = {name: relative(tensor, case[f"{variant}_{name}"]) for name, tensor in found.items()}
    assert max(errors.values()) < TOLERANCE[dtype], errors


def test_the_reference_agrees_with_the_fixtures() -> None:
    for path in FIXTURES:
        case = dict(np.load(path))
        inputs = (case["in_s"], case["in_weight"], case["in_bias"], case["in_t"])
        for variant, choices in VARIANTS.items():
            given_weight = {"token_weight": np.array([10.0, 1, 1, 1, 1])} if "token_weight" in choices else {}
            answer = reference.projected(*inputs, **{**choices, **given_weight})
            for name, got in (
                ("loss", answer.loss),
                ("d_pred", answer.prediction),
                ("d_weight", answer.weight),
                ("d_bias", answer.bias),
                ("d_s", answer.student),
            ):
                # Two orders of summation in float64: 7e-16 seen.
                assert np.allclose(got, case[f"{variant}_{name}"], rtol=1e-13, atol=1e-16), (variant, name)


def tokens(seed: int, *shape: int, scale: float = 3.0, shift: float = 1.7) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale + shift


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 2), (3, 7, 5), (2, 9, 33)])
@pytest.mark.parametrize("target", ["whiten", "l2", "l2_scaled", "none"])
@pytest.mark.parametrize("beta", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("weighting", ["none", "N", "BN"])
@pytest.mark.parametrize("normaliser", ["mean", "weighted_mean"])
def test_every_setting_against_the_reference(
    shape: tuple[int, int, int], target: Any, beta: float, weighting: str, normaliser: Any
) -> None:
    prediction, teacher = tokens(1, *shape).requires_grad_(), tokens(2, *shape)
    sizes = {"none": None, "N": shape[1:2], "BN": shape[:2]}[weighting]
    weight = None if sizes is None else tokens(3, *sizes).abs()
    choices = {"beta": beta, "target": target, "normaliser": normaliser}
    loss = whitened_smooth_l1(prediction, teacher, token_weight=weight, **choices)
    loss.backward()
    answer = reference.loss_and_gradient(
        prediction.detach().numpy(),
        teacher.numpy(),
        token_weight=None if weight is None else weight.numpy(),
        **choices,
    )
    # Summation order alone separates the two in float64: 1.1e-15 seen.
    assert relative(loss, answer.loss) < 1e-12
    assert relative(prediction.grad, answer.prediction) < 1e-12


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(*(st.integers(1, 6),) * 3),
    seed=st.integers(0, 2**32 - 1),
    beta=st.floats(0, 8),
    scale=st.floats(1e-3, 1e3),
)
def test_any_sizes_and_scales(shape: tuple[int, int, int], seed: int, beta: float, scale: float) -> None:
    prediction = tokens(seed, *shape).requires_grad_()
    teacher = tokens(seed + 1, *shape, scale=scale)
    weight = tokens(seed + 2, *shape[:2]).clamp(min=0)
    loss = whitened_smooth_l1(prediction, teacher, beta=beta, token_weight=weight, normaliser="weighted_mean")
    loss.backward()
    answer = reference.loss_and_gradient(
        prediction.detach().numpy(),
        teacher.numpy(),
        beta=beta,
        token_weight=weight.numpy(),
        normaliser="weighted_mean",
    )
    # Variances near eps amplify rounding: 1e-14 seen in 40 draws.
    assert relative(loss, answer.loss) < 1e-11
    assert relative(prediction.grad, answer.prediction) < 1e-11


def test_constant_teacher_rows_are_finite() -> None:
    prediction = tokens(1, 2, 3, 8).requires_grad_()
    loss = whitened_smooth_l1(prediction, torch.full((2, 3, 8), 7.0, dtype=torch.float64))
    loss.backward()
    answer = reference.loss_and_gradient(prediction.detach().numpy(), np.full((2, 3, 8), 7.0))
    assert relative(loss, answer.loss) < 1e-12
    assert torch.isfinite(prediction.grad).all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 4e-3), (torch.float16, 1e-3)])
def test_half_precision_inputs_are_computed_in_float32(dtype: torch.dtype, tolerance: float) -> None:
    prediction = tokens(1, 2, 9, 64).to(dtype).requires_grad_()
    teacher = tokens(2, 2, 9, 64).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = whitened_smooth_l1(prediction, teacher) * 64
    loss.backward()
    rounded = prediction.detach().double().numpy(), teacher.double().numpy()
    answer = reference.loss_and_gradient(*rounded)
    assert loss.dtype == torch.float32
    assert prediction.grad.dtype == dtype
    # The value is float32 from the rounded inputs on (5e-8 seen); the gradient is rounded once, to half an
    # ulp of its dtype (2.2e-3 and 2.8e-4 seen).
    assert relative(loss, answer.loss * 64) < 1e-6
    assert relative(prediction.grad, answer.prediction * 64) < tolerance


def test_dtypes_may_differ_and_float64_wins() -> None:
    prediction, teacher = tokens(1, 2, 3, 8), tokens(2, 2, 3, 8)
    assert whitened_smooth_l1(prediction.bfloat16(), teacher.float()).dtype == torch.float32
    assert whitened_smooth_l1(prediction.float(), teacher).dtype == torch.float64


@pytest.mark.parametrize("target", ["whiten", "l2", "l2_scaled", "none"])
def test_the_teacher_gets_no_gradient(target: Any) -> None:
    prediction, teacher = tokens(1, 2, 3, 8).requires_grad_(), tokens(2, 2, 3, 8).requires_grad_()
    whitened_smooth_l1(prediction, teacher, target=target).backward()
    assert teacher.grad is None
    assert prediction.grad is not None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["prediction", "teacher"])
@pytest.mark.parametrize("target", ["whiten", "l2", "l2_scaled", "none"])
@pytest.mark.parametrize("beta", [0.0, 2.0])
def test_nothing_leaks_from_a_token_of_weight_zero(bad: float, where: str, target: Any, beta: float) -> None:
    clean = {"prediction": tokens(1, 2, 3, 8), "teacher": tokens(2, 2, 3, 8)}
    dirty = {name: tensor.clone() for name, tensor in clean.items()}
    dirty[where][1, 2] = bad
    weight = torch.ones(2, 3)
    weight[1, 2] = 0
    results = []
    for case in (clean, dirty):
        prediction = case["prediction"].requires_grad_()
        loss = whitened_smooth_l1(prediction, case["teacher"], target=target, beta=beta, token_weight=weight)
        loss.backward()
        results.append((loss.detach(), prediction.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert not results[0][1][1, 2].any()


@pytest.mark.parametrize("where", ["prediction", "teacher"])
@pytest.mark.parametrize("target", ["whiten", "l2", "l2_scaled", "none"])
@pytest.mark.parametrize("beta", [0.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_nan_in_a_kept_token_reaches_loss_and_gradient(
    where: str, target: Any, beta: float, dtype: torch.dtype
) -> None:
    case = {"prediction": tokens(1, 2, 3, 40).to(dtype), "teacher": tokens(2, 2, 3, 40).to(dtype)}
    case[where][0, 1, 33] = float("nan")
    prediction = case["prediction"].requires_grad_()
    loss = whitened_smooth_l1(prediction, case["teacher"], target=target, beta=beta)
    loss.backward()
    assert torch.isnan(loss)
    assert torch.isnan(prediction.grad[0, 1, 33])


def test_no_weight_at_all_gives_zero_for_both_normalisers() -> None:
    for normaliser in ("mean", "weighted_mean"):
        prediction = tokens(1, 2, 3, 8).requires_grad_()
        loss = whitened_smooth_l1(
            prediction, tokens(2, 2, 3, 8), token_weight=torch.zeros(3), normaliser=normaliser
        )
        loss.backward()
        assert loss == 0
        assert not prediction.grad.any()


GOOD = {"prediction": (2, 3, 4), "teacher": (2, 3, 4)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"teacher": torch.zeros(2, 3, 5)}, r"\(2, 3, 4\) and teacher \(2, 3, 5\).*equal shape"),
        ({"prediction": torch.zeros(3, 4), "teacher": torch.zeros(3, 4)}, r"\(B, N, D\)"),
        ({"prediction": torch.zeros(0, 3, 4), "teacher": torch.zeros(0, 3, 4)}, "nothing to compare"),
        ({"prediction": torch.zeros(2, 3, 4, dtype=torch.int64)}, "prediction is torch.int64"),
        ({"teacher": torch.zeros(2, 3, 4, dtype=torch.complex64)}, "teacher is torch.complex64"),
        ({"teacher": torch.zeros(2, 3, 4, device="meta")}, "prediction is on cpu, teacher on meta"),
        ({"token_weight": torch.ones(2)}, r"\(2,\) is neither \(3,\) nor \(2, 3\)"),
        ({"token_weight": torch.ones(3, 2)}, r"\(3, 2\) is neither"),
        ({"token_weight": torch.ones(3, device="meta")}, "on the device of the prediction"),
        ({"beta": -1.0}, "beta=-1.0 must be"),
        ({"beta": float("nan")}, "beta=nan must be"),
        ({"eps": -1e-5}, "eps=-1e-05 must be"),
        ({"target": "white"}, "target='white' must be one of whiten, l2, l2_scaled, none"),
        ({"normaliser": "sum"}, "normaliser='sum' must be one of mean, weighted_mean"),
    ],
)
def test_bad_input(change: dict[str, Any], words: str) -> None:
    arguments = {"prediction": torch.zeros(2, 3, 4), "teacher": torch.zeros(2, 3, 4), **change}
    with pytest.raises(ValueError, match=words):
        whitened_smooth_l1(arguments.pop("prediction"), arguments.pop("teacher"), **arguments)


def maps(
    count: int, batch: int = 4, num_tokens: int = 5, width: int = 6
) -> tuple[list[Tensor], list[Tensor]]:
    predicted = [tokens(10 + i, batch, num_tokens, width + i).requires_grad_() for i in range(count)]
    return predicted, [tokens(20 + i, batch, num_tokens, width + i) for i in range(count)]


@pytest.mark.parametrize("normaliser", ["mean", "weighted_mean"])
@pytest.mark.parametrize("cls", ["match", "drop", "mean"])
def test_objective_weights_the_class_token(normaliser: Any, cls: Any) -> None:
    predicted, taught = maps(1)
    spec = recipes.Objective(normaliser=normaliser, cls=cls, cls_weight=10.0, beta=0.7, target="l2")
    loss = Objective(spec)(predicted, taught, torch.ones(4, dtype=torch.bool))
    loss.backward()
    weight = np.array([1.0 if cls == "drop" else 10.0, 1, 1, 1, 1])
    answer = reference.loss_and_gradient(
        predicted[0].detach().numpy(),
        taught[0].numpy(),
        beta=0.7,
        target="l2",
        token_weight=weight,
        normaliser=normaliser,
    )
    # The folded normaliser is one more rounding: 3e-16 seen.
    assert relative(loss, answer.loss) < 1e-12
    assert relative(predicted[0].grad, answer.prediction) < 1e-12


@pytest.mark.parametrize("num_maps", [1, 2])
def test_the_embedding_is_added_by_its_cosine(num_maps: int) -> None:
    predicted, taught = maps(num_maps)
    given, wanted = tokens(30, 4, 1, 9), tokens(31, 4, 1, 9)
    valid = torch.tensor([True, False, True, True])
    # An invalid image may hold anything, on either side, and has no gradient.
    given[1] = wanted[1] = float("nan")
    given.requires_grad_()
    plain = Objective(recipes.Objective())(predicted, taught, valid)
    spec = recipes.Objective(embedding_weight=0.25)
    loss = Objective(spec)([*predicted, given], [*taught, wanted], valid)
    loss.backward()
    first, second = given.detach().numpy()[:, 0], wanted.numpy()[:, 0]
    lengths = np.linalg.norm(first, axis=1), np.linalg.norm(second, axis=1)
    cosine = (first * second).sum(1) / (lengths[0] * lengths[1])
    distance = np.where(valid.numpy(), 1 - cosine, 0).mean()
    # The derivative of -cosine, over the batch, with its weight.
    towards = second / lengths[1][:, None] - cosine[:, None] * first / lengths[0][:, None]
    slope = np.where(valid.numpy()[:, None], -0.25 * towards / lengths[0][:, None] / 4, 0)
    # float64 throughout: 2e-15 seen, of a difference of two losses.
    assert relative(loss - plain.detach(), np.asarray(0.25 * distance)) < 1e-12
    assert given.grad is not None
    assert relative(given.grad[:, 0], slope) < 1e-12


@pytest.mark.parametrize("granularity", ["cls", "gap"])
def test_objective_does_not_weight_a_lone_token(granularity: Any) -> None:
    predicted, taught = maps(1, num_tokens=1)
    loss = Objective(recipes.Objective(granularity=granularity))(predicted, taught, torch.ones(4).bool())
    answer = reference.loss_and_gradient(predicted[0].detach().numpy(), taught[0].numpy())
    assert relative(loss, answer.loss) < 1e-12


@pytest.mark.parametrize("normaliser", ["mean", "weighted_mean"])
def test_an_invalid_image_adds_nothing_and_changes_no_other_gradient(normaliser: Any) -> None:
    objective = Objective(recipes.Objective(normaliser=normaliser))
    predicted, taught = maps(1)
    objective(predicted, taught, torch.ones(4).bool()).backward()
    masked, _ = maps(1)
    taught[0][2] = float("nan")
    loss = objective(masked, taught, torch.tensor([True, True, False, True]))
    loss.backward()
    assert torch.isfinite(loss)
    assert not masked[0].grad[2].any()
    kept = [0, 1, 3]
    assert torch.equal(masked[0].grad[kept], predicted[0].grad[kept])


@pytest.mark.parametrize("normaliser", ["mean", "weighted_mean"])
def test_the_mean_over_micro_batches_is_the_loss_of_the_whole(normaliser: Any) -> None:
    objective = Objective(recipes.Objective(normaliser=normaliser))
    predicted, taught = maps(1)
    valid = torch.tensor([True, False, False, True])
    whole = objective(predicted, taught, valid)
    parts = [objective([predicted[0][i : i + 2]], [taught[0][i : i + 2]], valid[i : i + 2]) for i in (0, 2)]
    assert relative(torch.stack(parts).mean(), whole.item()) < 1e-14


def test_several_teachers_are_averaged() -> None:
    predicted, taught = maps(3)
    valid = torch.ones(4).bool()
    objective = Objective(recipes.Objective())
    loss = objective(predicted, taught, valid)
    each = [objective([p], [t], valid) for p, t in zip(predicted, taught, strict=True)]
    assert relative(loss, torch.stack(each).mean().item()) < 1e-14


def test_a_wholly_invalid_batch_gives_zero() -> None:
    predicted, taught = maps(1)
    loss = Objective(recipes.Objective())(predicted, taught, torch.zeros(4).bool())
    loss.backward()
    assert loss == 0
    assert not predicted[0].grad.any()


def test_objective_refuses_what_does_not_pair() -> None:
    predicted, taught = maps(2)
    objective = Objective(recipes.Objective())
    with pytest.raises(ValueError, match="2 predicted maps do not pair with 1"):
        objective(predicted, taught[:1], torch.ones(4).bool())
    with pytest.raises(ValueError, match="0 predicted maps"):
        objective([], [], torch.ones(4).bool())
    with pytest.raises(ValueError, match=r"valid of shape \(3,\)"):
        objective(predicted, taught, torch.ones(3).bool())
    with pytest.raises(ValueError, match="must be bool"):
        objective(predicted, taught, torch.ones(4))
