"""Checkpoints: exact resume, other world sizes and ZeRO stages, damage, retention, and steps that were
skipped."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fd_scale.engine import checkpoint, saving
from fd_scale.errors import RunError
from tests.engine import problem
from tests.engine.problem import Setting
from tests.engine.saves import OneProcess
from tests.spawn import spawn

STOP = 4
EXACT = [
    Setting(
        stage,
        bf16,
        micro_batch=2 if stage == 3 else 4,
        drop_path=0.3,
        activation_checkpointing=stage == 3,
        steps=8,
    )
    for stage in (0, 1, 2, 3)
    for bf16 in (False, True)
]
EXACT += [Setting(3, option=option, steps=8) for option in ("all on the host", "two-level")]
LONG = {stage: Setting(stage, micro_batch=4, steps=STOP + 20) for stage in (0, 1, 2, 3)}
PAIRS = [(LONG[before], LONG[after]) for before, after in ((0, 3), (1, 0), (3, 2), (3, 3))]
"""Every way to write and every way to read, at least once: neither knows of the other."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def told(folder: Path) -> list[list[Any]]:
    """By rank of two: what they found in exact resumes, after a NaN, while saving for others, in resumes."""
    for name in ("exact", "elastic", "nonfinite"):
        (folder / name).mkdir()
    place = str(folder / "elastic")
    calls = [
        (problem.interrupted, (EXACT, str(folder / "exact"), STOP)),
        (problem.poisoned, (EXACT, str(folder / "nonfinite"))),
        (problem.interrupted, ([LONG[0], LONG[1], LONG[3]], place, STOP)),
        (problem.resume_many, (elastic_pairs(folder), place)),
    ]
    return spawn(problem.several, 2, calls, timeout_s=540)


def elastic_pairs(folder: Path) -> list[tuple[Setting, str]]:
    return [(after, str(folder / "elastic" / before.label())) for before, after in PAIRS]


@pytest.fixture(scope="module")
def exact(told: list[list[Any]]) -> list[dict[str, Any]]:
    return [rank[0] for rank in told]


@pytest.mark.parametrize("setting", EXACT, ids=Setting.label)
def test_resume_is_exact(setting: Setting, exact: list[dict[str, Any]]) -> None:
    for rank in exact:
        whole, resumed = rank[setting.label()]["whole"], rank[setting.label()]["resumed"]
        assert resumed["start"] == STOP
        assert resumed["loss"] == whole["loss"][STOP:]
        assert resumed["norm"] == whole["norm"][STOP:]


@pytest.fixture(scope="module")
def elastic(folder: Path, told: list[list[Any]]) -> dict[int, dict[str, Any]]:
    """Checkpoints written by two processes, finished by two and by one, at other ZeRO stages."""
    alone = spawn(problem.resume_many, 1, elastic_pairs(folder), str(folder / "elastic"))[0]
    return {0: told[0][2], 1: alone, 2: told[0][3]}


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(("before", "after"), PAIRS, ids=Setting.label)
def test_another_world_size_and_stage(
    size: int, before: Setting, after: Setting, elastic, folder: Path
) -> None:
    whole = elastic[0][before.label()]["whole"]
    resumed = elastic[size][after.label(), str(folder / "elastic" / before.label())]
    assert resumed["start"] == STOP
    assert len(resumed["loss"]) == 20
    # fp32 sums in another order: 3e-7 seen.
    assert resumed["loss"] == pytest.approx(whole["loss"][STOP:], rel=1e-6)
    assert resumed["decays"] == [0.0, 0.05]


@pytest.mark.parametrize("setting", EXACT, ids=Setting.label)
def test_a_step_that_is_not_finite_is_skipped(setting: Setting, told: list[list[Any]]) -> None:
    for rank in told:
        seen = rank[1][setting.label()]
        assert seen["applied"] == [False, True, True, True]
        assert seen["held"] > 0
        assert seen["untouched"]
        assert seen["reported"] == 1
        assert all(math.isfinite(loss) for loss in seen["loss"])
        assert seen["adam_steps"] == 5


# -------------------------------------------------------------------------- files, without an engine


def copy_of_one(folder: Path, tmp_path: Path, exact: Any) -> Path:
    """A root with two committed checkpoints, steps 4 and 6, both from the stage 3 run."""
    root = tmp_path / "root"
    shutil.copytree(folder / "exact" / EXACT[-2].label(), root)
    later = root / "step-00000006"
    shutil.copytree(root / "step-00000004", later)
    manifest = json.loads((later / "manifest.json").read_text()) | {"step": 6}
    (later / "manifest.json").write_text(json.dumps(manifest))
    return root


def test_a_damaged_newest_checkpoint_gives_way(folder: Path, tmp_path: Path, exact: Any) -> None:
    root = copy_of_one(folder, tmp_path, exact)
    assert checkpoint.newest(root, OneProcess(), print).step == 6
    shard = root / "step-00000006" / "rank-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    warnings: list[str] = []
    assert checkpoint.newest(root, OneProcess(), warnings.append).step == 4
    assert "SHA-256" in warnings[0]
    shard.write_bytes(content[:100])
    assert checkpoint.newest(root, OneProcess(), warnings.append).step == 4
    assert "100 bytes" in warnings[1]
    shard.unlink()
    assert checkpoint.newest(root, OneProcess(), warnings.append).step == 4
    assert "missing" in warnings[2]


def test_a_partial_save_is_never_read(folder: Path, tmp_path: Path, exact: Any) -> None:
    root = copy_of_one(folder, tmp_path, exact)
    (root / "step-00000006").rename(root / "step-00000006.partial")
    (root / "step-00000007").mkdir()
    assert [c.step for c in checkpoint.committed(root)] == [4]


def test_no_whole_checkpoint_is_for_a_person_to_decide(folder: Path, tmp_path: Path, exact: Any) -> None:
    root = copy_of_one(folder, tmp_path, exact)
    assert checkpoint.newest(tmp_path / "nothing", OneProcess(), print) is None
    for shard in root.glob("*/rank-00000.safetensors"):
        shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(RunError, match=r"none of the 2 checkpoints in .* is whole"):
        checkpoint.newest(root, OneProcess(), lambda text: None)


def test_what_was_passed_over_is_kept_and_does_not_count(folder: Path, tmp_path: Path, exact: Any) -> None:
    """Else retention would let go of the whole one in favour of the damaged one."""
    root = copy_of_one(folder, tmp_path, exact)
    (kept,) = checkpoint.set_aside(root, after=4)
    assert kept.name.startswith("step-00000006.")
    assert kept.suffix == ".damaged"
    assert (kept / "rank-00001.safetensors").exists()
    saving.retain(root, keep_last=1, keep_every_steps=None)
    assert [c.step for c in checkpoint.committed(root)] == [4]


def test_retention_keeps_the_newest_and_every_nth(tmp_path: Path) -> None:
    for step in range(1, 9):
        path = tmp_path / f"step-{step:08d}"
        path.mkdir()
        (path / "manifest.json").write_text(json.dumps({"format": 1, "step": step, "files": []}))
    saving.retain(tmp_path, keep_last=2, keep_every_steps=3)
    assert [c.step for c in checkpoint.committed(tmp_path)] == [3, 6, 7, 8]


def test_fragments_of_all_ranks_make_whole_parameters(folder: Path, elastic: Any) -> None:
    """Stage 3 writes pieces, stage 0 whole tensors: after the same steps they are the same weights."""
    saved = {}
    for setting in (LONG[0], LONG[3]):
        found = checkpoint.committed(folder / "elastic" / setting.label())[-1]
        pieces = checkpoint.Pieces(found)
        saved[setting.stage] = {name: pieces.whole("master", name) for name in found.manifest["parameters"]}
    network = dict(problem.Network(LONG[0]).named_parameters())
    assert saved[0].keys() == saved[3].keys() == network.keys()
    for name, value in saved[0].items():
        assert not torch.equal(value, network[name])
        # Sums in another order, through four AdamW steps of at most 2e-3 each.
        torch.testing.assert_close(saved[3][name], value, rtol=1e-4, atol=2e-5)
