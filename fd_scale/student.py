"""The student: a backbone, one projector per teacher, and the front door for pixels.

It is what the engine trains. Parameter names are ``backbone.*``, under the architecture's own names,
``projectors.<n>.*``, and ``embedder.*`` where a recipe keeps CLIP's embedding. Teachers and the loss stay
outside; of a teacher only the form of its map is used.

The student sees pixels by ImageNet's mean and std whatever its teachers see, as in the released code: they
belong to the student, which outlives its teachers.

Shape letters: B images, N tokens, M selected tokens, D channels, E CLIP's joint embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

import models
from fd_scale import timm_maps
from fd_scale.errors import RecipeError
from fd_scale.objective.features import Features
from fd_scale.objective.targets import has_class_token, mean_as_class, select
from fd_scale.pixels import IMAGENET_MEAN, IMAGENET_STD, normalise
from fd_scale.run import recipe as recipes
from fd_scale.timm_maps import ArchitectureError, MapForm
from models.projector import Projector
from models.vit import VisionTransformer, export_hint

TIMM = "timm:"
POOLED = (1, 1)
"""The grid of a class token or a mean patch that is regressed alone."""


class Projection(Protocol):
    """What a student needs to know of CLIP's projection."""

    @property
    def width(self) -> int:
        """Channels of the joint embedding."""


class MapLike(Protocol):
    """What a student needs to know of a teacher: the form of its map."""

    @property
    def name(self) -> str:
        """For messages."""

    @property
    def width(self) -> int:
        """Channels of a token."""

    @property
    def grid(self) -> tuple[int, int]:
        """(height, width) in patches."""

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the grid; 0 when there is no class token."""

    @property
    def projection(self) -> Projection | None:
        """A CLIP's, from its class token to the joint embedding."""


class MapLoss(Protocol):
    """A loss that projects a student's tokens itself."""

    def __call__(
        self, tokens_BMD: Tensor, projectors: Sequence[Any], embedding_B1E: Tensor | None = None
    ) -> Tensor:
        """The loss, a scalar."""


class Student(nn.Module):
    """uint8 pixels (B, 3, S, S) to the tokens (B, M, D) that each teacher's are compared with.

    ``mean`` and ``std`` are plain numbers, so that casting or sharding the module leaves them exact.
    """

    mean = IMAGENET_MEAN
    std = IMAGENET_STD

    def __init__(
        self,
        backbone: nn.Module,
        form: MapForm,
        projectors: Sequence[Projector],
        *,
        input_size: int,
        objective: recipes.Objective,
        embedder: nn.Linear | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.projectors = nn.ModuleList(projectors)
        self.embedder = embedder
        self.form = form
        self.input_size = input_size
        self.objective = objective

    def forward(self, pixels: Tensor, loss: MapLoss | None = None) -> tuple[Tensor, ...] | Tensor:
        """One projected map per teacher, and last the embedding (B, 1, E) where there is a head for it, in
        the dtype of the parameters (or of autocast); with ``loss``, what it makes of the tokens, the
        projectors and the embedding, so that no map is ever whole."""
        dtype = next(self.parameters()).dtype
        # Through the backbone's own call: ZeRO gathers a module's parameters when it is called.
        output = self.backbone(normalise(pixels, self.mean, self.std, dtype))
        features = timm_maps.as_features(output, self.form)
        embeddings = () if self.embedder is None else (self.embedder(image_token(features)[:, None]),)
        granularity, cls = self.objective.granularity, self.objective.cls
        if cls == "mean" and has_class_token(granularity=granularity, cls=cls):
            features = mean_as_class(features)
        # Selected first, since a linear map commutes with it: nothing is projected that is not regressed.
        tokens_BMD = select(features, granularity=granularity, cls=cls)
        if loss is not None:
            return loss(tokens_BMD, [*self.projectors], *embeddings)
        return (*(projector(tokens_BMD) for projector in self.projectors), *embeddings)

    def set_grad_checkpointing(self, enable: bool = True, **granularity: Any) -> None:
        """Recompute the backbone's blocks in the backward pass; see ``recompute``."""
        recompute(self.backbone, enable, **granularity)


def image_token(features: Features) -> Tensor:
    """What stands for the whole image (B, D): the class token, or the mean patch where there is none."""
    return features.tokens_BND[:, 0] if features.num_prefix_tokens else features.patches_BND.mean(dim=1)


def recompute(backbone: nn.Module, enable: bool = True, **granularity: Any) -> None:
    """Recompute a network's blocks in the backward pass; ``granularity`` (``every``, ``stages``) says which.
    Raises ``RecipeError`` where it cannot."""
    try:
        backbone.set_grad_checkpointing(enable, **granularity)  # type: ignore[operator]
    except models.ModelError as error:
        raise RecipeError(f"{error} (activation_checkpointing in the scale file)") from error
    except (AttributeError, AssertionError) as error:
        if enable:
            raise RecipeError(
                f"{type(backbone).__name__} cannot recompute its activations: set "
                "activation_checkpointing to false in the scale file"
            ) from error
    except TypeError as error:
        raise RecipeError(
            f"{type(backbone).__name__} recomputes all of its blocks or none, not {granularity}: set "
            "activation_checkpointing to true or false in the scale file"
        ) from error


def build_student(recipe: recipes.Recipe, teachers: Sequence[MapLike]) -> Student:
    """The student of a recipe for these teachers, with random weights from PyTorch's global generator even
    where it is to ``begin`` with others.

    Raises ``RecipeError`` for an unknown architecture, and for maps that cannot be compared as the recipe
    asks.
    """
    objective = recipe.objective
    backbone = build_backbone(recipe.student)
    form = map_form(backbone, recipe.student)
    _check_class_tokens(recipe.student, objective, form, teachers)
    projectors = [_projector(recipe, form, teacher) for teacher in teachers]
    return Student(
        backbone,
        form,
        projectors,
        input_size=recipe.student.input_size,
        objective=objective,
        embedder=_embedder(objective, form, teachers),
    )


def build_backbone(spec: recipes.Student) -> nn.Module:
    """The backbone alone; called with normalised pixels, it gives its map after the final norm.

    Raises ``RecipeError`` for an unknown architecture and for arguments that it does not take.
    """
    try:
        if spec.architecture.startswith(TIMM):
            return timm_maps.build(
                spec.architecture.removeprefix(TIMM),
                input_size=spec.input_size,
                arguments=spec.arguments,
                **_timm_arguments(spec),
            )
        return models.create(
            spec.architecture, input_size=spec.input_size, drop_path=spec.drop_path, **_own_arguments(spec)
        )
    except (ArchitectureError, models.ModelError) as error:
        raise RecipeError(f"{error} (student.architecture, student.arguments)") from error


def begin(student: Student, spec: recipes.Student) -> None:
    """Put the weights that the recipe begins with, if there are any, into the backbone.

    Raises ``RecipeError`` for a file that cannot be read, or whose tensors are not those of the backbone.
    """
    if spec.weights is None:
        return
    try:
        tensors = load_file(spec.weights)
    except (OSError, SafetensorError) as error:
        raise RecipeError(
            f"student.weights={spec.weights!r} is no readable .safetensors file ({error}): name "
            "one, or set null"
        ) from error
    if wrong := misfits(student.backbone, tensors, "student"):
        raise RecipeError(
            f"student.weights={spec.weights!r} do not fit {spec.architecture} ({len(wrong)} tensors):\n  "
            + "\n  ".join(wrong[:6])
            + "\ncheck student.architecture, student.position, student.layer_scale and student.arguments"
        )
    student.backbone.load_state_dict(tensors)


def misfits(network: nn.Module, tensors: Mapping[str, Tensor], role: str) -> list[str]:
    """A line for each tensor that the network, in its ``role``, and the given ones do not have alike."""
    own = network.state_dict()
    return [
        f"{name}: {_shape(tensors, name)} there, {_shape(own, name)} in the {role}"
        for name in sorted(own.keys() | tensors.keys())
        if _shape(tensors, name) != _shape(own, name)
    ]


def _shape(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...] | str:
    return tuple(tensors[name].shape) if name in tensors else "absent"


def map_form(backbone: nn.Module, spec: recipes.Student) -> MapForm:
    """How the map of a built backbone lies. Raises ``RecipeError`` when it gives none."""
    if spec.architecture.startswith(TIMM):
        return _timm_form(backbone, spec)
    stated: Any = backbone
    prefix = stated.num_prefix_tokens
    return MapForm("tokens", stated.grid, prefix, has_class_token=prefix > 0, width=stated.embed_dim)


def _timm_form(backbone: nn.Module, spec: recipes.Student) -> MapForm:
    """Read off one grey image, for which the backbone's own call must give the map that a teacher's would
    be."""
    size, training = spec.input_size, backbone.training
    grey = torch.zeros(1, 3, size, size, device=next(backbone.parameters()).device)
    try:
        with torch.no_grad():
            output = backbone.eval()(grey)
            as_teacher = timm_maps.final_map(backbone, grey)
        form = timm_maps.form_of(backbone, as_teacher)
    except (ArchitectureError, RuntimeError, AssertionError, ValueError) as error:
        raise RecipeError(
            f"student {spec.architecture} gives no map at student.input_size={size}: {error}"
        ) from error
    finally:
        backbone.train(training)
    if output.shape != as_teacher.shape or not torch.equal(output, as_teacher):
        raise RecipeError(
            f"student {spec.architecture} does more than a norm after its map, which cannot be taken off: "
            "choose another student.architecture"
        )
    return form


def loading_recipe(recipe: recipes.Recipe) -> dict[str, Any]:
    """How others build the backbone for its exported weights: ``library``, ``architecture`` and
    ``arguments``.

    ``timm``: ``timm.create_model(architecture, checkpoint_path=file, **arguments)``; ``models``:
    ``models.create(architecture, **arguments)`` and then ``load_state_dict``.
    """
    spec = recipe.student
    if spec.architecture.startswith(TIMM):
        name = spec.architecture.removeprefix(TIMM)
        arguments = {**spec.arguments, "num_classes": 0, "global_pool": ""}
        if timm_maps.takes_img_size(name):
            arguments["img_size"] = spec.input_size
        return {"library": "timm", "architecture": name, "arguments": arguments}
    with torch.device("meta"):
        backbone = build_backbone(spec)
    if isinstance(backbone, VisionTransformer):
        return {"library": "timm", **export_hint(backbone)}
    arguments = {"input_size": spec.input_size, **_own_arguments(spec)}
    return {"library": "models", "architecture": spec.architecture, "arguments": arguments}


def _timm_arguments(spec: recipes.Student) -> dict[str, Any]:
    """What the recipe's other fields, and the map, make of timm's arguments."""
    for name, reason in (
        ("drop_path_rate", "student.drop_path says it"),
        ("global_pool", "maps are not pooled"),
    ):
        if name in spec.arguments:
            raise RecipeError(f"student.arguments.{name} is not the recipe's to give: {reason}")
    # Not every family knows the argument, so that it is given only where there is something to drop.
    drop_path = {"drop_path_rate": spec.drop_path} if spec.drop_path > 0 else {}
    return {"num_classes": 0, "global_pool": "", **drop_path}


def _own_arguments(spec: recipes.Student) -> dict[str, Any]:
    """Arguments of ``models.create`` beside size and drop path; a recipe has a position for its ViTs
    alone."""
    arguments: dict[str, Any] = dict(spec.arguments)
    if spec.position is not None:
        arguments |= {"position": spec.position, "layer_scale": spec.layer_scale}
    return arguments


def _check_class_tokens(
    spec: recipes.Student, objective: recipes.Objective, form: MapForm, teachers: Sequence[MapLike]
) -> None:
    if not has_class_token(granularity=objective.granularity, cls=objective.cls):
        return
    asked = f"objective.cls={objective.cls!r} with objective.granularity={objective.granularity!r}"
    others = "objective.cls=drop" if objective.granularity == "full" else "objective.granularity=gap"
    for teacher in teachers:
        if teacher.num_prefix_tokens == 0:
            raise RecipeError(
                f"{asked} needs a teacher with a class token, {teacher.name} has none: set {others}"
            )
    if objective.cls == "match" and not form.has_class_token:
        raise RecipeError(
            f"{asked} needs a student with a class token, {spec.architecture} has none: set {others}, or "
            "objective.cls=mean to regress the teacher's class token by the student's mean patch"
        )


def _projector(recipe: recipes.Recipe, form: MapForm, teacher: MapLike) -> Projector:
    objective = recipe.objective
    if objective.granularity != "full":
        return Projector(
            form.width, teacher.width, from_grid=POOLED, to_grid=POOLED, num_prefix_tokens=0, resample="exact"
        )
    if objective.grid == "exact" and form.grid != teacher.grid:
        raise RecipeError(_unequal_grids(recipe.student, form, teacher))
    return Projector(
        form.width,
        teacher.width,
        from_grid=form.grid,
        to_grid=teacher.grid,
        num_prefix_tokens=int(has_class_token(granularity="full", cls=objective.cls)),
        resample=objective.grid,
    )


def _embedder(objective: recipes.Objective, form: MapForm, teachers: Sequence[MapLike]) -> nn.Linear | None:
    """The head to the first teacher's embedding. Raises ``RecipeError`` for a teacher that has none."""
    if not objective.embedding_weight or not teachers:
        return None
    if teachers[0].projection is None:
        raise RecipeError(
            f"objective.embedding_weight={objective.embedding_weight:g} regresses CLIP's embedding, but "
            f"{teachers[0].name} is no CLIP with a projection of its class token: set it to 0, or choose "
            "another teacher"
        )
    return nn.Linear(form.width, teachers[0].projection.width)


def _unequal_grids(spec: recipes.Student, form: MapForm, teacher: MapLike) -> str:
    stride = spec.input_size // form.grid[0]
    return (
        f"student {spec.architecture} at {spec.input_size} px has a grid of {_by(form.grid)}, teacher "
        f"{teacher.name} one of {_by(teacher.grid)}, and objective.grid=exact needs equal ones: set "
        f"student.input_size={stride * teacher.grid[0]}, another teacher.input_size, or "
        "objective.grid=bilinear"
    )


def _by(grid: tuple[int, int]) -> str:
    return f"{grid[0]}x{grid[1]}"
