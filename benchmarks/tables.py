"""What do the measurements say? The tables of docs/performance.md, made from the results files.

    python -m benchmarks.tables            writes them between the marks of the page
    python -m benchmarks.tables --check    1 where the page says something else

A number that no results file holds is "not measured yet"; nothing here is typed in but the goals.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
NOT_YET = "not measured yet"

Found = dict[str, Any]


@dataclass(frozen=True)
class Goal:
    """A figure that is asked for: its words, what must be reached and what is aimed at, and which way is
    better."""

    what: str
    must: float
    aim: float
    unit: str = ""
    lower: bool = False

    def row(self, value: float | None) -> list[str]:
        """A line of the table of goals."""
        asked = [f"{_number(self.must)}{self.unit}", f"{_number(self.aim)}{self.unit}"]
        if value is None:
            return [self.what, *asked, NOT_YET]
        reached = value <= self.must if self.lower else value >= self.must
        return [self.what, *asked, f"{_number(value)}{self.unit}{'' if reached else ' (missed)'}"]


def results(name: str) -> Found | None:
    """A results file, or None where nothing was measured."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def rows_of(name: str, **wanted: Any) -> list[Found]:
    """The rows of a results file with these values; none where there is no file."""
    found = results(name) or {"results": []}
    return [row for row in found["results"] if all(row.get(key) == value for key, value in wanted.items())]


def goals() -> Iterator[list[str]]:
    """The figures that are asked of one H200, and what was measured there."""
    for case in ("ViT-B/16", "ViT-L/14"):
        share = _of(rows_of("loss-cuda", case=case, implementation="fused"), "share_of_copy")
        yield Goal(f"loss kernel, {case}: share of a copy's bandwidth", 0.8, 0.9).row(share)
    for other, must, aim in (("eager", 6.0, 8.0), ("torch.compile", 1.4, 1.8)):
        faster = _of(rows_of("loss-cuda", case="ViT-B/16", implementation=other), "fused_is_faster")
        yield Goal(f"loss kernel, ViT-B/16: times as fast as {other}", must, aim).row(faster)
    for model, name, must, aim in (
        ("vitb", "ViT-B/16, 224", 2240, 2800),
        ("vitl", "ViT-L/14, 224", 485, 607),
        ("swinv2b", "SwinV2-B, 256", 1120, 1800),
        ("swinv2g", "SwinV2-G, 256", 44, 59),
    ):
        yield Goal(f"step of {name}", must, aim, " images/s").row(_best(model))
    swin = rows_of("step-cuda-swinv2b", variant="eager")
    eager, best = _of(swin, "images_per_s"), _best("swinv2b")
    yield Goal("step of SwinV2-B: times its own eager", 2, 2).row(best / eager if best and eager else None)
    peers = results("peers-cuda") or {}
    yield Goal("the published step over ours, ViT-B/16", 2, 3).row(peers.get("published_over_ours"))
    alone = [row["step_over_student_only"] for row in rows_of("step-cuda-vitb") if "images_per_s" in row]
    yield Goal("step over the student's alone, ViT-B/16", 1.40, 1.35, lower=True).row(
        min(alone, default=None)
    )


def peers_table(device: str) -> Iterator[list[str]]:
    """Our step against those of others."""
    found = results(f"peers-{device}")
    if found is None:
        return
    ours = found["results"][0]["step_us"]["median"]
    for row in found["results"]:
        us = row["step_us"]
        spread = f"{us['q20'] / 1e3:,.0f} to {us['q80'] / 1e3:,.0f}"
        ratio = f"{us['median'] / ours:.2f}"
        yield [row["step"], f"{row['images_per_s']:.2f}", f"{us['median'] / 1e3:,.0f} ({spread})", ratio]


def chunked_table(device: str) -> Iterator[list[str]]:
    """The loss in pieces against whole maps."""
    for row in rows_of(f"loss_chunked-{device}"):
        pieces = "whole" if row["chunk_tokens"] is None else f"{row['chunk_tokens']:,}"
        shape = " x ".join(map(str, row["shape"]))
        memory = f"{row['extra_memory_mib']:,.0f}"
        yield [
            row["case"],
            shape,
            pieces,
            memory,
            f"{row['memory_over_whole']:.2f}",
            f"{row['time_over_whole']:.2f}",
        ]


def loss_table(device: str) -> Iterator[list[str]]:
    """The loss by implementation."""
    for row in rows_of(f"loss-{device}"):
        us = row["forward_and_backward_us"]["median"]
        yield [
            row["case"],
            row["implementation"],
            f"{us:,.0f}",
            f"{row['share_of_copy']:.0%}",
            f"{row['extra_memory_mib']:,.1f}",
            f"{row['fused_is_faster']:.2f}",
        ]


def measured_steps(device: str) -> list[Found]:
    """The rows of all steps that were measured to their end."""
    files = [f"step-{device}"] + [f"step-{device}-{m}" for m in ("vitb", "vitl", "swinv2b", "swinv2g")]
    return [row for name in files for row in rows_of(name) if "part_share" in row]


def parts_table(device: str) -> Iterator[list[str]]:
    """Where the time of a step goes."""
    for row in measured_steps(device):
        shares = [f"{share:.0%}" for share in row["part_share"].values()]
        yield [row["model"], row["variant"], f"{row['images_per_s']:.1f}", *shares]


def alternatives_table(device: str) -> Iterator[list[str]]:
    """What could be otherwise in a step."""
    found = results(f"step-{device}") or results(f"step-{device}-vitb") or {"parts": []}
    for row in found["parts"]:
        value = row["left_out"] if "left_out" in row else f"{row['us']['median'] / 1e3:,.2f} ms"
        if row.get("kept_mib"):
            value += f", {row['kept_mib']:,.1f} MiB"
        error = f"{row['target_error']:.1e}" if "target_error" in row else ""
        yield [row["part"], row["name"], value, error]


def attention_table(device: str) -> Iterator[list[str]]:
    """Attention by form."""
    for row in rows_of(f"attention-{device}"):
        case = [row["name"], str(row["num_tokens"]), row["bias"], row["form"]]
        if "left_out" in row:
            yield [*case, row["left_out"], "", ""]
            continue
        us, memory = row["forward_and_backward_us"]["median"], row["extra_memory_mib"]
        yield [*case, f"{us:,.0f}", f"{memory:,.0f}", f"{row['error']:.0e}"]


PARTS = ("model", "variant", "images/s", "transfer", "teacher", "forward", "loss", "backward", "optimizer")
TABLES: dict[str, tuple[Sequence[str], Any]] = {
    "goals": (("what, on one H200 in bfloat16", "must", "goal", "measured"), goals),
}
for _device in ("cuda", "cpu"):
    TABLES |= {
        f"peers-{_device}": (("step", "images/s", "ms (20 to 80 %)", "over ours"), peers_table),
        f"chunked-{_device}": (
            ("case", "student's map", "tokens", "MiB", "memory / whole", "time / whole"),
            chunked_table,
        ),
        f"loss-{_device}": (("case", "how", "us", "of a copy", "MiB", "fused is x as fast"), loss_table),
        f"parts-{_device}": (PARTS, parts_table),
        f"alternatives-{_device}": (("part", "how", "time", "error of the targets"), alternatives_table),
        f"attention-{_device}": (
            ("layer", "tokens", "bias", "form", "us", "MiB", "error"),
            attention_table,
        ),
    }


def table(name: str) -> str:
    """One table as Markdown."""
    header, make = TABLES[name]
    device = name.rpartition("-")[2]
    rows = list(make() if name == "goals" else make(device))
    if not rows:
        return f"*{NOT_YET.capitalize()}.*\n"
    return "\n".join(_markdown(header, rows)) + "\n"


def page(text: str) -> str:
    """The page with every table between its marks made anew; raises ``ValueError`` for an unknown mark."""
    kept: list[str] = []
    inside = False
    for line in text.splitlines():
        if line.startswith("<!-- table "):
            name = line.removeprefix("<!-- table ").removesuffix(" -->")
            if name not in TABLES:
                raise ValueError(
                    f"docs/performance.md asks for table {name!r}: there are {', '.join(TABLES)}"
                )
            kept += [line, "", *table(name).splitlines(), ""]
            inside = True
        elif line == "<!-- end -->":
            inside = False
            kept.append(line)
        elif not inside:
            kept.append(line)
    return "\n".join(kept) + "\n"


def _markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(header)} |"
    yield f"|{'---|' * len(header)}"
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', '/') for cell in row)} |"


def _of(rows: Sequence[Found], key: str) -> float | None:
    return rows[0][key] if rows and key in rows[0] else None


def _best(model: str) -> float | None:
    rates = [row["images_per_s"] for row in rows_of(f"step-cuda-{model}") if "images_per_s" in row]
    return max(rates, default=None)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page, or compare it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare only; 1 where the page differs")
    asked = parser.parse_args(arguments)
    before = PAGE.read_text()
    after = page(before)
    if asked.check:
        if before != after:
            print("docs/performance.md is not what the results say: python -m benchmarks.tables")
        return int(before != after)
    PAGE.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
