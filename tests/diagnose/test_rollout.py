"""Rollout against the product written out, and where there is none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fd_scale.diagnose.anatomy import anatomy
from fd_scale.diagnose.capture import attention_maps
from fd_scale.diagnose.rollout import has_rollout, rollout, rollout_step
from tests.diagnose.tiny import SMALL, SWIN, own_subject, pixels, timm_subject


def test_the_product_of_all_layers() -> None:
    subject = own_subject("vit_micro_patch8")
    values = pixels(2)
    maps: list[Tensor] = []
    with attention_maps(subject.network, lambda _, found: maps.append(found.double())):
        subject.backbone.tokens(values)
    product = torch.eye(17).double().expand(2, 17, 17)
    for found in maps:
        product = (0.5 * found.mean(dim=1) + 0.5 * torch.eye(17)) @ product
    looked = product[:, 0, 1:]
    expected = (looked / looked.sum(dim=1, keepdim=True)).view(2, 4, 4)
    torch.testing.assert_close(
        rollout(subject, anatomy(subject), values).double(), expected, rtol=1e-5, atol=1e-8
    )


def test_without_a_class_token_all_patches_look() -> None:
    subject = timm_subject("vit_tiny_patch16_224", **SMALL, class_token=False, global_pool="avg")
    found = rollout(subject, anatomy(subject), pixels(1))
    assert found.shape == (1, 4, 4)
    assert float(found.sum()) == pytest.approx(1)


def test_a_layer_that_attends_to_itself_passes_everything_on() -> None:
    itself = torch.eye(3).expand(1, 2, 3, 3)
    torch.testing.assert_close(rollout_step(itself)[0], torch.eye(3))


@pytest.mark.parametrize(
    ("name", "arguments"), [("swin_tiny_patch4_window7_224", SWIN), ("convnext_atto", {})]
)
def test_where_there_is_none(name: str, arguments: dict[str, object]) -> None:
    subject = timm_subject(name, side=64, **arguments)
    found = anatomy(subject)
    assert not has_rollout(found)
    with pytest.raises(ValueError, match="there is no rollout"):
        rollout(subject, found, pixels(1, 64))
