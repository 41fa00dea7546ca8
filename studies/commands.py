"""The public command line, as a user calls it, for the questions that are about whole runs.

What a command printed lies in a log beside its piece; one that fails stops the study with the log's end.
"""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from fd_scale.data.writer import Sample, write_shards
from studies.pictures import Pictures

ROOT = Path(__file__).resolve().parents[1]
LOG_LINES = 40
POLL_S = 0.2


def fd_scale(*arguments: str, log: Path, processes: int = 1, stop_when: Path | None = None) -> bool:
    """Run ``fd-scale ARGUMENTS``, under torchrun for several processes; whether it came to its end.

    With ``stop_when``, a folder, it is told to stop as a scheduler would (SIGTERM) once that holds something.
    Raises ``RuntimeError`` with the end of the log for any other exit status than 0, or than the signal's.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), "-m", "fd_scale", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with (
        log.open("a", encoding="utf-8") as file,
        subprocess.Popen(command, stdout=file, stderr=file, env=environment) as process,
    ):
        stopped = stop_when is not None and _stop(process, stop_when)
    if process.returncode == 0:
        return True
    if stopped and process.returncode in (128 + signal.SIGTERM, -signal.SIGTERM, 1):
        # torchrun's own status of a job that was told to stop is 1.
        return False
    end = "\n".join(log.read_text(encoding="utf-8").splitlines()[-LOG_LINES:])
    raise RuntimeError(f"fd-scale {' '.join(arguments)} ended with status {process.returncode}:\n{end}")


def shards(pictures: Pictures, classes: tuple[str, ...], out: Path) -> None:
    """Labelled images as shards with an index, lossless."""
    write_shards(_samples(pictures), out, classes=classes)


def _stop(process: subprocess.Popen[bytes], folder: Path) -> bool:
    while process.poll() is None:
        if folder.is_dir() and any(
            entry.name.startswith("step-") for entry in folder.glob("*/checkpoints/*")
        ):
            process.send_signal(signal.SIGTERM)
            return True
        time.sleep(POLL_S)
    return False


def _samples(pictures: Pictures) -> Iterator[Sample]:
    for number, (pixels, label) in enumerate(
        zip(pictures.pixels.cpu(), pictures.labels.tolist(), strict=True)
    ):
        buffer = io.BytesIO()
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(buffer, "PNG")
        yield f"picture-{number:08d}", {"png": buffer.getvalue(), "cls": str(label).encode()}
