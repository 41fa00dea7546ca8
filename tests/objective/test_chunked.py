"""The loss in pieces: equal to the plain path in value and every gradient, and never holding a map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fd_scale.objective import Objective
from fd_scale.objective.chunked import ChunkedLoss, pieces
from fd_scale.run import recipe as recipes
from models.projector import Projector
from tests.reference import objective as reference


@dataclass
class Problem:
    """Student tokens, projectors and teacher maps, one image of which may be invalid."""

    tokens: Tensor
    projectors: list[Projector]
    taught: list[Tensor]
    valid: Tensor

    def leaves(self) -> list[Tensor]:
        return [self.tokens, *(p for projector in self.projectors for p in projector.parameters())]


def problem(
    widths: Sequence[int] = (6,),
    *,
    batch: int = 3,
    grids: tuple[tuple[int, int], tuple[int, int]] = ((2, 3), (2, 3)),
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> Problem:
    generator = torch.Generator().manual_seed(0)
    student, teacher = grids
    resample = "exact" if student == teacher else "bilinear"
    torch.manual_seed(0)
    projectors = [
        Projector(4, width, from_grid=student, to_grid=teacher, num_prefix_tokens=1, resample=resample)
        for width in widths
    ]
    tokens = 2 * torch.randn(batch, 1 + student[0] * student[1], 4, generator=generator, dtype=torch.float64)
    taught = [
        torch.randn(batch, 2 + teacher[0] * teacher[1], width, generator=generator, dtype=torch.float64) + 3
        for width in widths
    ]
    return Problem(
        tokens.to(device, dtype).requires_grad_(),
        [projector.to(device, dtype) for projector in projectors],
        [t.to(device, dtype)[:, 1:] for t in taught],  # a strided map, as one without its register is
        torch.ones(batch, dtype=torch.bool, device=device),
    )


def plain(p: Problem, objective: Objective) -> Tensor:
    return objective([projector(p.tokens) for projector in p.projectors], p.taught, p.valid)


def chunked(p: Problem, objective: Objective, chunk_tokens: int) -> Tensor:
    return ChunkedLoss(objective, p.taught, p.valid, chunk_tokens)(p.tokens, p.projectors)


def relative(got: Tensor, expected: Any) -> float:
    expected = np.asarray(expected, np.float64)
    found = got.detach().double().cpu().numpy()
    return float(np.linalg.norm(found - expected) / max(np.linalg.norm(expected), 1e-300))


OBJECTIVES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "weighted mean": {"normaliser": "weighted_mean"},
    "l2, plain L1": {"target": "l2", "beta": 0.0},
    "none": {"target": "none", "cls_weight": 1.0, "beta": 0.5},
    "l2 at the size of whitened": {"target": "l2_scaled"},
}


@pytest.mark.parametrize("chunk_tokens", [1, 3, 7, 8, 1000])
@pytest.mark.parametrize("widths", [(6,), (6, 1, 9)], ids=["one head", "three heads"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_value_and_all_gradients_are_those_of_the_plain_path(
    name: str, widths: tuple[int, ...], chunk_tokens: int
) -> None:
    objective, p = Objective(recipes.Objective(**OBJECTIVES[name])), problem(widths)
    expected, found = plain(p, objective), chunked(p, objective, chunk_tokens)
    # The order of float64 sums: 4e-16 seen.
    assert relative(found, expected.item()) < 1e-13
    gradients = (torch.autograd.grad(3 * loss, p.leaves()) for loss in (expected, found))
    for want, got in zip(*gradients, strict=True):
        assert relative(got, want.numpy()) < 1e-13


@pytest.mark.parametrize("chunk_tokens", [2, 7, 30])
def test_against_the_closed_form(chunk_tokens: int) -> None:
    p = problem((9,))
    found = chunked(p, Objective(recipes.Objective(cls_weight=10.0)), chunk_tokens)
    found.backward()
    weight, bias = (parameter.detach().numpy() for parameter in p.projectors[0].parameters())
    answer = reference.projected(
        p.tokens.detach().numpy(), weight, bias, p.taught[0].numpy(), token_weight=np.array([10.0] + 6 * [1])
    )
    assert relative(found, answer.loss) < 1e-13
    for leaf, want in zip(p.leaves(), (answer.student, answer.weight, answer.bias), strict=True):
        assert relative(leaf.grad, want) < 1e-13


def test_gradients_by_finite_differences() -> None:
    p = problem((3, 2), batch=2, grids=((1, 1), (1, 1)))
    objective = Objective(recipes.Objective())

    def loss(*leaves: Tensor) -> Tensor:
        tokens, *weights = leaves
        for projector, pair in zip(p.projectors, (weights[:2], weights[2:]), strict=True):
            projector.linear.weight, projector.linear.bias = pair
        return ChunkedLoss(objective, p.taught, p.valid, 1)(tokens, p.projectors)

    leaves = [leaf.detach().clone().requires_grad_() for leaf in p.leaves()]
    for projector in p.projectors:
        del projector.linear.weight, projector.linear.bias
    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize("grids", [((2, 2), (3, 4)), ((4, 4), (2, 2))], ids=["up", "down"])
def test_unequal_grids(grids: tuple[tuple[int, int], tuple[int, int]]) -> None:
    objective, p = Objective(recipes.Objective(grid="bilinear")), problem((6, 3), grids=grids)
    expected, found = plain(p, objective), chunked(p, objective, 5)
    gradients = [torch.autograd.grad(loss, p.leaves()) for loss in (expected, found)]
    for want, got in zip((expected, *gradients[0]), (found, *gradients[1]), strict=True):
        # Resampled before instead of after the product, in float64: 1e-15 seen.
        assert relative(got, want.detach().numpy()) < 1e-12


def test_heads_of_different_grids() -> None:
    """Two of the student's own grid around one of another: gradients meet in the student's tokens."""
    objective = Objective(recipes.Objective(grid="bilinear"))
    same, other = problem((6, 3), grids=((2, 2), (2, 2))), problem((5,), grids=((2, 2), (3, 4)))
    projectors = [same.projectors[0], other.projectors[0], same.projectors[1]]
    taught = [same.taught[0], other.taught[0], same.taught[1]]
    p = Problem(same.tokens, projectors, taught, same.valid)
    gradients = [
        torch.autograd.grad(loss, p.leaves()) for loss in (plain(p, objective), chunked(p, objective, 4))
    ]
    for want, got in zip(*gradients, strict=True):
        assert relative(got, want.numpy()) < 1e-12


def test_an_embedding_beside_the_maps() -> None:
    """A second target, which is small and taken whole: its gradient, and the student's through both."""
    objective, p = Objective(recipes.Objective(embedding_weight=0.7)), problem((6, 3))
    head = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    p.taught.append(torch.randn(3, 1, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3)))
    p.valid[2] = False
    embedded = p.tokens[:, :1] @ head
    maps = [projector(p.tokens) for projector in p.projectors]
    expected = objective([*maps, embedded], p.taught, p.valid)
    found = ChunkedLoss(objective, p.taught, p.valid, 4)(p.tokens, p.projectors, embedded)
    assert relative(found, expected.item()) < 1e-13
    leaves = [*p.leaves(), head]
    gradients = [torch.autograd.grad(loss, leaves, retain_graph=True) for loss in (expected, found)]
    for want, got in zip(*gradients, strict=True):
        assert relative(got, want.numpy()) < 1e-13
    with pytest.raises(ValueError, match=r"2 projectors and no embedding do not pair .* and an embedding"):
        ChunkedLoss(objective, p.taught, p.valid, 4)(p.tokens, p.projectors)


def test_an_invalid_image_adds_nothing_and_may_hold_anything() -> None:
    objective, p = Objective(recipes.Objective()), problem((6, 3))
    p.valid[1] = False
    expected = plain(p, objective)
    want = torch.autograd.grad(expected, p.leaves())
    p.taught[0][1] = float("nan")
    found = chunked(p, objective, 5)
    got = torch.autograd.grad(found, p.leaves())
    assert relative(found, expected.item()) < 1e-13
    assert not got[0][1].any()
    for one, other in zip(got, want, strict=True):
        assert relative(one, other.numpy()) < 1e-13


def test_nan_in_a_kept_token_reaches_loss_and_gradients() -> None:
    p = problem((6,))
    p.taught[0][2, 1, 0] = float("nan")
    loss = chunked(p, Objective(recipes.Objective()), 5)
    loss.backward()
    assert loss.isnan()
    assert p.tokens.grad is not None
    assert p.tokens.grad.isnan().all(-1).nonzero().tolist() == [[2, 1]]
    assert p.projectors[0].linear.weight.grad.isnan().all()


@pytest.mark.parametrize("chunk_tokens", [8, 64, 512])
def test_bfloat16_gradients_of_the_projector_do_not_decay_with_the_number_of_pieces(
    chunk_tokens: int,
) -> None:
    p = problem((48,), batch=8, grids=((8, 8), (8, 8)))
    objective = Objective(recipes.Objective())
    half = problem((48,), batch=8, grids=((8, 8), (8, 8)), dtype=torch.bfloat16)
    with torch.no_grad():
        for exact, rounded in zip(p.leaves(), half.leaves(), strict=True):
            exact.copy_(rounded)
        p.taught[0].copy_(half.taught[0])
    expected = torch.autograd.grad(plain(p, objective), p.leaves())
    whole = torch.autograd.grad(plain(half, objective), half.leaves())
    found = torch.autograd.grad(chunked(half, objective, chunk_tokens), half.leaves())
    for want, by_plain, got in zip(expected, whole, found, strict=True):
        # Twice the plain path's error in the same dtype; 65 pieces added up in bfloat16 would be off by more.
        assert relative(got, want.numpy()) < 2 * relative(by_plain, want.numpy())


def test_float32_is_kept_and_half_is_refused() -> None:
    p = problem((6,), dtype=torch.float32)
    assert chunked(p, Objective(recipes.Objective()), 5).dtype == torch.float32
    half = problem((6,), dtype=torch.float16)
    with pytest.raises(ValueError, match=r"tokens are torch.float16.*train in bfloat16 or float32"):
        chunked(half, Objective(recipes.Objective()), 5)


def test_what_is_frozen_gets_no_gradient() -> None:
    objective = Objective(recipes.Objective())
    for frozen in ("tokens", "projector", "bias"):
        p = problem((6, 3))
        {
            "tokens": p.tokens,
            "projector": p.projectors[0].linear.weight,
            "bias": p.projectors[1].linear.bias,
        }[frozen].requires_grad_(False)
        leaves = [leaf for leaf in p.leaves() if leaf.requires_grad]
        gradients = [
            torch.autograd.grad(loss, leaves) for loss in (plain(p, objective), chunked(p, objective, 4))
        ]
        for want, got in zip(*gradients, strict=True):
            assert relative(got, want.numpy()) < 1e-13
    p = problem((6, 3))
    with torch.no_grad():
        assert not chunked(p, objective, 4).requires_grad


def test_backward_may_be_asked_again_where_that_was_announced() -> None:
    p = problem((6, 3))
    loss = chunked(p, Objective(recipes.Objective()), 4)
    first = torch.autograd.grad(loss, p.leaves(), retain_graph=True)
    tripled = torch.autograd.grad(3 * loss, p.leaves(), retain_graph=True)
    again = torch.autograd.grad(loss, p.leaves())
    for one, three, other in zip(first, tripled, again, strict=True):
        assert torch.equal(one, other)
        assert relative(three, 3 * one.numpy()) < 1e-15
    with pytest.raises(RuntimeError, match="second time, after they were let go: pass retain_graph=True"):
        torch.autograd.grad(loss, p.leaves())


def test_second_derivatives_are_refused() -> None:
    p = problem((6,))
    loss = chunked(p, Objective(recipes.Objective()), 4)
    with pytest.raises(RuntimeError, match="no second derivative: drop create_graph=True"):
        torch.autograd.grad(loss, p.tokens, create_graph=True)


def test_autocast_changes_nothing() -> None:
    p, objective = problem((6,), dtype=torch.float32), Objective(recipes.Objective())
    expected = torch.autograd.grad(chunked(p, objective, 4), p.leaves())
    with torch.autocast("cpu", torch.bfloat16):
        loss = chunked(p, objective, 4)
    assert all(map(torch.equal, torch.autograd.grad(loss, p.leaves()), expected))


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [
            t for t in (result if isinstance(result, tuple | list) else (result,)) if isinstance(t, Tensor)
        ]
        known = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        fresh = [t.numel() for t in made if t.untyped_storage().data_ptr() not in known]
        self.numel = max([self.numel, *fresh])
        return result


def test_no_map_is_ever_whole() -> None:
    p, objective = problem((64, 64), batch=6), Objective(recipes.Objective())
    a_map = p.taught[0].numel()
    with Largest() as by_plain:
        plain(p, objective).backward()
    with Largest() as in_pieces:
        chunked(p, objective, 7).backward()
    assert by_plain.numel == a_map
    assert in_pieces.numel == a_map // 6


def test_pieces_cover_every_token_once() -> None:
    for batch, num_tokens, chunk_tokens in [
        (3, 7, 1),
        (3, 7, 5),
        (3, 7, 7),
        (3, 7, 15),
        (1, 1, 100),
        (5, 2, 4),
    ]:
        seen = torch.zeros(batch, num_tokens)
        for piece in pieces(batch, num_tokens, chunk_tokens):
            assert seen[piece].numel() <= chunk_tokens
            seen[piece] += 1
        assert (seen == 1).all()


def test_what_does_not_fit_is_named() -> None:
    p, objective = problem((6, 3)), Objective(recipes.Objective())
    with pytest.raises(ValueError, match="2 projectors and no embedding do not pair with 1 teacher maps"):
        ChunkedLoss(objective, p.taught[:1], p.valid, 4)(p.tokens, p.projectors)
    with pytest.raises(ValueError, match=r"projector of \(6, 4\).*\(3, 7, 4\).*teacher tokens \(3, 7, 3\)"):
        ChunkedLoss(objective, p.taught[::-1], p.valid, 4)(p.tokens, p.projectors)
    with pytest.raises(ValueError, match="valid of shape"):
        ChunkedLoss(objective, p.taught, p.valid[:2], 4)(p.tokens, p.projectors)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_kernel_computes_the_pieces_on_a_gpu(dtype: torch.dtype) -> None:
    p = problem((768, 96), batch=4, grids=((14, 14), (14, 14)), dtype=dtype, device="cuda")
    objective = Objective(recipes.Objective())
    expected, found = plain(p, objective), chunked(p, objective, 256)
    assert relative(found, expected.item()) < 1e-5
    gradients = [torch.autograd.grad(loss, p.leaves()) for loss in (expected, found)]
    for want, got in zip(*gradients, strict=True):
        # Two paths of the same dtype, each rounded once or twice.
        assert relative(got, want.detach().double().cpu().numpy()) < 4 * torch.finfo(dtype).eps + 1e-5
