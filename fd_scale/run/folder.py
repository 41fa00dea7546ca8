"""The directory of a run: what lies where, whose it is, and how a file gets there whole.

    <root>/fd_swinv2g-3fa91c07/    the recipe's name and the fingerprint of its science
      recipe.json                  what was asked
      placement.json               what a scale's "teacher": "auto" came to, and why
      starts/0001/                 one per start:
        ds_config.json               what DeepSpeed got
        environment.json             command, commit, versions, host, processors, Slurm job
        stacks/                      of all ranks, where this start hung
      metrics.jsonl                one line per log interval, units in the names
      quarantine.jsonl             samples that could not be used, and why
      STATE, lease/                how the run stands; which start may write here
      checkpoints/                 made by their writers at need, as are the next two
      exports/
      reports/

A requeued job finds its own directory by name, on other machines too; an edited recipe has another name. All
functions that write are for one process of a run (``World.on_main``).
"""

from __future__ import annotations

import errno
import importlib.metadata
import json
import os
import platform
import secrets
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fd_scale import __version__
from fd_scale.errors import RecipeError, RunError
from fd_scale.run.recipe import R, Recipe, RunRecipe, checked
from fd_scale.run.values import read_values

PACKAGES = ("torch", "torchvision", "timm", "deepspeed", "open_clip_torch", "webdataset", "simplejpeg")
"""Installed packages whose versions a start records."""

SLURM_FACTS = ("SLURM_JOB_ID", "SLURM_JOB_NAME", "SLURM_RESTART_COUNT", "SLURM_JOB_NODELIST", "SLURM_NTASKS")


@dataclass(frozen=True)
class RunFolder:
    """A run directory: ``open`` for a run that is to go on, ``at`` for one that is to be looked at."""

    path: Path

    @classmethod
    def of(cls, recipe: RunRecipe) -> RunFolder:
        """The directory of a recipe's run, which may not be there yet."""
        return cls(Path(recipe.run.root) / recipe.run_name)

    @classmethod
    def open(cls, root: Path | str, recipe: RunRecipe) -> RunFolder:
        """The directory of ``recipe`` under ``root``, made where it is missing.

        Raises ``RunError`` for a directory of this name that holds another recipe, a damaged one or none,
        saying which fields differ, and for a root that cannot be written.
        """
        folder = cls(Path(root) / recipe.run_name)
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
            if _is_new(folder.path):
                write_atomically(folder.recipe, recipe.to_json())
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
                raise
            raise RunError(
                f"run directory {folder.path} cannot be used ({error.strerror}): set run.root"
            ) from None
        recorded = folder.read_as(type(recipe))
        if recorded.fingerprint != recipe.fingerprint:
            raise RunError(
                f"{folder.recipe} holds another recipe than its directory's name says:\n"
                + _differences(recorded.science(), recipe.science())
                + "\nmove the directory away, or choose another run.root"
            )
        return folder

    @classmethod
    def at(cls, path: Path | str) -> RunFolder:
        """The run directory at ``path``; raises ``RunError`` where there is none."""
        folder = cls(Path(path))
        if not folder.path.is_dir():
            raise RunError(f"run directory {path} does not exist")
        if not folder.recipe.is_file():
            raise RunError(f"{path} is no run directory: it has no {folder.recipe.name}")
        return folder

    def read_recipe(self) -> Recipe:
        """The recorded recipe of a distillation; raises ``RunError`` where it is missing, damaged or of
        another kind."""
        values = _recorded(self)
        if "task" in values:
            raise RunError(
                f"{self.path} is a run of `fd-scale evaluate --task {values['task']}`, and a run of "
                "`fd-scale distill` is wanted here"
            )
        return _read_as(self, Recipe, values)

    def read_as(self, kind: type[R]) -> R:
        """The recorded recipe of a kind; errors as of ``read_recipe``."""
        return _read_as(self, kind, _recorded(self))

    @property
    def recipe(self) -> Path:
        """File of what was asked."""
        return self.path / "recipe.json"

    @property
    def placement(self) -> Path:
        """File of where the teacher's weights lie, where the scale left that open."""
        return self.path / "placement.json"

    @property
    def checkpoints(self) -> Path:
        """Folder of the saved steps."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """File of one JSON object per log interval."""
        return self.path / "metrics.jsonl"

    @property
    def quarantine(self) -> Path:
        """File of one JSON object per sample that could not be used."""
        return self.path / "quarantine.jsonl"

    @property
    def exports(self) -> Path:
        """Folder of exported weights."""
        return self.path / "exports"

    @property
    def reports(self) -> Path:
        """Folder of evaluations, plots and pictures."""
        return self.path / "reports"

    def new_start(self, ds_config: Mapping[str, Any], environment: Mapping[str, Any]) -> Path:
        """Record one more start of the run; returns its folder, ``starts/0001`` and counting."""
        starts = self.path / "starts"
        starts.mkdir(exist_ok=True)
        number = 1 + max((int(entry.name) for entry in starts.iterdir() if entry.name.isdecimal()), default=0)
        start = starts / f"{number:04d}"
        start.mkdir()
        write_atomically(start / "ds_config.json", as_json(ds_config))
        write_atomically(start / "environment.json", as_json(environment))
        return start


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that whoever looks, also after a crash, sees the whole of it or what was there before.

    Raises ``OSError`` (a full disk, for one) with the former content intact and no temporary file left.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Make a file, or the names that were created or renamed in a directory, survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def as_json(value: Any) -> str:
    """The record form of plain values: indented, one trailing newline."""
    return json.dumps(value, indent=2) + "\n"


def environment() -> dict[str, Any]:
    """Facts about this start that explain its numbers later: code, versions, machine, job. No secrets."""
    return {
        "started_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "source": _source(),
        "versions": {"fd_scale": __version__, "python": platform.python_version(), **_versions()},
        "host": platform.node(),
        "system": platform.platform(),
        "cpu": {"model": _cpu_model(), "count": os.cpu_count()},
        "gpus": _gpus(),
        "slurm": {name.lower(): os.environ[name] for name in SLURM_FACTS if name in os.environ},
    }


def _recorded(folder: RunFolder) -> dict[str, Any]:
    """The plain values of the recorded recipe, not yet checked."""
    try:
        return read_values(RunFolder.at(folder.path).recipe)
    except RecipeError as error:
        raise _unusable(folder, error) from None


def _read_as(folder: RunFolder, kind: type[R], values: Mapping[str, Any]) -> R:
    try:
        return checked(kind, values)
    except RecipeError as error:
        raise _unusable(folder, error) from None


def _unusable(folder: RunFolder, error: RecipeError) -> RunError:
    return RunError(
        f"{folder.recipe} cannot be used: {error}\n"
        "put it back from a copy (`fd-scale recipes NAME` prints one), or move the directory away"
    )


def _is_new(path: Path) -> bool:
    """Whether a directory holds nothing but what an interrupted ``write_atomically`` may have left."""
    return all(entry.name.startswith(".") and entry.name.endswith(".tmp") for entry in path.iterdir())


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """One line per dotted field whose value differs."""
    old, new = _flatten(before), _flatten(now)
    fields = [field for field in {**old, **new} if old.get(field, "absent") != new.get(field, "absent")]
    return "\n".join(
        f"  {field}: {old.get(field, 'absent')!r} there, {new.get(field, 'absent')!r} now" for field in fields
    )


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping) or not value:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, part in value.items():
        flat |= _flatten(part, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _source() -> dict[str, Any]:
    """Commit of the checkout that the code runs from; empty for an installed package."""
    checkout = Path(__file__).resolve().parents[2]
    if not (checkout / ".git").exists():
        return {}
    commit = _git(checkout, "rev-parse", "HEAD")
    changes = _git(checkout, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "uncommitted_changes": None if changes is None else bool(changes)}


def _git(checkout: Path, *arguments: str) -> str | None:
    try:
        answer = subprocess.run(
            ["git", "-C", str(checkout), *arguments], capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def _cpu_model() -> str:
    facts = Path("/proc/cpuinfo")
    if facts.exists():
        for line in facts.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gpus() -> list[str]:
    import torch

    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
