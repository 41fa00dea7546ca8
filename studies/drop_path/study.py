"""Stochastic depth of student and teacher while distilling (FD paper, ablation); fine-tuning has one rate for
all rows."""

from __future__ import annotations

from studies.rows import variant_rows
from studies.settings import Study
from studies.verdicts import Row
from studies.workbench import Workbench


def measure(work: Workbench, study: Study) -> list[Row]:
    """One row per pair of rates, student / teacher."""
    return variant_rows(work, study)
