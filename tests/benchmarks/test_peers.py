"""The published step, written anew, computes the same loss as ours; and the comparison runs, tiny."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor

from benchmarks import peers
from fd_scale.objective import Objective
from fd_scale.pixels import IMAGENET_MEAN, IMAGENET_STD, normalise
from fd_scale.run import recipe as recipes
from fd_scale.teachers import load
from models.attention import explicit_attention

ROOT = Path(__file__).parents[2]


def test_the_comparison_runs() -> None:
    """In a process of its own, as DeepSpeed asks."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.peers", "--smoke"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("ours, eager", "published", "ours, student alone", "timm", "times ours"):
        assert name in done.stdout


def published() -> tuple[peers.Published, Tensor]:
    """The published step of two tiny ViTs at 32 pixels, and two images."""
    spec = recipes.Teacher(
        library="timm", architecture="vit_tiny_patch16_224", weights="random", input_size=32
    )
    teacher = load(spec, device="cpu", dtype=torch.float32, seed=0)
    torch.manual_seed(0)
    student = peers.PublishedStudent("vit_tiny_patch16", 32, teacher.width)
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    return peers.Published(student, teacher, torch.device("cpu"), half=False), pixels


def test_the_published_loss_is_ours_at_its_settings() -> None:
    """Class token of weight 1, the teacher's own mean and std, whitening, smooth L1 with its knee at 2."""
    step, pixels = published()
    (images,) = peers.float_images([pixels], torch.device("cpu"))
    found = step.loss(images)
    tokens = step.student.backbone(normalise(pixels, IMAGENET_MEAN, IMAGENET_STD, torch.float32))
    decoder = step.student.decoder
    assert decoder.bias is not None
    predicted = torch.nn.functional.linear(tokens, decoder.weight.squeeze(-1), decoder.bias)
    taught = step.teacher.features(pixels).tokens_BND
    objective = Objective(recipes.Objective(cls_weight=1.0))
    expected = objective([predicted], [taught], torch.ones(2, dtype=torch.bool))
    # Images normalised, un-normalised and normalised again, in float32.
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_attention_written_out_is_attention() -> None:
    query, key, value = (torch.randn(2, 3, 5, 8) for _ in range(3))
    bias = torch.randn(1, 3, 5, 5)
    for given in (bias, None):
        expected = explicit_attention(query, key, value, given, scale=0.3)
        torch.testing.assert_close(peers.written_out_attention(query, key, value, given, scale=0.3), expected)


def test_the_pairs_are_of_one_size() -> None:
    """timm's network of a pair has our student's width and depth: what it is compared with."""
    for pair in (peers.GPU_PAIR, peers.CPU_PAIR):
        with torch.device("meta"):
            ours = peers.models.create(pair.architecture)
            theirs = timm.create_model(pair.timm_name)
        assert (ours.embed_dim, len(ours.blocks)) == (theirs.embed_dim, len(theirs.blocks))
