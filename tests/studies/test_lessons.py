"""What teachers are taught: captions that fit their class, and objectives that can be learnt."""

from __future__ import annotations

import pytest
import torch

from fd_scale.student import build_backbone
from studies.lessons import LESSONS, NOISE, VOCABULARY, WORDS_PER_CLASS, captions
from studies.rate import scaled
from studies.settings import Network, load

NETWORK = Network(input_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2)


def test_captions_fit_their_class_but_for_a_known_share() -> None:
    labels = torch.arange(10).repeat(2000)
    told = captions(labels, 10, 0)
    assert told.shape == (20_000, 2)
    assert 0 <= int(told.min()) <= int(told.max()) < VOCABULARY
    assert (told[:, 0] <= told[:, 1]).all()
    for label in range(10):
        counts = told[labels == label].flatten().bincount(minlength=VOCABULARY).double() / 4000
        fitting = counts.topk(WORDS_PER_CLASS).values
        # A word fits with 1 - noise, and of the wrong ones 3 of 24 fit by chance; standard error 0.006.
        expected = 1 - NOISE + NOISE * WORDS_PER_CLASS / VOCABULARY
        assert float(fitting.sum()) == pytest.approx(expected, abs=0.03)
        assert float(fitting.min()) > 0.2
    assert torch.equal(told, captions(labels, 10, 0))
    assert not torch.equal(told, captions(labels, 10, 1))


def learnt(name: str, steps: int) -> list[float]:
    """The loss on one batch of sixteen colours with noise, again and again."""
    torch.manual_seed(0)
    colours = torch.randint(0, 200, (16, 3, 1, 1), dtype=torch.uint8)
    pixels = colours + torch.randint(0, 56, (16, 3, 16, 16), dtype=torch.uint8)
    labels = torch.arange(4).repeat(4)
    lesson = LESSONS[name](build_backbone(NETWORK.spec("ape", None)), labels, 4, 0)
    trained = [parameter for parameter in lesson.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    losses = []
    for step in range(steps):
        torch.manual_seed(step % 4)
        loss = lesson([pixels] * lesson.num_views, torch.arange(16))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        lesson.after_step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", ["supervised", "contrastive", "masked_image"])
def test_a_lesson_can_be_learnt(name: str) -> None:
    losses = learnt(name, 40)
    assert sum(losses[-4:]) < 0.95 * sum(losses[:4])


def test_self_distillation_tells_images_apart() -> None:
    """At first all images go to one prototype, which costs little; once centring has forbidden that, they
    must be told apart."""
    losses = learnt("self_distilled", 160)
    assert max(losses) > losses[0]
    # Uniform over 256 prototypes costs 5.5; 2.8 seen after 120 steps, and falling.
    assert losses[-1] < 0.5 * max(losses)


def test_lengths_follow_the_rate_in_whole_batches() -> None:
    bench = load("granularity", "gpu")[1]
    assert bench.for_images_per_s is not None
    half = scaled(bench, bench.for_images_per_s / 2)
    assert half.distilling.images == pytest.approx(bench.distilling.images / 2, abs=bench.distilling.batch)
    assert half.distilling.images % half.distilling.batch == 0
    assert scaled(bench, bench.for_images_per_s) == bench
    laptop = load("granularity", "laptop")[1]
    assert scaled(laptop, 1.0) == laptop
