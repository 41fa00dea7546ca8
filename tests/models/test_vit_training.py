"""The ViT as it is trained: recomputed blocks, the shared bias, drop path."""

from __future__ import annotations

import itertools

import pytest
import torch

from models import ModelError
from models.attention import explicit_attention
from models.ops import Ops
from models.vit import POSITIONS, VisionTransformer
from tests.models.test_vit import SMALL, loss_and_gradients, pixels, vit


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
@pytest.mark.parametrize("position", POSITIONS)
def test_checkpointing_changes_no_bit(position, drop_path):
    model = vit(position, drop_path=drop_path).train()
    results = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        torch.manual_seed(5)
        results.append(loss_and_gradients(model, pixels(model, batch=4)))
    (tokens, loss, gradients), (tokens_again, loss_again, gradients_again) = results
    assert torch.equal(tokens, tokens_again)
    assert torch.equal(loss, loss_again)
    assert all(torch.equal(gradients[name], gradients_again[name]) for name in gradients)


def test_checkpointing_recomputes_each_block_once_and_only_for_a_backward_pass():
    model = vit()
    calls = []
    model.blocks[1].register_forward_pre_hook(lambda *_: calls.append("block"))
    model.set_grad_checkpointing()
    with torch.no_grad():
        model(pixels(model))
    assert calls == ["block"]
    model(pixels(model)).sum().backward()
    assert calls == ["block"] * 3
    model.set_grad_checkpointing(False)
    model(pixels(model)).sum().backward()
    assert calls == ["block"] * 4


@pytest.mark.parametrize(("every", "recomputed"), [(1, [0, 1, 2]), (2, [0, 2]), (3, [0]), (7, [0])])
def test_checkpointing_takes_one_block_of_each_so_many(every, recomputed):
    model = vit()
    calls = []
    for index, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda *_, index=index: calls.append(index))
    model.set_grad_checkpointing(every=every)
    model(pixels(model)).sum().backward()
    assert sorted(calls) == sorted([0, 1, 2, *recomputed])


def test_checkpointing_takes_at_least_every_block():
    with pytest.raises(ModelError, match="every=0 must be 1 or more blocks"):
        vit().set_grad_checkpointing(every=0)


def test_checkpointing_is_not_the_re_entrant_one():
    """The re-entrant form refuses ``torch.autograd.grad``."""
    model = vit()
    model.set_grad_checkpointing()
    table = model.rel_pos_bias.relative_position_bias_table
    (gradient,) = torch.autograd.grad(model(pixels(model)).square().sum(), table)
    assert gradient.any()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_shared_bias_is_one_tensor_computed_once(checkpointing):
    biases = []

    def watched(query, key, value, bias, *, scale):
        biases.append(bias)
        return explicit_attention(query, key, value, bias, scale=scale)

    model = vit(ops=Ops(attention=watched))
    model.set_grad_checkpointing(checkpointing)
    gathered = []
    model.rel_pos_bias.register_forward_hook(lambda *_: gathered.append(1))
    model(pixels(model)).sum().backward()
    assert len(gathered) == 1
    assert len(biases) == (6 if checkpointing else 3)
    assert len({bias.data_ptr() for bias in biases}) == 1
    assert biases[0].shape == (1, 3, 26, 26)


def test_the_bias_reaches_the_logits_with_the_published_index():
    """One row at a time: a large bias on class -> patch draws the class token's attention to patches."""
    weights = []

    def watched(query, key, value, bias, *, scale):
        weights.append((scale * query @ key.mT + bias).softmax(-1))
        return explicit_attention(query, key, value, bias, scale=scale)

    model = vit(ops=Ops(attention=watched), depth=1).eval()
    table = model.rel_pos_bias.relative_position_bias_table
    for row, query, keys in ((-3, 0, range(1, 26)), (-2, 7, [0]), (-1, 0, [0]), (8 * 9 + 8, 1, [25])):
        # The fourth: (dy, dx) = (4, 4), the last patch's query and the first patch's key, so that its reverse
        # (-4, -4) is row 0.
        with torch.no_grad():
            table.zero_()
            table[row] = 50.0
            model(pixels(model))
        attended = weights.pop()
        if row == 8 * 9 + 8:
            assert (attended[:, :, 25, 1] > 0.99).all()
            assert (attended[:, :, 1, 25] < 0.9).all()
        else:
            assert (attended[:, :, query, list(keys)].sum(-1) > 0.99).all()


def test_drop_path_rises_linearly_over_depth():
    model = VisionTransformer(drop_path=0.3, **{**SMALL, "depth": 4})
    for branch in ("drop_path1", "drop_path2"):
        rates = [getattr(block, branch).drop_prob for block in model.blocks]
        assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3], abs=1e-7)
    alone = VisionTransformer(drop_path=0.3, **{**SMALL, "depth": 1})
    assert alone.blocks[0].drop_path1.drop_prob == 0.0


def test_drop_path_drops_a_whole_branch_of_a_sample_and_scales_the_rest():
    model = vit(drop_path=0.5, depth=2, layer_scale=0.7).double().train()
    block = model.blocks[1]
    image = torch.randn(1, 26, 48, dtype=torch.float64)
    bias = model.rel_pos_bias()
    outcomes = []
    for attention_kept, mlp_kept in itertools.product((0.0, 2.0), repeat=2):  # 1 / (1 - 0.5) = 2
        middle = image + attention_kept * block.gamma_1 * block.attn(block.norm1(image), bias)
        outcomes.append(middle + mlp_kept * block.gamma_2 * block.mlp(block.norm2(middle)))
    torch.manual_seed(0)
    out = block(image.expand(64, -1, -1), bias)
    distance = torch.stack([(out - outcome).abs().amax(dim=(1, 2)) for outcome in outcomes])
    # The same float64 sums in batches of 64 and of 1. Seen: 2.5e-14.
    assert (distance.min(dim=0).values < 1e-12).all()
    counts = distance.argmin(dim=0).bincount(minlength=4)
    # 64 draws with four equal chances: fewer than 4 of one kind has a probability of about 1e-4.
    assert counts.min() >= 4


def test_evaluation_drops_nothing():
    model = vit(drop_path=0.9)
    whole = vit(drop_path=0.0)
    assert torch.equal(model.eval()(pixels(model)), whole.eval()(pixels(whole)))
