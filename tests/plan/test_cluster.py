"""Headers of batch scripts, and numbers of GPUs."""

from __future__ import annotations

from pathlib import Path

import pytest

from fd_scale.errors import PlanError
from fd_scale.plan import gpus
from fd_scale.plan.cluster import from_sbatch, of_size

SLURM = Path(__file__).parents[2] / "slurm"
H200 = gpus.get("h200")


def script(folder: Path, *options: str) -> Path:
    path = folder / "job.sbatch"
    path.write_text(
        "#!/bin/bash\n" + "".join(f"#SBATCH {o}\n" for o in options) + "\nexec true\n#SBATCH --nodes=99\n"
    )
    return path


def test_a_template_of_ours() -> None:
    found = from_sbatch(SLURM / "fd_swinv2g.sbatch", H200)
    assert (found.num_nodes, found.gpus_per_node, found.num_gpus) == (8, 8, 64)
    assert (found.cores_per_gpu, found.time_limit_s) == (8, 86_400)
    assert found.slowest_link_gb_s == H200.node_link_gb_s


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400),
        ("1:30", 90),
        ("24:00:00", 86_400),
        ("2-12", 216_000),
        ("1-00:30:00", 88_200),
        ("UNLIMITED", None),
    ],
)
def test_slurm_times(tmp_path: Path, text: str, seconds: int | None) -> None:
    path = script(tmp_path, "--nodes=1", "--ntasks-per-node=2", f"--time={text}")
    assert from_sbatch(path, H200).time_limit_s == seconds


def test_the_last_option_counts_and_the_header_ends_at_a_command(tmp_path: Path) -> None:
    path = script(tmp_path, "--nodes=1", "--ntasks-per-node 4", "--nodes=3", "--gpus-per-node=h100:4")
    found = from_sbatch(path, H200)
    assert (found.num_nodes, found.gpus_per_node, found.cores_per_gpu) == (3, 4, None)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--nodes=2"], "no line '#SBATCH --ntasks-per-node=...'"),
        (["--nodes=two", "--ntasks-per-node=8"], "--nodes=two must be a whole number"),
        (["--nodes=1", "--ntasks-per-node=4", "--gpus-per-node=8"], "must be equal"),
        (["--nodes=1", "--ntasks-per-node=4", "--time=soon"], "--time=soon is no time"),
    ],
)
def test_headers_that_cannot_be_planned_for(tmp_path: Path, options: list[str], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        from_sbatch(script(tmp_path, *options), H200)


def test_a_script_that_is_not_there_names_one_that_is() -> None:
    with pytest.raises(PlanError, match=r"does not exist; did you mean fd_clip_vitb16\.sbatch"):
        from_sbatch(SLURM / "fd_clip_vitb1.sbatch", H200)


def test_numbers_of_gpus() -> None:
    assert (of_size(1, H200).num_nodes, of_size(1, H200).gpus_per_node) == (1, 1)
    assert (of_size(64, H200).num_nodes, of_size(64, H200).gpus_per_node) == (8, 8)
    assert of_size(8, H200).slowest_link_gb_s == H200.link_gb_s
    with pytest.raises(PlanError, match="--gpus 12 does not fill nodes of 8"):
        of_size(12, H200)


def test_an_unknown_gpu_names_near_ones() -> None:
    with pytest.raises(PlanError, match=r"unknown GPU 'a100-8'; did you mean a100-80"):
        gpus.get("a100-8")
