"""On what was a benchmark run, and where does its answer go? Facts of the machine, and the results files.

A results file explains its numbers without its author: machine, versions, commit, time and protocol stand
beside them. It holds no host name and no path.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fd_scale.run.folder import as_json, environment, write_atomically

RESULTS = Path(__file__).parent / "results"
COMMIT = "FD_SCALE_COMMIT"
"""Names the commit where the code is a copy without its history."""


def facts() -> dict[str, Any]:
    """Machine, versions and commit, as plain values."""
    found = environment()
    source = found["source"] or {"commit": os.environ.get(COMMIT), "uncommitted_changes": None}
    versions = found["versions"] | {
        "triton": _version("triton"),
        "numpy": _version("numpy"),
        "cuda": torch.version.cuda,
    }
    return {
        "started_utc": found["started_utc"],
        "source": source,
        "versions": versions,
        "system": found["system"],
        "cpu": found["cpu"],
        "gpus": [_gpu(index) for index in range(torch.cuda.device_count())],
        "driver": _driver(),
    }


def write(name: str, results: Mapping[str, Any]) -> Path:
    """``results/<name>.json``: the facts of this machine, then the results; replaced whole."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    write_atomically(path, as_json({"facts": _at_first_write(), **results}))
    return path


@functools.cache
def _at_first_write() -> dict[str, Any]:
    """The facts before this process wrote any results, which are changes of the checkout themselves."""
    return facts()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu(index: int) -> dict[str, Any]:
    found = torch.cuda.get_device_properties(index)
    return {
        "name": found.name,
        "memory_gib": round(found.total_memory / 2**30, 1),
        "multiprocessors": found.multi_processor_count,
        "capability": f"{found.major}.{found.minor}",
    }


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.split("\n")[0].strip() or None
