"""One pass over all images: the same answers whatever the batches and however many processes, and the right
ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fd_scale.diagnose.anatomy import OUTPUT, anatomy
from fd_scale.diagnose.capture import attention_maps
from fd_scale.diagnose.parts import Parts
from fd_scale.diagnose.subjects import DiagnoseError, Subject
from fd_scale.diagnose.survey import POOLED_IMAGES, Survey, gather_sums, survey
from fd_scale.run.world import World
from tests.diagnose.tiny import ALONE, SMALL, SWIN, own_subject, pixels, timm_subject

COUNT = 11
SUBJECTS: dict[str, Callable[[], Subject]] = {
    "vit": lambda: timm_subject("vit_tiny_patch16_224", **SMALL),
    "own": lambda: own_subject("vit_micro_patch8"),
    "swin": lambda: timm_subject("swin_tiny_patch4_window7_224", **SWIN),
    "conv": lambda: timm_subject("convnext_atto", side=64),
}


def surveyed(name: str, batch: int, world: World = ALONE) -> Survey:
    subject = SUBJECTS[name]()
    everything = pixels(COUNT, subject.backbone.input_size)
    first, last = (COUNT * part // world.size for part in (world.rank, world.rank + 1))
    return survey(subject, anatomy(subject), everything[first:last].split(batch), world)


def values(record: Any, path: str = "") -> dict[str, Tensor]:
    if isinstance(record, dict):
        return {k: v for key, part in record.items() for k, v in values(part, f"{path}/{key}").items()}
    return {path: torch.as_tensor(record).double()}


def assert_equal(one: Any, other: Any) -> None:
    """To 1e-6 of each answer's own size: kernels for other batch sizes round differently, 1e-7 was seen."""
    first, second = values(one), values(other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        scale = float(value.abs().nan_to_num().max()) or 1.0
        torch.testing.assert_close(
            second[name] / scale,
            value / scale,
            rtol=0,
            atol=1e-6,
            equal_nan=True,
            msg=lambda m, n=name: n + m,
        )


@pytest.mark.parametrize("name", SUBJECTS)
def test_the_size_of_batches_changes_nothing(name: str) -> None:
    whole = surveyed(name, COUNT).record()
    for batch in (1, 4):
        assert_equal(whole, surveyed(name, batch).record())


def test_answers_are_those_of_all_maps_together() -> None:
    subject = SUBJECTS["vit"]()
    held: dict[str, list[Tensor]] = {}
    with attention_maps(subject.network, lambda name, found: held.setdefault(name, []).append(found)):
        tokens = subject.backbone.tokens(pixels(COUNT)).patches_BND
    found = surveyed("vit", 4)
    assert found.num_images == COUNT
    for name, maps in held.items():
        mean = maps[0].double()[:, :, 1:, 1:].mean(dim=(0, 1))
        torch.testing.assert_close(found.average_map[name].map_QK, mean, rtol=0, atol=1e-8)
    torch.testing.assert_close(found.pooled[OUTPUT], tokens.mean(dim=1), rtol=1e-5, atol=1e-5)
    cosines = torch.nn.functional.normalize(tokens.double(), dim=-1)
    pairs = (cosines @ cosines.transpose(1, 2)).flatten(1).sum(dim=1) - 16
    assert found.token_similarity[OUTPUT].cosine == pytest.approx(float(pairs.mean()) / (16 * 15), rel=1e-5)


def test_pooled_tokens_are_those_of_the_first_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fd_scale.diagnose.survey.POOLED_IMAGES", 5)
    cut = surveyed("vit", 4)
    monkeypatch.setattr("fd_scale.diagnose.survey.POOLED_IMAGES", POOLED_IMAGES)
    torch.testing.assert_close(cut.pooled[OUTPUT], surveyed("vit", 4).pooled[OUTPUT][:5])


def test_bfloat16_autocast_leaves_the_sums_alone() -> None:
    exact = surveyed("vit", 4)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = surveyed("vit", 4)
    for name, answer in exact.distance.items():
        # bfloat16 logits near 10 move maps by some percent, means over 11 x 16 queries much less. 0.5 % seen.
        torch.testing.assert_close(rounded.distance[name].per_head_px, answer.per_head_px, rtol=0.02, atol=0)
        assert rounded.head_similarity[name].columns == pytest.approx(
            exact.head_similarity[name].columns, rel=0.02
        )


def test_sums_under_autocast_are_not_rounded() -> None:
    subject = SUBJECTS["own"]()
    found = anatomy(subject)
    with torch.autocast("cpu", torch.bfloat16):
        sums = gather_sums(subject, found, [pixels(3)])
    columns = sums.questions["head_similarity/blocks.0.attn"]["columns"]
    exact = {}
    with torch.autocast("cpu", torch.bfloat16), attention_maps(subject.network, exact.__setitem__):
        subject.backbone.tokens(pixels(3))
    unit = torch.nn.functional.normalize(exact["blocks.0.attn"].double()[:, :, 1:, 1:], dim=2)
    total = sum((unit[:, a] * unit[:, b]).sum() for a in range(4) for b in range(a + 1, 4))
    # Products in bfloat16 would be off by 1e-3.
    assert float(columns[0]) == pytest.approx(float(total), rel=1e-6)


def test_a_survey_is_kept_bit_for_bit(tmp_path: Any) -> None:
    found = surveyed("vit", 4)
    parts = Parts(tmp_path)
    parts.write("survey", {}, found.record())
    again = Survey.of_record(parts.read("survey", {}))
    first, second = values(found.record()), values(again.record())
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name].nan_to_num(7), second[name].nan_to_num(7)) for name in first)


def test_no_image_at_all_is_refused() -> None:
    subject = SUBJECTS["vit"]()
    with pytest.raises(DiagnoseError, match="no image of the data could be read"):
        survey(subject, anatomy(subject), [], ALONE)
