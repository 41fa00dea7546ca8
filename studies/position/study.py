"""How a student knows where a patch is (FD paper, ablation of position encodings); the teacher's positions
are absolute."""

from __future__ import annotations

from studies.rows import variant_rows
from studies.settings import Study
from studies.verdicts import Row
from studies.workbench import Workbench


def measure(work: Workbench, study: Study) -> list[Row]:
    """One row per encoding, all under one teacher."""
    return variant_rows(work, study)
