"""Features of a data set: every readable sample once, in order, and the same from the cache."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fd_scale.data.index import ShardSet
from fd_scale.data.scenes import scene, scene_seed, write_scenes
from fd_scale.evaluate.backbone import Backbone
from fd_scale.evaluate.features import (
    EvaluationError,
    LabelledFeatures,
    common_classes,
    extract,
    of_shards,
    standard_error,
)
from fd_scale.objective.features import Features

SIDE = 16


@dataclass
class Colours:
    """A network whose tokens are the mean colours of picture and quarters; counts its calls."""

    scale: float = 1.0
    calls: int = 0

    def __call__(self, pixels: Tensor) -> Features:
        self.calls += 1
        values = pixels.float() * self.scale
        quarters = torch.nn.functional.avg_pool2d(values, SIDE // 2).flatten(2).transpose(1, 2)
        return Features(torch.cat((values.mean((2, 3))[:, None], quarters), 1), (2, 2), 1)

    def backbone(self) -> Backbone:
        record = {"sha256": f"colours x {self.scale}"}
        return backbone_of("colours", record, self)


def backbone_of(name: str, record: dict[str, Any], read: Callable[[Tensor], Features]) -> Backbone:
    """A network that is the function ``read`` of uint8 pixels."""
    return Backbone(name, SIDE, torch.device("cpu"), record, lambda pixels: pixels, read, nn.Identity())


@dataclass
class Made:
    """A batch."""

    pixels: dict[int, Tensor]
    valid: Tensor
    labels: Tensor | None


def batch(values: list[int], labels: list[int] | None, valid: list[bool] | None = None) -> Made:
    pixels = torch.tensor(values, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, SIDE, SIDE)
    return Made(
        {SIDE: pixels},
        torch.tensor(valid or [True] * len(values)),
        None if labels is None else torch.tensor(labels),
    )


def of(labels: list[int]) -> LabelledFeatures:
    return LabelledFeatures("model", {"gap": torch.zeros(len(labels), 1)}, torch.tensor(labels), 0, {})


def test_unreadable_samples_are_left_out_and_counted():
    batches = [batch([10, 20, 30], [0, -1, 2], [True, False, True]), batch([40], [1])]
    features = extract(Colours().backbone(), batches, {"data": "made"})
    assert features.labels.tolist() == [0, 2, 1]
    assert features.pooled["cls"].tolist() == [[10.0] * 3, [30.0] * 3, [40.0] * 3]
    assert features.pooled["gap"].dtype == torch.float32
    assert (len(features), features.num_left_out, features.facts) == (3, 1, {"data": "made"})


def test_a_shard_set_is_seen_whole_and_in_order(tmp_path):
    write_scenes(tmp_path / "out", num_images=9, size=SIDE, seed=2, max_count=4)
    shards = ShardSet.open(tmp_path / "out")
    features = of_shards(Colours().backbone(), shards, crop_pct=1.0, batch=2)
    drawn = [scene(scene_seed(2, number), SIDE) for number in range(9)]
    assert features.labels.tolist() == [one.label for one in drawn]
    expected = torch.stack([torch.from_numpy(one.image).float().mean((0, 1)) for one in drawn])
    # Of 255; JPEG keeps mean colours well. Worst seen 0.4.
    torch.testing.assert_close(features.pooled["cls"], expected, rtol=0, atol=1.5)
    assert features.facts["data"] == shards.fingerprint
    assert (features.facts["crop_pct"], features.facts["input_size"]) == (1.0, SIDE)


def test_the_cache_gives_the_same_and_knows_network_data_and_crop(tmp_path):
    for seed in (0, 1):
        write_scenes(tmp_path / str(seed), num_images=5, size=SIDE, seed=seed)
    shards, others = (ShardSet.open(tmp_path / str(seed)) for seed in (0, 1))
    cache, network, other = tmp_path / "cache", Colours(), Colours(scale=2.0)
    first = of_shards(network.backbone(), shards, cache=cache)
    again = of_shards(network.backbone(), shards, cache=cache)
    assert network.calls == 1
    for kind in ("cls", "gap"):
        assert torch.equal(first.pooled[kind], again.pooled[kind])
    assert torch.equal(first.labels, again.labels)
    assert (again.model, again.num_left_out, again.facts) == ("colours", 0, first.facts)
    assert torch.equal(
        of_shards(other.backbone(), shards, cache=cache).pooled["cls"], 2 * first.pooled["cls"]
    )
    of_shards(network.backbone(), others, cache=cache)
    of_shards(network.backbone(), shards, crop_pct=0.5, cache=cache)
    assert (network.calls, other.calls) == (3, 1)
    assert not list(cache.glob("*.partial"))


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([batch([1, 2], None)], "the samples have no labels"),
        ([batch([1], [0], [False])], "no readable labelled sample to evaluate colours on"),
        ([], "no readable labelled sample"),
    ],
)
def test_data_that_cannot_be_evaluated_on_are_refused(batches, message):
    with pytest.raises(EvaluationError, match=message):
        extract(Colours().backbone(), batches)


def test_features_that_are_not_finite_are_refused():
    def logarithms(pixels: Tensor) -> Features:
        return Features(pixels.float().mean((2, 3)).log()[:, None], (1, 1), 0)

    broken = backbone_of("broken", {}, logarithms)
    with pytest.raises(EvaluationError, match="broken gives 1 of 3 images gap features that are not finite"):
        extract(broken, [batch([5, 0, 7], [0, 1, 0])])


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ([0, 1, -1], [0], "label -1 is negative"),
        ([3, 3, 3], [3], "all 3 training samples have label 3"),
        ([0, 1], [0, 2, 5], r"2 labels of the test set do not occur in the training set \(\[2, 5\]\)"),
    ],
)
def test_labels_that_cannot_be_learnt_are_refused(train, test, message):
    with pytest.raises(EvaluationError, match=message):
        common_classes(torch.tensor(train), torch.tensor(test))


def test_classes_and_errors_are_counted():
    assert common_classes(torch.tensor([0, 4, 1]), torch.tensor([4])) == 5
    assert standard_error(0.5, 100) == pytest.approx(0.05)
    assert standard_error(1.0, 3) == 0.0
