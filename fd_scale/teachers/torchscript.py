"""The tensors of a TorchScript archive, as OpenAI published CLIP, without running any of it.

An archive is a zip: ``data.pkl`` names the module's attributes, ``data/<n>`` hold the raw tensors, and
``code/`` is the program. The program is not read here, and of the pickle only tensors and plain values are
understood, so that a file of unknown origin is as safe as safetensors. (``torch.jit.load`` would compile the
program, and is deprecated.)
"""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES: Mapping[str, torch.dtype] = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class Attributes:
    """A scripted module as its attributes; what class it had does not matter."""

    def __init__(self) -> None:
        self.values: Mapping[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        self.values = state if isinstance(state, Mapping) else {}


def is_archive(path: Path) -> bool:
    """Whether the file is a TorchScript archive (``torch.save`` writes zips too, without a program)."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.split("/")[1:2] == ["code"] for name in archive.namelist())


def read_archive(path: Path) -> dict[str, Tensor]:
    """The tensors by the dotted names of the modules that hold them: what ``state_dict()`` would say.

    Raises ``pickle.UnpicklingError`` for anything that a scripted network does not need.
    """
    with zipfile.ZipFile(path) as archive:
        inside = next((name for name in archive.namelist() if name.endswith("/data.pkl")), None)
        if inside is None:
            raise pickle.UnpicklingError("no data.pkl inside")
        with archive.open(inside) as stream:
            root = Reader(stream, archive, inside.removesuffix(".pkl")).load()
    return dict(_tensors(root, ""))


class Reader(pickle.Unpickler):
    """An unpickler that makes tensors, attributes and plain values, and refuses the rest."""

    def __init__(self, stream: Any, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(stream)
        self.archive, self.folder = archive, folder

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for a global of the pickle."""
        known: dict[tuple[str, str], Callable[..., Any]] = {
            ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
            ("collections", "OrderedDict"): OrderedDict,
        }
        if module.startswith("__torch__"):
            return Attributes
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        if module == "torch.jit._pickle" and name.startswith("build_"):
            return list
        if (module, name) in known:
            return known[module, name]
        raise pickle.UnpicklingError(f"it holds a {module}.{name}, which no network needs")

    def persistent_load(self, pid: Any) -> Tensor:
        """The raw tensor that the pickle refers to, flat."""
        _, dtype, key, _, count = pid
        if not isinstance(dtype, torch.dtype) or not isinstance(key, str):
            raise pickle.UnpicklingError(f"it refers to {pid!r}, which is no tensor")
        raw = bytearray(self.archive.read(f"{self.folder}/{key}"))
        return torch.frombuffer(raw, dtype=dtype, count=count) if count else torch.empty(0, dtype=dtype)


def _rebuild(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    return storage.as_strided(size, stride, offset).clone()


def _tensors(holder: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    if not isinstance(holder, Attributes):
        return
    for name, value in holder.values.items():
        if isinstance(value, Tensor):
            yield prefix + name, value
        else:
            yield from _tensors(value, f"{prefix}{name}.")
