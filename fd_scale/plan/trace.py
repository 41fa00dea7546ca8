"""What does one micro-step hold and compute? Counted by running the real networks without storage.

Teacher, student, loss and backward pass run as the loop runs them, with the real checkpointing, on tensors
that have shapes and dtypes and no memory, and a ``Ledger`` watches. ``device="cuda"`` stands for the kernels
of a GPU: the scaled dot product that PyTorch takes there, with what it keeps, and the fused loss;
``device="cpu"`` is the CPU itself. Weights, sharding and the optimizer are left to ``memory.py``.

Shape letters: B images, N tokens, D channels, H heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from fd_scale.objective import Objective, kernels
from fd_scale.objective.losses import cosine_distance
from fd_scale.objective.targets import for_kernels
from fd_scale.plan.course import MANY, Course, Trace
from fd_scale.plan.ledger import Ledger
from fd_scale.plan.networks import without_storage
from fd_scale.run.recipe import Recipe
from fd_scale.student import Student
from fd_scale.teachers import Guest, Teacher, targets

Device = Literal["cuda", "cpu"]

TEACHER, FORWARD, LOSS, BACKWARD = "teacher", "forward", "loss", "backward"
GRADIENTS, IMAGES, MAPS, WORKSPACE = "gradients", "images", "teacher maps", "workspace"
GATHERED, REDUCTION = "gathered weights", "copies in a reduction"
BIAS_ALIGNMENT = 16
"""Elements to which PyTorch pads the last side of an attention bias for the memory-efficient kernel."""


@dataclass(frozen=True)
class Sharding:
    """What ZeRO-3 does with weights and gradients in the course of a pass."""

    bucket_numel: int
    """Gradients are reduced when so many elements have come."""
    reduction_bytes: int
    """Per element of a bucket, of the copies made while it is reduced."""
    threshold: int
    """Smaller weights are whole always; each other one is gathered until its gradient has come."""


@dataclass(frozen=True)
class Networks:
    """A recipe's networks without storage, ready to be traced."""

    recipe: Recipe
    teacher: Teacher
    student: Student
    device: Device
    fake: FakeTensorMode | None

    @classmethod
    def build(cls, recipe: Recipe, *, bf16: bool, device: Device) -> Networks:
        """In the engine's dtype. Raises the errors of the run itself for wrong input."""
        dtype = torch.bfloat16 if bf16 else torch.float32
        teacher, student = without_storage(recipe, dtype)
        student.to(dtype)
        fake = None
        if device == "cpu":
            fake = FakeTensorMode(allow_non_fake_inputs=True)
            with fake:
                for module in (teacher.network, student):
                    module.to_empty(device="cpu")
        return cls(recipe, teacher, student, device, fake)

    def trace(self, micro_batch: int, **how: Any) -> Trace:
        """One micro-step of so many images; ``how`` as of ``course``."""
        return self.course(images=micro_batch, **how).at(micro_batch)

    def course(
        self,
        *,
        images: int = MANY,
        recompute: bool,
        keeps_gradients: bool,
        accumulates: bool = False,
        sharding: Sharding | None = None,
        granularity: Mapping[str, Any] | None = None,
    ) -> Course:
        """One micro-step, from which that of any number of images follows; exactly that of ``images``.

        ``recompute``: activation checkpointing; ``granularity``: of which blocks, the arguments of a model's
        ``set_grad_checkpointing``, all when None. ``keeps_gradients``: the engine leaves them in ``.grad``
        until the step; else each is taken away as it comes. ``accumulates``: a micro-batch went before, whose
        gradients are there. ``sharding``: with the traffic of ZeRO-3.
        """
        self.student.set_grad_checkpointing(recompute, **(granularity or {}))
        ledger = Ledger(images)
        ledger.know([*self.student.parameters(), *self.student.buffers()])
        network = self.teacher.network
        ledger.know([*network.parameters(), *network.buffers()])
        with ExitStack() as stack:
            if self.fake is not None:
                stack.enter_context(self.fake)
            else:
                stack.enter_context(_DeviceAttention())
            stack.enter_context(ledger)
            stack.enter_context(_labels(ledger, self.student))
            stack.enter_context(
                _gradients(ledger, self.student, keeps=keeps_gradients, there=accumulates, sharding=sharding)
            )
            taught, forwarded = self._run(ledger)
            return Course.of(ledger, taught=taught, forwarded=forwarded, sharded=sharding is not None)

    def _run(self, ledger: Ledger) -> tuple[int, int]:
        """How much has happened when the teacher, and when the forward pass is done."""
        device = "meta" if self.fake is None else "cpu"
        sizes = {self.student.input_size, self.teacher.input_size}
        with ledger.during(IMAGES):
            pixels = {
                side: torch.empty(ledger.images, 3, side, side, dtype=torch.uint8, device=device)
                for side in sizes
            }
            valid = torch.empty(ledger.images, dtype=torch.bool, device=device)
        with ledger.during(TEACHER):
            taught = targets([Guest(self.teacher, self.recipe.objective)], pixels)
            for number in range(len(taught)):  # a name of its own would keep the last one alive
                ledger.relabel(taught[number], MAPS)
        after_teacher = len(ledger.history)
        with ledger.during(FORWARD):
            predicted = self.student(pixels[self.student.input_size])
        after_forward = len(ledger.history)
        with ledger.during(LOSS):
            loss = self._loss(predicted, taught, valid)
            del predicted, taught
        with ledger.during(BACKWARD):
            ledger.label = WORKSPACE
            run_backward(loss)
        return after_teacher, after_forward

    def _loss(self, predicted: tuple[Tensor, ...], taught: Sequence[Tensor], valid: Tensor) -> Tensor:
        objective = self.recipe.objective
        if self.device == "cpu":
            return Objective(objective)(predicted, taught, valid)
        weight_BN = valid[:, None].float().expand(taught[0].shape[:2])
        tokens_BND, target = for_kernels(taught[0], objective.target)
        loss: Tensor = kernels.whitened_smooth_l1(
            predicted[0], tokens_BND, beta=objective.beta, target=target, token_weight=weight_BN
        ).value
        if objective.embedding_weight:
            loss = loss + objective.embedding_weight * cosine_distance(predicted[-1], taught[-1], valid)
        return loss


def run_backward(loss: Tensor) -> None:
    """The backward pass, in which function modes stay on.

    ``Tensor.backward`` is itself a function that a mode takes, and so turns the mode off for all that runs
    inside; recomputed blocks would then take other kernels than they took at first.
    """
    torch.autograd.Variable._execution_engine.run_backward(
        (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


class _DeviceAttention(TorchFunctionMode):
    """The scaled dot product as a GPU runs it: flash attention without a bias, the memory-efficient kernel
    with one, whose bias is padded and whose bias's gradient is as large as all images' scores. The meta
    device itself would write the scores out."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        return _scaled_dot_product(*args, **kwargs)


def _scaled_dot_product(
    query_BHND: Tensor,
    key_BHMD: Tensor,
    value_BHMD: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    half = query_BHND.dtype in (torch.bfloat16, torch.float16)
    if attn_mask is None and half:
        return torch.ops.aten._scaled_dot_product_flash_attention(
            query_BHND, key_BHMD, value_BHMD, dropout_p, is_causal, False, scale=scale
        )[0]
    if attn_mask is not None:
        num_keys = key_BHMD.shape[2]
        if missing := -num_keys % BIAS_ALIGNMENT:
            attn_mask = F.pad(attn_mask, (0, missing))[..., :num_keys]
        attn_mask = attn_mask.expand(*query_BHND.shape[:3], num_keys)
    needs_lse = torch.is_grad_enabled()
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        query_BHND, key_BHMD, value_BHMD, attn_mask, needs_lse, dropout_p, is_causal, scale=scale
    )[0]


@contextmanager
def _labels(ledger: Ledger, student: Student) -> Iterator[None]:
    """Names of the student's parts on what they make; attention apart, wherever it is."""
    handles = []
    for name, module in student.named_modules():
        if label := part_name(name, module):
            handles += ledger.labelled(module, label)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def part_name(name: str, module: nn.Module) -> str:
    """The label of a module of the student, or an empty string for one that has its parent's."""
    if type(module).__name__.endswith("Attention"):
        return f"attention of {_place(name)}"
    words = name.split(".")
    if words[0] == "projectors":
        return "projector" if len(words) == 2 else ""
    if name == "embedder":
        return "projector"
    is_block = len(words) == 3 and words[1] in ("blocks", "layers", "stages")
    is_child = len(words) == 2 and words[1] not in ("blocks", "layers", "stages", "rel_pos_bias")
    return _place(name) if words[0] == "backbone" and (is_block or is_child) else ""


def _place(name: str) -> str:
    """Stage n of a pyramid, the blocks of a ViT, or a child of the backbone, from a module's name."""
    words = name.split(".")
    if words[1] in ("layers", "stages"):
        return f"stage {int(words[2]) + 1}"
    return words[1].replace("_", " ")


@contextmanager
def _gradients(
    ledger: Ledger, student: Student, *, keeps: bool, there: bool, sharding: Sharding | None
) -> Iterator[None]:
    """What the engine does with gradients as they come, and with gathered weights."""
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    gathered: dict[Tensor, Tensor] = {}
    if sharding is not None:
        with ledger.making(GATHERED):
            gathered = {p: torch.empty_like(p) for p in parameters if p.numel() >= sharding.threshold}
    waiting: list[Tensor] = []

    def arrived(parameter: Tensor) -> None:
        assert parameter.grad is not None  # the hook runs after it was accumulated
        if keeps:
            ledger.relabel(parameter.grad, GRADIENTS)
            return
        gathered.pop(parameter, None)
        if sharding is None:
            parameter.grad = None
            return
        if sum(p.numel() for p in waiting) + parameter.numel() > sharding.bucket_numel:
            reduce(sharding, parameter.device)
        waiting.append(parameter)
        if parameter.numel() <= sharding.bucket_numel:
            parameter.grad = None  # it was copied into the bucket; a larger one waits as it is
        else:
            ledger.relabel(parameter.grad, GRADIENTS)

    def reduce(how: Sharding, device: torch.device) -> None:
        with ledger.making(REDUCTION):
            numel = sum(parameter.numel() for parameter in waiting)
            torch.empty(numel * how.reduction_bytes, dtype=torch.uint8, device=device)
        for parameter in waiting:
            parameter.grad = None
        waiting.clear()

    if keeps and there:
        with ledger.during(GRADIENTS):
            for parameter in parameters:
                parameter.grad = torch.empty_like(parameter)
    handles = [parameter.register_post_accumulate_grad_hook(arrived) for parameter in parameters]
    try:
        yield
    finally:
        for handle, parameter in zip(handles, parameters, strict=True):
            handle.remove()
            parameter.grad = None
