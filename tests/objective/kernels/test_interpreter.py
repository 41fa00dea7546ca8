"""The Triton kernels on a machine without a GPU: Triton reads TRITON_INTERPRET when imported, hence a
process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fd_scale.objective.kernels.choice import INTERPRETED


@pytest.mark.skipif(INTERPRETED, reason="already inside the interpreter: unset TRITON_INTERPRET")
def test_kernels_in_the_interpreter() -> None:
    pytest.importorskip("triton", reason="needs triton: pip install triton")
    tests = Path(__file__).parent / "on_device" / "test_row_kernels.py"
    command = [sys.executable, "-m", "pytest", str(tests), "-q", "-p", "no:cacheprovider", "--durations=0"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    root = Path(__file__).parents[3]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    found = re.search(r"(\d+) passed", done.stdout)
    assert found, done.stdout[-2000:]
    assert int(found.group(1)) > 80  # a suite that collects nothing must not pass
    assert "skipped" not in done.stdout
