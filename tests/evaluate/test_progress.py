"""What a run measures of itself, against NumPy and scikit-learn; and a run of two processes that does."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from fd_scale.data.index import ShardSet
from fd_scale.data.scenes import write_scenes
from fd_scale.data.sets import open_shards
from fd_scale.distill import Distillation
from fd_scale.errors import RecipeError
from fd_scale.evaluate.backbone import of_student, of_teacher
from fd_scale.evaluate.progress import Explained, Progress, effective_rank, half_knn, similarity
from fd_scale.objective.targets import whiten
from fd_scale.run import recipes, scale
from fd_scale.run.recipe import derive
from fd_scale.run.world import World
from fd_scale.training import Run
from tests.spawn import spawn


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("channels", [1, 7])
def test_variance_explained_is_one_minus_the_error_over_the_variance(channels):
    target, noise = drawn(5, 3, channels) + 4, drawn(5, 3, channels, seed=1)
    parts = []
    for part in (slice(0, 2), slice(2, 5)):
        fit = Explained()
        fit.add(target[part] + 0.5 * noise[part], target[part])
        parts.append(fit)
    flat = target.double().numpy().reshape(-1, channels)
    error = ((0.5 * noise.double().numpy()) ** 2).sum()
    expected = 1 - error / ((flat - flat.mean(0)) ** 2).sum()
    assert Explained.together(parts).share == pytest.approx(expected, rel=1e-5)
    mean = Explained()
    mean.add(target.mean((0, 1)).expand_as(target), target)
    assert mean.share == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("rank", [1, 3])
def test_effective_rank_counts_equal_directions(rank):
    basis = torch.linalg.qr(drawn(20, rank).double() - drawn(20, rank).double().mean(0))[0]
    turn = torch.linalg.qr(drawn(rank, rank).double())[0]
    assert effective_rank(basis @ turn) == pytest.approx(rank, rel=1e-9)
    values = np.linalg.svd(np.asarray(drawn(9, 4) - drawn(9, 4).mean(0)), compute_uv=False)
    shares = values / values.sum()
    assert effective_rank(drawn(9, 4)) == pytest.approx(math.exp(-(shares * np.log(shares)).sum()), rel=1e-5)


def test_similarity_forgives_rotation_and_scale_alone():
    features = drawn(30, 6)
    turned = 3 * features @ torch.linalg.qr(drawn(6, 6, seed=2))[0] + 5
    assert similarity(features, turned) == pytest.approx(1, abs=1e-6)
    assert similarity(features, drawn(30, 6, seed=3)) < 0.5


def test_half_of_the_images_are_looked_up_among_the_others():
    labels = torch.arange(60) % 3
    features = torch.nn.functional.one_hot(labels, 5).float() + 0.4 * drawn(60, 5)
    weights: Any = lambda distance: np.exp((1 - distance) / 0.07)  # noqa: E731
    other = KNeighborsClassifier(20, metric="cosine", algorithm="brute", weights=weights)
    other.fit(features[0::2], labels[0::2])
    assert half_knn(features, labels) == pytest.approx(other.score(features[1::2], labels[1::2]))


def test_too_small_a_set_is_refused(tmp_path):
    write_scenes(tmp_path / "few", num_images=2, size=16, seed=0, max_count=2)
    with pytest.raises(RecipeError, match=r"run.probe holds 2 images"):
        Progress(ShardSet.open(tmp_path / "few"), every_steps=1, world=None)  # type: ignore[arg-type]


def figures_on_a_rank(world: World, folder: str) -> dict[str, float]:
    """Figures of a random student at step 0 under ZeRO-3; 10 and 9 images, batches of 4 and 3."""
    root = Path(folder)
    (root / "scale.json").write_text(
        json.dumps({"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 3}})
    )
    changes = {
        "student.input_size": 32,
        "teacher.input_size": 32,
        "teacher.weights": "random",
        "data.shards": str(root / "scenes"),
        "run.root": str(root / "runs"),
        "global_batch": 8,
        "schedule.images": 16,
        "schedule.warmup_images": 0,
        "scale": str(root / "scale.json"),
    }
    recipe = derive(recipes.get("demo"), **changes)
    resolved = scale.resolve(scale.load(recipe.scale), recipe, world.size)
    watch = Progress(ShardSet.open(root / "scenes"), every_steps=1, world=world)
    task = Distillation(recipe, resolved, world, watch=watch)
    student = task.module
    expected = {}
    if world.size == 1:
        pixels = torch.cat([p[32] for p, _, _ in watch.batches(task, 4)])
        labels = torch.cat([named for _, _, named in watch.batches(task, 4)])
        pooled = of_student(student).pooled(pixels)["gap"]
        taught = of_teacher(task.teachers[0])
        target = whiten(taught.tokens(pixels).tokens_BND)
        fit = Explained()
        fit.add(student.eval()(pixels)[0].detach(), target)
        expected = {
            "knn": half_knn(pooled, labels),
            "teacher_knn": half_knn(taught.pooled(pixels)["gap"], labels),
            "rank": effective_rank(pooled),
            "explained": fit.share,
        }
        student.train()
    run = Run(recipe, task, open_shards(recipe), resolved, world)
    beats: list[str] = []
    run.beat = beats.append
    found = run.task.figures(run, 0)
    assert len(beats) == math.ceil(math.ceil(19 / world.size) / 4)
    assert all(module.training for module in run.engine.module.modules())
    run.give_back()
    for name, value in expected.items():
        # The same float32 arithmetic through the engine: worst seen 1e-6 of a rank.
        assert found[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    return found


@pytest.mark.parametrize("size", [1, 2])
def test_figures_are_those_of_the_networks_whatever_the_number_of_processes(size, tmp_path):
    write_scenes(tmp_path / "scenes", num_images=19, size=32, seed=3, max_count=8)
    found = spawn(figures_on_a_rank, size, str(tmp_path))
    assert found[0]["drift"] == pytest.approx(0, abs=1e-6)
    assert {"probe_s", "probe_share", "teacher_rank"} <= found[0].keys()
    assert (tmp_path / "runs").glob("*/reports/probe_start.safetensors")
    shared = ("knn", "rank", "explained", "teacher_knn")
    for figures in found[1:]:
        assert [figures[name] for name in shared] == [found[0][name] for name in shared]
