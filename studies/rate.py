"""How fast is this machine at this work? Measured before anything is promised, in a few seconds.

The unit of all costs is an image in a training step of the student.
"""

from __future__ import annotations

import time

import torch

from fd_scale.run.recipe import RunRecipe
from fd_scale.student import build_backbone
from studies import lockstep
from studies.lockstep import Learner
from studies.settings import Bench, Length
from studies.workbench import common

STEPS, WARM = 6, 2


def images_per_second(bench: Bench, device: torch.device) -> float:
    """Images of a training step per second of the wall: the fastest of a few steps, since nothing but the
    machine's other work makes one slower."""
    torch.manual_seed(0)
    network = build_backbone(bench.network.spec("shared_rpb")).to(device)
    length = bench.distilling
    recipe = RunRecipe(name="rate", **common(length.model_copy(update={"images": length.batch * 100})))
    side = bench.network.input_size
    pixels = torch.randn(length.batch, 3, side, side, device=device)
    learner = Learner("rate", recipe, network, lambda shared: network(shared).float().square().mean())
    seconds = []
    for number in range(WARM + STEPS):
        _wait(device)
        begin = time.perf_counter()
        with lockstep.autocast(device):
            learner.step(pixels, number)
        _wait(device)
        seconds.append(time.perf_counter() - begin)
    return length.batch / min(seconds[WARM:])


def scaled(bench: Bench, rate: float) -> Bench:
    """The bench with its lengths in proportion to the rate, where the settings name the rate that they are
    for."""
    if bench.for_images_per_s is None:
        return bench
    factor = rate / bench.for_images_per_s

    def longer(length: Length) -> Length:
        batches = max(10, round(length.images * factor / length.batch))
        return length.model_copy(update={"images": batches * length.batch})

    spec = bench.finetuning
    batches = max(10, round(spec.images * factor / spec.batch))
    return bench.model_copy(
        update={
            "teaching": longer(bench.teaching),
            "distilling": longer(bench.distilling),
            "finetuning": spec.model_copy(update={"images": batches * spec.batch}),
        }
    )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
