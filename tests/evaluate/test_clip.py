"""A student that keeps CLIP's embedding: zero-shot survives by construction, in a run and in its export."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from open_clip.model import CLIP, CLIPVisionCfg

from fd_scale import training
from fd_scale.data.index import ShardSet
from fd_scale.data.scenes import write_scenes
from fd_scale.data.sets import open_shards
from fd_scale.distill import Distillation
from fd_scale.errors import RecipeError, RunError
from fd_scale.evaluate import accuracy
from fd_scale.evaluate import clip as clips
from fd_scale.evaluate.clip import Clip, ClipStudent, clip_student, embeddings
from fd_scale.evaluate.features import EvaluationError
from fd_scale.evaluate.naming import SourceError
from fd_scale.evaluate.source import open_source
from fd_scale.evaluate.zeroshot import logits, text_weights
from fd_scale.pixels import IMAGENET_MEAN, IMAGENET_STD
from fd_scale.run import recipe as recipe_module
from fd_scale.run import recipes, scale
from fd_scale.run.folder import RunFolder
from fd_scale.run.recipe import derive
from fd_scale.run.world import World
from fd_scale.student import build_student
from tests.evaluate.test_zeroshot import SIDE, TEMPLATES, TEXT, tokenizer
from tests.spawn import spawn
from tests.teachers.tiny import CLIP_VISION, VIT, loaded, pixels, saved, shaken, spec

ARCHITECTURE = "vit_base_patch16_clip_quickgelu_224"
WORLD: Any = SimpleNamespace(
    device=torch.device("cpu"),
    rank=0,
    size=1,
    gather=lambda value: [value],
    together=lambda action: action(),
)


@pytest.fixture(scope="module")
def clip() -> Clip:
    """Which sees pixels as students do."""
    torch.manual_seed(0)
    vision = CLIPVisionCfg(image_size=SIDE, **CLIP_VISION)
    model = CLIP(embed_dim=10, vision_cfg=vision, text_cfg=TEXT, quick_gelu=True)  # type: ignore[arg-type]
    return Clip(shaken(model), tokenizer, IMAGENET_MEAN, IMAGENET_STD, "tiny")


@pytest.fixture(scope="module")
def teacher(clip: Clip, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same tower in timm, from a file as CLIP's authors have it."""
    visual: Any = clip.model.visual
    tensors = {f"visual.{name}": tensor for name, tensor in visual.state_dict().items()}
    file = saved(tensors, tmp_path_factory.mktemp("clip") / "clip.safetensors")
    return loaded(spec(ARCHITECTURE, file, input_size=SIDE, arguments={"pretrained_cfg": "openai", **VIT}))


def recipe(**changes: Any) -> recipe_module.Recipe:
    student = {"architecture": f"timm:{ARCHITECTURE}", "input_size": SIDE, "drop_path": 0.0, "arguments": VIT}
    values = {
        "student.position": None,
        "student.layer_scale": None,
        **{f"student.{name}": value for name, value in student.items()},
        "teacher.architecture": ARCHITECTURE,
        "teacher.input_size": SIDE,
        "teacher.arguments": VIT,
        "teacher.weights": "random",
        "objective.embedding_weight": 1.0,
    }
    return derive(recipes.get("demo"), **values | changes)


@torch.no_grad()
@pytest.mark.parametrize("cls", ["match", "drop"])
def test_a_student_with_a_perfect_projector_has_the_teacher_s_accuracy(
    clip: Clip, teacher: Any, tmp_path: Path, cls: str
) -> None:
    student = build_student(recipe(**{"objective.cls": cls}), [teacher]).eval()
    student.backbone.load_state_dict(teacher.network.state_dict())
    assert student.embedder is not None
    student.embedder.weight.copy_(teacher.projection.weight_DE.T)
    student.embedder.bias.zero_()
    modes = embeddings(ClipStudent(student, teacher, "perfect", {}), clip, None, WORLD)
    assert list(modes) == (["projected", "direct"] if cls == "match" else ["projected"])
    write_scenes(tmp_path / "scenes", num_images=50, size=SIDE, seed=2, max_count=50)
    shards = ShardSet.open(tmp_path / "scenes")
    assert shards.classes is not None
    weights = text_weights(clip, list(shards.classes), TEMPLATES)
    found = [
        accuracy.measure(
            lambda seen, embed=embed: logits(embed(seen), weights),
            shards,
            WORLD,
            size=SIDE,
            crop_pct=1.0,
            batch=16,
        )
        for embed in (clip.embed, modes["projected"])
    ]
    assert abs(found[0].top1 - found[1].top1) < 1e-6
    ours = F.normalize(modes["projected"](pixels(SIDE, 20)), dim=1)
    theirs = F.normalize(clip.embed(pixels(SIDE, 20)), dim=1)
    # timm's tower and open_clip's in float32: worst seen 3e-7.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_what_has_no_projection_or_another_one_is_refused(clip: Clip, teacher: Any) -> None:
    plain = loaded(spec("vit_tiny_patch16_224", input_size=SIDE, arguments=VIT))
    with pytest.raises(RecipeError, match=r"embedding_weight=1 regresses CLIP's embedding, but vit_"):
        build_student(recipe(), [plain])
    student = build_student(recipe(), [teacher])
    student.embedder = torch.nn.Linear(24, 7)
    with pytest.raises(EvaluationError, match="embeds images in 7 channels, and tiny texts in 10"):
        embeddings(ClipStudent(student, teacher, "other", {}), clip, None, WORLD)


def test_networks_that_cannot_be_asked_in_words_are_refused(clip: Clip, tmp_path: Path) -> None:
    folder = tmp_path / "a-run"
    folder.mkdir()
    asked_for = derive(recipe(), **{"objective.cls": "drop", "objective.embedding_weight": 0.0})
    (folder / "recipe.json").write_text(asked_for.to_json())
    with pytest.raises(EvaluationError, match=r"did not regress its teacher's class token .*'drop'"):
        clip_student(RunFolder.at(folder), step=None, device=torch.device("cpu"))
    with pytest.raises(SourceError, match="has no text tower: words are for open_clip:NAME@WEIGHTS"):
        clips.asked("timm:test_vit@random", clip, None, None, WORLD)


def test_random_weights_have_a_projection_of_clip_s_width_for_trials() -> None:
    first, again = (loaded(recipe().teacher, seed=3) for _ in range(2))
    assert first.projection.weight_DE.shape == (24, 512)
    assert torch.equal(first.projection.weight_DE, again.projection.weight_DE)


def trained(world: World, asked: recipe_module.Recipe) -> None:
    def prepare(world: World) -> training.Run:
        resolved = scale.resolve(scale.load(asked.scale), asked, world.size)
        return training.Run(asked, Distillation(asked, resolved, world), open_shards(asked), resolved, world)

    assert training.drive(prepare, world) == 0


def refusal(world: World, asked: recipe_module.Recipe) -> str:
    resolved = scale.resolve(scale.load(asked.scale), asked, world.size)
    task = Distillation(asked, resolved, world)
    try:
        task.resume(task.facts | {"projection": "0" * 64}, Path("step-00000001"))
    except RunError as error:
        return str(error)
    return ""


@pytest.mark.slow
def test_a_run_learns_the_embedding_and_its_export_has_it(tmp_path: Path) -> None:
    """Two processes under ZeRO-3."""
    write_scenes(tmp_path / "scenes", num_images=40, size=SIDE, seed=4, max_count=20)
    scale_file = tmp_path / "scale.json"
    scale_file.write_text(
        json.dumps({"train_micro_batch_size_per_gpu": 8, "zero_optimization": {"stage": 3}})
    )
    asked = recipe(
        **{
            "data.shards": str(tmp_path / "scenes"),
            "run.root": str(tmp_path / "runs"),
            "run.workers": 0,
            "global_batch": 16,
            "schedule.images": 16 * 20,
            "schedule.warmup_images": 0,
            "optim.lr": 2e-3,
            "scale": str(scale_file),
            "run.log_every_steps": 1,
        }
    )
    spawn(trained, 2, asked)
    (run,) = (tmp_path / "runs").iterdir()
    teacher = loaded(asked.teacher, seed=asked.seed)
    (export,) = (run / "exports").glob("step-00000020.safetensors")
    seen = pixels(SIDE, 8)
    with torch.no_grad():
        found = [open_source(str(path)).pooled(seen)["projected"] for path in (run, export)]
        student = clip_student(RunFolder.at(run), step=None, device=torch.device("cpu"))
        found.append(student.embeddings(seen))
        wanted = teacher.projection(teacher.features(seen).tokens_BND[:, 0])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=1e-5)  # equal batches: worst seen 0
    tower: Any = SimpleNamespace(width=512, name="random")
    told = clips.asked(str(export), tower, None, None, WORLD)
    assert list(told.modes) == ["projected"]
    assert torch.equal(told.modes["projected"](seen), found[1])
    tower.width = 7
    with pytest.raises(EvaluationError, match="embeds images in 512 channels, and random texts in 7"):
        clips.asked(str(export), tower, None, None, WORLD)
    export.with_name("step-00000020.embedding.safetensors").unlink()
    with pytest.raises(SourceError, match=r"has no step-00000020.embedding.safetensors beside it"):
        clips.asked(str(export), tower, None, None, WORLD)
    # Of random students the cosine is 0 +- 0.05 over 512 channels.
    assert float(F.cosine_similarity(found[0], wanted).mean()) > 0.5
    assert "embedding.safetensors" in export.with_suffix(".md").read_text()
    (said,) = spawn(refusal, 1, asked)
    assert "was made with another projection of its teacher's class token" in said
