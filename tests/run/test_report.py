"""What the user sees: one line per log interval, no step twice, and a W&B that cannot harm a run."""

from __future__ import annotations

import io
import json
import math
import sys
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from fd_scale.errors import RunError
from fd_scale.run import recipes, report
from fd_scale.run.folder import RunFolder
from fd_scale.run.recipe import derive
from fd_scale.run.report import Reporter, plot_metrics, read_metrics, status_line

DEMO = recipes.get("demo")
VALUES = {
    "loss": 0.24713,
    "lr": 1.5e-3,
    "grad_norm": 0.8125,
    "images_per_s": 64.0,
    "data_wait_share": 0.034,
    "memory_gib": 1.256,
}
SHOWN = "loss 0.2471  lr 1.50e-03  grad norm 0.812  64.0 images/s  data wait 3%  1.26 GiB  eta 0:04:08"


@pytest.fixture
def folder(tmp_path):
    return RunFolder.open(tmp_path, DEMO)


class Page:
    """A console on a string, as a file or as a terminal of 120 columns."""

    def __init__(self, *, terminal: bool = False) -> None:
        self.text = io.StringIO()
        self.console = Console(file=self.text, force_terminal=terminal, width=120, color_system=None)

    @property
    def lines(self) -> list[str]:
        return self.text.getvalue().splitlines()


def reporter(folder: RunFolder, page: Page, recipe=DEMO, **arguments) -> Reporter:
    given = {"enabled": True, "total_steps": 256, "console": page.console, **arguments}
    return Reporter(folder, recipe, **given)


# Metrics.


def test_each_log_is_one_json_line(folder):
    with reporter(folder, Page()) as out:
        out.log(8, VALUES)
        first = folder.metrics.read_text()
        assert json.loads(first) == {"step": 8, **VALUES}
        out.log(16, {"loss": 0.2})
    assert read_metrics(folder.metrics) == [{"step": 8, **VALUES}, {"step": 16, "loss": 0.2}]


def test_a_value_that_is_not_finite_is_null_and_the_line_is_json(folder):
    with reporter(folder, Page()) as out:
        out.log(1, {"loss": math.nan, "grad_norm": math.inf, "lr": 1.0})
    assert read_metrics(folder.metrics) == [{"step": 1, "loss": None, "grad_norm": None, "lr": 1.0}]


def test_a_resumed_run_has_no_step_twice(folder):
    with reporter(folder, Page()) as out:
        for step in (8, 16, 24, 32):
            out.log(step, {"loss": float(step)})
    with reporter(folder, Page(), start_step=16) as out:
        assert [row["step"] for row in read_metrics(folder.metrics)] == [8, 16]
        out.log(24, {"loss": 0.5})
    assert read_metrics(folder.metrics) == [
        {"step": 8, "loss": 8.0},
        {"step": 16, "loss": 16.0},
        {"step": 24, "loss": 0.5},
    ]


def test_a_run_from_the_start_forgets_all(folder):
    with reporter(folder, Page()) as out:
        out.log(8, VALUES)
    with reporter(folder, Page()) as out:
        out.log(8, {"loss": 0.1})
    assert read_metrics(folder.metrics) == [{"step": 8, "loss": 0.1}]


def test_what_a_crash_damaged_is_dropped_and_counted(folder):
    folder.metrics.write_bytes(
        b'{"step": 8, "loss": 0.1}\n\x00\x00\xff\n[1]\n{"step": 16, "loss": 0.2}\n{"step": 24, "lo'
    )
    page = Page()
    with reporter(folder, page, start_step=24) as out:
        out.log(32, {"loss": 0.3})
    assert [row["step"] for row in read_metrics(folder.metrics)] == [8, 16, 32]
    assert all(json.loads(line) for line in folder.metrics.read_text().splitlines())
    assert page.lines[0] == f"{folder.metrics}: 3 unreadable lines dropped"


def test_a_tensor_is_refused_and_not_read_from_the_device(folder):
    import torch

    with reporter(folder, Page()) as out, pytest.raises(TypeError):
        out.log(1, {"loss": torch.tensor(1.0)})


def test_other_ranks_do_nothing(folder):
    page = Page()
    with reporter(folder, page, recipe=derive(DEMO, **{"run.wandb": "online"}), enabled=False) as out:
        out.log(8, VALUES)
        out.say("words")
    assert page.lines == []
    assert not folder.metrics.exists()


# The progress line.


def test_a_file_gets_plain_lines(folder):
    page = Page()
    with reporter(folder, page) as out:
        out.say("3 steps [skipped]")
        out.log(8, VALUES)
        out.log(256, {"loss": 0.1, "skipped_steps": 2.0, "teacher_ms": 12.345})
    assert page.lines == [
        "3 steps [skipped]",
        f"step   8/256  {SHOWN}",
        "step 256/256  loss 0.1000  2 steps skipped  teacher_ms 12.35",
    ]


def test_the_time_left_is_images_left_over_images_per_second(folder):
    """(256 - 8) steps x 64 images / 64 images per second = 248 s."""
    assert status_line({}, 248.0) == "eta 0:04:08"
    assert status_line({}, 90_061.4) == "eta 1 day, 1:01:01"
    assert status_line({"loss": math.nan}, math.nan) == "loss nan"
    page = Page()
    with reporter(folder, page) as out:
        out.log(8, {"images_per_s": 0.0})
    assert "eta" not in page.text.getvalue()


def test_troubles_are_shown_where_there_are_any():
    assert status_line({"skipped_steps": 0.0, "bad_samples": 0.0, "loss": 1.0}, math.nan) == "loss 1.0000"
    assert (
        status_line({"skipped_steps": 1.0, "bad_samples": 3.0}, math.nan) == "1 steps skipped  3 bad samples"
    )


def test_a_terminal_gets_a_bar_and_the_status_below(folder):
    page = Page(terminal=True)
    with reporter(folder, page, start_step=4) as out:
        assert "4/256" in page.text.getvalue()
        out.log(8, VALUES)
        out.say("checkpoint [saved]")
        after = page.text.getvalue()
    assert "8/256" in after
    assert SHOWN in after
    assert "checkpoint [saved]" in after
    assert page.text.getvalue().endswith("\x1b[?25h"), "the cursor is shown again"


def test_closing_twice_and_logging_afterwards_are_harmless(folder):
    page = Page()
    out = reporter(folder, page)
    out.log(8, VALUES)
    out.close()
    out.close()
    out.log(16, VALUES)
    assert len(read_metrics(folder.metrics)) == 1


# W&B.


def with_wandb(monkeypatch, *, init=None, log=None, finish=None, key=True):
    """A module that stands in for wandb; returns what it was told."""
    told: dict[str, list] = {"init": [], "log": [], "finish": [], "threads": []}

    class Run:
        def log(self, values, step):
            told["threads"].append(threading.current_thread().name)
            if log is not None:
                log()
            told["log"].append((step, values))

        def finish(self):
            if finish is not None:
                finish()
            told["finish"].append(True)

    def start(**arguments):
        told["init"].append(arguments)
        if init is not None:
            init()
        return Run()

    fake = types.ModuleType("wandb")
    fake.init, fake.login, fake.Settings = start, lambda prompt: key, lambda **arguments: arguments
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return told


def fail():
    raise ConnectionError("no route to host")


def asked(mode: str = "online"):
    return derive(DEMO, **{"run.wandb": mode})


def test_wandb_gets_what_the_file_gets(folder, monkeypatch):
    told = with_wandb(monkeypatch)
    with reporter(folder, Page(), recipe=asked()) as out:
        out.log(8, VALUES)
        out.log(16, {"loss": 0.1})
    assert told["log"] == [(8, VALUES), (16, {"loss": 0.1})]
    assert told["finish"] == [True]
    assert set(told["threads"]) == {"wandb"}
    (arguments,) = told["init"]
    assert arguments["project"] == "fd_scale"
    assert arguments["id"] == arguments["name"] == DEMO.run_name
    assert (arguments["mode"], arguments["resume"], arguments["dir"]) == ("online", "allow", folder.path)
    assert arguments["config"]["optim"]["lr"] == DEMO.optim.lr


@pytest.mark.parametrize("part", ["init", "log", "finish"])
def test_a_failure_of_wandb_is_said_once_and_the_run_goes_on(folder, monkeypatch, part):
    with_wandb(monkeypatch, **{part: fail})
    page = Page()
    with reporter(folder, page, recipe=asked()) as out:
        for step in range(1, 6):
            out.log(step, VALUES)
    assert [row["step"] for row in read_metrics(folder.metrics)] == [1, 2, 3, 4, 5]
    said = [line for line in page.lines if line.startswith("W&B")]
    assert said == [
        "W&B is off for the rest of this run (ConnectionError: no route to host); "
        f"metrics go on in {folder.metrics}"
    ]


def test_a_wandb_that_is_not_there_is_said(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    page = Page()
    with reporter(folder, page, recipe=asked("offline")) as out:
        out.log(1, VALUES)
    assert sum("W&B is off for the rest of this run (ModuleNotFoundError" in line for line in page.lines) == 1


def test_what_a_probe_measures_is_in_the_file_on_the_console_and_in_wandb(folder, monkeypatch):
    """Also at a step without a loss, and with values that the console knows nothing of."""
    figures = {"knn": 0.125, "teacher_knn": 0.5, "explained": -0.03, "rank": 14.2, "teacher_rank": 31.0}
    figures |= {"drift": 0.25, "probe_s": 2.5, "probe_share": 0.011}
    told, page = with_wandb(monkeypatch), Page()
    with reporter(folder, page, recipe=asked()) as out:
        out.log(0, figures)
    assert read_metrics(folder.metrics) == [{"step": 0, **figures}]
    assert told["log"] == [(0, figures)]
    (line,) = page.lines
    for shown in ("knn 0.125", "teacher_knn 0.5", "explained -0.03", "rank 14.2", "drift 0.25"):
        assert shown in line


def test_nobody_is_asked_for_a_key(folder, monkeypatch):
    told = with_wandb(monkeypatch, key=False)
    page = Page()
    with reporter(folder, page, recipe=asked()) as out:
        out.log(1, VALUES)
    assert told["init"] == []
    assert any(
        "set WANDB_API_KEY, call `wandb login`, or set run.wandb=offline" in line for line in page.lines
    )


@pytest.mark.parametrize("part", ["init", "log", "finish"])
def test_a_wandb_that_hangs_holds_nobody_up(folder, monkeypatch, part):
    """The thread sleeps; logging takes no part in it, and closing waits for the agreed time only."""
    release = threading.Event()
    with_wandb(monkeypatch, **{part: lambda: release.wait(60)})
    monkeypatch.setattr(report, "WANDB_CLOSE_S", 0.2)
    page = Page()
    out = reporter(folder, page, recipe=asked())
    begin = time.monotonic()
    for step in range(1, 21):
        out.log(step, VALUES)
    assert time.monotonic() - begin < 5, "20 log lines take milliseconds; 5 s allow for a busy machine"
    out.close()
    assert time.monotonic() - begin < 10
    assert sum("it did not finish within 0 s" in line for line in page.lines) == 1
    assert len(read_metrics(folder.metrics)) == 20
    release.set()


def test_a_queue_that_is_full_is_given_up(folder, monkeypatch):
    release = threading.Event()
    with_wandb(monkeypatch, init=lambda: release.wait(60))
    page = Page()
    out = reporter(folder, page, recipe=asked())
    uploader = out._wandb
    assert uploader is not None
    uploader._queue.maxsize = 3
    for step in range(1, 9):
        out.log(step, VALUES)
    out.close()
    assert sum("3 log lines wait for it" in line for line in page.lines) == 1
    release.set()


def test_the_real_wandb_works_offline(folder, monkeypatch):
    """Its own process, its own files; no network, no key, no question."""
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    page = Page()
    with reporter(folder, page, recipe=asked("offline")) as out:
        out.log(1, VALUES)
    assert not any(line.startswith("W&B") for line in page.lines)
    (written,) = folder.path.glob("wandb/offline-run-*/run-*.wandb")
    assert written.stat().st_size > 0


def test_wandb_is_imported_by_nobody_else():
    package = Path(report.__file__).parents[1]
    users = [file.name for file in package.rglob("*.py") if "import wandb" in file.read_text()]
    assert users == ["report.py"]


# The plot.


def test_the_plot_shows_the_losses(folder, tmp_path):
    """Loss falls from 1 to 0 over the steps, so the ink must run from top left to bottom right."""
    with reporter(folder, Page()) as out:
        for step in range(101):
            out.log(step, {"loss": 1 - step / 100, "lr": 1e-3})
    picture = tmp_path / "new" / "loss.png"
    plot_metrics(folder.metrics, picture)
    pixels = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    assert pixels.shape[:2] == (750, 1050)
    blue = (pixels[..., 2] - pixels[..., 0]) > 80
    upper = blue[:500]
    rows, columns = np.nonzero(upper)
    left, right = columns < np.quantile(columns, 0.1), columns > np.quantile(columns, 0.9)
    assert rows[left].mean() < 0.25 * 500
    assert rows[right].mean() > 0.75 * 500


def test_the_plot_passes_over_what_was_not_finite(folder, tmp_path):
    with reporter(folder, Page()) as out:
        out.log(1, {"loss": 1.0})
        out.log(2, {"loss": math.nan, "lr": 1.0})
    plot_metrics(folder.metrics, tmp_path / "loss.png")
    assert Image.open(tmp_path / "loss.png").format == "PNG"


@pytest.mark.parametrize("content", [None, "", '{"step": 1, "lr": 1.0}\n', '{"step": 1, "loss": null}\n'])
def test_nothing_to_plot_is_told(tmp_path, content):
    metrics = tmp_path / "metrics.jsonl"
    if content is not None:
        metrics.write_text(content)
    with pytest.raises(RunError, match="holds no loss to plot"):
        plot_metrics(metrics, tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()
