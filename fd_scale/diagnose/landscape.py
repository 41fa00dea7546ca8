"""How fast does a network get worse when its weights are moved at random? The loss around a minimum.

Definition: Li et al. (arXiv 1712.09913), as FD's paper uses it. A direction is Gaussian noise in which every
filter (slice of a weight along its first dimension) has the length of the network's own filter; the loss is
measured at weights + alpha x direction, on fixed images, without augmentation. Biases, norms and scales,
whose slices are single numbers, stay. A class token or an absolute position table is one filter; a relative
one has one per row. Weights are never written to: each point is computed by a functional call.

The papers plot fine-tuned networks. A ``Task`` says what is measured here, and of which ``stage``; curves of
unequal stages are refused to be compared.

Shape letters: B images, N tokens, D channels, A points, S directions.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call

from fd_scale.diagnose.parts import Parts, slug
from fd_scale.diagnose.subjects import DiagnoseError
from fd_scale.run.world import World

Stage = Literal["raw", "linear head", "fine-tuned"]
"""As distilled or pretrained, under a linear classifier of frozen features, or with a classifier that the
network was fine-tuned with."""

Point = Mapping[int, float]
"""Alpha by number of a line."""

SHORTEST = 1e-10
"""Added to the length of a filter of noise before dividing by it (Li et al., released code)."""
NEAR = 0.25
"""Alphas up to here decide the curvature."""


@dataclass(frozen=True, eq=False)
class Task:
    """What is measured of a network around its weights."""

    network: str
    stage: Stage
    quantities: tuple[str, ...]
    """What ``score`` gives, in this order."""
    module: nn.Module
    """uint8 pixels to anything that ``score`` takes."""
    moved: str
    """Prefix of the parameters that are moved: the backbone's, never those of projectors and heads."""
    score: Callable[[Any, int], Tensor]
    """The module's output for a batch, and the batch's number, to sums over its images, (quantities,)."""
    facts: Mapping[str, Any]
    """What decides the numbers, beside grid and seeds, as JSON."""

    @property
    def parameters(self) -> dict[str, Tensor]:
        """Those that are moved, by name in ``module``."""
        named = self.module.named_parameters()
        return {name: parameter.detach() for name, parameter in named if name.startswith(self.moved)}


@dataclass(frozen=True)
class Grid:
    """Where the loss is measured: at ``points`` alphas in [-radius, radius], along ``directions`` lines."""

    points: int = 17
    radius: float = 1.0
    directions: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.points < 3 or self.points % 2 == 0 or self.directions < 1 or not self.radius > 0:
            raise DiagnoseError(
                f"a landscape of --points {self.points}, --directions {self.directions} and --radius "
                f"{self.radius} is none: points must be odd (the middle is the network itself), 3 or more"
            )

    @property
    def alphas(self) -> tuple[float, ...]:
        """Rising, with an exact 0 in the middle."""
        half = self.points // 2
        return tuple(self.radius * step / half for step in range(-half, half + 1))


@dataclass(frozen=True, eq=False)
class Landscape:
    """One network's curves."""

    network: str
    stage: Stage
    alphas: tuple[float, ...]
    curves: dict[str, Tensor]
    """By quantity: float64 (S, A), means over images."""
    num_images: int


@dataclass(frozen=True, eq=False)
class Surface:
    """One network's loss over the plane of two directions."""

    network: str
    stage: Stage
    alphas: tuple[float, ...]
    heights: dict[str, Tensor]
    """By quantity: float64 (A, A), first direction downwards."""


@dataclass(frozen=True)
class Flatness:
    """Numbers of one curve, which is the mean over directions; NaN where they do not exist."""

    at_zero: float
    rise_at_quarter: float
    """Mean change at alpha = +-0.25."""
    rise_at_half: float
    """Mean change at alpha = +-0.5."""
    curvature: float
    """Second derivative of the parabola that fits best up to +-0.25."""
    doubles_at: float
    """Smallest alpha at which the mean of both sides is twice the value at 0; infinite beyond the grid."""
    halves_at: float
    """Smallest alpha at which it is half; infinite beyond the grid."""


def measure(
    task: Task,
    batches: Sequence[Tensor],
    grid: Grid,
    world: World,
    parts: Parts,
    *,
    on_points: Callable[[int], None] = lambda _: None,
) -> Landscape:
    """The curves of a task along ``grid.directions`` lines. Collective.

    ``batches`` are this process's share of the images, on the task's device. Each finished direction is kept
    in ``parts`` and not computed again; ``on_points`` hears how many of ``directions x points`` are done.
    """
    num_images = _total(batches, world)
    facts = {**task.facts, "alpha": 0}
    middle = parts.kept(
        world,
        f"landscape-{_slug(task)}-middle",
        facts,
        lambda: evaluate(task, batches, {}, [{}], world) / num_images,
    )
    rows = []
    for number in range(grid.directions):
        facts = {**task.facts, "alphas": grid.alphas, "seed": grid.seed, "direction": number}
        points = [{number: alpha} for alpha in grid.alphas if alpha != 0]
        on_more = _counted_from(number * grid.points, on_points)

        def compute(
            number: int = number,
            points: Sequence[Point] = points,
            on_more: Callable[[int], None] = on_more,
        ) -> Tensor:
            lines = {number: direction(task.parameters, seed=grid.seed, number=number)}
            return evaluate(task, batches, lines, points, world, on_points=on_more) / num_images

        sides = parts.kept(world, f"landscape-{_slug(task)}-{number}", facts, compute)
        half = len(sides) // 2
        rows.append(torch.cat((sides[:half], middle, sides[half:])))
        on_more(grid.points)
    values = torch.stack(rows)
    curves = {quantity: values[:, :, place] for place, quantity in enumerate(task.quantities)}
    return Landscape(task.network, task.stage, grid.alphas, curves, num_images)


def measure_surface(
    task: Task,
    batches: Sequence[Tensor],
    grid: Grid,
    world: World,
    parts: Parts,
    *,
    on_points: Callable[[int], None] = lambda _: None,
) -> Surface:
    """The loss over the plane of the first two directions; each row of the plane is a part. Collective.

    ``on_points`` hears how many of ``points x points`` are done.
    """
    num_images = _total(batches, world)
    lines = {number: direction(task.parameters, seed=grid.seed, number=number) for number in (0, 1)}
    rows = []
    for place, alpha in enumerate(grid.alphas):
        facts = {**task.facts, "alphas": grid.alphas, "seed": grid.seed, "row": place}
        points = [{0: alpha, 1: other} for other in grid.alphas]
        on_more = _counted_from(place * grid.points, on_points)

        def compute(points: Sequence[Point] = points, on_more: Callable[[int], None] = on_more) -> Tensor:
            return evaluate(task, batches, lines, points, world, on_points=on_more) / num_images

        rows.append(parts.kept(world, f"surface-{_slug(task)}-{place}", facts, compute))
        on_more(grid.points)
    values = torch.stack(rows)
    heights = {quantity: values[:, :, place] for place, quantity in enumerate(task.quantities)}
    return Surface(task.network, task.stage, grid.alphas, heights)


@torch.no_grad()
def evaluate(
    task: Task,
    batches: Sequence[Tensor],
    lines: Mapping[int, Mapping[str, Tensor]],
    points: Sequence[Point],
    world: World,
    *,
    on_points: Callable[[int], None] = lambda _: None,
) -> Tensor:
    """Sums over the images of all processes, float64 (points, quantities) on the CPU. Collective.

    A point gives the alpha of each of the ``lines``. Where all are 0, the network's own weights are used, so
    that it is reproduced bit for bit. ``on_points`` hears how many points this process has done.
    """
    parameters = task.parameters
    sums = torch.zeros(len(points), len(task.quantities), dtype=torch.float64)
    for place, point in enumerate(points):
        moved = moved_by(parameters, lines, point)
        for number, pixels in enumerate(batches):
            output = functional_call(task.module, moved, (pixels,))
            sums[place] += task.score(output, number).double().cpu()
        on_points(place + 1)
    if world.size > 1:
        total = sums.to(world.device)
        dist.all_reduce(total)
        sums = total.cpu()
    return sums


def moved_by(
    parameters: Mapping[str, Tensor], lines: Mapping[int, Mapping[str, Tensor]], point: Point
) -> dict[str, Tensor]:
    """``weights + sum of alpha x direction``, new tensors; the very same ones where every alpha is 0."""
    moved = dict(parameters)
    for number, alpha in point.items():
        if alpha == 0:
            continue
        for name, step in lines[number].items():
            moved[name] = torch.add(moved[name], step, alpha=alpha)
    return moved


def direction(parameters: Mapping[str, Tensor], *, seed: int, number: int) -> dict[str, Tensor]:
    """Filter-normalised Gaussian noise for the parameters that move; the others are left out.

    Drawn on the CPU from (seed, number, name), hence the same on every device and process, and for every
    network that has a parameter of this name and shape.
    """
    found = {}
    for name, weight in parameters.items():
        if weight.ndim < 2 or weight[0].numel() < 2:
            continue
        drawn = hashlib.sha256(f"{seed}/{number}/{name}".encode()).digest()[:7]
        generator = torch.Generator().manual_seed(int.from_bytes(drawn, "big"))
        noise = torch.randn(weight.shape, generator=generator).to(weight)
        length = _filter_lengths(weight) / (_filter_lengths(noise) + SHORTEST)
        found[name] = noise * length
    return found


def flatness(landscape: Landscape, quantity: str) -> Flatness:
    """The numbers of a curve's mean over directions."""
    alphas = torch.tensor(landscape.alphas, dtype=torch.float64)
    curve = landscape.curves[quantity].mean(dim=0)
    middle = len(alphas) // 2
    at_zero = float(curve[middle])
    right, sides = alphas[middle:], (curve[middle:] + curve[: middle + 1].flip(0)) / 2
    near = alphas.abs() <= NEAR + 1e-9
    if near.sum() < 3:
        near = alphas.abs() <= float(alphas[middle + 1]) + 1e-9
    powers = torch.stack([alphas[near] ** power for power in range(3)], dim=1)
    fitted = torch.linalg.lstsq(powers, curve[near, None]).solution
    return Flatness(
        at_zero=at_zero,
        rise_at_quarter=_at(right, sides, 0.25) - at_zero,
        rise_at_half=_at(right, sides, 0.5) - at_zero,
        curvature=2 * float(fitted[2]),
        doubles_at=_crossing(right, sides - 2 * at_zero) if at_zero > 0 else math.nan,
        halves_at=_crossing(right, at_zero / 2 - sides) if at_zero > 0 else math.nan,
    )


def check_comparable(landscapes: Sequence[Landscape]) -> None:
    """Raise ``DiagnoseError`` for curves of unequal stages or grids: they say nothing about each other."""
    stages = {landscape.stage for landscape in landscapes}
    if len(stages) > 1 or len({landscape.alphas for landscape in landscapes}) > 1:
        raise DiagnoseError(
            f"landscapes of the stages {', '.join(sorted(stages))} are not set side by side: measure both "
            "networks at one stage and at the same alphas"
        )


def _filter_lengths(weight: Tensor) -> Tensor:
    """The L2 norm of each slice along the first dimension, shaped to scale it."""
    lengths = torch.linalg.vector_norm(weight.flatten(1), dim=1)
    return lengths.view(-1, *(1,) * (weight.ndim - 1))


def _at(alphas: Tensor, values: Tensor, alpha: float) -> float:
    """By linear interpolation; NaN beyond the grid."""
    if alpha > float(alphas[-1]) + 1e-9:
        return math.nan
    place = min(max(int(torch.searchsorted(alphas, alpha)), 1), len(alphas) - 1)
    share = (alpha - alphas[place - 1]) / (alphas[place] - alphas[place - 1])
    return float(values[place - 1] + share * (values[place] - values[place - 1]))


def _crossing(alphas: Tensor, values: Tensor) -> float:
    """Where ``values``, negative at first, first reach 0, by linear interpolation; infinite if never."""
    reached = torch.nonzero(values >= 0)
    if not len(reached):
        return math.inf
    place = int(reached[0])
    if place == 0:
        return float(alphas[0])
    before, after = values[place - 1], values[place]
    share = -before / (after - before)
    return float(alphas[place - 1] + share * (alphas[place] - alphas[place - 1]))


def _total(batches: Sequence[Tensor], world: World) -> int:
    mine = sum(len(pixels) for pixels in batches)
    total = sum(world.gather(mine)) if world.size > 1 else mine
    if total == 0:
        raise DiagnoseError("a landscape needs at least one readable image")
    return total


def _counted_from(first: int, on_points: Callable[[int], None]) -> Callable[[int], None]:
    return lambda done: on_points(first + done)


def _slug(task: Task) -> str:
    return slug(f"{task.network}-{task.quantities[0]}")
