"""What has been made already, and what would still have to be made? Pieces of studies as folders on disk.

A piece is named by its kind and by a digest of all that decides it, so that studies share pieces, a stopped
study goes on, and nothing is made twice. A folder without ``piece.json``, which is written last, does not
count. The same calls can be made in planning, where nothing is made and the work is added up.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fd_scale.run.folder import as_json, write_atomically

VERSION = 1
"""Part of every identity: raised when a change of the code would make other pieces of the same settings."""
MARKER = "piece.json"


@dataclass(frozen=True)
class Piece:
    """Something that was made, or is planned."""

    kind: str
    identity: str
    folder: Path
    record: Mapping[str, Any]
    """What is known of it, as JSON; of a planned one what ``Store.piece`` was told to suppose."""

    @property
    def weights(self) -> Path:
        """Its network, in the form of an export, where it has one."""
        return self.folder / "weights.safetensors"


@dataclass
class Store:
    """Pieces in a folder; ``planning`` makes none, and adds up ``todo`` instead."""

    root: Path
    say: Callable[[str], None]
    planning: bool = False
    todo: dict[str, float] = field(default_factory=dict)
    """Work of pieces that are not there yet, in images of a training step, by identity."""
    used: dict[str, Piece] = field(default_factory=dict)
    """All that was asked for, by identity."""

    def name(self, kind: str, facts: Mapping[str, Any]) -> str:
        """The identity of a piece of these facts, which are plain values."""
        canonical = json.dumps([VERSION, kind, facts], sort_keys=True, separators=(",", ":"))
        return f"{kind}-{hashlib.sha256(canonical.encode()).hexdigest()[:12]}"

    def find(self, kind: str, facts: Mapping[str, Any]) -> Piece | None:
        """The piece, if it was made."""
        identity = self.name(kind, facts)
        folder = self.root / identity
        if not (folder / MARKER).is_file():
            return None
        record = json.loads((folder / MARKER).read_text(encoding="utf-8"))["record"]
        self.used[identity] = Piece(kind, identity, folder, record)
        return self.used[identity]

    def piece(
        self,
        kind: str,
        facts: Mapping[str, Any],
        make: Callable[[Path], Mapping[str, Any]],
        *,
        work: float,
        suppose: Mapping[str, Any],
    ) -> Piece:
        """The piece, which ``make`` makes in the folder that it is given, returning the record.

        ``work`` is what it costs, in images of a training step, and ``suppose`` its record while planning.
        """
        if found := self.find(kind, facts):
            return found
        if self.planning:
            return self.plan(kind, facts, work=work, suppose=suppose)
        folder = self.begin(kind, facts)
        return self.finish(kind, facts, make(folder))

    def plan(self, kind: str, facts: Mapping[str, Any], *, work: float, suppose: Mapping[str, Any]) -> Piece:
        """Count the work of a piece that is not there."""
        identity = self.name(kind, facts)
        self.todo[identity] = work
        return Piece(kind, identity, self.root / identity, suppose)

    def begin(self, kind: str, facts: Mapping[str, Any]) -> Path:
        """The folder of a piece that is about to be made."""
        folder = self.root / self.name(kind, facts)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def finish(self, kind: str, facts: Mapping[str, Any], record: Mapping[str, Any]) -> Piece:
        """Declare a piece made."""
        identity = self.name(kind, facts)
        folder = self.root / identity
        write_atomically(folder / MARKER, as_json({"kind": kind, "facts": facts, "record": record}))
        self.used[identity] = Piece(kind, identity, folder, record)
        return self.used[identity]
