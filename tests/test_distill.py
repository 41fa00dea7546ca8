"""Whole runs through the command line: two processes, ZeRO-3, killed, resumed, exported, and refused."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image

from fd_scale.data.index import ShardSet
from fd_scale.data.loader import TrainLoader
from fd_scale.data.pack import pack
from fd_scale.data.plan import Plan
from fd_scale.export import load_student
from fd_scale.pixels import IMAGENET_MEAN, IMAGENET_STD
from fd_scale.run import recipe as recipes
from fd_scale.run import recipes as named
from fd_scale.student import build_student
from fd_scale.teachers import load
from tests.reference.objective import loss_and_gradient
from tests.warm import Started, Warm

STEPS = 12
BASE = {
    "schedule.images": STEPS * 16,
    "schedule.warmup_images": 32,
    "global_batch": 16,
    "student.drop_path": 0.2,
    "optim.average_decay": 0.9,
    "run.log_every_steps": 1,
    "run.save_every_steps": 4,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty JPEG pictures of smooth noise in shards of ten."""
    folder = tmp_path_factory.mktemp("data")
    draw = np.random.default_rng(0)
    (folder / "images").mkdir()
    for index in range(40):
        coarse = Image.fromarray(draw.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        coarse.resize((96, 72), Image.Resampling.BICUBIC).save(
            folder / "images" / f"{index:02d}.jpg", quality=90
        )
    pack(folder / "images", folder / "shards", max_count=10)
    zero = {"stage": 3, "reduce_bucket_size": 1_000_000}
    own = {"teacher": "auto"}
    scale = {"train_micro_batch_size_per_gpu": 8, "zero_optimization": zero, "fd_scale": own}
    (folder / "scale.json").write_text(json.dumps(scale))
    return folder


@pytest.fixture(scope="module")
def teacher(data: Path) -> Path:
    """Weights of the demo's teacher, random."""
    torch.manual_seed(1)
    arguments = named.get("demo").teacher.arguments
    network = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=0, **arguments)
    path = data / "teacher.safetensors"
    safetensors.torch.save_file(network.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def words(data: Path, teacher: Path) -> Callable[..., list[str]]:
    """The words after ``fd-scale`` that run the demo recipe with changes."""

    def words(root: Path, **changes: Any) -> list[str]:
        asked = BASE | {"teacher.weights": teacher, "data.shards": data / "shards"}
        asked |= {"run.root": root, "scale": data / "scale.json"} | changes
        assignments = [word for key, value in asked.items() for word in ("--set", f"{key}={value}")]
        return ["distill", "--recipe", "demo", *assignments]

    return words


@pytest.fixture(scope="module")
def start(words: Callable[..., list[str]]) -> Iterator[Callable[..., Started]]:
    """Start two ranks."""
    warm = Warm()
    try:
        yield lambda root, ranks=2, **changes: warm.start(*words(root, **changes), ranks=ranks)
    finally:
        warm.close()


@pytest.fixture(scope="module")
def alone(start: Callable[..., Started]) -> Callable[..., tuple[int, str]]:
    """Run one process without a launcher to its end; exit status and output."""
    return lambda root, **changes: start(root, ranks=0, **changes).wait()


def metrics(root: Path) -> list[dict[str, Any]]:
    (path,) = root.glob("demo-*/metrics.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def losses(root: Path) -> dict[int, tuple[float, float]]:
    return {row["step"]: (row["loss"], row["grad_norm"]) for row in metrics(root)}


def wait_for(condition: Callable[[], bool], started: Started, timeout_s: float = 180) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        ended = any(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE for pid in started.pids)
        if ended or time.monotonic() > end:
            raise AssertionError(f"never came: {started.output()}")
        time.sleep(0.02)


@pytest.fixture(scope="module")
def whole(words: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """An undisturbed run of two processes under torchrun: its root and what it printed."""
    root = tmp_path_factory.mktemp("whole")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *launcher, "-m", "fd_scale", *words(root)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return root, done.stdout + done.stderr


def test_a_run_learns_and_writes_it_down(whole: tuple[Path, str]) -> None:
    root, output = whole
    rows = metrics(root)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"]
    assert rows[0]["lr"] == pytest.approx(1e-5)
    assert rows[2]["lr"] == pytest.approx(named.get("demo").optim.lr)
    assert {"images_per_s", "data_wait_share", "memory_gib", "skipped_steps", "bad_samples"} <= rows[0].keys()
    stalled = [row["step"] for row in rows if row["checkpoint_stall_s"] > 0]
    assert stalled == [5, 9], "the intervals in which steps 4 and 8 were saved"
    assert "images/s" in output
    assert "loss: reference (the features are on cpu, and the kernel needs a CUDA device)" in output
    (run,) = root.iterdir()
    assert recipes.load(run / "recipe.json").run_name == run.name
    assert json.loads((run / "starts/0001/ds_config.json").read_text())["gradient_accumulation_steps"] == 1
    assert "teacher: whole on every process (auto: with it a process needs" in output
    assert json.loads((run / "placement.json").read_text())["teacher"] == "replicate"
    assert (
        json.loads((run / "starts/0001/environment.json").read_text())["fd_scale"]["teacher"] == "replicate"
    )
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000008", "step-00000012"]


def test_the_first_loss_is_that_of_the_definition(
    alone: Callable[..., Any], data: Path, teacher: Path, tmp_path: Path
) -> None:
    """Step 0 again by hand: plan, crop, both networks, whitening and smooth L1, in float64."""
    images = {"schedule.images": 16, "schedule.warmup_images": 0, "student.drop_path": 0.0}
    status, output = alone(tmp_path, **images)
    assert status == 0, output
    (run,) = tmp_path.iterdir()
    recipe = recipes.load(run / "recipe.json")
    shards = ShardSet.open(data / "shards")
    plan = Plan(shards.counts, seed=0, global_batch=16, fingerprint=shards.fingerprint)
    (batch,) = TrainLoader(
        shards, plan, recipe.view, [64], rank=0, world_size=1, micro_batch=16, accumulation=1, stop_step=1
    )
    frozen = load(recipe.teacher, device="cpu", dtype=torch.float32, seed=0)
    torch.manual_seed(recipe.seed)
    student = build_student(recipe, [frozen]).double()
    network = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, num_classes=0, **recipe.teacher.arguments
    )
    network.load_state_dict(safetensors.torch.load_file(teacher))
    network = network.eval().double()
    pixels = batch.pixels[64].double() / 255
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    with torch.no_grad():
        # The tag of this architecture was trained with mean and std 0.5; the student sees ImageNet's.
        taught = network.forward_features((pixels - 0.5) / 0.5)
        predicted = student.projectors[0].linear(student.backbone((pixels - mean) / std))
    weights = np.where(np.arange(65) == 0, 10.0, 1.0)
    expected = loss_and_gradient(predicted.numpy(), taught.numpy(), token_weight=weights)
    # The run computes in float32: 2e-7 seen.
    assert losses(tmp_path)[1][0] == pytest.approx(expected.loss, rel=2e-6)


@pytest.mark.slow
def test_a_loss_in_pieces_is_the_same_run(
    start: Callable[..., Started], whole: tuple[Path, str], data: Path, tmp_path: Path
) -> None:
    """Two ranks, ZeRO-3, 100 of 520 tokens at a time: the curve, and the names in checkpoint and export."""
    scale = json.loads((data / "scale.json").read_text()) | {"fd_scale": {"loss_chunk_tokens": 100}}
    (tmp_path / "scale.json").write_text(json.dumps(scale))
    root = tmp_path / "runs"
    status, output = start(root, scale=tmp_path / "scale.json").wait()
    assert status == 0, output
    expected, found = losses(whole[0]), losses(root)
    for step in range(1, STEPS + 1):
        # Sums of float32 in another order, over twelve steps of AdamW: 9e-8 seen.
        assert found[step] == pytest.approx(expected[step], rel=1e-5), step
    (run,), (other,) = root.iterdir(), whole[0].iterdir()
    assert run.name == other.name, "how it fits the machine is not the science"
    ours, theirs = (
        safetensors.torch.load_file(folder / "exports" / f"step-{STEPS:08d}.safetensors")
        for folder in (run, other)
    )
    assert ours.keys() == theirs.keys()
    assert checkpoint_names(run) == checkpoint_names(other)


def checkpoint_names(run: Path) -> list[str]:
    """Names of all tensors of the last checkpoint."""
    files = sorted((run / "checkpoints" / f"step-{STEPS:08d}").rglob("*.safetensors"))
    assert files
    return [name for path in files for name in safetensors.torch.load_file(path)]


def test_exports_load_where_they_say(whole: tuple[Path, str]) -> None:
    (run,) = whole[0].iterdir()
    weights = run / "exports" / f"step-{STEPS:08d}.safetensors"
    card = weights.with_suffix(".md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    scope: dict[str, Any] = {}
    before = os.getcwd()
    os.chdir(weights.parent)
    try:
        exec(code, scope)
    finally:
        os.chdir(before)
    ours, theirs = load_student(weights), scope["model"].eval()
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        # Two implementations of the same network in float32: 1e-6 seen.
        torch.testing.assert_close(theirs.forward_features(pixels), ours(pixels), rtol=1e-4, atol=1e-5)
    assert not any("projector" in name for name in safetensors.torch.load_file(weights))


def test_killed_with_9_and_resumed(
    start: Callable[..., Started], whole: tuple[Path, str], tmp_path: Path
) -> None:
    started = start(tmp_path)
    wait_for(lambda: list(tmp_path.glob("demo-*/checkpoints/step-????????")) != [], started)
    started.kill()
    assert started.wait()[0] == -signal.SIGKILL
    status, output = start(tmp_path).wait()
    assert status == 0, output
    assert "going on from step 4" in output or "going on from step 8" in output
    assert losses(tmp_path) == losses(whole[0])
    for average in ("", "-ema"):
        file = f"demo-*/exports/step-{STEPS:08d}{average}.safetensors"
        here, there = (safetensors.torch.load_file(next(r.glob(file))) for r in (tmp_path, whole[0]))
        assert here.keys() == there.keys()
        assert all(torch.equal(value, there[name]) for name, value in here.items()), average


def test_a_signal_saves_and_one_process_goes_on(
    start: Callable[..., Any], alone: Callable[..., Any], whole: tuple[Path, str], tmp_path: Path
) -> None:
    """Stopped by SIGTERM at any step on two processes, finished on one: no step is lost or made twice."""
    started = start(tmp_path)
    wait_for(
        lambda: list(tmp_path.glob("demo-*/metrics.jsonl")) != [] and len(metrics(tmp_path)) >= 2, started
    )
    started.kill(signal.SIGTERM)
    status, output = started.wait()
    assert status == 128 + signal.SIGTERM
    assert "stopped by SIGTERM at step" in output
    stopped_at = len(metrics(tmp_path))
    (run,) = tmp_path.iterdir()
    assert (run / "STATE").read_text() == f"PREEMPTED step={stopped_at} from=0\n"
    assert stopped_at < STEPS
    status, output = alone(tmp_path)
    assert status == 0, output
    assert f"going on from step {stopped_at}" in output
    rows = metrics(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert losses(tmp_path)[stopped_at] == losses(whole[0])[stopped_at]
    # Drop path is drawn per process, so the rest differs, but not by much.
    assert rows[-1]["loss"] == pytest.approx(metrics(whole[0])[-1]["loss"], rel=0.2)


def test_a_finished_run_says_so(alone: Callable[..., Any], whole: tuple[Path, str]) -> None:
    status, output = alone(whole[0])
    assert status == 0
    assert "is finished" in output
    (run,) = whole[0].iterdir()
    assert (run / "STATE").read_text() == f"DONE step={STEPS}\n"


def test_another_teacher_is_refused(
    alone: Callable[..., Any], whole: tuple[Path, str], teacher: Path, tmp_path: Path
) -> None:
    original = teacher.read_bytes()
    tensors = safetensors.torch.load_file(teacher)
    tensors["norm.bias"] = tensors["norm.bias"] + 1e-3
    safetensors.torch.save_file(tensors, teacher)
    try:
        status, output = alone(whole[0])
    finally:
        teacher.write_bytes(original)
    assert status == 2
    assert "made with another teacher" in output
    assert "sha256" in output


def test_other_data_is_refused(
    alone: Callable[..., Any], whole: tuple[Path, str], data: Path, tmp_path: Path
) -> None:
    pack(data / "images", tmp_path / "shards", max_count=20)
    status, output = alone(whole[0], **{"data.shards": tmp_path / "shards"})
    assert status == 2
    assert "shards: 4 at the checkpoint, 2 now" in output


def test_a_loss_that_is_never_finite_stops_the_run(
    alone: Callable[..., Any], teacher: Path, tmp_path: Path
) -> None:
    tensors = safetensors.torch.load_file(teacher)
    tensors["norm.weight"][0] = math.nan
    broken = tmp_path / "broken.safetensors"
    safetensors.torch.save_file(tensors, broken)
    changes = {"teacher.weights": broken, "run.max_nonfinite_steps": 2}
    status, output = alone(tmp_path / "root", **changes)
    assert status == 2
    assert "not finite for 2 steps in a row" in output
    assert "teacher vit_tiny_patch16_224 on" in output
    assert "student on" not in output


def test_a_full_disk_leaves_the_last_checkpoint(alone: Callable[..., Any], tmp_path: Path) -> None:
    """The run directory lies on a small file system, which the second save fills."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(small)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"mounting a small file system needs root: {mounted.stderr.decode().strip()}")
    try:
        status, output = alone(small)
        assert status == 1
        assert "No space left on device" in output
        (run,) = small.iterdir()
        # The full disk may meet the metrics first, while the save is still being given up.
        left = [path.name for path in (run / "checkpoints").iterdir() if path.suffix != ".partial"]
        assert left == ["step-00000004"]
    finally:
        subprocess.run(["umount", str(small)], check=True)


REFUSALS = [
    ({"data.shards": "/nowhere"}, "/nowhere"),
    ({"teacher.architecture": "vit_tinny_patch16_224"}, "vit_tiny_patch16_224"),
    ({"student.architecture": "vit_mikro_patch8"}, "vit_micro_patch8"),
    ({"global_batch": 18}, "that work"),
    ({"student.input_size": 48}, "grid"),
    ({"optim.lrr": 1}, "did you mean lr"),
    ({"scale": "cpuu"}, "cpu"),
]


@pytest.mark.parametrize(
    ("changes", "expected"),
    REFUSALS,
    ids=lambda value: next(iter(value), "") if isinstance(value, dict) else "",
)
def test_wrong_input_is_refused_with_one_message(
    changes: dict[str, Any], expected: str, alone: Callable[..., Any], tmp_path: Path
) -> None:
    status, output = alone(tmp_path, **changes)
    assert status == 2
    assert expected in output
    assert "Traceback" not in output
