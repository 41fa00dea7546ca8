"""The ledger against programs whose bytes and operations are counted by hand."""

from __future__ import annotations

import torch
from torch import nn

from fd_scale.plan.ledger import Ledger


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
    assert ledger.peak_bytes == 8000
    assert ledger.at_peak == ("pass", {"pass": 8000})


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
