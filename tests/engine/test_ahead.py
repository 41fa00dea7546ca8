"""Steps that wait for nothing, beside DeepSpeed's own, and what stays where it cannot be done.

That they compute the same as a plain loop is for test_zero.py, and that they read nothing for test_waits.py.
"""

from __future__ import annotations

import logging
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from fd_scale.engine import ahead
from fd_scale.engine.fragments import fragments, steps_taken
from fd_scale.run.world import World
from tests.engine import problem
from tests.engine.problem import Setting
from tests.spawn import spawn

SETTINGS = [Setting(stage, bf16, micro_batch=8) for stage in (0, 1, 2, 3) for bf16 in (False, True)]
SETTINGS += [Setting(1, bf16=True, micro_batch=8, option="wide sums")]


def with_another_version(world: World, folder: str) -> dict[str, Any]:
    """Each stage as DeepSpeed steps by itself, beside the same as it is led; a step with a NaN in both."""
    logging.getLogger("fd_scale").addHandler(handler := Heard())
    results = {}
    versions = (ahead.READ_IN, ("0.0.1",))
    for setting in SETTINGS:
        pair = []
        for known in versions:
            ahead.READ_IN = known
            engine, resolved = problem.make_engine(world, setting, folder)
            history = problem.advance(engine, resolved, world, 5, poison=2)
            weights = {f.name: f.of(f.buffer).clone() for f in fragments(engine.deepspeed)}
            pair.append((history, weights, steps_taken(engine.deepspeed), list(handler.lines)))
            handler.lines.clear()
            engine.deepspeed.destroy()
        results[setting.label()] = pair
    return results


class Heard(logging.Handler):
    """What was said."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    (found,) = spawn(with_another_version, 1, str(tmp_path_factory.mktemp("scales")))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS, ids=Setting.label)
def test_another_version_steps_by_itself_and_says_so(setting: Setting, pairs: dict[str, Any]) -> None:
    (led, led_weights, led_steps, quiet), (own, own_weights, own_steps, said) = pairs[setting.label()]
    assert led["applied"] == own["applied"] == [True, True, False, True, True]
    assert led_steps == own_steps == 4
    assert math.isnan(led["norm"][2])
    assert math.isnan(own["norm"][2])
    finite = [0, 1, 3, 4]
    # DeepSpeed sums squares in float64 and clips by another rounding: 3e-7 seen, 2e-6 in bf16.
    for key in ("loss", "norm"):
        assert [led[key][i] for i in finite] == pytest.approx([own[key][i] for i in finite], rel=1e-5)
    for name, weights in own_weights.items():
        torch.testing.assert_close(led_weights[name], weights, rtol=0, atol=1e-5)
    assert quiet == []
    waits = "decides on the host whether a gradient is finite"
    plain = setting.stage == 0 and not setting.bf16  # PyTorch's own step, whatever DeepSpeed is there
    assert [waits in line for line in said] == ([] if plain else [True])


def test_an_optimizer_that_decides_nothing_is_left_to_deepspeed() -> None:
    inner = torch.optim.SGD([nn.Parameter(torch.zeros(1))])
    engine = SimpleNamespace(optimizer=SimpleNamespace(step=None), basic_optimizer=inner)
    assert ahead.keep_ahead(engine) == "every step of SGD in SimpleNamespace waits for the device"
    assert engine.optimizer.step is None


def test_an_optimizer_on_the_host_waits_without_a_word() -> None:
    inner = torch.optim.SGD([nn.Parameter(torch.zeros(1))])
    for switch in ("cpu_offload", "offload_optimizer"):
        engine = SimpleNamespace(
            optimizer=SimpleNamespace(step=None, **{switch: True}), basic_optimizer=inner
        )
        assert ahead.keep_ahead(engine) is None
        assert engine.optimizer.step is None
