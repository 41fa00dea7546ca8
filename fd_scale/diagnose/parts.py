"""What of a diagnosis is finished already? One JSON file per part, so that a long one goes on after a stop.

A part's name carries a digest of everything that decides its content (weights, images, settings), so that
what is found is what would be computed again, and nothing else. Tensors are kept in it bit for bit.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from fd_scale.run.folder import write_atomically
from fd_scale.run.world import World

T = TypeVar("T")

VERSION = 1
"""Part of every digest: raised when a change here or in a question would alter what is measured."""
TENSOR = "base64"


@dataclass(frozen=True)
class Parts:
    """A folder of finished parts."""

    folder: Path

    def read(self, name: str, facts: Mapping[str, Any]) -> Any:
        """The content of a part, or None where it is not finished."""
        path = self._path(name, facts)
        if not path.is_file():
            return None
        return _decoded(json.loads(path.read_text()))["content"]

    def write(self, name: str, facts: Mapping[str, Any], content: Any) -> None:
        """Keep a finished part: plain values, NaN among them, and CPU tensors of any nesting."""
        self.folder.mkdir(parents=True, exist_ok=True)
        record = {"facts": dict(facts), "content": content}
        write_atomically(self._path(name, facts), json.dumps(_encoded(record)) + "\n")

    def kept(self, world: World, name: str, facts: Mapping[str, Any], compute: Callable[[], T]) -> T:
        """The content of a part: as it was finished before, or from ``compute``, by all processes, and then
        kept. Collective."""
        content: T | None = world.on_main(partial(self.read, name, facts))
        if content is None:
            content = compute()
            world.on_main(partial(self.write, name, facts, content))
        return content

    def _path(self, name: str, facts: Mapping[str, Any]) -> Path:
        text = json.dumps({"version": VERSION, "name": name, "facts": facts}, sort_keys=True)
        return self.folder / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


def plain(value: Any) -> Any:
    """The same for people and other programs: tensors as lists, NaN and infinities as null."""
    if isinstance(value, Tensor):
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return value


def slug(text: str) -> str:
    """A name of a part from any words."""
    return "".join(letter if letter.isalnum() else "_" for letter in text.lower())


def _encoded(value: Any) -> Any:
    if isinstance(value, Tensor):
        array = value.detach().cpu().contiguous().numpy()
        data = base64.b64encode(array.tobytes()).decode()
        return {TENSOR: data, "dtype": str(array.dtype), "shape": list(array.shape)}
    if isinstance(value, Mapping):
        return {key: _encoded(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_encoded(part) for part in value]
    return value


def _decoded(value: Any) -> Any:
    if isinstance(value, dict) and TENSOR in value:
        array = np.frombuffer(base64.b64decode(value[TENSOR]), dtype=value["dtype"])
        return torch.from_numpy(array.reshape(value["shape"]).copy())
    if isinstance(value, dict):
        return {key: _decoded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_decoded(part) for part in value]
    return value
