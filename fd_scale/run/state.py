"""One line that says how a run stands, for whoever started it: the batch script, a watcher, the next start.

It lies in the run directory as ``STATE``, and also where the environment variable ``FD_SCALE_STATE`` says,
since a batch script need not know the run directory. The lines are a protocol with ``slurm/job.sh``:

    RUNNING step=S from=F      at the start, and after each committed checkpoint; F is where this start began,
                               S the newest checkpoint, which may be some steps behind
    PREEMPTED step=S from=F    stopped as asked, everything saved
    DONE step=S                finished
    FAILED <reason>            another start would fail in the same way

An unexpected fault writes nothing: it may be worth another try. A start that does not get the run directory
(``lease.py``) says FAILED to its own batch script, and leaves the directory's line to the start that has it.
"""

from __future__ import annotations

import os
from pathlib import Path

from fd_scale.run.folder import write_atomically

VARIABLE = "FD_SCALE_STATE"
"""Environment variable with the path of a second copy."""


def announce(line: str, folder: Path | None) -> None:
    """Replace the line, in ``folder`` (None: not known yet) and where ``FD_SCALE_STATE`` says."""
    places = [] if folder is None else [folder / "STATE"]
    if VARIABLE in os.environ:
        places.append(Path(os.environ[VARIABLE]))
    for place in places:
        write_atomically(place, " ".join(line.split()) + "\n")
