"""A/A: the students of the granularity study once more, the first seed of each against its second.

All its pieces are those of that study, so that it costs nothing after it.
"""

from __future__ import annotations

from studies.outcome import Outcome
from studies.rows import variant_rows
from studies.settings import Study
from studies.verdicts import Contrast, Row, alike
from studies.workbench import Workbench


def measure(work: Workbench, study: Study) -> list[Row]:
    """The rows of granularity."""
    return variant_rows(work, study)


def compare(found: Outcome) -> list[Contrast]:
    """Every row with itself."""
    return alike(found.rows, found.labels)
