"""Where does fine-tuning start? A trainable network with the weights of whatever the user names.

Runs, exported files and the libraries' networks become one of two kinds, as for students: an architecture of
``models``, or one of timm. On the way its shared position table may be copied to each block, and positions
are fitted to another input size. The head is the business of ``classifier.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from fd_scale.engine.checkpoint import Checkpoint, Pieces, kind_of_weights
from fd_scale.errors import RunError
from fd_scale.evaluate.naming import (
    EMA,
    ExportedFile,
    LabelledRun,
    LibraryNetwork,
    SourceError,
    label,
    meaning,
    refuse_unused,
)
from fd_scale.export import choose, load_student, student_tensors
from fd_scale.pixels import IMAGENET_MEAN, IMAGENET_STD
from fd_scale.positions import resized
from fd_scale.run import recipe as recipes
from fd_scale.run.transfer import Start, TransferRecipe
from fd_scale.student import TIMM, build_backbone, map_form, misfits
from fd_scale.teachers import load
from fd_scale.teachers.fingerprint import fingerprint
from fd_scale.timm_maps import MapForm
from models.vit import SHARED_TABLE, unshare

NETWORK = "network."
"""Before the names of the network in a classifier."""
HEAD = "head."
"""Before the names of its last layer."""
NORM = "norm."
"""Before the names of its norm, which stands where the network's final one was, under the same name."""

STATISTICS = "pretrained_cfg"
"""Argument of a timm teacher that names a tag: no argument of the architecture."""
STUDENT_FIELDS = ("position", "layer_scale", "drop_path")
"""Arguments of an architecture of ``models`` that are fields of a student."""


@dataclass(frozen=True)
class Weights:
    """A network as it was found: how it is built, and its tensors."""

    spec: recipes.Student
    tensors: dict[str, Tensor]
    label: str
    """What it is called in records."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    classes: tuple[str, ...] | None = None
    """Of a fine-tuned run: what the rows of its head are."""
    head: Mapping[str, Tensor] | None = None
    """Of a fine-tuned run: ``weight`` and ``bias`` of its last layer."""


@dataclass(frozen=True)
class Trainable:
    """A network that can be trained, and what must be known of it."""

    network: nn.Module
    form: MapForm
    spec: recipes.Student
    mean: tuple[float, ...]
    std: tuple[float, ...]
    record: dict[str, Any]
    """The fingerprint of the weights that training starts from."""
    found: Weights

    @property
    def input_size(self) -> int:
        """Side of the square input, pixels."""
        return self.spec.input_size


def prepare(start: Start) -> Trainable:
    """The network of a recipe's ``start``, on the CPU, in float32.

    Raises ``SourceError`` for a word that names no trainable network, ``RunError`` for weights that do not
    fit, and the errors of runs and teachers.
    """
    return _fitted(find(start), start)


def find(start: Start) -> Weights:
    """The weights that ``start`` names, as they lie there."""
    if not start.network:
        raise SourceError("start.network is not set: name a run, an exported file or LIBRARY:NAME@WEIGHTS")
    text = start.network
    named = meaning(text, input_size=start.input_size)
    refuse_unused(text, named, step=start.step, input_size=None)
    if start.weights == "average" and isinstance(named, LibraryNetwork | ExportedFile):
        raise SourceError(f"start.weights='average' is for runs, and {text} is none: set raw")
    if isinstance(named, LibraryNetwork):
        return _of_library(named, text)
    if isinstance(named, ExportedFile):
        with safe_open(named.path, framework="pt") as file:
            metadata = file.metadata() or {}
        network = load_student(named.path)
        spec = recipes.Student.model_validate_json(metadata["student"])
        return Weights(spec, dict(network.state_dict()), label(text))
    average = named.average or start.weights == "average"
    checkpoint = choose(named.folder, start.step)
    name = label(f"{named.folder.path}{EMA * average}", checkpoint.step)
    if isinstance(named, LabelledRun):
        return _of_tuned(named.recipe, checkpoint, name, average=average)
    spec = named.folder.read_recipe().student
    return Weights(spec, student_tensors(checkpoint, average=average), name)


def _of_library(asked: LibraryNetwork, text: str) -> Weights:
    spec = asked.spec
    if spec.library == "open_clip":
        raise SourceError(
            f"{text} cannot be fine-tuned: name the same network in timm, which holds CLIP's towers "
            "(timm:vit_base_patch16_clip_quickgelu_224.openai)"
        )
    taught = load(spec, device="cpu", dtype=torch.float32, seed=asked.seed)
    tensors = dict(taught.network.state_dict())
    own = spec.library == "models"
    position: str | None = None
    if own and spec.architecture.startswith("vit_"):
        position = "shared_rpb" if SHARED_TABLE in tensors else "ape"
    values = {
        "architecture": spec.architecture if own else TIMM + spec.architecture,
        "input_size": taught.input_size,
        "drop_path": 0.0,
        "position": position,
        "layer_scale": 0.1 if position and any("gamma_1" in name for name in tensors) else None,
        "arguments": {k: v for k, v in spec.arguments.items() if k not in (STATISTICS, *STUDENT_FIELDS)},
    }
    return Weights(recipes.Student.model_validate(values), tensors, label(text), taught.mean, taught.std)


def _of_tuned(tuned: TransferRecipe, checkpoint: Checkpoint, name: str, *, average: bool) -> Weights:
    """The network of a fine-tuned run: where it started from, with what was trained laid over it."""
    kind, begun = kind_of_weights(checkpoint, average=average), prepare(tuned.start)
    pieces = Pieces(checkpoint)
    names = [n for n in checkpoint.manifest["parameters"] if n.startswith((NETWORK, NORM, HEAD))]
    trained = {n: pieces.whole(kind, n) for n in names}
    tensors = dict(begun.network.state_dict())
    tensors |= {n.removeprefix(NETWORK): t for n, t in trained.items() if not n.startswith(HEAD)}
    head = {n.removeprefix(HEAD): t for n, t in trained.items() if n.startswith(HEAD)}
    classes = checkpoint.facts["classes"]
    return Weights(
        begun.spec,
        tensors,
        name,
        begun.mean,
        begun.std,
        tuple(classes),
        head,
    )


def _fitted(found: Weights, start: Start) -> Trainable:
    """The network as ``start`` wants it: size, drop path, one position table or one per block."""
    spec, tensors = found.spec, found.tensors
    changes: dict[str, Any] = {
        "drop_path": start.drop_path,
        "input_size": start.input_size or spec.input_size,
    }
    if start.position == "unshare" and SHARED_TABLE in tensors and spec.position == "shared_rpb":
        changes["position"] = "rpb"
        tensors = unshare(tensors)
    wanted = spec.model_copy(update=changes)
    network = build_backbone(wanted)
    form = map_form(network, wanted)
    if wanted.input_size != spec.input_size:
        with torch.device("meta"):
            old = build_backbone(spec)
        grid = getattr(old, "grid", None) or _side(found, form, spec, wanted)
        tensors = resized(tensors, tuple(grid), form.grid)
    _load(network, tensors, start.network)
    record = fingerprint(
        network.state_dict(),
        start=start.network,
        architecture=wanted.architecture,
        input_size=wanted.input_size,
        position=wanted.position,
        mean=found.mean,
        std=found.std,
    )
    return Trainable(network, form, wanted, found.mean, found.std, record, found)


def _side(found: Weights, form: MapForm, spec: recipes.Student, wanted: recipes.Student) -> tuple[int, int]:
    """The grid of a timm network at its own size, by the stride that it has at the other one."""
    stride = wanted.input_size // form.grid[0]
    return spec.input_size // stride, spec.input_size // stride


def _load(network: nn.Module, tensors: Mapping[str, Tensor], name: str) -> None:
    if wrong := misfits(network, tensors, "network"):
        raise RunError(
            f"the weights of {name} do not fit ({len(wrong)} tensors):\n  "
            + "\n  ".join(wrong[:6])
            + "\ncheck start.network and start.input_size"
        )
    network.load_state_dict(dict(tensors))
