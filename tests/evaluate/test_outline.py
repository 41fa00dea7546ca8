"""What a dry run prints of each preset, number by number, against the papers' tables."""

from __future__ import annotations

import pytest

from fd_scale.evaluate.outline import rows
from fd_scale.run import presets
from fd_scale.run.sections import IMAGENET_1K_IMAGES
from tests.run.test_presets import COLUMNS, TABLE


@pytest.mark.parametrize("name", TABLE)
def test_a_dry_run_prints_the_papers_numbers(name: str) -> None:
    paper = dict(zip(COLUMNS, TABLE[name], strict=True))
    shown = dict(rows(presets.recipe_of(name)))
    epochs, warm = paper["epochs"], paper["warm"]
    rule = "linear" if name.startswith("fd_") else "none"
    tables = "" if name.startswith("fd_") else ", none of position tables"
    mixup, cutmix = paper["mix"]
    expected = {
        "start": f", raw weights, {paper['size'] or 'its own'} px",
        "position": paper["position"],
        "frozen": "patch embedding" if paper["stem"] else "nothing",
        "drop path": f"{paper['drop']:g}",
        "head": f"gap, {paper['order']}, new weights, std 2e-05",
        "optimizer": "adamw, betas 0.9, 0.999, eps 1e-08",
        "peak lr": f"{paper['lr']:g} at batch 2,048 (preset: {paper['lr']:g} at 2,048, rule {rule})",
        "images": (
            f"{epochs * IMAGENET_1K_IMAGES:,}, the first {warm * IMAGENET_1K_IMAGES:,} of them warm-up"
        ),
        "layer decay": f"{paper['decay']:g}, floors scaled too",
        "weight decay": f"0.05{tables}",
        "clip": "none" if paper["clip"] is None else f"{paper['clip']:g}",
        "EMA": "none" if paper["ema"] is None else f"{paper['ema']:g}, measured",
        "mixup, cutmix": f"{mixup:g}, {cutmix:g}, probability 1",
        "RandAug": "rand-m9-mstd0.5-inc1",
        "erasing": "0.25, noise per pixel",
        "smoothing": "0.1",
        "measured": f"crop {paper['crop']:g}, weights of the last step",
        "normalisation": "the network's own",
    }
    assert {row: shown[row] for row in expected} == expected
    assert shown["first, last lr"].endswith(f", {paper['end']:g}")


def test_a_dry_run_prints_the_probe_of_mae() -> None:
    shown = dict(rows(presets.recipe_of("linear")))
    assert shown["optimizer"] == "lars, momentum 0.9"
    assert shown["peak lr"] == "6.4 at batch 16,384 (preset: 6.4 at 16,384, rule linear)"
    assert shown["first, last lr"] == "0, 0"
    assert shown["head"] == "cls, pool_norm, new weights, std 0.01"
    assert shown["frozen"] == "everything but the head"
    assert shown["weight decay"] == "0"
    assert (shown["RandAug"], shown["erasing"], shown["smoothing"]) == ("none", "0, noise per pixel", "0")
    assert shown["mixup, cutmix"].startswith("0, 0")
