"""The demo: it says what the numbers say, clears only what it made, and its teacher is a teacher."""

import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from rich.console import Console

from fd_scale import demo
from fd_scale.cli import app
from fd_scale.data.scenes import IGNORED
from fd_scale.demo import AFTER, BEFORE, TEACHER, difference, verdict
from fd_scale.demo_teacher import patch_classes, pretrain
from fd_scale.errors import RunError
from fd_scale.pictures import Measured
from fd_scale.run import recipes
from fd_scale.run.recipe import derive
from fd_scale.teachers import load

SMALL = {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}


def rows(before: float, after: float, teacher: float, error: float = 0.01) -> demo.Rows:
    values = {BEFORE: before, AFTER: after, TEACHER: teacher}
    return {name: {"kNN": Measured(value, error)} for name, value in values.items()}


@pytest.mark.parametrize(
    ("before", "after", "teacher", "words"),
    [
        (
            0.2,
            0.8,
            0.81,
            [
                "a gain (+60.0 points",
                "within noise (-1.0 points",
                "By 1 of 1",
                "by 1 it is not measurably behind",
            ],
        ),
        (
            0.5,
            0.51,
            0.8,
            ["within noise (+1.0 points", "is behind (-29.0 points", "By 0 of 1", "by 0 it is not"],
        ),
        (
            0.5,
            0.4,
            0.3,
            [
                "a loss (-10.0 points",
                "is ahead (+10.0 points",
                "By 0 of 1",
                "by 1 it is not measurably behind",
            ],
        ),
    ],
)
def test_the_verdict_follows_from_the_numbers(before, after, teacher, words):
    text = " ".join(verdict(rows(before, after, teacher)))
    for word in words:
        assert word in text


def test_noise_is_two_standard_errors_of_a_difference():
    change, noise = difference(Measured(0.7, 0.03), Measured(0.6, 0.04))
    assert (change, noise) == (pytest.approx(0.1), pytest.approx(0.1))


def test_a_patch_is_what_covers_most_of_it():
    semantic = np.zeros((8, 12), np.uint8)[:8, :8]
    semantic[:4, :4] = IGNORED
    semantic[0:2, 4:8] = 3  # half of the patch
    semantic[4:6, 0:2] = 2  # a quarter is too little
    semantic[4:8, 4:8], semantic[4:6, 4:8] = 6, 1  # of equal shares the lower class
    assert patch_classes(semantic, 4).tolist() == [[0, 3], [0, 1]]


def test_an_earlier_demo_is_cleared_and_nothing_else(tmp_path):
    out = tmp_path / "out"
    demo._make_room(out)
    assert [entry.name for entry in out.iterdir()] == ["demo.json"]
    (out / "runs" / "demo-0").mkdir(parents=True)
    (out / "loss.png").write_bytes(b"old")
    (out / "README.md").write_text("old")
    demo._make_room(out)
    assert [entry.name for entry in out.iterdir()] == ["demo.json"]
    (out / "thesis.tex").write_text("mine")
    (out / "loss.png").write_bytes(b"old")
    with pytest.raises(RunError, match=r"not of an earlier demo \(thesis.tex\): give --out another folder"):
        demo._make_room(out)
    assert sorted(entry.name for entry in out.iterdir()) == ["demo.json", "loss.png", "thesis.tex"]


def test_a_folder_with_names_of_a_demo_but_not_of_one_is_refused(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(RunError, match=r"no demo\.json"):
        demo._make_room(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    with pytest.raises(RunError, match="is a file: give the demo a folder"):
        demo._make_room(tmp_path / "README.md")


def test_the_pretrained_teacher_is_a_teacher(tmp_path):
    spec = derive(recipes.get("demo"), **{"teacher.arguments": SMALL, "teacher.input_size": 32}).teacher
    said: list[str] = []
    for name in ("a", "b"):
        weights = tmp_path / f"{name}.safetensors"
        pretrain(spec, weights, num_images=16, seed=0, cue=0.8, steps=4, say=said.append)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert len(said) == 8
    taught = load(
        spec.model_copy(update={"weights": str(weights)}), device="cpu", dtype=torch.float32, seed=0
    )
    assert (taught.width, taught.grid, taught.num_prefix_tokens) == (16, (4, 4), 1)


def test_a_failed_distillation_shows_the_end_of_its_log(tmp_path):
    said: list[str] = []
    with pytest.raises(RuntimeError, match=r"exit status 1:(.|\n)*--set 'nonsense' is not of the form"):
        demo.distil(["nonsense"], tmp_path / "log", say=said.append)
    assert said[0].startswith("torchrun --standalone --nproc-per-node 2 -m fd_scale distill --recipe demo")


def test_chapters_are_numbered_and_timed():
    console = Console(record=True, width=80)
    story = demo.Story(console, chapters=2)
    with story.chapter("One"):
        story.say("[not markup]")
    with story.chapter("Two"):
        story.say("done")
    text = console.export_text()
    for words in ("[1/2] One", "[2/2] Two", "[not markup]"):
        assert words in text
    assert list(story.seconds) == ["One", "Two"]


def test_the_command_that_it_prints_at_the_end_is_one(tmp_path):
    run = tmp_path / "a run"
    python, dash_m, module, *words = shlex.split(demo.diagnosis(run))
    assert (Path(python).exists(), dash_m, module) == (True, "-m", "fd_scale")
    command = typer.main.get_command(app).commands[words[0]]
    assert command.make_context("fd-scale", words[1:]).params["target"] == str(run)
