"""``sbatch slurm/evaluate.sbatch``: a fine-tuning is warned, queued again, and goes on to its record."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from fd_scale.data.scenes import write_scenes
from tests.cluster.cluster import Cluster
from tests.cluster.program import NOTING, REPOSITORY, curve, starts

STEPS = 8
PATIENCE_S = 200.0


@pytest.mark.slow
def test_a_fine_tuning_is_requeued_and_ends_with_its_record(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "slurm").symlink_to(REPOSITORY / "slurm")
    for seed, (name, count) in enumerate({"train": 40, "test": 15}.items()):
        write_scenes(tmp_path / name, num_images=count, size=32, seed=seed, max_count=40)
    changes = {
        "start.input_size": 32,
        "schedule.images": STEPS * 16,
        "schedule.warmup_images": 16,
        "scale": "cpu",
        "run.root": tmp_path / "runs",
        "run.workers": 0,
        "run.log_every_steps": 1,
    }
    words = ["timm:test_vit@random", "--task", "finetune", "--train", "train", "--test", "test"]
    words += ["--global-batch", "16", "--out", "records"]
    words += [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
    environment = {
        "FD_SCALE_PYTHON": sys.executable,
        "FD_SCALE_EXEC": NOTING,
        "FD_SCALE_SET": "data.shards=/a/distillations/shards",
        "PYTHONPATH": str(REPOSITORY),
        "PAUSES": "0:2",
    }
    size = ["--nodes=1", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=1"]
    job = cluster.submit(tmp_path, *size, "slurm/evaluate.sbatch", *words, environment=environment)
    job.wait_for_text("pausing before step 2", timeout_s=PATIENCE_S)
    job.warn()
    assert job.wait_for("COMPLETED", "FAILED", timeout_s=PATIENCE_S) == "COMPLETED", job.report()
    assert "FD_SCALE_SET and FD_SCALE_STAGE_SHARDS are of distillations, and not used" in job.log()
    assert [line[0] for line in starts(tmp_path)] == ["PREEMPTED", "DONE"], job.report()
    assert starts(tmp_path)[1][1] == f"step={STEPS}"
    assert "going on from step" in job.log()
    assert [step for step, *_ in curve(tmp_path)] == list(range(1, STEPS + 1))
    (record,) = (tmp_path / "records").glob("finetune-*.json")
    assert json.loads(record.read_text())["num_test"] == 15
