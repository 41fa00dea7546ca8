"""The landscape of losses that are known, of directions that are checked, and of parts that are kept."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from fd_scale.diagnose.landscape import (
    Grid,
    Landscape,
    Task,
    check_comparable,
    direction,
    evaluate,
    flatness,
    measure,
    measure_surface,
    moved_by,
)
from fd_scale.diagnose.parts import Parts
from fd_scale.diagnose.subjects import DiagnoseError
from fd_scale.run.world import World
from tests.diagnose.tiny import ALONE, SMALL, timm_subject

GRID = Grid(points=5, radius=0.5, directions=2, seed=3)


class Bowl(nn.Module):
    """The mean over images of image x squared length of the weights: a parabola along every line."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.moved = nn.Linear(3, 2)
        self.head = nn.Linear(2, 2)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def forward(self, images: Tensor) -> Tensor:
        return images * self.moved.weight.double().square().sum() + self.moved.bias.double().sum() * 0


def bowl(calls: list[int] | None = None) -> Task:
    def score(output: Tensor, number: int) -> Tensor:
        if calls is not None:
            calls.append(number)
        return output.sum().reshape(1)

    return Task("bowl", "raw", ("loss",), Bowl(), "moved.", score, {"network": "bowl"})


BATCHES = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([5.0])]


def test_a_quadratic_loss_has_its_known_landscape(world: World, tmp_path: Path) -> None:
    task = bowl()
    found = measure(task, BATCHES, GRID, world, Parts(tmp_path))
    assert found.alphas == (-0.5, -0.25, 0, 0.25, 0.5)
    assert found.num_images == 4
    weight = task.parameters["moved.weight"].double()
    mean_image = 11 / 4
    for number in range(2):
        line = direction(task.parameters, seed=3, number=number)["moved.weight"].double()
        expected = [mean_image * float((weight + a * line).square().sum()) for a in found.alphas]
        # Weights are moved in float32.
        assert found.curves["loss"][number].tolist() == pytest.approx(expected, rel=1e-6)
    lines = [direction(task.parameters, seed=3, number=n)["moved.weight"].double() for n in range(2)]
    numbers = flatness(found, "loss")
    second = 2 * mean_image * sum(float(line.square().sum()) for line in lines) / 2
    assert numbers.curvature == pytest.approx(second, rel=1e-5)
    assert numbers.rise_at_quarter == pytest.approx(second / 2 * 0.25**2, rel=1e-5)
    assert numbers.rise_at_half == pytest.approx(second / 2 * 0.5**2, rel=1e-5)
    # Filters of noise are as long as the weights: half of them adds a quarter to the squared length.
    assert numbers.doubles_at == math.inf


def test_the_plane_of_a_quadratic_loss(world: World, tmp_path: Path) -> None:
    task = bowl()
    found = measure_surface(task, BATCHES, replace(GRID, points=3), world, Parts(tmp_path))
    weight = task.parameters["moved.weight"].double()
    one, two = (direction(task.parameters, seed=3, number=n)["moved.weight"].double() for n in range(2))
    expected = [
        [11 / 4 * float((weight + a * one + b * two).square().sum()) for b in found.alphas]
        for a in found.alphas
    ]
    torch.testing.assert_close(found.heights["loss"], torch.tensor(expected).double(), rtol=1e-6, atol=0)


def test_every_filter_of_a_direction_is_as_long_as_the_networks_own() -> None:
    network = timm_subject("vit_tiny_patch16_224", **SMALL).network
    parameters = {name: parameter.detach() for name, parameter in network.named_parameters()}
    found = direction(parameters, seed=0, number=0)
    untouched = parameters.keys() - found.keys()
    assert untouched == {name for name, parameter in parameters.items() if parameter.ndim < 2}
    for name, step in found.items():
        # A class token and a position table are one filter each, a patch embedding one per channel.
        lengths = step.flatten(1).double().norm(dim=1)
        torch.testing.assert_close(
            lengths, parameters[name].flatten(1).double().norm(dim=1), rtol=1e-6, atol=0
        )
    assert found["cls_token"].shape[0] == 1


def test_scales_of_heads_do_not_move() -> None:
    assert not direction({"logit_scale": torch.ones(4, 1, 1)}, seed=0, number=0)


def test_directions_are_random_and_repeat_by_seed_number_and_name() -> None:
    parameters = {"a": torch.randn(40, 50, generator=torch.Generator().manual_seed(0))}
    first = direction(parameters, seed=0, number=0)["a"]
    assert torch.equal(first, direction({**parameters, "b": torch.ones(2, 2)}, seed=0, number=0)["a"])
    for other in (
        direction(parameters, seed=1, number=0)["a"],
        direction(parameters, seed=0, number=1)["a"],
        direction({"b": parameters["a"]}, seed=0, number=0)["b"],
    ):
        cosine = float(torch.cosine_similarity(first.flatten(), other.flatten(), dim=0))
        assert abs(cosine) < 0.08  # 2,000 entries: four standard deviations are 0.09


def test_a_filter_of_zeros_stays() -> None:
    weight = torch.ones(3, 4)
    weight[1] = 0
    found = direction({"weight": weight}, seed=0, number=0)["weight"]
    assert not found[1].any()
    assert found[0].any()


@torch.no_grad()
def test_alpha_0_is_the_network_bit_for_bit_and_nothing_is_written_to() -> None:
    subject = timm_subject("vit_tiny_patch16_224", **SMALL)
    network: Any = subject.network
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    plain = network(images)
    parameters = {name: parameter.detach() for name, parameter in network.named_parameters()}
    lines = {0: direction(parameters, seed=0, number=0), 1: direction(parameters, seed=0, number=1)}
    still = moved_by(parameters, lines, {0: 0.0, 1: 0.0})
    assert torch.equal(functional_call(network, still, (images,)), plain)
    moved = moved_by(parameters, lines, {0: 0.5, 1: -0.25})
    assert not torch.equal(functional_call(network, moved, (images,)), plain)
    expected = parameters["blocks.0.attn.qkv.weight"] + 0.5 * lines[0]["blocks.0.attn.qkv.weight"]
    expected = expected - 0.25 * lines[1]["blocks.0.attn.qkv.weight"]
    torch.testing.assert_close(moved["blocks.0.attn.qkv.weight"], expected)
    assert torch.equal(network(images), plain)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_finished_parts_are_not_computed_again(world: World, tmp_path: Path) -> None:
    calls: list[int] = []
    told: list[int] = []
    first = measure(bowl(calls), BATCHES, GRID, world, Parts(tmp_path), on_points=told.append)
    assert len(calls) == 2 * (1 + 2 * 4)  # batches x (middle + directions x other points)
    assert told == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    files = sorted(tmp_path.glob("*.json"))
    assert [json.loads(path.read_text())["facts"]["network"] for path in files] == ["bowl"] * 3
    next(path for path in files if "-1-" in path.name).unlink()
    calls.clear()
    again = measure(bowl(calls), BATCHES, GRID, world, Parts(tmp_path))
    assert len(calls) == 2 * 4
    assert torch.equal(first.curves["loss"], again.curves["loss"])
    calls.clear()
    measure(bowl(calls), BATCHES, replace(GRID, directions=3), world, Parts(tmp_path))
    assert len(calls) == 2 * 4  # one more direction, and nothing else
    other = replace(bowl(calls), facts={"network": "other"})
    calls.clear()
    measure(other, BATCHES, GRID, world, Parts(tmp_path))
    assert len(calls) == 18


def curve(
    values: list[float], stage: Any = "raw", alphas: tuple[float, ...] = (-1, -0.5, 0, 0.5, 1)
) -> Landscape:
    return Landscape("net", stage, alphas, {"loss": torch.tensor([values]).double()}, 1)


def test_flatness_where_a_loss_doubles_and_an_accuracy_halves() -> None:
    rising = flatness(curve([9.0, 3.0, 1.0, 2.0, 4.0]), "loss")
    assert rising.at_zero == 1
    assert rising.rise_at_half == pytest.approx(1.5)
    assert rising.rise_at_quarter == pytest.approx(0.75)
    assert rising.doubles_at == pytest.approx(0.5 / 1.5)  # sides average 2.5 at 0.5
    assert rising.halves_at == math.inf
    falling = flatness(curve([0.1, 0.6, 0.8, 0.6, 0.1]), "loss")
    assert falling.halves_at == pytest.approx(0.5 + 0.5 * 0.2 / 0.5)
    assert falling.curvature < 0


def test_flatness_of_a_quantity_that_begins_at_0_has_no_double() -> None:
    found = flatness(curve([4.0, 1.0, 0.0, 1.0, 4.0]), "loss")
    assert math.isnan(found.doubles_at)
    assert found.curvature == pytest.approx(8)  # 4 alpha^2
    narrow = curve([4.0, 1.0, 0.0, 1.0, 4.0], alphas=(-0.2, -0.1, 0, 0.1, 0.2))
    assert math.isnan(flatness(narrow, "loss").rise_at_half)


def test_stages_are_not_compared() -> None:
    check_comparable([curve([0.0] * 5), curve([1.0] * 5)])
    with pytest.raises(DiagnoseError, match="stages linear head, raw are not set side by side"):
        check_comparable([curve([0.0] * 5), curve([0.0] * 5, stage="linear head")])
    with pytest.raises(DiagnoseError, match="at the same alphas"):
        check_comparable([curve([0.0] * 5), curve([0.0] * 3, alphas=(-1, 0, 1))])


@pytest.mark.parametrize("wrong", [{"points": 4}, {"points": 1}, {"directions": 0}, {"radius": 0.0}])
def test_a_grid_without_a_middle_or_width_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(DiagnoseError, match="points must be odd"):
        Grid(**wrong)


def test_no_image_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DiagnoseError, match="at least one readable image"):
        measure(bowl(), [], GRID, ALONE, Parts(tmp_path))


def test_only_the_parameters_asked_for_are_moved() -> None:
    assert bowl().parameters.keys() == {"moved.weight", "moved.bias"}
    sums = evaluate(bowl(), BATCHES, {}, [{}], ALONE)
    assert float(sums) == pytest.approx(11 * float(bowl().parameters["moved.weight"].double().square().sum()))
