"""Augmentations: drawn from the sample's key, mixed as timm mixes, never with a sample that is damaged."""

import pickle
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fd_scale.errors import RecipeError
from fd_scale.evaluate.augment import Mixer, randaug, smoothed
from fd_scale.evaluate.finetune import soft_cross_entropy
from fd_scale.run.transfer import Augment
from fd_scale.run.world import seed_step

CPU = torch.device("cpu")
PLAIN = Augment(randaug=None, erase=0.0, mixup=0.0, cutmix=0.0, smoothing=0.0)


def key(number: int) -> np.ndarray:
    return np.array([number, 7], dtype=np.uint64)


def view(size: int = 24) -> torch.Tensor:
    return torch.randint(0, 256, (3, size, size), generator=torch.Generator().manual_seed(0)).byte()


def test_randaug_depends_on_the_key_alone_and_leaves_generators_alone():
    change = randaug(Augment(), (0.5, 0.5, 0.5))
    assert change is not None
    random.seed(1)
    np.random.seed(1)
    states = random.getstate(), np.random.get_state()[1].tolist()
    first = pickle.loads(pickle.dumps(change))({24: view()}, key(3))[24]
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states
    random.seed(2)
    assert torch.equal(change({24: view()}, key(3))[24], first)
    assert (first.shape, first.dtype) == (view().shape, torch.uint8)
    others = [change({24: view()}, key(number))[24] for number in range(4, 12)]
    assert sum(not torch.equal(other, first) for other in others) >= 6


def test_the_strongest_changes_leave_an_image():
    """At magnitude 10 timm's posterisation would keep no bit of 8, which Pillow refuses."""
    change = randaug(Augment(randaug="rand-m10-n8-inc1"), (0.5, 0.5, 0.5))
    assert change is not None
    for number in range(40):
        assert change({24: view()}, key(number))[24].shape == (3, 24, 24)


def test_no_policy_is_no_change_and_a_wrong_one_is_refused():
    assert randaug(PLAIN, (0.5, 0.5, 0.5)) is None
    with pytest.raises(RecipeError, match=r"augment.randaug='random' is no policy"):
        randaug(Augment(randaug="random"), (0.5, 0.5, 0.5))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("classes", [2, 5])
def test_smoothed_labels_are_those_of_pytorch(smoothing, classes):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(7, classes, generator=generator)
    labels = torch.randint(0, classes, (7,), generator=generator)
    ours = soft_cross_entropy(logits, smoothed(labels, classes, smoothing), torch.ones(7, dtype=torch.bool))
    torch.testing.assert_close(ours, F.cross_entropy(logits, labels, label_smoothing=smoothing))


def test_mixing_is_repeated_by_the_step_s_seed():
    pixels, labels = torch.randn(6, 3, 16, 16), torch.arange(6) % 3
    mixer = Mixer(Augment(randaug=None, erase=1.0), num_classes=3, device=CPU)
    results = []
    for step in (5, 5, 6):
        seed_step(0, step, 0)
        results.append(mixer(pixels.clone(), labels, torch.ones(6, dtype=torch.bool)))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert not torch.equal(results[0][0], results[2][0])
    assert torch.allclose(results[0][1].sum(1), torch.ones(6))


def test_mixup_is_a_weighted_sum_with_the_reversed_batch():
    pixels, labels = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
    mixer = Mixer(PLAIN.model_copy(update={"mixup": 0.8}), num_classes=4, device=CPU)
    seed_step(0, 1, 0)
    mixed, soft, _ = mixer(pixels.clone(), labels, torch.ones(4, dtype=torch.bool))
    share = float(soft[0, 0])
    assert 0 < share < 1
    torch.testing.assert_close(mixed, share * pixels + (1 - share) * pixels.flip(0))
    assert float(soft[0, 3]) == pytest.approx(1 - share)


def test_a_damaged_sample_takes_its_partner_with_it():
    mixer = Mixer(PLAIN.model_copy(update={"cutmix": 1.0}), num_classes=2, device=CPU)
    valid = torch.tensor([True, False, True, True])
    _, _, left = mixer(torch.randn(4, 3, 8, 8), torch.tensor([0, -1, 1, 1]), valid)
    assert left.tolist() == [True, False, False, True]


def test_samples_that_are_not_valid_have_no_part_in_the_loss():
    logits = torch.randn(3, 4, requires_grad=True)
    soft = smoothed(torch.tensor([1, 0, 2]), 4, 0.0)
    loss = soft_cross_entropy(logits, soft, torch.tensor([True, False, True]))
    expected = F.cross_entropy(logits[[0, 2]], torch.tensor([1, 2]))
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert logits.grad is not None
    assert logits.grad[1].abs().sum() == 0
    none = soft_cross_entropy(logits, soft, torch.zeros(3, dtype=torch.bool))
    assert float(none) == 0.0


def test_an_odd_batch_cannot_be_mixed():
    mixer = Mixer(Augment(randaug=None, erase=0.0), num_classes=2, device=CPU)
    with pytest.raises(RecipeError, match="micro-batch of 3 cannot be mixed in pairs"):
        mixer(torch.zeros(3, 3, 8, 8), torch.zeros(3, dtype=torch.int64), torch.ones(3, dtype=torch.bool))
