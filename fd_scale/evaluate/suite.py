"""Was anything gained? Before, after and the difference, of networks measured alike.

One column per kind of evaluation, one row per network. Only records of the same task, feature, protocol, data
and seeds meet in a column; what does not fit is refused with its reason. A difference within two standard
errors is marked as noise (``record.change``).
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from fd_scale.evaluate.record import Record, RecordError, change, differences, read
from fd_scale.run.folder import write_atomically

CLASSIFICATION = ("knn", "linear_fast", "linear", "finetune", "zeroshot")
"""Tasks of the suite, in the order of its columns; the two kinds of linear probe never share one."""
NOISE = "~"
"""After a difference within noise."""
ABSENT = "n.r."
"""Not run."""


@dataclass(frozen=True)
class Comparison:
    """Networks measured alike, against one of them."""

    before: str
    """The network that the others are compared with."""
    rows: Mapping[str, Mapping[str, Record]]
    """Records by network, ``before`` first, and by column."""
    columns: Sequence[str]


def compare(records: Iterable[Record], before: str) -> Comparison:
    """Put records side by side, against the network whose weights or name are ``before``.

    Raises ``RecordError`` when ``before`` was not measured, when a network was measured twice for one column,
    and when two that meet in a column are not comparable, saying in what.
    """
    found = [record for record in records if record.task in CLASSIFICATION]
    rows: dict[str, dict[str, Record]] = {}
    for record in sorted(found, key=lambda r: (r.model != before, r.model)):
        row = rows.setdefault(record.model, {})
        for column in _columns(record):
            if column in row and differences(row[column], record):
                raise RecordError(_twice(row[column], record, column))
            row[column] = record
    if before not in rows:
        raise RecordError(
            f"there is no record of {before} to compare with; measured were {', '.join(rows) or 'none'}"
        )
    for name, row in rows.items():
        for column, record in row.items():
            base = rows[before].get(column)
            if base is not None and (lines := differences(base, record)):
                raise RecordError(
                    f"{column} of {before} and {name} cannot be compared:\n  " + "\n  ".join(lines)
                )
    present = {column for row in rows.values() for column in row}
    return Comparison(before, rows, sorted(present, key=_order))


def read_all(folders: Iterable[Path]) -> list[Record]:
    """The records in folders, each file once; a file that is none is refused by ``record.read``."""
    paths = sorted({path.resolve() for folder in folders for path in folder.glob("*.json")})
    return [read(path) for path in paths if path.name.startswith(CLASSIFICATION)]


def console_table(found: Comparison) -> Table:
    """For the console: accuracies in percent, differences signed."""
    table = Table(title=TITLE, title_justify="left", title_style="not italic")
    for number, name in enumerate(["", *found.columns]):
        table.add_column(name, justify="left" if number == 0 else "right", no_wrap=number == 0)
    for line in _lines(found):
        table.add_row(*line)
    return table


def markdown(found: Comparison) -> str:
    """A table and its legend."""
    heads = ["", *found.columns]
    lines = [heads, ["---", *("---:" for _ in found.columns)], *_lines(found)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{LEGEND}\n"


def page(found: Comparison) -> str:
    """The same as one HTML page that needs nothing else."""
    cells = "".join(f"<th>{html.escape(name)}</th>" for name in ["", *found.columns])
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>\n"
        for line in _lines(found)
    )
    style = "table{border-collapse:collapse}"
    style += "td,th{padding:.3em .8em;border-bottom:1px solid #ccc;text-align:right}"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>What was gained</title>'
        f"<style>body{{font-family:sans-serif;margin:2em}}{style}td:first-child{{text-align:left}}</style>"
        f"</head>\n<body><h1>What was gained</h1>\n<table><tr>{cells}</tr>\n{rows}</table>\n"
        f"<p>{html.escape(LEGEND)}</p></body></html>\n"
    )


def write_reports(found: Comparison, folder: Path) -> list[Path]:
    """``classification.md`` and ``classification.html`` in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {"classification.md": markdown(found), "classification.html": page(found)}
    for name, text in texts.items():
        write_atomically(folder / name, text)
    return [folder / name for name in texts]


TITLE = "Accuracy, % +- one standard error"
LEGEND = (
    f"{TITLE}: over seeds where there are several, else of the choice of test images. A difference followed "
    f"by {NOISE} is within two standard errors: noise. {ABSENT}: not run."
)


def _lines(found: Comparison) -> list[list[str]]:
    """Cells of the table, row by row: each network, and below it its difference."""
    base = found.rows[found.before]
    lines = []
    for name, row in found.rows.items():
        lines.append([name, *(_accuracy(row.get(column)) for column in found.columns)])
        if name != found.before:
            changes = (_difference(base.get(column), row.get(column)) for column in found.columns)
            lines.append(["difference", *changes])
    return lines


def _accuracy(record: Record | None) -> str:
    if record is None:
        return ABSENT
    seeds = f" ({len(record.seeds)} seeds)" if len(record.seeds) > 1 else ""
    return f"{100 * record.mean:.2f} +- {100 * record.uncertainty:.2f}{seeds}"


def _difference(before: Record | None, after: Record | None) -> str:
    if before is None or after is None:
        return ABSENT
    gain, noise = change(before, after)
    return f"{100 * gain:+.2f}{f' {NOISE}' if abs(gain) <= noise else ''}"


def _columns(record: Record) -> list[str]:
    """Where a record stands. CLIP's own zero-shot is what all modes of its students are compared with."""
    mode = record.facts.get("mode")
    if mode == "clip":
        return [f"{record.task} {other}" for other in ("projected", "direct", "destandardised")]
    return [f"{record.task} {mode or record.feature}"]


def _order(column: str) -> tuple[int, str]:
    return CLASSIFICATION.index(column.partition(" ")[0]), column


def _twice(first: Record, second: Record, column: str) -> str:
    lines = "\n  ".join(differences(first, second))
    return f"{column} of {first.model} was measured in two ways; keep one of the records:\n  {lines}"
