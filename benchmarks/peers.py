"""How fast is our step against the ones of others, on the same networks, batch and machine, in the same run?

    python -m benchmarks.peers            writes results/peers-DEVICE.json
    python -m benchmarks.peers --smoke    tiny, in seconds, written nowhere

``published``: the step of feature distillation as the code published with the paper takes it, written anew
from its description: normalised float32 images are sent to the device; the student writes out its attention,
logits and bias in float32; the images are un-normalised and normalised again for the teacher; the projector
is a convolution over channels-first tokens; whitening and smooth L1 are eager; float16 autocast with a loss
scaler; AdamW without fusion; the host waits for the device and reads loss and gradient norm in every step.
``timm``: timm's training step of the student's architecture, cross entropy with label smoothing under
bfloat16 autocast, its optimizer factory and clipping: a student without a teacher. Ours: the product's step
(``benchmarks/step.py``), with its teacher and on targets that are there already.

On a CPU everything is float32, without autocast and scaler: the ratio then holds for the arithmetic alone.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.utils import dispatch_clip_grad
from torch import Tensor, nn

import models
from benchmarks import clock, record
from benchmarks.clock import Protocol
from benchmarks.step_setup import CPU, CPU_MODELS, GPU, GPU_MODELS, SMOKE_MODELS, VARIANTS, Model, Setup
from fd_scale.distill import load_teachers
from fd_scale.pixels import IMAGENET_MEAN, IMAGENET_STD
from fd_scale.run.world import World
from fd_scale.teachers import Teacher
from models.ops import Ops

CLIP_NORM = 3.0


@dataclass(frozen=True)
class Pair:
    """A pair of networks: ours by name and timm's of the same size."""

    model: Model
    architecture: str
    timm_name: str


GPU_PAIR = Pair(GPU_MODELS[0], "vit_base_patch16", "vit_base_patch16_224")
CPU_PAIR = Pair(CPU_MODELS[0], "vit_tiny_patch16", "vit_tiny_patch16_224")
SMOKE_PAIR = Pair(SMOKE_MODELS[0], "vit_micro_patch8", "test_vit")


def written_out_attention(
    query_BHND: Tensor, key_BHMD: Tensor, value_BHMD: Tensor, bias: Tensor | None, *, scale: float
) -> Tensor:
    """Logits and bias in float32 memory, as the published code leaves them under autocast."""
    logits_BHNM = ((query_BHND * scale) @ key_BHMD.transpose(-2, -1)).float()
    if bias is not None:
        logits_BHNM = logits_BHNM + bias.float()
    return (logits_BHNM.softmax(dim=-1) @ value_BHMD.float()).to(value_BHMD.dtype)


class PublishedStudent(nn.Module):
    """A ViT with a shared table and the projector as a convolution: float images to a map (B, N, C)."""

    def __init__(self, architecture: str, input_size: int, teacher_width: int) -> None:
        super().__init__()
        ops = Ops(attention=written_out_attention)
        self.backbone = models.create(architecture, input_size=input_size, ops=ops)
        self.decoder = nn.Conv1d(self.backbone.embed_dim, teacher_width, kernel_size=1)

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """The projected map; its channels lie apart in memory."""
        tokens_BND = self.backbone(images_B3HW)
        return self.decoder(tokens_BND.permute(0, 2, 1)).permute(0, 2, 1)


@dataclass
class Published:
    """The published step: what it holds between two steps."""

    student: PublishedStudent
    teacher: Teacher
    device: torch.device
    half: bool
    """Whether it is float16 under a loss scaler."""

    def __post_init__(self) -> None:
        self.student.to(self.device)
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=1e-4, weight_decay=0.05)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.half)
        self.mean, self.std, self.teacher_mean, self.teacher_std = (
            torch.tensor(values, device=self.device).view(1, 3, 1, 1)
            for values in (IMAGENET_MEAN, IMAGENET_STD, self.teacher.mean, self.teacher.std)
        )
        self.criterion = nn.SmoothL1Loss(beta=2.0)

    def autocast(self) -> AbstractContextManager[Any]:
        """Its precision."""
        return torch.autocast(self.device.type, torch.float16) if self.half else nullcontext()

    def loss(self, images_B3HW: Tensor) -> Tensor:
        """Student first, then the teacher, then their distance."""
        with self.autocast():
            predicted_BNC = self.student(images_B3HW)
            with torch.no_grad():
                raw_B3HW = images_B3HW * self.std + self.mean
                own_B3HW = (raw_B3HW - self.teacher_mean) / self.teacher_std
                features = self.teacher.read(self.teacher.network, own_B3HW.to(self.teacher.dtype))
                target_BNC = F.layer_norm(features.tokens_BND, features.tokens_BND.shape[-1:])
            return self.criterion(predicted_BNC, target_BNC).mean()

    def step(self, images: Tensor) -> tuple[float, float]:
        """One optimizer step; loss and gradient norm as numbers."""
        loss = self.loss(images.to(self.device, non_blocking=True))
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.student.parameters(), CLIP_NORM)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return loss.item(), norm.item()


def timm_step(
    name: str, input_size: int, device: torch.device, *, half: bool, compiled: bool
) -> Callable[[Tensor], None]:
    """timm's training step on uint8 images and random labels."""
    network = timm.create_model(name, num_classes=1000, img_size=input_size).to(device)
    parameters = list(network.parameters())
    optimizer = create_optimizer_v2(network, opt="adamw", lr=1e-4, weight_decay=0.05)
    criterion = LabelSmoothingCrossEntropy(0.1)
    if compiled:
        network = torch.compile(network)
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) * 255 for v in (IMAGENET_MEAN, IMAGENET_STD))

    def take(pixels: Tensor) -> None:
        images = pixels.to(device, non_blocking=True).float().sub_(mean).div_(std)
        labels = torch.randint(0, 1000, (len(images),), device=device)
        with torch.autocast(device.type, torch.bfloat16) if half else nullcontext():
            loss = criterion(network(images), labels)
        loss.backward()
        dispatch_clip_grad(parameters, CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()

    return take


def float_images(pixels: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """The same images as a loader that normalises gives them: float32 on the host."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    images = [(batch.float() / 255 - mean) / std for batch in pixels]
    return [batch.pin_memory() for batch in images] if device.type == "cuda" else images


def works(pair: Pair, world: World, folder: Path) -> dict[str, clock.Work]:
    """A step of each, by name."""
    device, on_gpu = world.device, world.device.type == "cuda"
    found: dict[str, clock.Work] = {}
    variants = ("compiled", "eager") if on_gpu else ("eager",)
    setups = {name: Setup.of(pair.model, VARIANTS[name], world, folder) for name in variants}
    for name, setup in setups.items():
        found[f"ours, {name}"] = _ours(setup, None)
    eager = setups["eager"]
    side = eager.student.input_size
    (teacher,) = load_teachers(eager.recipe, device, torch.float16 if on_gpu else torch.float32)
    published = Published(
        PublishedStudent(pair.architecture, side, teacher.width), teacher, device, half=on_gpu
    )
    images = float_images(eager.batches, device)
    turn = iter(range(10**9))
    found["published"] = lambda: published.step(images[next(turn) % len(images)])
    found["ours, student alone"] = _ours(setups[variants[0]], setups[variants[0]].targets())
    following = eager.in_turn()
    for compiled in (False, True) if on_gpu else (False,):
        take = timm_step(pair.timm_name, side, device, half=on_gpu, compiled=compiled)
        found["timm, compiled" if compiled else "timm"] = _with(take, following)
    return found


def _ours(setup: Setup, taught: list[Tensor] | None) -> clock.Work:
    following = setup.in_turn()
    return lambda: setup.step(following(), taught)


def _with(take: Callable[[Tensor], None], following: Callable[[], Tensor]) -> clock.Work:
    return lambda: take(following())


def measure(pair: Pair, protocol: Protocol) -> dict[str, Any]:
    """All steps turn by turn."""
    world = World.start()
    device = world.device.type
    with tempfile.TemporaryDirectory(prefix="fd-peers-") as folder:
        todo = works(pair, world, Path(folder))
        times = clock.interleaved(todo, device, protocol)
        waits = {name: len(clock.waits(work, device)) for name, work in todo.items()}
    medians = {name: found["median"] for name, found in times.items()}
    ours = medians["ours, compiled" if device == "cuda" else "ours, eager"]
    rows = [
        {
            "step": name,
            "step_us": times[name],
            "images_per_s": round(pair.model.micro_batch / median * 1e6, 2),
            "waits_per_step": waits[name],
        }
        for name, median in medians.items()
    ]
    return {
        "question": "our step against the published one and timm's",
        "device": device,
        "model": pair.model.name,
        "micro_batch": pair.model.micro_batch,
        "protocol": asdict(protocol),
        "results": rows,
        "published_over_ours": round(medians["published"] / ours, 3),
        "timm_over_our_student_alone": round(medians["timm"] / medians["ours, student alone"], 3),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and write unless it was only a look."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, seconds; writes nothing")
    clock.add_within(parser)
    asked = parser.parse_args(arguments)
    clock.begin(asked.within)
    on_gpu = torch.cuda.is_available()
    pair, protocol = (GPU_PAIR, GPU) if on_gpu else (CPU_PAIR, CPU)
    if asked.smoke:
        pair, protocol = SMOKE_PAIR, clock.SMOKE
    found = measure(pair, protocol)
    for row in found["results"]:
        print(f"{row['step']:22} {row['images_per_s']:9.2f} images/s, {row['waits_per_step']} waits")
    print(f"the published step takes {found['published_over_ours']} times ours")
    if not asked.smoke:
        found["load_average"] = round(os.getloadavg()[0], 1)
        print(record.write(f"peers-{found['device']}", found).relative_to(record.RESULTS.parent.parent))
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # DeepSpeed's threads may outlive the answer
