"""The whole story on real images, through the command line: pack, distil, probe, fine-tune, compare."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from typer.testing import CliRunner

from fd_scale.cli import app
from fd_scale.data.index import ShardSet
from fd_scale.data.loader import evaluation_batches
from fd_scale.engine.checkpoint import MASTER, Pieces, committed
from fd_scale.evaluate.source import open_source

CIFAR = Path(__file__).parents[2].parent / "shared" / "data" / "cifar10.tar.gz"
SIDE, PER_CLASS = 32, {"train": 60, "test": 25}
SMALL = {
    "student.arguments": {"embed_dim": 48, "depth": 3, "num_heads": 3},
    "student.input_size": SIDE,
    "teacher.weights": "random",
    "teacher.input_size": SIDE,
    "teacher.arguments": {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3},
    "global_batch": 32,
    "schedule.images": 384,
    "schedule.warmup_images": 32,
}
HABITS = {"run.workers": 0, "run.log_every_steps": 1}
SCALE = {"train_micro_batch_size_per_gpu": 32, "zero_optimization": {"stage": 0}}
"""LARS, of the linear probe, needs whole parameters."""
STEPS = 30
PATIENCE_S = 240

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CIFAR.is_file(), reason=f"no {CIFAR.name} in ../shared/data: CIFAR-10 as folders"),
]


def fd_scale(*words: object) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "fd_scale", *map(str, words)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )


def done(process: subprocess.Popen[str], status: int = 0) -> str:
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == status, output
    return output


def settings(values: dict[str, Any]) -> list[str]:
    return [word for name, value in values.items() for word in ("--set", f"{name}={value}")]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few images of each class, packed."""
    folder = tmp_path_factory.mktemp("cifar")
    taken: Counter[str] = Counter()
    with tarfile.open(CIFAR) as tar:
        for member in tar:
            parent = str(Path(member.name).parent)
            part = Path(parent).parent.name
            if member.isfile() and taken[parent] < PER_CLASS[part]:
                taken[parent] += 1
                tar.extract(member, folder, filter="data")
    for part in PER_CLASS:
        packed = CliRunner().invoke(
            app, ["shards", "pack", str(folder / "cifar10" / part), str(folder / part)]
        )
        assert packed.exit_code == 0, packed.output
    (folder / "scale.json").write_text(json.dumps(SCALE))
    return folder


@pytest.fixture(scope="module")
def run(shards: Path) -> Path:
    """A short distillation from a random teacher."""
    asked = {**SMALL, **HABITS, "data.shards": shards / "train", "run.root": shards / "runs"}
    asked["scale"] = shards / "scale.json"
    done(fd_scale("distill", "--recipe", "demo", *settings(asked)))
    (found,) = (shards / "runs").iterdir()
    return found


def tuning(run: Path, shards: Path, root: str) -> subprocess.Popen[str]:
    changes = {
        **HABITS,
        "scale": shards / "scale.json",
        "schedule.images": STEPS * 32,
        "schedule.warmup_images": 64,
        "optim.lr": 2e-3,
        "run.root": shards / root,
        "run.save_every_steps": 7,
        "start.drop_path": 0.1,
    }
    words = ["--task", "finetune", "--train", shards / "train", "--test", shards / "test"]
    return fd_scale("evaluate", run, *words, "--global-batch", 32, *settings(changes))


@pytest.fixture(scope="module")
def tuned(run: Path, shards: Path) -> Path:
    """Where its fine-tuning lies, which nothing interrupted."""
    done(tuning(run, shards, "whole"))
    return shards / "whole"


@pytest.fixture(scope="module")
def probe(run: Path, shards: Path) -> Path:
    """The record of its linear probe."""
    changes = {"schedule.images": 20 * 32, "schedule.warmup_images": 64, "run.root": shards / "probes"}
    words = ["--task", "linear", "--train", shards / "train", "--test", shards / "test", "--global-batch", 32]
    done(fd_scale("evaluate", run, *words, *settings({**HABITS, **changes, "scale": shards / "scale.json"})))
    (record,) = (run / "reports").glob("linear-cls-*.json")
    return record


def weights(root: Path) -> dict[str, torch.Tensor]:
    (folder,) = root.iterdir()
    saved = committed(folder / "checkpoints")[-1]
    assert saved.step == STEPS
    pieces = Pieces(saved)
    return {name: pieces.whole(MASTER, name) for name in saved.manifest["parameters"]}


def test_an_interrupted_fine_tuning_ends_with_the_weights_of_the_whole_one(
    run: Path, tuned: Path, shards: Path
) -> None:
    interrupted = tuning(run, shards, "interrupted")
    metrics = shards / "interrupted"
    deadline = time.monotonic() + PATIENCE_S
    while len([row for path in metrics.glob("*/metrics.jsonl") for row in path.open()]) < 10:
        assert interrupted.poll() is None, interrupted.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    interrupted.send_signal(signal.SIGTERM)
    done(interrupted, 128 + signal.SIGTERM)
    output = done(tuning(run, shards, "interrupted"))
    assert "going on from step" in output
    ours, theirs = weights(tuned), weights(shards / "interrupted")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_the_linear_probe_runs_to_its_record(probe: Path) -> None:
    assert json.loads(probe.read_text())["num_test"] == 10 * PER_CLASS["test"]


def features(run: Path, shards: Path, kind: str) -> tuple[np.ndarray, np.ndarray]:
    network = open_source(str(run))
    parts = [
        (network.pooled(batch.pixels[SIDE])[kind].numpy(), batch.labels)
        for batch in evaluation_batches(ShardSet.open(shards), size=SIDE, crop_pct=0.875, batch=100)
    ]
    return np.concatenate([values for values, _ in parts]), np.concatenate([labels for _, labels in parts])


def votes(distances: np.ndarray) -> np.ndarray:
    return np.exp((1 - distances) / 0.07)


@pytest.mark.usefixtures("tuned", "probe")
def test_the_suite_reports_and_its_knn_is_scikit_learn_s(run: Path, shards: Path) -> None:
    """The table of student and teacher holds the fine-tuning and the probe that were made before."""
    words = ["--suite", "classification", "--train", shards / "train", "--test", shards / "test"]
    done(fd_scale("evaluate", run, *words))
    report = (run / "reports" / "classification.md").read_text()
    for column in ("knn cls", "knn gap", "linear_fast gap", "linear cls", "finetune gap"):
        assert column in report
    assert "difference" in report
    for kind in ("cls", "gap"):
        (path,) = (run / "reports").glob(f"knn-{kind}-{run.name}@*.json")
        record = json.loads(path.read_text())
        known, labels = features(run, shards / "train", kind)
        asked, wanted = features(run, shards / "test", kind)
        for k in (10, 20, 100, 200):
            other = KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=votes)
            score = other.fit(known, labels).score(asked, wanted)
            assert record["metrics"][f"top1_k{k}"] == [pytest.approx(score, abs=1e-9)]
    best = json.loads(next((run / "reports").glob(f"linear_fast-gap-{run.name}@*.json")).read_text())
    assert best["mean"] > 0.15, "chance is 0.1"
