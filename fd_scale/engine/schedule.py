"""Learning rates as a pure function of the step.

Nothing is stored: a resumed run, or one that skipped a step, asks for the value of its step and gets the same
answer.
"""

from __future__ import annotations

import math


def learning_rate(
    step: int, *, steps: int, warmup_steps: int, peak: float, warmup_lr: float, min_lr: float
) -> float:
    """The learning rate of optimizer step ``step`` (counted from 0): linear warm-up, then half a cosine.

    The first step has ``warmup_lr``, step ``warmup_steps`` has ``peak``, and the cosine runs over the
    remaining ``steps - warmup_steps`` steps towards ``min_lr``, which the step after the last would reach
    (released code of the FD paper: the total length is not stretched by the warm-up).
    """
    if step < warmup_steps:
        return warmup_lr + (peak - warmup_lr) * step / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
    return min_lr + (peak - min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))
