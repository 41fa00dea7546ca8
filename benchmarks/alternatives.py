"""What of a step could be done otherwise, and does it pay? Other AdamWs, other ways to run the teacher and to
send the images, and a Swin V2 teacher whose position bias is kept.

None of it is part of the product. For ``benchmarks/step.py --parts``, on the step's own networks and images;
the teachers with a position bias are the same in every call.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import clock
from benchmarks.clock import Protocol
from benchmarks.step_setup import Setup
from fd_scale.objective.targets import whiten
from fd_scale.run import recipe as recipes
from fd_scale.teachers import load


def optimizers(parameters: Sequence[Tensor], device: str) -> dict[str, Callable[[], Any] | str]:
    """How AdamW could be computed over float32 copies of these parameters: makers, or why there is none."""

    def torch_adamw(**how: bool) -> Callable[[], Any]:
        return lambda: torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.05, **how)

    found: dict[str, Callable[[], Any] | str] = {
        "torch, fused": torch_adamw(fused=True),
        "torch, foreach": torch_adamw(foreach=True),
        "torch, one by one": torch_adamw(foreach=False, fused=False),
    }
    if device != "cuda":
        return found | {"DeepSpeed FusedAdam": "needs a CUDA device", "apex FusedAdam": "needs a CUDA device"}
    from deepspeed.ops.adam import FusedAdam

    found["DeepSpeed FusedAdam"] = lambda: FusedAdam(parameters, lr=1e-4, weight_decay=0.05)
    found["apex FusedAdam"] = "apex is not installed"
    if importlib.util.find_spec("apex") is not None:
        from apex.optimizers import FusedAdam as Apex

        found["apex FusedAdam"] = lambda: Apex(parameters, lr=1e-4, weight_decay=0.05, adam_w_mode=True)
    return found


def measure_optimizers(setup: Setup, protocol: Protocol) -> list[dict[str, Any]]:
    """A row for each AdamW; the floor is 28 bytes per parameter."""
    device, rows = setup.device.type, []
    shapes = [parameter.shape for parameter in setup.student.parameters()]
    parameters = [torch.randn(shape, device=device, requires_grad=True) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    count = sum(parameter.numel() for parameter in parameters)
    for name, make in optimizers(parameters, device).items():
        if isinstance(make, str):
            rows.append({"part": "optimizer", "name": name, "left_out": make})
            continue
        optimizer = make()
        times = clock.timed(optimizer.step, device, protocol)
        rows.append(
            {
                "part": "optimizer",
                "name": name,
                "us": times,
                "num_parameters": count,
                "gb_per_s": round(28 * count / times["median"] / 1e3, 2),
            }
        )
    return rows


def measure_teacher(setup: Setup, protocol: Protocol) -> list[dict[str, Any]]:
    """A row for each way of running the teacher, with the relative L2 error of its whitened targets."""
    device, guest = setup.device.type, setup.guests[0]
    pixels = setup.batches[0].to(setup.device)
    side = pixels.shape[-1]

    def plain() -> list[Tensor]:
        return [guest({side: pixels})]

    def inference() -> list[Tensor]:
        with torch.inference_mode():
            return plain()

    ways: dict[str, Callable[[], Any] | str] = {"no_grad": plain, "inference mode": inference}
    graph, float8 = "CUDA graph", "float8 (torchao, per row)"
    ways |= {graph: "needs a CUDA device", float8: "needs a CUDA device"}
    exact = whiten(plain()[0])
    outputs: dict[str, list[Tensor]] = {}
    if device == "cuda":
        ways[graph], outputs[graph] = clock.captured(plain, device)
        ways[float8] = "torchao is not installed"
    rows = [_teacher_row(name, way, outputs.get(name), exact, device, protocol) for name, way in ways.items()]
    if device == "cuda" and importlib.util.find_spec("torchao") is not None:
        from torchao import quantization

        # Last, for it replaces the teacher's weights.
        how = quantization.Float8DynamicActivationFloat8WeightConfig(granularity=quantization.PerRow())
        quantization.quantize_(guest.teacher.network, how)
        rows[-1] = _teacher_row(float8, plain, None, exact, device, protocol)
    return rows


def measure_transfer(setup: Setup, protocol: Protocol) -> list[dict[str, Any]]:
    """A row for each way of sending the images: on the stream of the step, which stands still meanwhile, or
    on one of its own, beside the work that is under way."""
    if setup.device.type != "cuda":
        return [{"part": "transfer", "name": "own stream", "left_out": "needs a CUDA device"}]
    pixels, own = setup.batches[0], torch.cuda.Stream()
    side = pixels.shape[-1]
    there = {side: pixels.to(setup.device)}

    def same() -> None:
        setup.guests[0](there)
        pixels.to(setup.device, non_blocking=True)

    def beside() -> None:
        with torch.cuda.stream(own):
            moved = pixels.to(setup.device, non_blocking=True)
        setup.guests[0](there)
        torch.cuda.current_stream().wait_stream(own)
        moved.record_stream(torch.cuda.current_stream())

    works: dict[str, clock.Work] = {
        "none, the teacher alone": lambda: setup.guests[0](there),
        "the step's stream": same,
        "own stream": beside,
    }
    times = clock.interleaved(works, setup.device.type, protocol)
    return [{"part": "transfer", "name": name, "us": found} for name, found in times.items()]


SWIN_TEACHERS = {
    "cuda": (("models", "swinv2_base", 128, 256), ("timm", "swinv2_base_window16_256", 128, 256)),
    "cpu": (("models", "swinv2_tiny", 2, 256), ("timm", "swinv2_tiny_window16_256", 2, 256)),
    "smoke": (("models", "swinv2_tiny", 1, 64), ("timm", "swinv2_tiny_window8_256", 1, 64)),
}
"""Library, architecture, images and their side, of the teachers whose position bias is kept."""


class Kept(nn.Module):
    """What a network gave once, given again."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, _: Tensor) -> Tensor:
        """The same, whatever is asked."""
        return self.value


@torch.no_grad()
def keep_biases(network: nn.Module, pixels_B3SS: Tensor) -> tuple[int, Callable[[], Any]]:
    """Put what every CPB MLP gives in its place: the bytes that it takes, and what computes all of it.

    In timm's blocks that is the table by offset, from which they gather; in ours the whole bias.
    """
    given: dict[nn.Module, Tensor] = {}
    asked: dict[nn.Module, Tensor] = {}
    owners = [module for module in network.modules() if getattr(module, "cpb_mlp", None) is not None]

    def note(module: nn.Module, taken: tuple[Tensor], output: Tensor) -> None:
        asked[module], given[module] = taken[0], output

    hooks = [owner.cpb_mlp.register_forward_hook(note) for owner in owners]
    network(pixels_B3SS)
    for hook in hooks:
        hook.remove()
    for owner in owners:
        owner.cpb_mlp = Kept(given[owner.cpb_mlp])

    @torch.no_grad()
    def compute() -> None:
        for module, offsets in asked.items():
            module(offsets)

    return sum(value.nbytes for value in given.values()), compute


def measure_bias(setup: Setup, protocol: Protocol) -> list[dict[str, Any]]:
    """Rows for each Swin V2 teacher without a student: its position bias computed in every pass, kept, and
    computed alone, which costs the same for any number of images."""
    device, rows = setup.device.type, []
    dtype = torch.bfloat16 if setup.resolved.bf16 else torch.float32
    teachers = SWIN_TEACHERS["smoke" if protocol is clock.SMOKE else device]
    for library, architecture, num_images, side in teachers:
        spec = recipes.Teacher(library=library, architecture=architecture, weights="random", input_size=side)
        computed, kept = (load(spec, device=setup.device, dtype=dtype, seed=0) for _ in range(2))
        pixels = torch.randint(0, 256, (num_images, 3, side, side), dtype=torch.uint8, device=setup.device)
        blank = torch.zeros(1, 3, side, side, dtype=dtype, device=setup.device)
        num_bytes, alone = keep_biases(kept.network, blank)
        works: dict[str, clock.Work] = {
            "computed": partial(computed.features, pixels),
            "kept": partial(kept.features, pixels),
            "the bias alone": alone,
        }
        same = torch.equal(computed.features(pixels).tokens_BND, kept.features(pixels).tokens_BND)
        times = clock.interleaved(works, device, protocol)
        for how, found in times.items():
            rows.append(
                {
                    "part": "position bias",
                    "name": f"{architecture} of {library}, {how}",
                    "us": found,
                    "num_images": num_images,
                    "time_over_computed": round(found["median"] / times["computed"]["median"], 4),
                    "kept_mib": round(num_bytes / 2**20, 2) if how == "kept" else 0.0,
                    "same_features": same,
                }
            )
    return rows


def _teacher_row(
    name: str,
    way: Callable[[], Any] | str,
    outputs: list[Tensor] | None,
    exact: Tensor,
    device: str,
    protocol: Protocol,
) -> dict[str, Any]:
    if isinstance(way, str):
        return {"part": "teacher", "name": name, "left_out": way}
    times = clock.timed(way, device, protocol)
    found = way() if outputs is None else outputs
    error = (whiten(found[0]) - exact).norm() / exact.norm()
    return {"part": "teacher", "name": name, "us": times, "target_error": round(error.item(), 6)}
