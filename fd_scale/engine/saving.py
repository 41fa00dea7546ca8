"""Saving a checkpoint: a copy on the host, then files, and its name last of all.

Training waits for the copy only. Files are written, flushed to the disk and committed by a thread, whose
words to the other ranks' threads travel in a process group of their own; a second save waits for the first.
Until the commit there is a ``.partial``, which nothing reads. What a checkpoint holds, and how it is read, is
said in ``checkpoint.py``.

Where the run's file system is slow, ``FD_SCALE_STAGE_SAVES`` names a folder on the node's own disk: each rank
writes its file there first, which frees the copy in memory, takes the checksum there, and copies it from
there.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from fd_scale.engine import fragments as where
from fd_scale.engine.checkpoint import AVERAGE, FORMAT, MANIFEST, Checkpoint, committed, sha256, shapes
from fd_scale.engine.zero import Engine
from fd_scale.errors import RunError
from fd_scale.run.folder import sync, write_atomically
from fd_scale.run.world import World

STAGE = "FD_SCALE_STAGE_SAVES"
"""Environment variable: a folder on the node's own disk, with room for its ranks' part of a checkpoint."""


@dataclass(frozen=True)
class Snapshot:
    """What one rank has to write, in host memory that the next step does not touch."""

    tensors: dict[str, Tensor]
    """Flat float32 fragments as ``kind/parameter``, and rank 0's buffers; empty where another rank holds the
    same."""
    starts: dict[str, str]
    """The first element of each parameter's fragment."""
    manifest: dict[str, Any]
    """All but the list of files."""

    @property
    def step(self) -> int:
        """Optimizer steps of the run."""
        return int(self.manifest["step"])


def snapshot(engine: Engine, world: World, facts: dict[str, Any]) -> Snapshot:
    """Copy weights and moments of this rank to the host."""
    manifest = {
        "format": FORMAT,
        "step": engine.step_number,
        "adam_steps": where.steps_taken(engine.deepspeed),
        "world_size": world.size,
        "average_decay": engine.average.decay if engine.average else None,
        "zero_stage": int(engine.deepspeed.zero_optimization_stage()),
        "parameters": shapes(engine),
        "facts": facts,
    }
    if where.replicated(engine.deepspeed) and world.rank > 0:
        return Snapshot({}, {}, manifest)
    tensors: dict[str, Tensor] = {}
    starts: dict[str, str] = {}
    state = where.inner_optimizer(engine.deepspeed).state
    for fragment in where.fragments(engine.deepspeed):
        starts[fragment.name] = str(fragment.start)
        # A copy of each also because views of one flat buffer share storage, which safetensors refuses.
        tensors[f"master/{fragment.name}"] = fragment.of(fragment.buffer).to("cpu", copy=True)
        for key in where.moments(engine.deepspeed) if fragment.buffer in state else ():
            moment = fragment.of(state[fragment.buffer][key])
            tensors[f"{key}/{fragment.name}"] = moment.to("cpu", copy=True)
    for fragment, average in engine.average.fragments() if engine.average else ():
        tensors[f"{AVERAGE}/{fragment.name}"] = average.to("cpu", copy=True)
    if world.rank == 0:
        for name, value in _persistent_buffers(engine.module):
            tensors[f"buffer/{name}"] = value.detach().to("cpu", copy=True).contiguous()
    return Snapshot(tensors, starts, manifest)


def stage() -> Path | None:
    """The folder that ``FD_SCALE_STAGE_SAVES`` names, made where it is missing; None without the variable.

    Raises ``RunError`` where it cannot be written.
    """
    if not os.environ.get(STAGE):
        return None
    folder = Path(os.environ[STAGE])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise RunError(
            f"{STAGE}={folder} cannot be written ({error.strerror}): name a folder on the node's own disk, "
            "or unset it"
        ) from None
    return folder


def write(
    folder: Path,
    shot: Snapshot,
    world: World,
    *,
    stage: Path | None = None,
    before_commit: Callable[[], None] = lambda: None,
) -> Checkpoint:
    """Write and commit a snapshot of every rank under ``folder``, by way of ``stage`` where given.
    Collective.

    When any rank cannot write (a full disk, say), all ranks raise its ``OSError``, the partial save is
    removed, and earlier checkpoints stand. ``before_commit`` may object, on rank 0, by raising. A checkpoint
    of the same step is replaced: a run is at a step again only when what it had saved there was no use.
    """
    final = folder / f"step-{shot.step:08d}"
    partial = final.with_suffix(".partial")
    world.on_main(lambda: _begin(folder, partial))
    try:
        file = world.together(lambda: _write_rank(partial, shot, world.rank, stage))
        manifest = shot.manifest | {"files": [entry for entry in world.gather(file) if entry is not None]}
        world.on_main(lambda: _commit(partial, final, manifest, before_commit))
    except OSError:
        world.on_main(lambda: shutil.rmtree(partial, ignore_errors=True))
        raise
    return Checkpoint(final, manifest)


def save(folder: Path, engine: Engine, world: World, facts: dict[str, Any]) -> Checkpoint:
    """Write and commit a checkpoint of the engine's step, and wait for it. Collective; errors as in
    ``write``."""
    return write(folder, snapshot(engine, world, facts), world)


def retain(
    folder: Path, *, keep_last: int, keep_every_steps: int | None, keep: Collection[int] = ()
) -> list[Path]:
    """Remove all checkpoints but the newest ``keep_last``, those at multiples of ``keep_every_steps``, and
    those of the steps ``keep``."""
    removed = []
    for checkpoint in committed(folder)[:-keep_last]:
        multiple = keep_every_steps is not None and checkpoint.step % keep_every_steps == 0
        if not multiple and checkpoint.step not in keep:
            shutil.rmtree(checkpoint.path)
            removed.append(checkpoint.path)
    return removed


class Saver:
    """Saves the checkpoints of one run, one after the other, in the background where asked.

    ``last_step`` is the step of the checkpoint that the run goes on from. Files go by way of ``stage`` where
    given. ``before_commit`` may object by raising; ``committed`` is told each step whose checkpoint stands.
    Both are called on rank 0, in the thread that writes.
    """

    def __init__(
        self,
        folder: Path,
        world: World,
        *,
        background: bool,
        last_step: int | None,
        before_commit: Callable[[], None],
        committed: Callable[[int], None],
        stage: Path | None = None,
    ) -> None:
        self._folder, self._world, self._stage = folder, world, stage
        self._aside = world.aside() if background else None
        self._last_step = last_step
        self._before_commit, self._committed = before_commit, committed
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def save(self, engine: Engine, facts: dict[str, Any]) -> None:
        """Save the engine's step; a step that was saved is not saved again. Collective.

        Waits for a save under way, and raises what went wrong in it. Without a background, errors are those
        of ``write``.
        """
        self.wait()
        if engine.step_number == self._last_step:
            return
        shot = snapshot(engine, self._world, facts)
        self._last_step = shot.step
        if self._aside is None:
            self._write(shot, self._world)
            return
        self._thread = threading.Thread(
            target=self._work, args=(shot, self._aside), name="saver", daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """Until the save under way stands; raises what went wrong in it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def check(self) -> None:
        """Raise what went wrong in a save, if that is known by now. Ranks may learn of it at different
        times."""
        if self._failure is not None:
            raise self._failure

    def _work(self, shot: Snapshot, world: World) -> None:
        try:
            self._write(shot, world)
        except BaseException as error:  # raised again in the thread that trains
            self._failure = error

    def _write(self, shot: Snapshot, world: World) -> None:
        write(self._folder, shot, world, stage=self._stage, before_commit=self._before_commit)
        world.on_main(lambda: self._committed(shot.step))


def _begin(folder: Path, partial: Path) -> None:
    # Not its parents: where the file system of the run is gone, nothing must grow in its place.
    folder.mkdir(exist_ok=True)
    for stale in folder.glob("*.partial"):
        shutil.rmtree(stale)
    partial.mkdir()


def _write_rank(partial: Path, shot: Snapshot, rank: int, stage: Path | None) -> dict[str, Any] | None:
    """This rank's file and its description; None where it has nothing to write."""
    if not shot.tensors:
        return None
    path = partial / f"rank-{rank:05d}.safetensors"
    if stage is None:
        _write_file(path, shot)
        sync(path)
        return _described(path)
    # The same name at every save of the run, so that a killed rank leaves one file behind, and the next
    # save on this node takes its place.
    run = hashlib.sha256(str(partial.parent.resolve()).encode()).hexdigest()[:8]
    local = stage / f"{run}-{path.name}"
    try:
        _write_file(local, shot)
        shot.tensors.clear()
        entry = _described(local)
        shutil.copyfile(local, path)
    finally:
        local.unlink(missing_ok=True)
    sync(path)
    return entry | {"name": path.name}


def _write_file(path: Path, shot: Snapshot) -> None:
    try:
        save_file(shot.tensors, path, metadata=shot.starts)
    except SafetensorError as error:  # how safetensors reports a full disk
        raise OSError(f"{path} could not be written: {error}") from error


def _described(path: Path) -> dict[str, Any]:
    return {"name": path.name, "size": path.stat().st_size, "sha256": sha256(path)}


def _persistent_buffers(module: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    kept = set(module.state_dict(keep_vars=True))
    return ((name, buffer) for name, buffer in module.named_buffers() if name in kept)


def _commit(partial: Path, final: Path, manifest: dict[str, Any], before_commit: Callable[[], None]) -> None:
    write_atomically(partial / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    before_commit()
    if final.exists():
        shutil.rmtree(final)
    os.rename(partial, final)
    sync(final.parent)
