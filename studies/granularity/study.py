"""Full map, mean patch or class token (FD paper, table of distillation targets)."""

from __future__ import annotations

from studies.rows import variant_rows
from studies.settings import Study
from studies.verdicts import Row
from studies.workbench import Workbench


def measure(work: Workbench, study: Study) -> list[Row]:
    """One row per target, all under one teacher."""
    return variant_rows(work, study)
