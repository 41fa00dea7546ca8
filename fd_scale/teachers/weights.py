"""Weights of a teacher: what a recipe's ``weights`` refers to, what is in a file, and whether it fits.

Public checkpoints wrap their tensors in many ways. All that is taken off is named in the log; where a file
leaves a choice, the recipe must make it (``FILE#student``). Files are read without executing anything in
them.
"""

from __future__ import annotations

import argparse
import logging
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fd_scale.errors import TeacherError, near_misses
from fd_scale.teachers.torchscript import is_archive, read_archive

log = logging.getLogger("fd_scale")

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
WRAPPERS = ("state_dict", "model", "module", "teacher", "student", "model_ema", "state_dict_ema", "ema")
"""Keys under which public checkpoints keep their weights: timm, DeiT and MAE, EVA, DINO and EsViT."""

PREFIXES = ("module.", "_orig_mod.", "backbone.")
"""Before names of weights: left by data parallelism, by torch.compile, and by DINO's multi-crop wrapper."""

OPENAI_KEYS = {"input_resolution", "context_length", "vocab_size"}
"""What OpenAI's CLIP archives hold beside weights, and nobody else's."""

VISUAL = "visual."
"""Before the names of the vision tower in the file of a whole CLIP."""

SHOWN = 6
"""Names in a message, before the rest is counted."""

UNREADABLE = (
    pickle.UnpicklingError,
    SafetensorError,
    zipfile.BadZipFile,
    OSError,
    EOFError,
    RuntimeError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
)
"""What readers raise for files that are broken, or built to do harm."""

Statistics = tuple[tuple[float, ...], tuple[float, ...]]
"""(mean, std) of pixels, per colour."""


@dataclass(frozen=True)
class Source:
    """Where weights come from: a file (and a key in it), a tag of the library's hub, or chance."""

    text: str
    path: Path | None = None
    key: str | None = None

    @property
    def is_random(self) -> bool:
        """Whether there are no weights."""
        return self.text == "random"

    @property
    def label(self) -> str:
        """For records: a tag, ``random``, or a file's name without its folder."""
        return self.text if self.path is None else self.path.name + (f"#{self.key}" if self.key else "")


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a file under their bare names, and whether it is one of OpenAI's CLIPs."""

    label: str
    tensors: dict[str, Tensor]
    is_openai: bool


def source(text: str) -> Source:
    """What a recipe's ``teacher.weights`` means. Raises ``TeacherError`` for a file that is not there or
    not of a kind that is read."""
    name, _, key = text.partition("#")
    if name.endswith(SUFFIXES):
        path = Path(name).expanduser()
        if not path.is_file():
            raise TeacherError(f"weights file {path} does not exist (teacher.weights)")
        return Source(text, path, key or None)
    if "/" in name or Path(name).is_file():
        kinds = ", ".join(SUFFIXES)
        raise TeacherError(f"teacher.weights={text!r} looks like a file, but only {kinds} files are read")
    return Source(text)


def no_such_tag(tag: str, architecture: str, tags: list[str]) -> TeacherError:
    """The error for a tag that a library's hub does not have."""
    return TeacherError(
        f"teacher.weights={tag!r} is no tag of {architecture}{near_misses(tag, tags)} (tags: "
        f"{', '.join(tags) or 'none'}; or give a local file, or 'random' for trials)"
    )


def check_statistics(
    where: Source, architecture: str, published: Mapping[str, Statistics], argument: str
) -> None:
    """Refuse a file of an architecture whose tags differ in mean and std: nothing in it says which are
    right."""
    if len(set(published.values())) > 1:
        choices = ", ".join(
            f"{tag} (mean {mean[0]:.3f}, std {std[0]:.3f})" for tag, (mean, std) in published.items()
        )
        raise TeacherError(
            f"teacher.weights={where.text!r} does not say which mean and std it was trained with, and those "
            f"of {architecture} differ by tag: set teacher.arguments.{argument} to the right one of {choices}"
        )


def needs_quickgelu(what: str, architecture: str, quick: str) -> TeacherError:
    """The error for weights trained with QuickGELU in an architecture without it."""
    return TeacherError(
        f"{what} was trained with QuickGELU, and teacher.architecture={architecture!r} has the exact GELU: "
        f"its features would be slightly wrong without an error. Set teacher.architecture={quick!r}"
    )


def check_activation(checkpoint: Checkpoint, architecture: str, quick: str) -> None:
    """Refuse a CLIP transformer of OpenAI's for an architecture with the exact GELU, and warn of any other
    CLIP, whose file does not say. ``quick`` is the architecture's name with QuickGELU."""
    if VISUAL + "class_embedding" not in checkpoint.tensors:
        return
    if checkpoint.is_openai:
        raise needs_quickgelu(f"{checkpoint.label}, one of OpenAI's CLIPs,", architecture, quick)
    log.warning(
        "teacher weights %s: the file does not say which GELU its CLIP was trained with; %s has the exact "
        "one. For weights of OpenAI, MetaCLIP or DFN set teacher.architecture=%s",
        checkpoint.label,
        architecture,
        quick,
    )


def hub_failure(tag: str, architecture: str, error: BaseException) -> TeacherError:
    """The error for a tag whose weights could not be fetched or loaded."""
    reason = str(error).strip().splitlines() or [type(error).__name__]
    return TeacherError(
        f"weights {tag!r} of {architecture} could not be loaded from the hub: {reason[0]}\nOn a machine "
        "without network, fetch the file elsewhere and give it: --set teacher.weights=/path/to/file"
    )


@contextmanager
def drawn_from(seed: int, architecture: str) -> Iterator[None]:
    """Random weights drawn within depend on ``seed`` alone; they are announced, and no other draw is
    disturbed."""
    log.warning(
        "TEACHER %s HAS RANDOM WEIGHTS (seed %d): good for trials of the machinery, worthless as a teacher. "
        "Set teacher.weights to a tag or a file.",
        architecture,
        seed,
    )
    generator = torch.random.default_generator
    before = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(before)


def read(where: Source) -> Checkpoint:
    """The weights in a local file, unwrapped; raises ``TeacherError`` when it cannot be read or leaves a
    choice."""
    if where.path is None:
        raise ValueError(f"{where.text!r} is not a file")
    try:
        content, is_script = _content(where.path)
    except UNREADABLE as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise TeacherError(
            f"weights file {where.path} cannot be read safely: {reason}\nFiles are read without running code "
            "in them. Where you trust this one, save its tensors alone as safetensors"
        ) from error
    tensors, steps = _unwrapped(content, where)
    tensors, stripped = _stripped(tensors, where)
    if steps or stripped:
        log.info("teacher weights %s: took %s", where.label, ", ".join([*steps, *stripped]))
    is_openai = is_script or tensors.keys() >= OPENAI_KEYS
    return Checkpoint(where.label, {n: t for n, t in tensors.items() if n not in OPENAI_KEYS}, is_openai)


def fit(
    network: nn.Module, tensors: Mapping[str, Tensor], *, of: str, into: str, heads: tuple[str, ...]
) -> None:
    """Load tensors into a network, every one matched but those of ``heads``, which it has left out knowingly.

    ``heads`` are beginnings of names. Raises ``TeacherError`` that lists the names that are missing, left
    over, or of another shape.
    """
    own = network.state_dict()
    left_over = [name for name in tensors if name not in own]
    dropped = [name for name in left_over if name.startswith(heads)]
    problems = {
        "missing in the file": [name for name in own if name not in tensors],
        "not in the network": [name for name in left_over if name not in dropped],
        "of another shape": [
            f"{name} {tuple(tensors[name].shape)}, network {tuple(own[name].shape)}"
            for name in own
            if name in tensors and tensors[name].shape != own[name].shape
        ],
    }
    if any(problems.values()):
        lines = [f"  {what}: {_listed(names)}" for what, names in problems.items() if names]
        raise TeacherError(
            "\n".join((f"weights {of} do not fit teacher {into}:", *lines))
            + "\nCheck teacher.architecture, teacher.arguments and teacher.input_size"
        )
    if dropped:
        log.info("teacher weights %s: left out its head (%s)", of, _listed(dropped))
    network.load_state_dict({name: tensors[name] for name in own})


def warn_of_resampling(of: str, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> None:
    """Say so when the library has changed position tables, to fit another input size or another layout."""
    was, now = _positions(before), _positions(after)
    if sorted(was.values()) != sorted(now.values()):
        log.warning(
            "teacher weights %s: position tables were fitted to this network, from %s rows to %s",
            of,
            sorted(set(was.values())),
            sorted(set(now.values())),
        )


def _positions(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Rows of the position tables of the vision tower."""
    ends = ("pos_embed", "positional_embedding", "relative_position_bias_table")
    towered = any(name.startswith("visual.") for name in tensors)
    names = (n for n in tensors if n.endswith(ends) and (not towered or n.startswith("visual.")))
    return {name: tensors[name].numel() // tensors[name].shape[-1] for name in names}


def _content(path: Path) -> tuple[Any, bool]:
    """What the file holds, and whether it is a TorchScript archive."""
    if path.suffix == ".safetensors":
        return load_file(path), False
    if is_archive(path):
        return read_archive(path), True
    # Checkpoints of DINO, MAE and DeiT hold their command line, which is harmless.
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True), False


def _unwrapped(content: Any, where: Source) -> tuple[dict[str, Tensor], list[str]]:
    steps = []
    if where.key is not None:
        content = _at(content, where.key, where)
        steps.append(f"key {where.key!r}")
    while isinstance(content, Mapping):
        inner = [name for name in WRAPPERS if isinstance(content.get(name), Mapping) and content[name]]
        if len(inner) > 1:
            options = " or ".join(f"{where.text}#{name}" for name in inner)
            raise TeacherError(f"weights file {where.path} holds several networks; say which: {options}")
        if not inner:
            break
        content = content[inner[0]]
        steps.append(f"key {inner[0]!r}")
    if not isinstance(content, Mapping):
        raise TeacherError(f"weights file {where.path} holds a {type(content).__name__}, not named tensors")
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise TeacherError(
            f"weights file {where.path} holds no tensors under {_listed([str(n) for n in content])}"
        )
    return tensors, steps


def _at(content: Any, key: str, where: Source) -> Any:
    names = (
        [str(name) for name, value in content.items() if isinstance(value, Mapping)]
        if isinstance(content, Mapping)
        else []
    )
    if key not in names:
        raise TeacherError(
            f"weights file {where.path} has no weights under {key!r}{near_misses(key, names)} "
            f"(keys: {', '.join(names) or 'none, it holds tensors themselves'})"
        )
    return content[key]


def _stripped(tensors: dict[str, Tensor], where: Source) -> tuple[dict[str, Tensor], list[str]]:
    steps = []
    while prefix := next((p for p in PREFIXES if any(name.startswith(p) for name in tensors)), None):
        bare = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        if len(bare) != len(tensors):
            raise TeacherError(f"weights file {where.path} has names both with and without {prefix!r}")
        tensors = bare
        steps.append(f"names after {prefix!r}")
    return tensors, steps


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
