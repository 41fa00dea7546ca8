"""The command line: what the README prints is what it takes; wrong input ends with status 2."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from fd_scale.cli import app
from fd_scale.run import recipes

README = Path(__file__).parents[1] / "README.md"


def commands() -> Iterator[list[str]]:
    """The words after ``fd-scale`` or ``-m fd_scale`` in fenced lines without a language."""
    blocks = README.read_text().split("```")[1::2]
    for line in (line for block in blocks if block.startswith("\n") for line in block.splitlines()):
        words = shlex.split(line, comments=True)
        for start in (["fd-scale"], ["-m", "fd_scale"]):
            for place in range(len(words)):
                if words[place : place + len(start)] == start:
                    yield words[place + len(start) :]


def test_the_readme_prints_commands() -> None:
    assert len(list(commands())) >= 5


@pytest.mark.parametrize("words", list(commands()), ids=" ".join)
def test_a_command_of_the_readme_is_taken(words: list[str]) -> None:
    command = typer.main.get_command(app)
    while hasattr(command, "commands"):
        command, words = command.commands[words[0]], words[1:]
    context = command.make_context("fd-scale", list(words))
    name = context.params.get("recipe")
    assert name is None or recipes.get(name).name == name


def test_the_readme_knows_every_recipe() -> None:
    text = README.read_text()
    variants = ("_released_code", "_100ep")
    missing = [
        name for name in recipes.names() if not any(v in name for v in variants) and f"`{name}`" not in text
    ]
    assert not missing


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fd_scale", *words], capture_output=True, text=True, timeout=240
    )


def test_wrong_words_end_with_status_2_and_one_message(tmp_path: Path) -> None:
    unknown = run("recipes", "fd_clip_vitb61")
    assert unknown.returncode == 2
    assert unknown.stderr.startswith("error: unknown recipe 'fd_clip_vitb61'; did you mean fd_clip_vitb16")
    nothing = run("export", str(tmp_path))
    assert nothing.returncode == 2
    assert "is no run directory" in nothing.stderr
    empty = run("shards", "pack", str(tmp_path), str(tmp_path / "out"))
    assert empty.returncode == 2
    assert str(tmp_path) in empty.stderr
    assert not any("Traceback" in result.stderr for result in (unknown, nothing, empty))


def test_the_largest_recipe_is_outlined_without_being_built() -> None:
    outlined = run("distill", "--recipe", "fd_swinv2g", "--dry-run")
    assert outlined.returncode == 0, outlined.stderr
    assert "2,996,208,352 parameters" in outlined.stdout
    assert "ZeRO-3, bf16, activation checkpointing on" in outlined.stdout
    assert "weight decay 0.05" in outlined.stdout
