"""Rules that the kernels' source keeps, because neither the interpreter nor a GPU complains when it does
not."""

from __future__ import annotations

import ast
from pathlib import Path

import fd_scale.objective.kernels

SOURCES = sorted(Path(fd_scale.objective.kernels.__file__).parent.glob("*.py"))


def calls(name: str) -> list[ast.Call]:
    """Calls of ``tl.<name>`` in all kernels."""
    nodes = [node for path in SOURCES for node in ast.walk(ast.parse(path.read_text()))]
    return [
        node
        for node in nodes
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == name
        if isinstance(node.func.value, ast.Name) and node.func.value.id == "tl"
    ]


def test_masked_loads_say_what_is_behind_the_mask() -> None:
    masked = [{keyword.arg for keyword in call.keywords} for call in calls("load")]
    masked = [names for names in masked if "mask" in names]
    assert len(masked) >= 6
    assert all("other" in names for names in masked)


def test_nan_passes_every_clamp_and_maximum() -> None:
    limits = [ast.unparse(call) for name in ("clamp", "maximum", "minimum") for call in calls(name)]
    assert len(limits) >= 2
    assert all("PropagateNan.ALL" in call for call in limits)


def test_no_atomics_no_device_library_and_nothing_that_waits_for_the_device() -> None:
    for path in SOURCES:
        names = {
            node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)
        }
        assert not {name for name in names if name.startswith("atomic")}, path.name
        # A product would multiply bit patterns in the interpreter.
        assert not names & {"dot", "libdevice", "item", "cpu", "tolist", "synchronize", "equal", "nonzero"}, (
            path.name
        )
