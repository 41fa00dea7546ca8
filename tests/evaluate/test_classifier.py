"""Classifiers: pooling and norm in both orders, what is frozen, heads by class names, other sizes."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import models
from fd_scale.errors import RecipeError
from fd_scale.evaluate.classifier import Classifier, map_head
from fd_scale.evaluate.start import Weights, _fitted
from fd_scale.run import recipe as recipes
from fd_scale.run.transfer import Head, Start

SMALL: dict[str, Any] = {"embed_dim": 16, "depth": 3, "num_heads": 2}


def weights(size: int = 24, **found: Any) -> Weights:
    """A shared-table ViT with weights all different from their start."""
    spec = recipes.Student(
        architecture="vit_micro_patch8", input_size=size, drop_path=0.0, arguments=dict(SMALL)
    )
    network = models.create("vit_micro_patch8", input_size=size, layer_scale=0.1, **SMALL)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return Weights(spec, dict(network.state_dict()), "made", **found)


def pixels(size: int = 24) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def tokens(found: Weights, size: int = 24) -> Tensor:
    """Before the final norm."""
    network = models.create("vit_micro_patch8", input_size=size, layer_scale=0.1, **SMALL)
    network.load_state_dict(found.tensors)
    network.norm = nn.Identity()
    with torch.no_grad():
        return network.eval()(pixels(size))


@pytest.mark.parametrize("position", ["unshare", "keep"])
@pytest.mark.parametrize("order", ["pool_norm", "norm_pool"])
@pytest.mark.parametrize("feature", ["gap", "cls"])
def test_logits_are_those_of_the_definition(position, order, feature):
    found = weights()
    start = _fitted(found, Start(network="made", position=position))
    assert (start.spec.position, start.found) == ("rpb" if position == "unshare" else "shared_rpb", found)
    module = Classifier(start, Head(feature=feature, order=order), num_classes=5).eval()
    with torch.no_grad():
        module.norm.weight.add_(torch.randn(16))
        module.head.weight.normal_()
    before = tokens(found)
    patches = before[:, :1] if feature == "cls" else before[:, 1:]
    with torch.no_grad():
        pooled = module.norm(patches.mean(1)) if order == "pool_norm" else module.norm(patches).mean(1)
        expected = module.head(pooled)
        # Un-shared tables give the same sums in the same order: worst seen 1e-6.
        torch.testing.assert_close(module(pixels()), expected, rtol=1e-5, atol=1e-5)


def test_a_head_begins_near_zero():
    module = Classifier(_fitted(weights(), Start(network="made")), Head(), num_classes=1000)
    # Of 16,000 draws at 2e-5: the standard error of their std is 1e-7.
    assert float(module.head.weight.std()) == pytest.approx(2e-5, abs=5e-7)
    assert module.head.bias.abs().sum() == 0


def test_stem_and_first_blocks_can_stay_as_they_are():
    module = Classifier(_fitted(weights(), Start(network="made", position="keep")), Head(), num_classes=2)
    module.freeze(stem=True, blocks=0)
    frozen = {name for name, p in module.named_parameters() if not p.requires_grad}
    assert frozen == {"network.patch_embed.proj.weight", "network.patch_embed.proj.bias"}
    module.freeze(stem=False, blocks=2)
    frozen = {name for name, p in module.named_parameters() if not p.requires_grad}
    assert {"network.cls_token", "network.blocks.0.gamma_1", "network.blocks.1.mlp.fc1.weight"} <= frozen
    assert not any(name.startswith(("network.blocks.2", "head", "network.rel_pos_bias")) for name in frozen)
    with pytest.raises(RecipeError, match=r"start.freeze_blocks=4 is more than the 3 blocks"):
        module.freeze(stem=False, blocks=4)


def test_rows_of_a_head_follow_the_names_of_classes():
    head = {"weight": torch.arange(48.0).view(3, 16), "bias": torch.tensor([1.0, 2.0, 3.0])}
    start = _fitted(weights(classes=("n3", "n1", "n7"), head=head), Start(network="made"))
    module = Classifier(start, Head(init="mapped"), num_classes=4)
    assert map_head(module, start, ("n1", "n2", "n3", "n4")) == 2
    assert torch.equal(module.head.weight[0], head["weight"][1])
    assert torch.equal(module.head.weight[2], head["weight"][0])
    assert module.head.bias.tolist() == [2.0, 0.0, 1.0, 0.0]
    with pytest.raises(RecipeError, match=r"none of the 1 classes \(x, ...\) is among the 3 of the start"):
        map_head(module, start, ("x",))
    with pytest.raises(RecipeError, match="needs a start that was fine-tuned"):
        map_head(module, _fitted(weights(), Start(network="made")), ("n1",))


@pytest.mark.parametrize("position", ["unshare", "keep"])
def test_another_size_interpolates_positions(position):
    found = weights()
    start = _fitted(found, Start(network="made", input_size=40, position=position))
    assert (start.form.grid, start.input_size) == ((5, 5), 40)
    tables = [p for n, p in start.network.named_parameters() if n.endswith("relative_position_bias_table")]
    assert {table.shape for table in tables} == {(9 * 9 + 3, 2)}
    shared = found.tensors["rel_pos_bias.relative_position_bias_table"]
    assert torch.equal(tables[0][-3:], shared[-3:])
    module = Classifier(start, Head(), num_classes=2)
    assert module(pixels(40)).shape == (2, 2)


def test_a_feature_that_is_not_there_is_refused():
    spec = recipes.Student(
        architecture="timm:swin_tiny_patch4_window7_224",
        input_size=32,
        position=None,
        layer_scale=None,
        drop_path=0.0,
        arguments={"embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4},
    )
    from fd_scale.student import build_backbone

    start = _fitted(Weights(spec, dict(build_backbone(spec).state_dict()), "made"), Start(network="made"))
    with pytest.raises(RecipeError, match=r"head.feature='cls' needs a class token"):
        Classifier(start, Head(feature="cls"), num_classes=2)
    kept = Classifier(start, Head(order="norm_pool", keep_norm=True), num_classes=2)
    assert isinstance(kept.network.norm, nn.LayerNorm)
    assert kept(torch.zeros(1, 3, 32, 32)).shape == (1, 2)
