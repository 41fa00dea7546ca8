"""Does it work on this machine, and what does it do? The whole story in minutes, with nothing downloaded.

Scenes are drawn, a small teacher learns from labels, a student learns from the teacher alone through the
same engine as every run (two processes, ZeRO-3), and teacher and student are measured before and after.
This module tells the story; each chapter is a command or a function that a user has as well. What it says
at the end follows from the numbers, whatever they are.

Shape letters: B images, N patches.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from fd_scale.data.index import ShardSet
from fd_scale.data.scenes import SHAPES, Scene, scene, scene_seed, write_scenes
from fd_scale.demo_teacher import pretrain
from fd_scale.errors import RunError
from fd_scale.evaluate import knn, linear_fast
from fd_scale.evaluate.backbone import CLS, GAP, Backbone, of_export, of_student, of_teacher
from fd_scale.evaluate.features import LabelledFeatures, of_shards
from fd_scale.export import export
from fd_scale.pictures import Measured, before_after_markdown, before_after_table, feature_map_picture
from fd_scale.run import recipes
from fd_scale.run.folder import RunFolder, as_json, write_atomically
from fd_scale.run.recipe import Recipe, apply_overrides
from fd_scale.run.report import plot_metrics, read_metrics
from fd_scale.student import build_student
from fd_scale.teachers import Teacher, load

CUE = 0.8
"""Share of objects whose colour tells their class (``scenes.scene``)."""
NUM_TEACHING, NUM_UNLABELLED, NUM_LABELLED, NUM_TEST = 4096, 4096, 1536, 1536
"""Scenes of the four sets: for the teacher to learn from, for the student to learn from, for kNN and probe,
and to measure on."""
TEACHING_SEED, UNLABELLED_SEED, LABELLED_SEED, TEST_SEED = range(4)
"""Of the four sets, which have no scene in common."""
PROCESSES = 2
MAX_THREADS = 8
"""More are slower on networks this small."""
LOG_LINES = 80
"""Of a log to show after a failure: torchrun's own farewell takes forty."""

TEACHER, BEFORE, AFTER = "teacher", "student, before", "student, after"
TITLE = "Accuracy, % \u00b1 standard error (CLS: class token, mean: mean patch)"
TASKS = {"knn": f"kNN-{knn.HEADLINE}", "linear_fast": "linear"}
POOLINGS = {CLS: "CLS", GAP: "mean"}
MARKER = "demo.json"
MADE = ("shards", "runs", "evaluation", "teacher.safetensors", "distill.log", "loss.png", "feature_maps.png")
"""What a demo makes beside its texts; removed before it starts again."""
TEXTS = ("README.md", "summary.json", MARKER)

Rows = dict[str, dict[str, Measured]]
"""Accuracies by model and measure."""


@dataclass
class Story:
    """Where the demo is told: chapters on the console, and how long each took."""

    console: Console
    chapters: int
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def chapter(self, title: str) -> Iterator[None]:
        """A numbered headline, and the time at the end."""
        self.console.print(f"\n[{len(self.seconds) + 1}/{self.chapters}] {title}", style="bold", markup=False)
        begin = time.perf_counter()
        yield
        self.seconds[title] = time.perf_counter() - begin
        self.say(f"{self.seconds[title]:.0f} s")

    def say(self, text: str) -> None:
        """An indented line."""
        self.console.print(f"      {text}", markup=False, highlight=False, soft_wrap=True)


def run(out: Path) -> None:
    """Tell the story; everything that it makes lies in ``out``, which is new, empty, or of an earlier demo.

    Raises ``RunError`` for an ``out`` that holds something else, ``RuntimeError`` when distillation fails.
    """
    out = out.resolve()
    _make_room(out)
    torch.set_num_threads(min(torch.get_num_threads(), MAX_THREADS))
    story = Story(Console(), chapters=5)
    recipe = recipes.get("demo")
    story.console.print(f"Feature distillation in miniature. Everything goes to {out}", soft_wrap=True)

    with story.chapter("Scenes: six shapes in procedural rooms"):
        sets = make_scenes(out / "shards", recipe.student.input_size)
        story.say(
            f"{NUM_UNLABELLED} to distil on, whose labels nobody reads, {NUM_LABELLED} labelled, {NUM_TEST} "
            f"to test; colour alone tells the shape in {CUE:.0%} of them"
        )
    with story.chapter("Teacher: a small ViT learns from labels and masks of scenes of its own"):
        weights = out / "teacher.safetensors"
        pretrain(recipe.teacher, weights, num_images=NUM_TEACHING, seed=TEACHING_SEED, cue=CUE, say=story.say)
    with story.chapter(f"Distillation: a random student, {PROCESSES} processes, ZeRO-3, no labels"):
        assignments = [
            f"teacher.weights={weights}",
            f"data.shards={sets['unlabelled']}",
            f"run.root={out / 'runs'}",
        ]
        recipe = apply_overrides(recipe, assignments)
        distil(assignments, out / "distill.log", say=story.say)
        folder = RunFolder(out / "runs" / recipe.run_name)
    with story.chapter("Evaluation: kNN and linear probe on frozen features"):
        teacher = load(recipe.teacher, device="cpu", dtype=torch.float32, seed=recipe.seed)
        backbones = networks(recipe, teacher, export(folder.path).weights)
        rows = evaluate(backbones, sets["labelled"], sets["test"], out / "evaluation")
    with story.chapter("Pictures"):
        plot_metrics(folder.metrics, out / "loss.png")
        draw_maps(backbones, recipe.student.input_size, out / "feature_maps.png")
    _tell_end(story, out, folder, rows)


def make_scenes(out: Path, size: int) -> dict[str, Path]:
    """Three shard sets of single-object scenes, by name; the teacher's own are never written."""
    wanted = {
        "unlabelled": (NUM_UNLABELLED, UNLABELLED_SEED),
        "labelled": (NUM_LABELLED, LABELLED_SEED),
        "test": (NUM_TEST, TEST_SEED),
    }
    for name, (num_images, seed) in wanted.items():
        write_scenes(
            out / name, num_images=num_images, size=size, seed=seed, cue=CUE, num_objects=1, max_count=512
        )
    return {name: out / name for name in wanted}


def distil(assignments: list[str], log: Path, *, say: Callable[[str], None] = print) -> None:
    """Run the public command under torchrun; its output goes to ``log``, its progress to ``say`` as well.

    Raises ``RuntimeError`` with the end of the log when it fails.
    """
    arguments = ["distill", "--recipe", "demo"]
    for assignment in assignments:
        arguments += ["--set", assignment]
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES)]
    say(f"torchrun {' '.join(launcher[1:])} -m fd_scale {' '.join(arguments)}")
    threads = min(max(1, _cores() // PROCESSES), MAX_THREADS)
    with (
        log.open("w", encoding="utf-8") as file,
        subprocess.Popen(
            [sys.executable, "-m", *launcher, "-m", "fd_scale", *arguments],
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process,
    ):
        for line in process.stdout or ():
            file.write(line)
            if line.startswith("step "):
                say(line.rstrip())
    if process.returncode != 0:
        end = "\n".join(log.read_text(encoding="utf-8").splitlines()[-LOG_LINES:])
        raise RuntimeError(
            f"distillation ended with exit status {process.returncode}:\n{end}\n(all of it: {log})"
        )


def networks(recipe: Recipe, teacher: Teacher, exported: Path) -> dict[str, Backbone]:
    """Teacher, the random student that the run began with, and the exported one."""
    torch.manual_seed(recipe.seed)
    random = build_student(recipe, [teacher])
    return {
        TEACHER: of_teacher(teacher),
        BEFORE: of_student(random, name=BEFORE),
        AFTER: of_export(exported, name=AFTER),
    }


def evaluate(backbones: Mapping[str, Backbone], labelled: Path, test: Path, records: Path) -> Rows:
    """Accuracies on ``test`` from the features of ``labelled``, with one JSON per result in ``records``."""
    records.mkdir(parents=True, exist_ok=True)
    sets = ShardSet.open(labelled), ShardSet.open(test)
    rows: Rows = {}
    for name, backbone in backbones.items():
        bank, asked = (_features(backbone, shards) for shards in sets)
        results: list[knn.KnnResult | linear_fast.LinearResult] = [
            *knn.evaluate(bank, asked),
            *linear_fast.evaluate(bank, asked),
        ]
        rows[name] = {
            f"{TASKS[result.task]} {POOLINGS[result.pooling]}": Measured(
                result.headline, result.standard_error
            )
            for result in results
        }
        for result in results:
            record = records / f"{name.replace(', ', '-')}-{result.task}-{result.pooling}.json"
            write_atomically(record, result.to_json())
    return rows


def draw_maps(backbones: Mapping[str, Backbone], size: int, picture: Path) -> None:
    """The feature maps of the first test scene of each class in PCA colours."""
    drawn = (scene(scene_seed(TEST_SEED, number), size, CUE, 1) for number in range(NUM_TEST))
    first: dict[int, Scene] = {}
    while len(first) < len(SHAPES):
        shown = next(drawn)
        first.setdefault(shown.label, shown)
    images = np.stack([first[label].image for label in sorted(first)])
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    maps = {}
    for name, backbone in backbones.items():
        features = backbone.tokens(pixels)
        maps[name] = features.patches_BND.unflatten(1, features.grid)
    feature_map_picture(pixels, maps, picture)


def verdict(rows: Mapping[str, Mapping[str, Measured]]) -> list[str]:
    """What the numbers say, one sentence per measure and one for all; noise is two standard errors."""
    lines = []
    gained = not_behind = 0
    for measure, before in rows[BEFORE].items():
        after, teacher = rows[AFTER][measure], rows[TEACHER][measure]
        gain, gain_noise = difference(after, before)
        gap, gap_noise = difference(after, teacher)
        gained += gain > gain_noise
        not_behind += gap >= -gap_noise
        lines.append(
            f"{measure}: {before.value:.1%} before, {after.value:.1%} after: "
            f"{_compared(gain, gain_noise, 'a gain', 'a loss')}. The teacher has {teacher.value:.1%}: "
            f"{_compared(gap, gap_noise, 'the student is ahead', 'the student is behind')}."
        )
    lines.append(
        f"By {gained} of {len(lines)} measures the student gained more than noise; by {not_behind} it is not "
        "measurably behind its teacher."
    )
    return lines


def difference(first: Measured, second: Measured) -> tuple[float, float]:
    """The difference of two accuracies and its noise: two standard errors, as if the test sets were apart.

    They are one and the same, which makes the true noise smaller: what is called a gain is one, and what is
    within noise may still differ.
    """
    noise = 2 * (first.standard_error**2 + second.standard_error**2) ** 0.5
    return first.value - second.value, noise


def _compared(change: float, noise: float, up: str, down: str) -> str:
    text = f"{100 * change:+.1f} points, noise {100 * noise:.1f}"
    if abs(change) <= noise:
        return f"within noise ({text})"
    return f"{up if change > 0 else down} ({text})"


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _make_room(out: Path) -> None:
    """A folder with nothing in it but the marker, which tells the next demo that all this may go."""
    if out.exists() and not out.is_dir():
        raise RunError(f"{out} is a file: give the demo a folder of its own with --out")
    out.mkdir(parents=True, exist_ok=True)
    strangers = sorted({entry.name for entry in out.iterdir()} - {*MADE, *TEXTS})
    if strangers or (any(out.iterdir()) and not (out / MARKER).is_file()):
        found = ", ".join(strangers[:3]) or f"no {MARKER}"
        raise RunError(f"{out} is not empty and not of an earlier demo ({found}): give --out another folder")
    for name in (*MADE, *TEXTS[:-1]):
        entry = out / name
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink(missing_ok=True)
    write_atomically(out / MARKER, as_json({"made_by": "fd-scale demo"}))


def _features(backbone: Backbone, shards: ShardSet) -> LabelledFeatures:
    """Whole scenes: cropping would cut the objects."""
    return of_shards(backbone, shards, crop_pct=1.0)


def _tell_end(story: Story, out: Path, folder: RunFolder, rows: Rows) -> None:
    """The table, the verdict, and the texts of the folder."""
    words = verdict(rows)
    losses = [row["loss"] for row in read_metrics(folder.metrics) if row.get("loss") is not None]
    total_s = sum(story.seconds.values())
    story.console.print()
    story.console.print(before_after_table(rows, TITLE))
    facts = [
        f"The loss went from {losses[0]:.4f} to {losses[-1]:.4f}.",
        f"Chance is {1 / len(SHAPES):.1%}; whoever sees colours and no shapes can get "
        f"{CUE + (1 - CUE) / len(SHAPES):.1%}.",
        "A toy on toy images: it shows that the machinery works from shards to exported weights, not that "
        "the papers' claim, better fine-tuning, holds.",
    ]
    for line in (*words, *facts):
        story.console.print(line, markup=False, highlight=False, soft_wrap=True)
    summary = {
        "accuracy": {name: {m: asdict(v) for m, v in row.items()} for name, row in rows.items()},
        "verdict": words,
        "loss": {"first": losses[0], "last": losses[-1]},
        "seconds": story.seconds,
        "run": str(folder.path.relative_to(out)),
    }
    write_atomically(out / "summary.json", as_json(summary))
    write_atomically(out / "README.md", _readme(rows, [*words, *facts], folder.path.relative_to(out)))
    story.console.print(f"\n{total_s / 60:.1f} minutes. Look at {out}:", style="bold", soft_wrap=True)
    for name in ("README.md", "feature_maps.png", "loss.png"):
        story.say(str(out / name))
    story.console.print("What distillation changed inside, as one page in about two minutes:", style="bold")
    story.say(diagnosis(folder.path))


def diagnosis(run: Path) -> str:
    """The command that explains a run."""
    return shlex.join([sys.executable, "-m", "fd_scale", "diagnose", str(run)])


def _readme(rows: Rows, lines: list[str], run: Path) -> str:
    return f"""# Feature distillation in miniature

A small ViT, the teacher, learnt from labels and masks of {NUM_TEACHING:,} procedural scenes. A student of the
same size, begun at random, then learnt from the teacher's whitened feature maps of {NUM_UNLABELLED:,} other
scenes, without labels.

{TITLE}; {NUM_TEST:,} test scenes, {NUM_LABELLED:,} labelled ones to learn from:

{before_after_markdown(rows)}
{chr(10).join(f"- {line}" for line in lines)}

![Feature maps in PCA colours](feature_maps.png)

![Loss and learning rate](loss.png)

| file | what it is |
|---|---|
| `teacher.safetensors` | the teacher, for timm |
| `{run}` | the run: recipe, metrics, checkpoints, and in `exports` the student, for timm |
| `evaluation` | one record per number of the table |
| `shards` | the scenes as tar shards |
| `distill.log` | all that the two processes said |
| `summary.json` | the table, the verdict and the times, for programs |

What distillation changed inside the network, as one page: `fd-scale diagnose {run}`
"""
