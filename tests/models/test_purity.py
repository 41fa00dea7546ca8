"""``models`` stands alone: it imports PyTorch, timm, the standard library and itself."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import models

ALLOWED = {"torch", "timm", "models"} | sys.stdlib_module_names
SOURCES = sorted(Path(models.__file__).parent.rglob("*.py"))


def imported(source: str) -> set[str]:
    """Top-level names that a source imports, anywhere in it; a relative import counts as ``models``."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("models" if node.level or node.module is None else node.module.partition(".")[0])
    return found


def test_the_reader_sees_every_form_of_import():
    source = """
import os.path, fd_scale.run
from torch import nn
def late():
    if True:
        from deepspeed.ops import adam
from . import ops
"""
    assert imported(source) == {"os", "fd_scale", "torch", "deepspeed", "models"}


def test_there_are_sources_to_read():
    assert {"__init__.py", "ops.py", "projector.py", "vit.py"} <= {path.name for path in SOURCES}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_a_source_imports_nothing_else(path):
    assert imported(path.read_text()) - ALLOWED == set()


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_a_source_imports_nothing_by_a_computed_name(path):
    names = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
    assert not names & {"__import__", "importlib", "exec", "eval"}
