"""Words of ``fd-scale evaluate`` that are refused before anything is loaded, and the presets in a dry run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fd_scale.cli import app
from fd_scale.data.scenes import write_scenes
from fd_scale.errors import UserError

REFUSALS = [
    (["--task", "knnn"], "unknown --task 'knnn'; did you mean knn"),
    ([], "give either --task or --suite"),
    (["--task", "knn", "--suite", "classification"], "give either --task or --suite"),
    (["--suite", "dense"], "unknown --suite 'dense'"),
    (["--task", "knn"], "--train is missing"),
    (["--task", "knn", "--train", "SCENES", "--out", __file__], "is a file: name a folder for the records"),
    (["--task", "knn", "--preset", "fd_base"], "--preset: of no use to knn; for finetune, linear"),
    (["--task", "finetune", "--cache", "here"], "--cache: of no use to finetune"),
    (["--task", "finetune", "--clip", "a@b"], "--clip: of no use to finetune; for zeroshot, retrieval"),
    (["--task", "retrieval", "--classes", "here"], "--classes: of no use to retrieval; for zeroshot"),
    (["--task", "finetune", "--seeds", "0,x", "--train", "SCENES"], "is not a list of whole numbers"),
    (["--task", "finetune", "--set", "seed=5", "--train", "SCENES"], "seeds are given as --seeds 5"),
    (["--task", "finetune", "--seeds", "1,1", "--train", "SCENES"], "names a seed twice"),
    (["--task", "finetune", "--preset", "fd_bsae", "--train", "SCENES"], "did you mean fd_base"),
    (["--task", "finetune", "--preset", "linear", "--train", "SCENES"], "preset linear is for --task linear"),
]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "scenes"
    write_scenes(folder, num_images=40, size=16, seed=0, max_count=40)
    return folder


@pytest.mark.parametrize(("words", "message"), REFUSALS, ids=lambda value: " ".join(value)[:40])
def test_words_that_do_not_go_together_are_refused(words: list[str], message: str, scenes: Path) -> None:
    words = [str(scenes) if word == "SCENES" else word for word in words]
    result = CliRunner().invoke(app, ["evaluate", "timm:test_vit@random", "--test", str(scenes), *words])
    assert isinstance(result.exception, UserError), result.output
    assert message in str(result.exception)


def test_a_suite_of_two_input_sizes_is_refused_before_anything_is_measured(
    scenes: Path, tmp_path: Path
) -> None:
    words = ["timm:test_vit@random", "--against", "timm:vit_tiny_patch16_224@random", "--suite"]
    words += ["classification", "--train", str(scenes), "--test", str(scenes), "--out", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "fd_scale", "evaluate", *words], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 2, done.stderr
    assert "takes 224 pixels and" in done.stderr
    assert "160, which do not compare: give --against" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_prints_the_effective_hyper_parameters(scenes: Path) -> None:
    words = ["--task", "finetune", "--preset", "fd_base", "--train", str(scenes), "--global-batch", "16"]
    words += ["--set", "scale=cpu", "--dry-run"]
    result = CliRunner().invoke(
        app, ["evaluate", "timm:test_vit@random", "--test", str(scenes), *words], env={"COLUMNS": "200"}
    )
    assert result.exit_code == 0, result.output
    text = " ".join(result.output.split())
    for shown in (
        "peak lr 3.90625e-05 at batch 16 (preset: 0.005 at 2,048, rule linear)",
        "images 4,000, the first 800 of them warm-up",
        "steps 250, the first 50 of them warm-up",
        "layer decay 0.65, floors scaled too",
        "drop path 0.3",
        "mixup, cutmix 0.8, 1, probability 1",
        "RandAug rand-m9-mstd0.5-inc1",
        "clip 5",
        "EMA none",
        "weights of the last step",
    ):
        assert shown in text, shown
