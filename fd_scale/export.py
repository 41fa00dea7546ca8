"""From a run to weights that anyone can load: one safetensors file of the student alone, and its model card.

The tensors are read straight from a checkpoint's fragments, on one process, without an engine or a GPU. The
teacher and the projector stay behind; architectures of ``models`` carry timm's names, so the file loads in
either.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fd_scale import __version__
from fd_scale.engine.checkpoint import Checkpoint, Pieces, committed, faults, kind_of_weights
from fd_scale.errors import RunError
from fd_scale.run.folder import RunFolder, write_atomically
from fd_scale.run.recipe import Recipe, Student
from fd_scale.student import build_backbone, loading_recipe

BACKBONE = "backbone."
EMBEDDER = "embedder."
"""Before the names of the head to CLIP's embedding."""
EMBEDDING_SUFFIX = ".embedding.safetensors"
"""Of the file beside the weights that holds this head, where the run has one."""


@dataclass(frozen=True)
class Export:
    """An exported student: the weights file and its card."""

    weights: Path
    card: Path


def export(run: Path, *, step: int | None = None, average: bool = False) -> Export:
    """Write the student of a run's checkpoint (the newest, or of ``step``) to ``<run>/exports``; with
    ``average`` the moving average of its weights.

    The file holds float32 tensors under the architecture's own names, and metadata that says how to build it.
    Raises ``RunError`` when ``run`` is not a run directory, has no such checkpoint or no average, or the
    checkpoint is damaged.
    """
    folder = RunFolder.at(run)
    recipe = folder.read_recipe()
    checkpoint = choose(folder, step)
    tensors = student_tensors(checkpoint, average=average)
    weights = folder.exports / f"step-{checkpoint.step:08d}{'-ema' * average}.safetensors"
    weights.parent.mkdir(parents=True, exist_ok=True)
    loading = loading_recipe(recipe)
    write_weights(
        weights,
        tensors,
        recipe.student,
        step=str(checkpoint.step),
        weights="average" if average else "raw",
        loading=json.dumps(loading),
    )
    if head := embedder_tensors(checkpoint, average=average):
        beside = embedding_file(weights)
        partial = beside.with_suffix(".partial")
        save_file(head, partial)
        partial.replace(beside)
    card = weights.with_suffix(".md")
    kind = f"moving average, decay {recipe.optim.average_decay:g} per step; float32" if average else "float32"
    write_atomically(card, _card(recipe, checkpoint, loading, weights, kind, _last_metrics(folder)))
    return Export(weights, card)


def write_weights(path: Path, tensors: Mapping[str, Tensor], spec: Student, **facts: str) -> None:
    """Write a backbone's tensors, by the architecture's own names, as the one form of file that every command
    here takes for a network; ``facts`` go into its metadata."""
    metadata = {
        "format": "pt",
        "fd_scale": __version__,
        "student": json.dumps(spec.model_dump(mode="json")),
        **facts,
    }
    partial = path.with_suffix(".partial")
    save_file(dict(tensors), partial, metadata=metadata)
    partial.replace(path)


def student_tensors(checkpoint: Checkpoint, *, average: bool = False) -> dict[str, Tensor]:
    """The backbone's parameters (float32) and buffers by the architecture's own names; with ``average`` the
    moving average of the parameters. Raises ``RunError`` where there is none."""
    pieces, kind = Pieces(checkpoint), kind_of_weights(checkpoint, average=average)
    names = [name for name in checkpoint.manifest["parameters"] if name.startswith(BACKBONE)]
    tensors = {name.removeprefix(BACKBONE): pieces.whole(kind, name) for name in names}
    buffers = {name: value for name, value in pieces.buffers().items() if name.startswith(BACKBONE)}
    return tensors | {name.removeprefix(BACKBONE): value.contiguous() for name, value in buffers.items()}


def embedder_tensors(checkpoint: Checkpoint, *, average: bool = False) -> dict[str, Tensor]:
    """``weight`` (E, D) and ``bias`` (E,) of the head to CLIP's embedding; empty for a run without one. With
    ``average`` as of ``student_tensors``."""
    pieces, kind = Pieces(checkpoint), kind_of_weights(checkpoint, average=average)
    names = [name for name in checkpoint.manifest["parameters"] if name.startswith(EMBEDDER)]
    return {name.removeprefix(EMBEDDER): pieces.whole(kind, name) for name in names}


def embedding_file(weights: Path) -> Path:
    """Where the head to CLIP's embedding lies beside exported weights."""
    return weights.with_name(weights.stem + EMBEDDING_SUFFIX)


def choose(folder: RunFolder, step: int | None) -> Checkpoint:
    """The checkpoint of ``step``, or the newest. Raises ``RunError`` where there is none, or it is
    damaged."""
    available = committed(folder.checkpoints)
    if not available:
        raise RunError(f"{folder.path} has no checkpoint yet")
    wanted = available[-1] if step is None else next((c for c in available if c.step == step), None)
    if wanted is None:
        steps = ", ".join(str(c.step) for c in available)
        raise RunError(f"{folder.path} has no checkpoint of step {step}; it has {steps} (--step)")
    if wrong := faults(wanted):
        raise RunError(
            f"checkpoint {wanted.path.name} is damaged: {'; '.join(wrong)}; choose another with --step"
        )
    return wanted


def _last_metrics(folder: RunFolder) -> dict[str, Any]:
    if not folder.metrics.is_file():
        return {}
    lines = folder.metrics.read_text().splitlines()
    return json.loads(lines[-1]) if lines else {}


def _card(
    recipe: Recipe,
    checkpoint: Checkpoint,
    loading: dict[str, Any],
    weights: Path,
    kind: str,
    metrics: dict[str, Any],
) -> str:
    facts = checkpoint.facts
    rows = "\n".join(f"| {key} | {value} |" for key, value in sorted(metrics.items()))
    return f"""# {recipe.run_name}, step {checkpoint.step:,}

A `{recipe.student.architecture}` student, distilled from `{recipe.teacher.architecture}`
({recipe.teacher.weights}) by fd_scale {__version__}: {recipe.objective.granularity} map, target
`{recipe.objective.target}`, step {checkpoint.step:,} of {recipe.steps:,}.

```python
{_loading_code(loading, weights.name)}
```

Input: {recipe.student.input_size} px, normalised with ImageNet's mean and standard deviation.
Weights: {kind}.{_embedding_words(checkpoint, weights)}

## Teacher

```json
{json.dumps(facts.get("teacher", {}), indent=2)}
```

## Data

```json
{json.dumps(facts.get("data", {}), indent=2)}
```

## Last metrics

| quantity | value |
|---|---|
{rows}

## Recipe

```json
{recipe.to_json().strip()}
```
"""


def _embedding_words(checkpoint: Checkpoint, weights: Path) -> str:
    if not embedder_tensors(checkpoint):
        return ""
    name = embedding_file(weights).name
    return f"""

`{name}` takes the class token (or the mean patch of a network without one) to its teacher's joint
embedding of images and texts: `class_token @ weight.T + bias`, compared by cosine."""


def _loading_code(loading: dict[str, Any], file: str) -> str:
    """Python that builds the network and loads the file, every key matched."""
    name = loading["architecture"]
    arguments = "".join(f",\n    {key}={value!r}" for key, value in loading["arguments"].items())
    if loading["library"] == "timm":
        built = f"timm.create_model(\n    {name!r},\n    checkpoint_path={file!r}{arguments},\n)"
        return f"import timm\n\nmodel = {built}"
    return (
        "import models  # from fd_scale\nfrom safetensors.torch import load_file\n\n"
        f"model = models.create(\n    {name!r}{arguments},\n)\nmodel.load_state_dict(load_file({file!r}))"
    )


def load_student(weights: Path) -> torch.nn.Module:
    """The exported student as a module of its own architecture, in eval mode, every key matched."""
    try:
        with safe_open(weights, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise RunError(f"weights file {weights} does not exist") from None
    except (SafetensorError, OSError) as error:
        raise RunError(f"weights file {weights} cannot be read: {error}") from None
    if "student" not in metadata:
        raise RunError(
            f"{weights} was not exported by fd_scale: its metadata names no student; a file of "
            f"timm's weights is named timm:NAME@{weights}"
        )
    backbone = build_backbone(Student.model_validate_json(metadata["student"]))
    backbone.load_state_dict(tensors, strict=True)
    return backbone.eval()
