"""Checkpoints: whole or not there, free of pickles, and readable on another number of processes or ZeRO
stage.

    checkpoints/
      step-00012000/             a checkpoint: it has this name only when everything in it is on the disk
        manifest.json            step, shapes of all parameters, size and SHA-256 of files, the run's facts
        rank-00000.safetensors   this rank's fragments: master/<parameter>, exp_avg/..., exp_avg_sq/...,
                               and average/... in a run that averages its weights
        rank-00001.safetensors
      step-00012500.partial/     a save that was cut off; never read, removed by the next save
      step-00013000.1.damaged/   was passed over by a start, which said why; for a person to look at

A fragment is a flat float32 run of a parameter's elements; the file's metadata gives where it starts. Any
rank of any later run can therefore collect the elements it needs. Rank 0's file also holds the module's
buffers. A damaged newest checkpoint gives way to the one before it. Writing them is the business of
``saving.py``.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fd_scale.engine import fragments as where
from fd_scale.engine.zero import Engine
from fd_scale.errors import RunError
from fd_scale.run.world import World

FORMAT = 1
MANIFEST = "manifest.json"
MASTER = "master"
"""The kind of a fragment that holds weights."""
AVERAGE = "average"
"""The kind of a fragment that holds their moving average, in a run that has one."""
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint: its directory and its manifest."""

    path: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps of the run when it was saved."""
        return int(self.manifest["step"])

    @property
    def facts(self) -> dict[str, Any]:
        """What the run recorded of itself: data position, teacher, counters."""
        return dict(self.manifest["facts"])

    @property
    def size_bytes(self) -> int:
        """Bytes of its tensor files."""
        return sum(file["size"] for file in self.manifest["files"])


def committed(folder: Path) -> list[Checkpoint]:
    """The checkpoints under ``folder``, oldest first; a directory without a readable manifest is not one."""
    named = (path for path in folder.glob("step-*") if _NAME.fullmatch(path.name))
    found = [Checkpoint(path, manifest) for path in named if (manifest := _manifest(path)) is not None]
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def _manifest(path: Path) -> dict[str, Any] | None:
    try:
        manifest = json.loads((path / MANIFEST).read_text())
    except (OSError, json.JSONDecodeError):
        return None
    if manifest.get("format") != FORMAT:
        raise RunError(
            f"{path} has checkpoint format {manifest.get('format')!r}; this version reads format {FORMAT}"
        )
    return manifest


def faults(checkpoint: Checkpoint, *, share: int = 0, of: int = 1, hashes: bool = True) -> list[str]:
    """What is wrong with a checkpoint's files: sizes of all and, with ``hashes``, SHA-256 of every ``of``-th
    starting at ``share``."""
    wrong = []
    for index, file in enumerate(checkpoint.manifest["files"]):
        path = checkpoint.path / file["name"]
        if not path.is_file():
            wrong.append(f"{path} is missing")
        elif path.stat().st_size != file["size"]:
            wrong.append(f"{path} has {path.stat().st_size:,} bytes, the manifest says {file['size']:,}")
        elif hashes and index % of == share and sha256(path) != file["sha256"]:
            wrong.append(f"{path} has another SHA-256 than the manifest")
    return wrong


def newest(folder: Path, world: World, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint whose files are whole, agreed by all ranks; each damaged one is reported.
    Collective.

    None where there is no checkpoint. Raises ``RunError`` where there are some and all are damaged: to begin
    anew would throw away the work, and is for a person to decide.
    """
    available = world.on_main(lambda: committed(folder))
    for checkpoint in reversed(available):
        found = world.gather(faults(checkpoint, share=world.rank, of=world.size))
        wrong = sorted(set(itertools.chain.from_iterable(found)))
        if not wrong:
            return checkpoint
        warn(f"checkpoint {checkpoint.path.name} is damaged and is passed over: {'; '.join(wrong)}")
    if available:
        raise RunError(
            f"none of the {len(available)} checkpoints in {folder} is whole: put one back from a copy, or "
            "move this folder away to begin at step 0"
        )
    return None


def set_aside(folder: Path, after: int) -> list[Path]:
    """Rename the checkpoints after a step to ``.damaged``: they were passed over, and the run, which goes on
    from that step, must not count them among those it keeps."""
    aside = []
    for checkpoint in committed(folder):
        if checkpoint.step > after:
            name = checkpoint.path.with_suffix(f".{time.time_ns()}.damaged")
            aside.append(checkpoint.path.rename(name))
    return aside


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --------------------------------------------------------------------------------------------- loading


class Pieces:
    """The flat tensors of a checkpoint, addressed by kind, parameter and element, whoever wrote them."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._files: dict[str, Any] = {}
        self._index: dict[str, list[tuple[int, int, str]]] | None = None

    def _open(self, name: str) -> Any:
        if name not in self._files:
            try:
                self._files[name] = safe_open(self.checkpoint.path / name, framework="pt")
            except (OSError, SafetensorError) as error:
                raise RunError(f"{self.checkpoint.path / name} cannot be read: {error}") from None
        return self._files[name]

    @property
    def index(self) -> dict[str, list[tuple[int, int, str]]]:
        """For each parameter its (start, stop, file) runs ascending; reads every file's header once."""
        if self._index is None:
            self._index = {}
            for entry in self.checkpoint.manifest["files"]:
                file = self._open(entry["name"])
                for name, start in (file.metadata() or {}).items():
                    if name in self.checkpoint.manifest["parameters"]:
                        numel = file.get_slice(f"master/{name}").get_shape()[0]
                        self._index.setdefault(name, []).append(
                            (int(start), int(start) + numel, entry["name"])
                        )
            for runs in self._index.values():
                runs.sort()
        return self._index

    def read(self, kind: str, name: str, start: int, numel: int) -> Tensor:
        """Elements ``start : start + numel`` of a flattened parameter, float32 on the CPU."""
        out = torch.empty(numel)
        filled = 0
        for low, high, file in self.index.get(name, []):
            begin, end = max(start, low), min(start + numel, high)
            if begin < end:
                run = self._open(file).get_slice(f"{kind}/{name}")
                out[begin - start : end - start] = run[begin - low : end - low]
                filled += end - begin
        if filled != numel:
            raise RunError(f"{self.checkpoint.path} holds {filled:,} of {numel:,} elements of {kind}/{name}")
        return out

    def whole(self, kind: str, name: str) -> Tensor:
        """A whole parameter in its own shape, float32 on the CPU."""
        shape = torch.Size(self.checkpoint.manifest["parameters"][name])
        return self.read(kind, name, 0, shape.numel()).view(shape)

    def buffers(self) -> dict[str, Tensor]:
        """The module's persistent buffers."""
        file = self._open(self.checkpoint.manifest["files"][0]["name"])
        names = [name for name in file.keys() if name.startswith("buffer/")]  # noqa: SIM118 (not a mapping)
        return {name.removeprefix("buffer/"): file.get_tensor(name) for name in names}


def kind_of_weights(checkpoint: Checkpoint, *, average: bool) -> str:
    """The kind of the fragments that hold the weights as they are, or their moving average.

    Raises ``RunError`` where there is no average.
    """
    if average and checkpoint.manifest.get("average_decay") is None:
        raise RunError(
            f"{checkpoint.path} holds no average of the weights, for its recipe has none "
            "(optim.average_decay): take the weights themselves"
        )
    return AVERAGE if average else MASTER


def load(checkpoint: Checkpoint, engine: Engine) -> None:
    """Put a checkpoint into an engine of any world size and ZeRO stage, and move it to the saved step.
    Collective.

    Raises ``RunError`` when the module has other parameters than the one that was saved.
    """
    _check_parameters(checkpoint, engine)
    pieces = Pieces(checkpoint)
    taken = int(checkpoint.manifest["adam_steps"])
    if taken:
        where.create_moments(engine.deepspeed, taken)
    state = where.inner_optimizer(engine.deepspeed).state
    with torch.no_grad():
        for fragment in where.fragments(engine.deepspeed):
            span = (fragment.name, fragment.start, fragment.numel)
            fragment.of(fragment.buffer).copy_(pieces.read(MASTER, *span))
            for key in where.moments(engine.deepspeed) if taken else ():
                fragment.of(state[fragment.buffer][key]).copy_(pieces.read(key, *span))
        for fragment, average in engine.average.fragments() if engine.average else ():
            average.copy_(pieces.read(AVERAGE, fragment.name, fragment.start, fragment.numel))
        buffers = dict(engine.module.named_buffers())
        for name, value in pieces.buffers().items():
            buffers[name].copy_(value)
    where.refresh_parameters(engine.deepspeed)
    engine.move_to(checkpoint.step)


def shapes(engine: Engine) -> dict[str, list[int]]:
    """Shapes of the trained parameters as the module had them before ZeRO took them apart."""
    named = engine.module.named_parameters()
    return {name: list(getattr(p, "ds_shape", p.shape)) for name, p in named if p.requires_grad}


def _check_parameters(checkpoint: Checkpoint, engine: Engine) -> None:
    saved = checkpoint.manifest["parameters"]
    now = shapes(engine)
    different = [name for name in sorted(saved.keys() | now.keys()) if saved.get(name) != now.get(name)]
    if different:
        shown = "; ".join(f"{n}: {saved.get(n, 'absent')} -> {now.get(n, 'absent')}" for n in different[:5])
        raise RunError(f"{checkpoint.path} holds another student; parameters that differ: {shown}")
