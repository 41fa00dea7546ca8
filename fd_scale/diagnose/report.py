"""Where does a diagnosis lie when it is done? One page for people, and the same numbers for programs.

<out>/report.html       self-contained: figures, numbers, words
<out>/report.json       headline numbers, flatness, all answers by layer
<out>/figures/          every figure as SVG, PNG, CSV and JSON
<out>/parts/            finished parts, from which a stopped diagnosis goes on
"""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from fd_scale import __version__
from fd_scale.diagnose import summary
from fd_scale.diagnose.drawing import DARK, LIGHT, inline, save
from fd_scale.diagnose.page import sections
from fd_scale.diagnose.parts import plain
from fd_scale.diagnose.results import Results, Side
from fd_scale.run.folder import as_json, write_atomically

TEMPLATE = "page.html.jinja"
MAX_ROWS = 60
"""Of a table on the page; longer ones are in the CSV alone."""
NEGLIGIBLE = 1e-12
"""Rounding, shown as 0."""
LIVE_REFRESH_S = 30


def write(results: Results, out: Path, *, live: bool = False) -> Path:
    """Write page, numbers and figures into ``out``; returns the page. ``live`` makes it reload itself."""
    chapters = sections(results)
    for _, found in chapters:
        for section in found:
            save(section.drawing, out / "figures")
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "report.json", as_json(plain(numbers(results))))
    page = (
        _environment()
        .from_string(_source())
        .render(
            results=results,
            chapters=chapters,
            headlines=summary.headlines(results),
            flatness=summary.flatness_rows(results),
            light=LIGHT,
            dark=DARK,
            version=__version__,
            made=datetime.now(UTC).strftime("%d %B %Y, %H:%M UTC"),
            refresh_s=LIVE_REFRESH_S if live else None,
            max_rows=MAX_ROWS,
        )
    )
    write_atomically(out / "report.html", page)
    return out / "report.html"


def numbers(results: Results) -> dict[str, Any]:
    """Everything that was found, but images and pooled features."""
    return {
        "title": results.title,
        "about": dict(results.about),
        "headlines": [
            asdict(found) | {"change": found.change, "verdict": found.verdict}
            for found in summary.headlines(results)
        ],
        "flatness": summary.flatness_rows(results),
        "networks": [_network(side) for side in results.sides],
        "layer_similarity": results.cka,
        "drift": None if results.drift is None else asdict(results.drift),
        "notes": list(results.notes),
    }


def _network(side: Side) -> dict[str, Any]:
    record = side.survey.record()
    record.pop("pooled")
    for answer in record["average_map"].values():
        # Thousands of numbers each; the picture is among the figures.
        answer.pop("map_QK")
    attention = [asdict(layer) for layer in side.anatomy.attention]
    named = {"name": side.name, "role": side.role, "origin": side.origin}
    return named | {"facts": dict(side.facts), "attention_layers": attention} | record


def _environment() -> Environment:
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "svg": lambda drawing: Markup(inline(drawing)),
        "number": _number,
        "breakable": lambda path: Markup("/<wbr>").join(path.split("/")),
    }
    return environment


def _source() -> str:
    return files("fd_scale.diagnose").joinpath(TEMPLATE).read_text(encoding="utf-8")


def _number(value: Any, digits: int | None = None) -> str:
    """A value of a table as people read it."""
    value = plain(value)
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    if abs(value) < NEGLIGIBLE:
        value = 0.0
    if digits is not None:
        return f"{round(value, digits) + 0.0:,.{digits}f}"  # + 0.0: a zero has no sign
    return f"{value:.4g}"
