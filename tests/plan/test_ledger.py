"""The ledger against programs whose bytes and operations are counted by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fd_scale.plan.course import Course, Trace
from fd_scale.plan.ledger import Ledger


def whole(ledger: Ledger) -> Trace:
    return Course.of(ledger, taught=1, forwarded=1, sharded=False).at(1)


def test_storages_count_once_and_while_they_live() -> None:
    ledger = Ledger()
    with ledger, ledger.during("pass"):
        a = torch.empty(10, 100, device="meta")
        b = a.view(1000)[:500]
        assert ledger.live_bytes == 4000
        c = a + 1
        assert ledger.live_bytes == 8000
        del a
        assert ledger.live_bytes == 8000, "b is a view of it"
        del b
        assert ledger.live_bytes == 4000
        c.mul_(2)
        assert ledger.live_bytes == ledger.holding()["pass"] == 4000
    found = whole(ledger)
    assert ledger.peak_bytes == 8000
    assert (found.peak_bytes, found.peak_phase, found.at_peak) == (8000, "pass", {"pass": 8000})
    assert found.held_after_bytes == ledger.live_bytes == 4000


def test_what_is_known_is_not_counted() -> None:
    weight = torch.empty(7, 5, device="meta")
    ledger = Ledger()
    ledger.know([weight])
    with ledger:
        weight.add_(1)
        weight.t()
    assert ledger.peak_bytes == 0


def test_work_of_a_product_a_sum_and_a_view() -> None:
    a, b = torch.empty(3, 5, device="meta"), torch.empty(5, 7, device="meta", dtype=torch.float32)
    ledger = Ledger()
    with ledger, ledger.during("work"):
        product = a @ b
        product.t()
        torch.empty(1, 7, device="meta").expand(3, 7) + product
    found = {(work.flops, work.moved_bytes): n for work, n in ledger.work.items()}
    # 2 m n k; each operand and the result once, an expanded row once.
    assert found == {(2 * 3 * 7 * 5, 4 * (15 + 35 + 21)): 1, (0, 4 * (7 + 21 + 21)): 1}
    assert {work.phase for work in ledger.work} == {"work"}


def test_labels_follow_modules_and_relabelling() -> None:
    inner = nn.Linear(4, 4, bias=False, device="meta")
    outer = nn.Sequential(nn.ReLU(), inner)
    ledger = Ledger()
    ledger.know(outer.parameters())
    handles = [*ledger.labelled(outer, "outer"), *ledger.labelled(inner, "inner")]
    with ledger, ledger.during("forward"), torch.no_grad():
        x = torch.empty(2, 4, device="meta")
        hidden = outer[0](x)
        y = outer(x)
        assert ledger.holding() == {"forward": 64, "inner": 32}
        ledger.relabel(y, "kept")
        assert ledger.holding() == {"forward": 64, "kept": 32}
        with ledger.making("copy"):
            hidden.clone()
    assert ledger.holding() == {"forward": 64, "kept": 32}
    for handle in handles:
        handle.remove()


def test_results_are_remembered_and_remain_the_same() -> None:
    """What is made new is made again; a view, a write and a result of another form are not taken for it."""

    def program(width: int) -> list[tuple[Any, ...]]:
        ledger = Ledger()
        with ledger, ledger.during("pass"):
            x = torch.empty(6, width, device="meta").t()
            values = [x * 2, x * 2.0, x.mul_(2), x.contiguous(), x.reshape(-1), x.sum(0, keepdim=True), x + x]
            values += [*torch.nn.functional.layer_norm(x, (6,)).chunk(2), x.topk(3).indices, x @ x.t()]
        shapes = [(v.shape, v.stride(), v.dtype, v.untyped_storage().nbytes()) for v in values]
        return [*shapes, ledger.live_bytes, ledger.work, values[2] is x]

    first = program(5)
    assert program(5) == first
    assert program(7) != first
    assert first[-1] is True
