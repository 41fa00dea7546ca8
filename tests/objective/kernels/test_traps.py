"""Every trap that docs/performance.md names is held by tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE.parents[2] / "docs" / "performance.md"


def names_in(path: Path) -> set[str]:
    return {
        node.name
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def test_every_named_test_exists() -> None:
    text = PAGE.read_text()
    section = text[text.index("## Traps of the kernel") :]
    rows = re.findall(r"^\| (T\d+) \| [^|]+ \| (.+) \|$", section, flags=re.MULTILINE)
    assert [name for name, _ in rows] == [f"T{number}" for number in range(1, 19)]
    for name, held in rows:
        assert "::test_" in held, f"{name} is held by nothing"
    named = re.findall(r"([\w./]+\.py)::(test_\w+)", section)
    assert len(named) > 30
    for file, test in named:
        assert test in names_in(HERE / file), f"{file} has no {test}"
