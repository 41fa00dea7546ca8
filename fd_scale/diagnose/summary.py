"""What does it come to? A few headline numbers, before and after, and what the papers found.

``Expected`` is what FD's paper reports of teachers that gain (CLIP, DINO, DeiT); whether it holds here is
said, whatever it is. Numbers of deep layers are means over the last third.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from fd_scale.diagnose.landscape import Stage, flatness
from fd_scale.diagnose.results import Results, Side
from fd_scale.diagnose.tasks import CROSS_ENTROPY, SHIFT

T = TypeVar("T")
Expected = Literal["up", "down"] | None

ALIKE = 0.02
"""Relative change below which two numbers are called alike."""
FLATNESS: Mapping[Stage, tuple[str, str, Expected, str]] = {
    "raw": (
        "Shift of the map at 0.25",
        SHIFT,
        None,
        "How far the map moves when weights move by 0.25 of their length: less is flatter.",
    ),
    "linear head": (
        "Rise of cross entropy at 0.25",
        CROSS_ENTROPY,
        None,
        "How much the loss of a linear head rises at 0.25: less is flatter.",
    ),
    "fine-tuned": (
        "Rise of cross entropy at 0.25, fine-tuned",
        CROSS_ENTROPY,
        "down",
        "How much the loss of the fine-tuned network rises at 0.25: less is flatter.",
    ),
}
"""By stage: name, quantity, what the papers report, meaning. The papers plot fine-tuned networks alone."""


@dataclass(frozen=True)
class Headline:
    """One number of both networks."""

    name: str
    unit: str
    before: float | None
    after: float
    expected: Expected
    """Direction that the papers report, where the comparison is theirs."""
    meaning: str
    """One plain sentence."""
    digits: int = 2

    @property
    def change(self) -> Literal["up", "down", "alike", ""]:
        """From before to after, as far as the shown digits tell them apart; empty where there is nothing to
        compare."""
        if self.before is None or not (math.isfinite(self.before) and math.isfinite(self.after)):
            return ""
        shown = [round(value, self.digits) for value in (self.before, self.after)]
        if shown[0] == shown[1] or (
            abs(self.after - self.before) <= ALIKE * max(abs(self.before), abs(self.after))
        ):
            return "alike"
        return "up" if self.after > self.before else "down"

    @property
    def verdict(self) -> str:
        """In words, against the papers."""
        if not self.change or self.expected is None:
            return ""
        if self.change == "alike":
            return f"hardly changed (in the papers it {'rises' if self.expected == 'up' else 'falls'})"
        agrees = "as in the papers" if self.change == self.expected else "against the papers"
        return f"{'rose' if self.change == 'up' else 'fell'}, {agrees}"


def headlines(results: Results) -> list[Headline]:
    """The numbers at the head of the page."""
    found: list[Headline] = []
    if all(side.survey.distance for side in results.sides):
        found += _attention(results)
    found += _tokens(results)
    found += _landscape(results)
    return found


def flatness_rows(results: Results) -> list[dict[str, Any]]:
    """The numbers of every curve, by network, stage and quantity."""
    return [
        {"network": landscape.network, "stage": landscape.stage, "quantity": quantity}
        | flatness(landscape, quantity).__dict__
        for landscape in results.landscapes
        for quantity in landscape.curves
    ]


def deep(answers: Mapping[str, T]) -> list[T]:
    """Those of the last third of the layers, at least one."""
    values = list(answers.values())
    return values[-math.ceil(len(values) / 3) :]


def mean(values: Sequence[float]) -> float:
    """Of those that are numbers; NaN where none is."""
    known = [value for value in values if math.isfinite(value)]
    return sum(known) / len(known) if known else math.nan


def _attention(results: Results) -> list[Headline]:
    # Windows bound distances: between a Swin and a ViT they are not compared.
    comparable = len({side.anatomy.is_windowed for side in results.sides}) == 1

    def pair(
        name: str,
        unit: str,
        value: Callable[[Side], float],
        expected: Expected,
        meaning: str,
        digits: int = 2,
    ) -> Headline:
        before = value(results.before) if results.before and comparable else None
        return Headline(name, unit, before, value(results.after), expected, meaning, digits)

    return [
        pair(
            "Spread of heads, deep layers",
            "px",
            lambda side: mean([answer.spread_px for answer in deep(side.survey.distance)]),
            "up",
            "How much the heads of a layer differ in how far they look.",
        ),
        pair(
            "Similarity of heads, deep layers",
            "",
            lambda side: mean([answer.columns for answer in deep(side.survey.head_similarity)]),
            "down",
            "Whether heads look at the same tokens: 1 is all alike.",
        ),
        pair(
            "Diagonality, deep layers",
            "",
            lambda side: mean([answer.diagonality for answer in deep(side.survey.average_map)]),
            "up",
            "How much attention depends on relative position alone.",
        ),
        pair(
            "Column dominance, deep layers",
            "",
            lambda side: mean([answer.column_dominance for answer in deep(side.survey.average_map)]),
            "down",
            "How much attention goes to the same places whatever asks.",
        ),
    ]


def _tokens(results: Results) -> list[Headline]:
    def pair(name: str, value: Callable[[Side], float], meaning: str, digits: int = 2) -> Headline:
        before = value(results.before) if results.before else None
        return Headline(name, "", before, value(results.after), None, meaning, digits)

    return [
        pair(
            "Effective rank of the map",
            lambda side: list(side.survey.spectrum.values())[-1].effective_rank,
            "How many directions the final patch tokens really use.",
            1,
        ),
        pair(
            "Similarity of patches, final map",
            lambda side: list(side.survey.token_similarity.values())[-1].cosine,
            "Whether the patches of an image still differ: 1 is all alike.",
        ),
    ]


def _landscape(results: Results) -> list[Headline]:
    found = []
    for stage, (name, quantity, expected, meaning) in FLATNESS.items():
        rises = {
            landscape.network: flatness(landscape, quantity).rise_at_quarter
            for landscape in results.landscapes
            if landscape.stage == stage and quantity in landscape.curves
        }
        if results.after.name in rises:
            before = rises.get(results.before.name) if results.before else None
            found.append(Headline(name, "", before, rises[results.after.name], expected, meaning, 4))
    return found
