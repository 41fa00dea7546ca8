"""Zero-shot against open_clip's own logits and an explicit loop over templates; a student with a perfect
projector against its teacher."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from open_clip.model import CLIP, CLIPVisionCfg
from torch import Tensor

from fd_scale.data.index import ShardSet
from fd_scale.data.scenes import write_scenes
from fd_scale.evaluate.clip import Clip, embeddings, fit_affine, load_clip
from fd_scale.evaluate.features import EvaluationError
from fd_scale.evaluate.naming import SourceError
from fd_scale.evaluate.zeroshot import class_names, logits, templates_of, text_weights
from fd_scale.objective.targets import whiten
from fd_scale.pixels import normalise
from fd_scale.run import recipe as recipes
from tests.teachers.tiny import CLIP_VISION, pixels, shaken

SIDE, WORDS = 32, 50
TEXT = {"context_length": 6, "vocab_size": WORDS, "width": 8, "heads": 2, "layers": 1}
MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
CLASSES = ["red disc", "star", "green ring"]
TEMPLATES = ["a photo of a {}.", "many {}.", "the {} in the rain."]


def tokenizer(texts: list[str]) -> Tensor:
    """Letters as words, ended by the largest number, where CLIP reads the sentence."""
    rows = [[1 + sum(map(ord, word)) % (WORDS - 2) for word in text.split()][:5] for text in texts]
    return torch.tensor([[*row, WORDS - 1, *[0] * (5 - len(row))] for row in rows])


@pytest.fixture(scope="module")
def clip() -> Clip:
    torch.manual_seed(0)
    vision = CLIPVisionCfg(image_size=SIDE, **CLIP_VISION)
    return Clip(shaken(CLIP(embed_dim=10, vision_cfg=vision, text_cfg=TEXT)), tokenizer, MEAN, STD, "tiny")


@torch.no_grad()
def test_logits_are_open_clip_s_own(clip: Clip) -> None:
    """With one template, CLIP's forward pass gives the same cosines, times its own scale."""
    weights = text_weights(clip, CLASSES, ["a photo of a {}."])
    ours = logits(clip.embed(pixels(SIDE)), weights)
    texts = tokenizer([f"a photo of a {name}." for name in CLASSES])
    image, text, scale = clip.model(normalise(pixels(SIDE), MEAN, STD, torch.float32), texts)
    # Cosines in float32 times 100: worst seen 8e-6.
    torch.testing.assert_close(ours, 100 * (scale * image @ text.T) / scale, rtol=0, atol=1e-4)


@torch.no_grad()
def test_templates_are_averaged_after_each_is_normalised(clip: Clip) -> None:
    columns = []
    for name in CLASSES:
        vectors = [clip.model.encode_text(tokenizer([t.format(name)]))[0].double() for t in TEMPLATES]
        mean = sum(vector / vector.norm() for vector in vectors) / len(vectors)
        columns.append(mean / mean.norm())
    found = text_weights(clip, CLASSES, TEMPLATES)
    torch.testing.assert_close(found.double(), torch.stack(columns, 1), rtol=0, atol=1e-6)  # worst seen 1e-7


def student(clip: Clip, give: Any) -> Any:
    """A student that gives ``give`` of CLIP's class token after its norm."""
    visual: Any = clip.model.visual
    width = CLIP_VISION["width"]

    @torch.no_grad()
    def taught(seen: Tensor) -> Tensor:
        projection, visual.proj = visual.proj, None
        try:
            return visual(normalise(seen, MEAN, STD, torch.float32))
        finally:
            visual.proj = projection

    teacher = SimpleNamespace(
        input_size=SIDE, features=lambda seen: SimpleNamespace(tokens_BND=taught(seen)[:, None])
    )
    network = SimpleNamespace(
        input_size=SIDE,
        projectors=[SimpleNamespace(linear=SimpleNamespace(out_features=width))],
        embedder=None,
        objective=recipes.Objective(),
    )
    return SimpleNamespace(
        student=network, teacher=teacher, name="student", tokens=lambda seen: give(taught(seen))
    )


WORLD: Any = SimpleNamespace(device=torch.device("cpu"), rank=0, size=1)


@torch.no_grad()
def test_a_perfect_projector_has_the_teacher_s_logits(clip: Clip) -> None:
    """Of a target that is not normalised; both modes, and in tokens that are scaled one by one."""
    weights = text_weights(clip, CLASSES, TEMPLATES)
    expected = logits(clip.embed(pixels(SIDE, 6)), weights)
    for give in (lambda t: t, lambda t: 3 * t):
        modes = embeddings(student(clip, give), clip, None, WORLD)
        # The projection as a product of its own: worst seen 2e-6 of cosines, times 100.
        torch.testing.assert_close(
            logits(modes["direct"](pixels(SIDE, 6)), weights), expected, rtol=0, atol=1e-4
        )


@torch.no_grad()
def test_destandardised_undoes_what_is_affine_by_channel(clip: Clip, tmp_path: Path) -> None:
    write_scenes(tmp_path / "scenes", num_images=150, size=SIDE, seed=1, max_count=200)
    shards = ShardSet.open(tmp_path / "scenes")
    width = CLIP_VISION["width"]
    scale, shift = torch.linspace(0.5, 3, width), torch.linspace(-2, 2, width)
    weights = text_weights(clip, CLASSES, TEMPLATES)
    expected = logits(clip.embed(pixels(SIDE, 6)), weights)
    modes = embeddings(student(clip, lambda t: (t - shift) / scale), clip, shards, WORLD)
    direct, undone = (logits(modes[mode](pixels(SIDE, 6)), weights) for mode in ("direct", "destandardised"))
    assert (direct - expected).abs().max() > 1
    torch.testing.assert_close(undone, expected, rtol=0, atol=1e-2)  # a fit in float32 features; seen 5e-4


@torch.no_grad()
def test_whitening_loses_nothing_where_the_last_norm_is_plain() -> None:
    """Tokens of mean 0 and variance 1 are their own whitened ones, so that a student with a perfect projector
    answers as its teacher does."""
    torch.manual_seed(1)
    model = CLIP(embed_dim=10, vision_cfg=CLIPVisionCfg(image_size=SIDE, **CLIP_VISION), text_cfg=TEXT).eval()
    plain = Clip(model, tokenizer, MEAN, STD, "plain")
    weights = text_weights(plain, CLASSES, TEMPLATES)
    expected = logits(plain.embed(pixels(SIDE, 64)), weights)
    found = embeddings(student(plain, whiten), plain, None, WORLD)["direct"](pixels(SIDE, 64))
    # The two epsilons of 1e-5 change lengths alone: worst seen 5e-6 of cosines, times 100.
    torch.testing.assert_close(logits(found, weights), expected, rtol=0, atol=2e-3)
    assert torch.equal(logits(found, weights).argmax(1), expected.argmax(1))


def test_the_affine_map_is_least_squares() -> None:
    generator = torch.Generator().manual_seed(0)
    given = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    wanted = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    given[:, 2] = 5.0
    found = fit_affine(given, wanted)
    for channel in range(2):
        slope, intercept = np.polyfit(given[:, channel], wanted[:, channel], 1)
        assert float(found.scale_D[channel]) == pytest.approx(slope)
        assert float(found.shift_D[channel]) == pytest.approx(intercept)
    assert float(found.scale_D[2]) == 0
    assert float(found.shift_D[2]) == pytest.approx(float(wanted[:, 2].mean()))


def test_classes_and_templates_come_from_files_or_from_clip(tmp_path: Path) -> None:
    shards: Any = SimpleNamespace(classes=("red_disc", "star"))
    assert class_names(shards, None) == ["red disc", "star"]
    assert class_names(SimpleNamespace(classes=tuple(f"n{i:08d}" for i in range(1000))), None)[0] == "tench"  # type: ignore[arg-type]
    file = tmp_path / "classes.txt"
    file.write_text("a\nb\nc\n")
    with pytest.raises(EvaluationError, match="3 classes are named in words and the test shards have 2"):
        class_names(shards, file)
    with pytest.raises(EvaluationError, match="do not name their classes"):
        class_names(SimpleNamespace(classes=None), None)  # type: ignore[arg-type]
    assert len(templates_of(None)) == 80
    for wrong in ("plain", "{} of {}", "{} of {place}"):
        file.write_text(f"a photo of {{}}\n{wrong}\n")
        with pytest.raises(EvaluationError, match=rf"'{wrong}' does not hold one {{}} for the class"):
            templates_of(file)
    file.write_text("\n")
    with pytest.raises(EvaluationError, match=r"classes\.txt is empty \(--templates\)"):
        templates_of(file)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(EvaluationError, match=r"classes\.txt cannot be read as text: .*\(--classes\)"):
        class_names(shards, file)
    with pytest.raises(EvaluationError, match=r"none cannot be read as text: .*\(--templates\)"):
        templates_of(tmp_path / "none")


def test_towers_that_do_not_fit_are_refused(clip: Clip) -> None:
    other = student(clip, lambda t: t)
    other.student.projectors[0].linear.out_features = 99
    with pytest.raises(EvaluationError, match="class tokens of 99 channels, and tiny projects 24"):
        embeddings(other, clip, None, WORLD)
    with pytest.raises(SourceError, match="names no weights"):
        load_clip("ViT-B-16", torch.device("cpu"))
    with pytest.raises(SourceError, match="unknown open_clip model 'ViT-B-61'"):
        load_clip("ViT-B-61@openai", torch.device("cpu"))


def test_cosines_forgive_a_scale_and_not_a_shift() -> None:
    tokens, weights = torch.randn(4, 6), F.normalize(torch.randn(6, 3), dim=0)
    scaled = logits(tokens * torch.rand(4, 1).add(0.1), weights)
    torch.testing.assert_close(scaled, logits(tokens, weights), rtol=0, atol=1e-3)
    assert not torch.allclose(logits(tokens + 1, weights), logits(tokens, weights), atol=1)
