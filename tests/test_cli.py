"""The command line: what README and docs print is what it takes; wrong input ends with status 2."""

from __future__ import annotations

import errno
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from fd_scale.cli import app, main
from fd_scale.data.scenes import write_scenes
from fd_scale.run import recipes

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]


def commands() -> Iterator[list[str]]:
    """The words after ``fd-scale`` or ``-m fd_scale`` in fenced lines without a language."""
    blocks = [block for page in PAGES for block in page.read_text().split("```")[1::2]]
    for line in (line for block in blocks if block.startswith("\n") for line in block.splitlines()):
        words = shlex.split(line, comments=True)
        for start in (["fd-scale"], ["-m", "fd_scale"]):
            for place in range(len(words)):
                if words[place : place + len(start)] == start:
                    yield words[place + len(start) :]


def test_the_readme_prints_commands() -> None:
    assert len(list(commands())) >= 30


@pytest.mark.parametrize("words", list(commands()), ids=" ".join)
def test_a_printed_command_is_taken(words: list[str]) -> None:
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


def test_a_place_that_cannot_be_written_to_is_one_message(tmp_path: Path, monkeypatch, capsys) -> None:
    write_scenes(tmp_path / "set", num_images=2, size=16, seed=0, max_count=2)
    for words in (
        ["shards", "pack", str(tmp_path / "set"), str(tmp_path / "set" / "index.json" / "out")],
        ["shards", "show", str(tmp_path / "set"), "--sheet", str(tmp_path / "set" / "index.json" / "a.png")],
    ):
        monkeypatch.setattr(sys, "argv", ["fd-scale", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        assert re.search(
            r"error: .*index\.json.*: (Not a directory|File exists); name", capsys.readouterr().err
        )


def test_a_disk_that_is_full_is_one_message(monkeypatch, capsys) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("fd_scale.data.scenes.write_scenes", full)
    monkeypatch.setattr(sys, "argv", ["fd-scale", "shards", "scenes", "out"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: No space left on device; name another place")


def test_the_largest_recipe_is_outlined_without_being_built() -> None:
    outlined = run("distill", "--recipe", "fd_swinv2g", "--dry-run")
    assert outlined.returncode == 0, outlined.stderr
    assert "2,996,208,352 parameters" in outlined.stdout
    assert "ZeRO-3, bf16, activation checkpointing on" in outlined.stdout
    assert "weight decay 0.05" in outlined.stdout
