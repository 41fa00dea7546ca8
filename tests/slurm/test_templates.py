"""The files in slurm/, without a Slurm: every recipe has its template, and templates hold resources alone."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from fd_scale.run import recipes, scale

SLURM = Path(__file__).parents[2] / "slurm"
EVALUATE = SLURM / "evaluate.sbatch"
TEMPLATES = sorted(set(SLURM.glob("*.sbatch")) - {EVALUATE})
SHIPPED = [name for name in recipes.names() if re.fullmatch(r"fd_[a-z0-9]+(_[a-z0-9]+)?", name)]
"""Variants of a recipe (``..._100ep``, ``..._released_code``) are for ``job.sh``'s first word to say."""


def header(template: Path) -> dict[str, str]:
    return dict(re.findall(r"^#SBATCH --([a-z-]+)=?(\S*)$", template.read_text(), re.MULTILINE))


def test_every_recipe_has_a_template_of_its_name() -> None:
    assert [template.stem for template in TEMPLATES] == sorted(SHIPPED)


@pytest.mark.parametrize("template", [*TEMPLATES, EVALUATE], ids=lambda path: path.stem)
def test_a_template_is_a_header_and_one_command(template: Path) -> None:
    lines = [line for line in template.read_text().splitlines() if line and not line.startswith("#")]
    assert lines == [f'exec slurm/job.sh {template.stem} "$@"']
    common = header(SLURM / "fd_swinv2g.sbatch")
    own = {"job-name": template.stem, "nodes": header(template)["nodes"]}
    assert header(template) == {**common, **own}


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.stem)
def test_the_global_batch_fits_the_machines_that_are_asked_for(template: Path) -> None:
    recipe = recipes.get(template.stem)
    asked = header(template)
    world_size = int(asked["nodes"]) * int(asked["ntasks-per-node"])
    assert asked["ntasks-per-node"] == asked["gpus-per-node"]
    resolved = scale.resolve(scale.load(recipe.scale), recipe, world_size)
    assert resolved.micro_batch * resolved.accumulation * world_size == recipe.global_batch
    assert int(asked["cpus-per-task"]) > recipe.run.workers, "a core for each worker and one for the rank"


def test_the_scripts_are_clean() -> None:
    shellcheck = shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("no shellcheck on this machine: run tests/cluster/install.sh as root")
    scripts = [*SLURM.glob("*.sh"), *TEMPLATES, EVALUATE, *SLURM.parent.glob("tests/cluster/*.sh")]
    done = subprocess.run([shellcheck, "-x", *scripts], capture_output=True, text=True, cwd=SLURM.parent)
    assert done.returncode == 0, done.stdout
