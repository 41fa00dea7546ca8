"""The house's import rules, read off the sources: layers, owners of heavy libraries, no import from below."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for package in ("models", "fd_scale") for path in (ROOT / package).rglob("*.py"))

LAYERS = {
    # A file's layer is that of its longest matching prefix; it may import its own layer and lower ones.
    "models": 0,
    "fd_scale": 0,
    "fd_scale.errors": 0,
    "fd_scale.pixels": 1,
    "fd_scale.compiled": 1,
    "fd_scale.run.sections": 1,
    "fd_scale.run.recipe": 1,
    "fd_scale.run.values": 1,
    "fd_scale.run.world": 1,
    "fd_scale.objective.features": 1,
    "fd_scale.objective.kernels": 1,
    "fd_scale.timm_maps": 2,
    "fd_scale.positions": 2,
    "fd_scale.run": 2,
    "fd_scale.objective": 2,
    "fd_scale.data": 3,
    "fd_scale.teachers": 3,
    "fd_scale.engine.optim": 1,
    "fd_scale.engine.schedule": 1,
    "fd_scale.engine.norm": 1,
    "fd_scale.engine.adamw": 1,
    "fd_scale.engine.ahead": 2,
    "fd_scale.engine.lars": 1,
    "fd_scale.engine.layers": 1,
    "fd_scale.engine.fragments": 2,
    "fd_scale.engine.average": 2,
    "fd_scale.student": 3,
    "fd_scale.engine.zero": 3,
    "fd_scale.engine.checkpoint": 4,
    "fd_scale.engine.saving": 4,
    "fd_scale.engine": 0,
    "fd_scale.plan": 4,
    "fd_scale.shards": 4,
    "fd_scale.export": 5,
    "fd_scale.outline": 5,
    "fd_scale.meter": 4,
    "fd_scale.training": 5,
    "fd_scale.distill": 6,
    "fd_scale.evaluate": 7,
    "fd_scale.pictures": 7,
    "fd_scale.diagnose": 8,
    "fd_scale.demo_teacher": 8,
    "fd_scale.demo": 8,
    "fd_scale.cli": 9,
    "fd_scale.shards_cli": 9,
    "fd_scale.diagnose_cli": 9,
    "fd_scale.evaluate_cli": 9,
    "fd_scale.checkpoints_cli": 9,
    "fd_scale.plan_cli": 9,
    "fd_scale.__main__": 9,
}

OWNERS = {
    "deepspeed": {"fd_scale.engine.zero"},
    "wandb": {"fd_scale.run.report"},
    "mpi4py": {"fd_scale.run.world"},
    "open_clip": {"fd_scale.teachers.open_clip", "fd_scale.evaluate.clip", "fd_scale.evaluate.zeroshot"},
    "typer": {
        "fd_scale.cli",
        "fd_scale.shards_cli",
        "fd_scale.diagnose_cli",
        "fd_scale.evaluate_cli",
        "fd_scale.checkpoints_cli",
        "fd_scale.plan_cli",
    },
    "triton": {"fd_scale.objective.kernels"},
    "webdataset": {"fd_scale.data"},
    "simplejpeg": {"fd_scale.data"},
}


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            for alias in node.names:
                inside = f"{node.module}.{alias.name}"
                is_module = (ROOT / inside.replace(".", "/")).with_suffix(".py").exists()
                yield inside if is_module or (ROOT / inside.replace(".", "/")).is_dir() else node.module


def layer(module: str) -> int:
    return LAYERS[max((prefix for prefix in LAYERS if within(module, prefix)), key=len)]


def within(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(prefix + ".")


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_a_file_imports_only_its_own_layer_and_lower_ones(path: Path) -> None:
    own = layer(module_of(path))
    above = [name for name in imported(path) if name.startswith(("fd_scale", "models")) and layer(name) > own]
    assert not above


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_heavy_libraries_have_one_owner(path: Path) -> None:
    module = module_of(path)
    used = {name.partition(".")[0] for name in imported(path)} & OWNERS.keys()
    strangers = [name for name in used if not any(within(module, owner) for owner in OWNERS[name])]
    assert not strangers


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_no_file_is_too_long_and_all_is_ascii(path: Path) -> None:
    text = path.read_text()
    assert text.isascii()
    assert len(text.splitlines()) <= 400 or path.name == "swinv2.py"


def test_the_models_package_is_ours() -> None:
    import models

    assert Path(models.__file__).parent == ROOT / "models"
    assert "models" in sys.modules
