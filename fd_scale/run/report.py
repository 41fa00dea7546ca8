"""What does the user see of a run: a progress line, ``metrics.jsonl``, W&B where asked for, and a plot.

The loop measures; this module neither touches the device nor takes part in a collective. Values arrive as
host numbers, by names that carry their units. W&B is imported here only, in a thread of its own: a run
neither waits for it nor fails with it.
"""

from __future__ import annotations

import io
import json
import math
import queue
import threading
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from fd_scale.errors import RunError
from fd_scale.run.folder import RunFolder, write_atomically
from fd_scale.run.recipe import RunRecipe

FORMATS: Mapping[str, str] = {
    "loss": "loss {:.4f}",
    "lr": "lr {:.2e}",
    "grad_norm": "grad norm {:.3g}",
    "images_per_s": "{:,.1f} images/s",
    "data_wait_share": "data wait {:.0%}",
    "memory_gib": "{:.2f} GiB",
}
"""How known values are shown, in this order; others follow as ``name value``."""

TROUBLES: Mapping[str, str] = {
    "checkpoint_stall_s": "{:.2f} s to save",
    "skipped_steps": "{:.0f} steps skipped",
    "bad_samples": "{:.0f} bad samples",
}
"""What is shown where it is not 0."""

WANDB_CLOSE_S = 30.0
"""Longest wait for W&B at the end of a run."""


class Reporter:
    """Tells the user and the run directory how a run goes on.

    ``enabled`` is false on all ranks but one, and then nothing happens. ``start_step`` is the step that
    the run goes on from: what ``metrics.jsonl`` holds of later steps is dropped, so that no step occurs
    twice. ``console`` is where progress goes; by default the standard output.
    """

    def __init__(
        self,
        folder: RunFolder,
        recipe: RunRecipe,
        *,
        enabled: bool,
        total_steps: int,
        start_step: int = 0,
        console: Console | None = None,
    ) -> None:
        self.enabled = enabled
        if not enabled:
            return
        self._recipe, self._total_steps = recipe, total_steps
        self._console = console or Console()
        self._bar = (
            _Bar(recipe.name, total_steps, start_step, self._console) if self._console.is_terminal else None
        )
        damaged = _forget_after(folder.metrics, start_step)
        self._file = folder.metrics.open("a", encoding="utf-8")
        if damaged:
            self.say(f"{folder.metrics}: {damaged} unreadable lines dropped")
        self._wandb = None if recipe.run.wandb == "off" else _Uploader(folder, recipe, self.say)

    def __enter__(self) -> Reporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Report that ``step`` steps are done, with host numbers by name; nan and inf are stored as null."""
        if not self.enabled:
            return
        stored = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, **stored}, allow_nan=False) + "\n")
        self._file.flush()
        status = status_line(values, self._seconds_left(step, values))
        if self._bar is None:
            self._print(f"step {step:>{len(str(self._total_steps))}}/{self._total_steps}  {status}")
        else:
            self._bar.show(step, status)
        if self._wandb is not None:
            self._wandb.put(step, dict(values))

    def say(self, text: str) -> None:
        """One line of prose, above the progress line where there is one."""
        if not self.enabled:
            return
        if self._bar is None:
            self._print(text)
        else:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Finish the progress line and the files; further calls do nothing."""
        if not self.enabled:
            return
        if self._wandb is not None:
            self._wandb.close()
        if self._bar is not None:
            self._bar.stop()
        self._file.close()
        self.enabled = False

    def _print(self, text: str) -> None:
        print(text, file=self._console.file, flush=True)

    def _seconds_left(self, step: int, values: Mapping[str, float]) -> float:
        speed = values.get("images_per_s", math.nan)
        return (self._total_steps - step) * self._recipe.global_batch / speed if speed > 0 else math.nan


def status_line(values: Mapping[str, float], seconds_left: float) -> str:
    """The values in words, two spaces apart, and the time to the end where it is known."""
    parts = [text.format(values[name]) for name, text in FORMATS.items() if name in values]
    parts += [text.format(values[name]) for name, text in TROUBLES.items() if values.get(name)]
    others = (item for item in values.items() if item[0] not in FORMATS and item[0] not in TROUBLES)
    parts += [f"{name} {value:.4g}" for name, value in others]
    if math.isfinite(seconds_left):
        parts.append(f"eta {timedelta(seconds=round(seconds_left))}")
    return "  ".join(parts)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a ``metrics.jsonl`` by rising step; a line that a crash cut off is left out."""
    rows = (_parse(line) for line in path.read_text(encoding="utf-8", errors="replace").splitlines())
    return [row for row in rows if row is not None]


def plot_metrics(metrics: Path, picture: Path) -> None:
    """Draw loss and learning rate over steps from a ``metrics.jsonl`` into a PNG file.

    Raises ``RunError`` where there is nothing to draw.
    """
    rows = read_metrics(metrics) if metrics.exists() else []
    if not any(row.get("loss") is not None for row in rows):
        raise RunError(f"{metrics} holds no loss to plot: run at least run.log_every_steps steps")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for axes, name, label in ((upper, "loss", "loss"), (lower, "lr", "learning rate")):
        points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        axes.plot(
            *zip(*points, strict=True) if points else ((), ()), marker="." if len(points) < 50 else None
        )
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    lower.set_xlabel("optimizer step")
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150)
    picture.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(picture, image.getvalue())


def _parse(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _forget_after(path: Path, step: int) -> int:
    """Drop the rows after ``step`` and unreadable lines; returns how many of the latter there were."""
    if not path.exists():
        return 0
    content = path.read_text(encoding="utf-8", errors="replace")
    rows = read_metrics(path)
    kept = "".join(json.dumps(row) + "\n" for row in rows if row["step"] <= step)
    if kept != content:
        write_atomically(path, kept)
    return len(content.splitlines()) - len(rows)


class _Bar(Progress):
    """A bar with the status below it, redrawn when there is news: no thread takes turns with the training."""

    def __init__(self, name: str, total_steps: int, start_step: int, console: Console) -> None:
        self._status = ""
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            console=console,
            auto_refresh=False,
        )
        self._task = self.add_task(name, total=total_steps, completed=start_step)
        self.start()

    def get_renderables(self) -> Any:
        yield from super().get_renderables()
        status: RenderableType = Text(self._status)
        yield status

    def show(self, step: int, status: str) -> None:
        self._status = status
        self.update(self._task, completed=step, refresh=True)


class _Uploader:
    """Hands values to W&B in a thread, by a queue that never blocks the run; one failure ends it."""

    def __init__(self, folder: RunFolder, recipe: RunRecipe, say: Callable[[str], None]) -> None:
        self._folder, self._recipe, self._say = folder, recipe, say
        self._queue: queue.Queue[tuple[int, dict[str, float]] | None] = queue.Queue(maxsize=10_000)
        self._broken = False
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def put(self, step: int, values: dict[str, float]) -> None:
        if self._broken:
            return
        try:
            self._queue.put_nowait((step, values))
        except queue.Full:
            self._give_up(f"{self._queue.maxsize} log lines wait for it")

    def close(self) -> None:
        if self._broken:
            return
        try:
            self._queue.put_nowait(None)
        except queue.Full:
            return
        self._thread.join(WANDB_CLOSE_S)
        if self._thread.is_alive():
            self._give_up(f"it did not finish within {WANDB_CLOSE_S:.0f} s")

    def _work(self) -> None:
        try:
            run = self._start()
            while (item := self._queue.get()) is not None:
                step, values = item
                run.log(values, step=step)
            run.finish()
        # Whatever goes wrong inside W&B, the run goes on; it is said once.
        except Exception as error:
            self._give_up(f"{type(error).__name__}: {error}")

    def _start(self) -> Any:
        import wandb

        online = self._recipe.run.wandb == "online"
        # Without this, wandb.init would ask for a key at the terminal.
        if online and not wandb.login(prompt=False):
            raise RunError(
                "nobody is logged in: set WANDB_API_KEY, call `wandb login`, or set run.wandb=offline"
            )
        return wandb.init(
            project=self._recipe.run.wandb_project,
            name=self._recipe.run_name,
            id=self._recipe.run_name,
            resume="allow",
            mode="online" if online else "offline",
            dir=self._folder.path,
            config=self._recipe.model_dump(mode="json"),
            settings=wandb.Settings(console="off", silent=True),
        )

    def _give_up(self, reason: str) -> None:
        if not self._broken:
            self._broken = True
            self._say(
                f"W&B is off for the rest of this run ({reason}); metrics go on in {self._folder.metrics}"
            )
