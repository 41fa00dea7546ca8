"""Runs over images of which some cannot be decoded: masked, listed once, and not too many of them."""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fd_scale.data.index import ShardSet
from fd_scale.data.pack import pack
from fd_scale.data.plan import Plan
from tests.test_distill import alone, data, metrics, start, teacher, words  # noqa: F401


@pytest.fixture(scope="module")
def damaged(
    data: Path,  # noqa: F811
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The same pictures, three of them no images any more."""
    folder = tmp_path_factory.mktemp("damaged")
    shutil.copytree(data / "images", folder / "images")
    for index in (3, 17, 31):
        (folder / "images" / f"{index:02d}.jpg").write_bytes(b"<html>not found</html>")
    pack(folder / "images", folder / "shards", max_count=10)
    return folder / "shards"


def test_bad_samples_are_masked_and_listed_by_all_ranks(
    start: Callable[..., Any],  # noqa: F811
    damaged: Path,
    tmp_path: Path,
) -> None:
    # Five steps are two epochs of the forty pictures and a half: a bad one is met more than once.
    images = {"schedule.images": 5 * 16, "run.save_every_steps": 2}
    status, output = start(tmp_path, **images, **{"data.shards": damaged}).wait()
    assert status == 0, output
    (run,) = tmp_path.iterdir()
    lines = [json.loads(line) for line in (run / "quarantine.jsonl").read_text().splitlines()]
    shards = ShardSet.open(damaged)
    plan = Plan(shards.counts, seed=0, global_batch=16, fingerprint=shards.fingerprint)
    met = [
        [shards.key(*place) for place in zip(plan.samples(step).shard, plan.samples(step).index, strict=True)]
        for step in range(5)
    ]
    bad = [[key for key in keys if key in ("03", "17", "31")] for keys in met]
    assert sorted(line["key"] for line in lines) == sorted(set().union(*bad))
    assert {line["stage"] for line in lines} == {"decode"}
    counts = [row["bad_samples"] for row in metrics(tmp_path)]
    assert counts == np.cumsum([len(keys) for keys in bad]).tolist()
    assert all(math.isfinite(row["loss"]) for row in metrics(tmp_path))


def test_too_many_bad_samples_stop_the_run_with_the_command_that_finds_them(
    alone: Callable[..., Any],  # noqa: F811
    damaged: Path,
    tmp_path: Path,
) -> None:
    changes = {"data.shards": damaged, "data.max_bad_fraction": 0.0}
    status, output = alone(tmp_path, **changes)
    assert status == 2
    assert "more than data.max_bad_fraction=0.0 allows" in output
    (command,) = re.findall(r"Look into it with: fd-scale (.*)", output)
    verified = subprocess.run(
        [sys.executable, "-m", "fd_scale", *shlex.split(command)], capture_output=True, text=True
    )
    assert verified.returncode == 3
    assert json.loads(verified.stdout.splitlines()[0])["key"] in ("03", "17", "31")
