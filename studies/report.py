"""What do the numbers say to a reader? Tables, one sentence and a verdict per study, all made from results.

Nothing here is written by hand: where a study was not run, the text says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fd_scale.run.folder import write_atomically
from studies import drawing, outcome, settings
from studies.outcome import Outcome
from studies.settings import HERE
from studies.verdicts import Contrast, Row

BUDGETS = ("gpu", "laptop")
"""In the order of preference for the overview; ``smoke`` is never shown."""
OVERVIEW = HERE / "README.md"
BEGIN, END = "<!-- overview: begin (made by studies/run.py --tables) -->", "<!-- overview: end -->"


def publish(found: Outcome, root: Path = HERE) -> Path:
    """The table and the picture of a result, beside its JSON; the path of the table."""
    path = outcome.path_of(found.name, found.budget, root)
    write_atomically(path.with_suffix(".md"), markdown(found))
    drawing.draw(found, path.with_suffix(".png"))
    return path.with_suffix(".md")


def overview(names: Sequence[str], root: Path = HERE) -> str:
    """Miniature and papers side by side, one line per study."""
    lines = ["| study | question | papers | miniature | verdict |", "|---|---|---|---|---|"]
    for name in names:
        told = settings.load(name, "laptop")[0]
        paths = [outcome.path_of(name, budget, root) for budget in BUDGETS]
        results = [outcome.read(path) for path in paths if path.is_file()]
        if not results:
            lines.append(f"| {name} | {told.question} | {told.paper} | not run yet | |")
            continue
        for found in results:
            link = f"[{found.budget}]({name}/results/{found.budget}.md)"
            lines.append(
                f"| {name} | {told.question} | {told.paper} | {link}: {sentence(found)} | {verdict(found)} |"
            )
    return "\n".join(lines)


def write_overview(names: Sequence[str]) -> None:
    """Put the overview between its marks in the README of the studies."""
    text = OVERVIEW.read_text(encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    write_atomically(OVERVIEW, f"{before}{BEGIN}\n{overview(names)}\n{END}{after}")


def markdown(found: Outcome) -> str:
    """The whole result as a page."""
    facts = found.facts
    machine = facts["machine"]
    gpus = ", ".join(gpu["name"] for gpu in machine["gpus"])
    lines = [
        f"# {found.question}",
        "",
        f"Papers: {found.paper}.",
        f"Here: {sentence(found)}.",
        "",
        *_rows(found),
        "",
        *_contrasts(found),
        "",
        f"Budget `{found.budget}`, {gpus or machine['cpu']['model']}, torch {machine['versions']['torch']}, "
        f"commit `{(machine['source'].get('commit') or 'unknown')[:12]}`; {facts['data']}. Training took "
        f"{facts['seconds'] / 60:.0f} minutes, all pieces together. Settings, seeds and predictions: "
        f"[{found.budget}.json]({found.budget}.json).",
        "",
        f"![{found.question}]({found.budget}.png)",
        "",
    ]
    return "\n".join(lines)


def sentence(found: Outcome) -> str:
    """The rows by the first measure, and the contrasts by it."""
    measure = found.measures[0]
    rows = [f"{row.name} {_shown(row, measure)}" for row in found.rows if measure in row.measures]
    return f"{', '.join(rows)} ({measure})"


def verdict(found: Outcome) -> str:
    """Every contrast of the first measure in words."""
    told = []
    for one in (one for one in found.contrasts if one.measure == found.measures[0]):
        difference, noise = _amounts(found, one)
        told.append(f"{one.first} over {one.second} {difference} (noise {noise}): **{one.verdict}**")
    return "; ".join(told)


def _rows(found: Outcome) -> list[str]:
    head = ["row", *found.measures, "runs", "seconds a run"]
    lines = [_line(head), _line(["---"] * len(head))]
    for row in found.rows:
        cells = [_shown(row, measure) if measure in row.measures else "" for measure in found.measures]
        seconds = row.facts.get("seconds", [])
        runs = "given" if row.given else str(max(len(runs) for runs in row.measures.values()))
        lines.append(_line([row.name, *cells, runs, f"{np.mean(seconds):.0f}" if seconds else ""]))
    return lines


def _contrasts(found: Outcome) -> list[str]:
    head = ["first", "second", "by", "difference", "noise", "verdict"]
    lines = [_line(head), _line(["---"] * len(head))]
    for one in found.contrasts:
        difference, noise = _amounts(found, one)
        lines.append(_line([one.first, one.second, one.measure, difference, noise, one.verdict]))
    return lines


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _shown(row: Row, measure: str) -> str:
    mean = row.values(measure).mean()
    return f"{100 * mean:.1f}" if row.is_share(measure) else f"{mean:.3g}"


def _amounts(found: Outcome, one: Contrast) -> tuple[str, str]:
    """A difference and its noise, in points where they are of accuracies."""
    if all(row.is_share(one.measure) for row in found.rows if one.measure in row.measures):
        return f"{100 * one.difference:+.2f}", f"{100 * one.noise:.2f}"
    return f"{one.difference:+.3g}", f"{one.noise:.3g}"
