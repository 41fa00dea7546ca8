"""The product as it is used: ``sbatch slurm/fd_swinv2g.sbatch`` trains ZeRO-3 on two nodes, come what may.

The recipe is the shipped one with a small student and teacher, on the CPU scale. The runs have no stochastic
depth, whose draws belong to a rank: so that one reference serves runs on other numbers of nodes too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.program import (
    BATCH,
    curve,
    draw_shards,
    run_of,
    seen,
    starts,
    student,
    submit,
)

STEPS = 12


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
    assert job.wait_for("COMPLETED", "FAILED", timeout_s=180) == "COMPLETED", job.report()
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
