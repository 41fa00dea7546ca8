"""The product as it is used: ``sbatch slurm/fd_swinv2g.sbatch`` trains ZeRO-3 on two nodes, come what may.

The recipe is the shipped one with a small student and teacher, on the CPU scale. The runs have no stochastic
depth, whose draws belong to a rank: so that one reference serves runs on other numbers of nodes too.
"""

from __future__ import annotations

import collections
import json
import random
from pathlib import Path
from typing import Any

import pytest

from benchmarks import chaos
from tests.cluster.cluster import Cluster, Job
from tests.cluster.program import (
    BATCH,
    curve,
    draw_shards,
    of_all_ranks,
    run_of,
    seen,
    starts,
    student,
    submit,
)

STEPS = 12
PATIENCE_S = 200.0
"""Longest wait for a start to get on, also where other work keeps the processors busy."""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Twelve steps over one epoch of pictures and a few more."""
    shards = draw_shards(tmp_path_factory.mktemp("pictures"), STEPS * BATCH + 16)
    return {"schedule.images": STEPS * BATCH, "data.shards": shards, "run.save_every_steps": 3}


@pytest.fixture(scope="module")
def whole(running_cluster: Cluster, recipe: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an undisturbed run on two nodes."""
    folder = tmp_path_factory.mktemp("whole")
    job = submit(running_cluster, folder, recipe)
    assert job.wait_for("COMPLETED", "FAILED", timeout_s=PATIENCE_S) == "COMPLETED", job.report()
    return folder


def test_the_shipped_script_trains_and_ends_with_the_student(cluster: Cluster, whole: Path) -> None:
    losses = [loss for _, loss, _ in curve(whole)]
    assert len(losses) == STEPS
    assert losses[-1] < 0.9 * losses[0]
    assert student(whole)["norm.weight"].isfinite().all()
    assert [words[:2] for words in starts(whole)] == [["DONE", f"step={STEPS}"]]
    config = json.loads((run_of(whole) / "starts/0001/ds_config.json").read_text())
    assert config["zero_optimization"]["stage"] == 3
    facts = json.loads((run_of(whole) / "starts/0001/environment.json").read_text())
    assert facts["world_size"] == 2
    per_rank = [len(keys) for ranks in seen(whole).values() for keys in ranks.values()]
    assert per_rank == [BATCH // 2] * 2 * STEPS


@pytest.fixture(scope="module")
def struck(running_cluster: Cluster, recipe: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Job:
    """The same run through four starts: its time limit, a rank killed in a save and the newest checkpoint
    truncated, its time limit; and a second job for the same run."""
    folder = tmp_path_factory.mktemp("struck")
    together = ["--exclusive=user", "--mem=1000"]  # a node may have both jobs
    limit = ["--time=60", "--signal=B:USR1@60"]
    environment = {"PAUSES": "0:2 1:6:save 2:8", "FD_SCALE_STAGE_SAVES": str(folder / "disk")}
    often = recipe | {"run.save_every_steps": 1}
    job = submit(running_cluster, folder, often, *together, *limit, **environment)
    target = chaos.Target(job, folder, random.Random(0))

    job.wait_for_text("pausing before step 2", 2, timeout_s=PATIENCE_S)
    other = folder / "other"
    other.mkdir()
    second = submit(running_cluster, other, recipe | {"run.root": folder / "runs"}, *together, nodes=1)
    second.wait_for("COMPLETED", "FAILED", timeout_s=PATIENCE_S)
    job.reach_time_limit(60)

    job.wait_for_text("pausing while step 6 is saved", timeout_s=PATIENCE_S)
    chaos.newest_checkpoint_truncated(target)

    job.wait_for_text("pausing before step 8", 2, timeout_s=PATIENCE_S)
    job.reach_time_limit(60)
    job.wait_for("COMPLETED", "FAILED", timeout_s=PATIENCE_S)
    return job


def test_time_limits_and_faults_lose_nothing(struck: Job, whole: Path) -> None:
    folder = struck.log_path.parent
    assert struck.facts()["Restarts"] == "3"
    words = ["PREEMPTED", "RUNNING", "PREEMPTED", "DONE"]
    assert [line[0] for line in starts(folder)] == words, struck.report()
    assert "step-00000005 is damaged and is passed over" in struck.log()
    assert "going on from step 4" in struck.log(), "and the save of step 6, cut off, is no checkpoint"
    assert list((folder / "disk").iterdir()) == [], "saves went by way of it, and left nothing"
    outcome = chaos.compare(folder, whole)
    assert outcome.pop("samples") == STEPS * BATCH
    assert outcome.pop("samples_lost") == 0
    assert outcome == dict.fromkeys(("samples_in_the_same_place", "loss_curve_equal", "weights_equal"), True)


def test_a_second_job_on_the_same_run_is_refused(struck: Job) -> None:
    (log,) = (struck.log_path.parent / "other").glob("*.out")
    assert f"in use by Slurm job {struck.number}, process" in log.read_text()
    assert "failed for good" in log.read_text()


def test_two_nodes_then_one_then_two_in_one_epoch(
    cluster: Cluster, recipe: dict[str, Any], whole: Path, tmp_path: Path
) -> None:
    job = submit(cluster, tmp_path, recipe, PAUSES="0:4 1:8")
    for step, ranks, nodes in ((4, 2, 1), (8, 1, 2)):
        job.wait_for_text(f"pausing before step {step}", ranks, timeout_s=PATIENCE_S)
        job.warn()
        job.wait_for("PENDING")
        sizes = [f"numcpus={nodes}", f"numtasks={nodes}", f"numnodes={nodes}-{nodes}"]
        cluster.command("scontrol", "update", f"jobid={job.number}", *sizes)
    assert job.wait_for("COMPLETED", "FAILED", timeout_s=PATIENCE_S) == "COMPLETED", job.report()
    records = sorted((run_of(tmp_path) / "starts").glob("*/environment.json"))
    assert [json.loads(path.read_text())["world_size"] for path in records] == [2, 1, 2]
    ours, theirs = seen(tmp_path), seen(whole)
    for step in range(STEPS):
        assert of_all_ranks(ours[step]) == of_all_ranks(theirs[step]), step
    everything = collections.Counter(key for ranks in ours.values() for key in of_all_ranks(ranks))
    assert set(everything.values()) == {1}
    for (step, loss, _), (_, expected, _) in zip(curve(tmp_path), curve(whole), strict=True):
        # Sums in another order in float32.
        assert loss == pytest.approx(expected, rel=1e-6), step


def test_starts_that_cannot_save_come_to_an_end(
    cluster: Cluster, recipe: dict[str, Any], tmp_path: Path
) -> None:
    quota = "prlimit --fsize=100000"  # bytes per file: everything works but the checkpoints
    job = submit(cluster, tmp_path, recipe, "--hold", nodes=1, program=quota)
    stalled = "2026-01-01T00:00:00 RUNNING step=0 from=0 restart=0 nodes=n1 exit=1\n"
    (tmp_path / f"fd_swinv2g-{job.number}.starts").write_text(2 * stalled)  # what two such starts leave
    cluster.command("scontrol", "release", job.number)
    assert job.wait_for("COMPLETED", "FAILED", timeout_s=PATIENCE_S) == "FAILED", job.report()
    assert "3 starts in a row without progress: given up" in job.log()
    assert "File too large" in job.log()
    assert starts(tmp_path)[-1][:3] == ["RUNNING", "step=0", "from=0"]
    assert list((run_of(tmp_path) / "checkpoints").iterdir()) == []
