"""CLIP from open_clip, from OpenAI's kind of archive and through timm, against open_clip's own forward
pass."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip
import pytest
import torch
from open_clip.model import CLIP, CLIPVisionCfg, resize_pos_embed
from torch import Tensor, nn

from fd_scale.errors import TeacherError
from tests.teachers.tiny import CLIP_VISION, VIT, as_upstream, loaded, pixels, saved, shaken, spec

SIDE = 32
TEXT = {"context_length": 4, "vocab_size": 8, "width": 8, "heads": 2, "layers": 1}
QUICK, EXACT = "ViT-B-16-quickgelu", "ViT-B-16"
TIMM_QUICK, TIMM_EXACT = "vit_base_patch16_clip_quickgelu_224", "vit_base_patch16_clip_224"


def clip(quick_gelu: bool = True, **vision: Any) -> Any:
    """A whole tiny CLIP, as open_clip builds it."""
    torch.manual_seed(0)
    settings = {"image_size": SIDE, **CLIP_VISION, **vision}
    return shaken(
        CLIP(embed_dim=10, vision_cfg=CLIPVisionCfg(**settings), text_cfg=TEXT, quick_gelu=quick_gelu)
    )


def all_tokens(tower: Any, values: Tensor) -> Tensor:
    """ln_post on every token, written out."""
    patches = tower.conv1(values).flatten(2).transpose(1, 2)
    tokens = torch.cat((tower.class_embedding.expand(len(values), 1, -1), patches), dim=1)
    tokens = tower.ln_pre(tokens + tower.positional_embedding)
    for block in tower.transformer.resblocks:
        normed = block.ln_1(tokens)
        tokens = tokens + block.attn(normed, normed, normed, need_weights=False)[0]
        tokens = tokens + block.mlp(block.ln_2(tokens))
    return tower.ln_post(tokens)


@pytest.mark.parametrize(
    ("library", "content"), [("open_clip", "model"), ("open_clip", "tower"), ("timm", "model")]
)
@torch.no_grad()
def test_map_of_the_same_file_through_either_library(library: str, content: str, tmp_path: Path) -> None:
    model = clip()
    state = (model if content == "model" else model.visual).state_dict()
    path = saved(state, tmp_path / "clip.safetensors")
    architecture, arguments = {"open_clip": (QUICK, CLIP_VISION), "timm": (TIMM_QUICK, VIT)}[library]
    teacher = loaded(spec(architecture, path, library, input_size=SIDE, arguments=arguments))
    values = pixels(SIDE)
    features = teacher.features(values)
    seen = as_upstream(values, teacher.mean, teacher.std)

    # Order of float32 sums and a fused attention: 7e-7 seen on tokens of size 4; so throughout this file.
    assert torch.allclose(features.tokens_BND, all_tokens(model.visual, seen), rtol=0, atol=2e-5)
    # What CLIP itself makes of it: the class token, projected.
    assert torch.allclose(
        features.tokens_BND[:, 0] @ model.visual.proj, model.visual(seen), rtol=0, atol=2e-5
    )
    assert (teacher.width, teacher.grid, teacher.num_prefix_tokens) == (24, (2, 2), 1)
    assert teacher.mean == pytest.approx((0.48145466, 0.4578275, 0.40821073))
    assert teacher.std == pytest.approx((0.26862954, 0.26130258, 0.27577711))


@torch.no_grad()
def test_patches_are_open_clips_own_output_tokens(tmp_path: Path) -> None:
    model = clip()
    path = saved(model.state_dict(), tmp_path / "clip.safetensors")
    teacher = loaded(spec(QUICK, path, "open_clip", input_size=SIDE, arguments=CLIP_VISION))
    values = pixels(SIDE)
    model.visual.output_tokens = True
    _, patches_BND = model.visual(as_upstream(values, teacher.mean, teacher.std))
    assert torch.allclose(teacher.features(values).patches_BND, patches_BND, rtol=0, atol=2e-5)


@torch.no_grad()
def test_norm_after_pooling_is_applied_to_every_token(tmp_path: Path) -> None:
    vision = {"final_ln_after_pool": True, "pool_type": "avg", "no_ln_pre": True}
    model = clip(quick_gelu=False, **vision)
    path = saved(model.state_dict(), tmp_path / "clip.safetensors")
    teacher = loaded(spec(EXACT, path, "open_clip", input_size=SIDE, arguments={**CLIP_VISION, **vision}))
    values = pixels(SIDE)
    expected = all_tokens(model.visual, as_upstream(values, teacher.mean, teacher.std))
    assert torch.allclose(teacher.features(values).tokens_BND, expected, rtol=0, atol=2e-5)


@torch.no_grad()
def test_attentional_pooling_leaves_a_map_without_norm(tmp_path: Path) -> None:
    vision = {"attentional_pool": True, "attn_pooler_queries": 3, "attn_pooler_heads": 2}
    model = clip(quick_gelu=False, **vision)
    path = saved(model.state_dict(), tmp_path / "coca.safetensors")
    teacher = loaded(spec(EXACT, path, "open_clip", input_size=SIDE, arguments={**CLIP_VISION, **vision}))
    values = pixels(SIDE)
    seen = as_upstream(values, teacher.mean, teacher.std)
    tower = model.visual
    pooled = tower.ln_post(tower.attn_pool(teacher.features(values).tokens_BND))[:, 0] @ tower.proj
    assert torch.allclose(pooled, tower(seen), rtol=0, atol=2e-5)
    assert teacher.fingerprint["feature_point"] == "last map, which has no norm of its own"


@torch.no_grad()
def test_residual_tower(tmp_path: Path) -> None:
    vision = {"layers": (1, 1, 1, 1), "width": 4, "patch_size": None, "image_size": 64, "head_width": 64}
    model = clip(**vision)
    path = saved(model.state_dict(), tmp_path / "resnet.safetensors")
    arguments = {"layers": (1, 1, 1, 1), "width": 4}
    teacher = loaded(spec("RN50", path, "open_clip", input_size=64, arguments=arguments))
    values = pixels(64)
    features = teacher.features(values)
    assert (teacher.grid, teacher.num_prefix_tokens, teacher.width) == ((2, 2), 0, 128)
    map_BDHW = features.tokens_BND.transpose(1, 2).unflatten(2, (2, 2))
    expected = model.visual(as_upstream(values, teacher.mean, teacher.std))
    assert torch.allclose(model.visual.attnpool(map_BDHW), expected, rtol=0, atol=2e-5)


@torch.no_grad()
def test_towers_from_timm_are_read_as_timms(tmp_path: Path) -> None:
    vision = {
        "timm_model_name": "test_vit",
        "timm_pool": "token",
        "timm_proj": "linear",
        "image_size": 160,
    }
    model = clip(**vision)
    path = saved(model.state_dict(), tmp_path / "clip.safetensors")
    arguments = {k: v for k, v in vision.items() if k != "image_size"}
    teacher = loaded(spec(EXACT, path, "open_clip", input_size=160, arguments=arguments))
    values = pixels(160, batch=1)
    tokens_BND = teacher.features(values).tokens_BND
    expected = model.visual(as_upstream(values, teacher.mean, teacher.std))
    assert torch.allclose(model.visual.head(tokens_BND[:, 0]), expected, rtol=0, atol=5e-5)
    smaller = loaded(spec(EXACT, path, "open_clip", input_size=64, arguments=arguments))
    assert (smaller.input_size, smaller.grid) == (64, (4, 4))


@torch.no_grad()
def test_another_input_size_resamples_positions_as_open_clip_does(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, larger = clip(), clip(image_size=48)
    path = saved(model.state_dict(), tmp_path / "clip.safetensors")
    state = dict(model.state_dict())
    resize_pos_embed(state, SimpleNamespace(visual=larger.visual))
    larger.visual.load_state_dict({k[7:]: v for k, v in state.items() if k.startswith("visual.")})
    teacher = loaded(spec(QUICK, path, "open_clip", input_size=48, arguments=CLIP_VISION))
    values = pixels(48)
    seen = as_upstream(values, teacher.mean, teacher.std)
    assert torch.allclose(
        teacher.features(values).tokens_BND[:, 0] @ larger.visual.proj, larger.visual(seen), atol=2e-5
    )
    assert "position tables were fitted to this network, from [5] rows to [10]" in caplog.text


class Archive(nn.Module):
    """OpenAI's CLIP as its archives hold it: half precision, with three numbers beside the weights."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.visual = model.visual
        self.token_embedding = model.token_embedding
        self.logit_scale = model.logit_scale
        for name in ("input_resolution", "context_length", "vocab_size"):
            self.register_buffer(name, torch.tensor(SIDE))

    def forward(self, values: Tensor) -> Tensor:
        return (
            self.visual(values) * self.logit_scale + self.token_embedding.weight.sum() + self.input_resolution
        )


def archive(model: Any, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated; the archives are not going away
        traced = torch.jit.trace(Archive(model), torch.zeros(1, 3, SIDE, SIDE), check_trace=False)
        traced.half().save(str(path))
    return path


@pytest.mark.parametrize("library", ["open_clip", "timm"])
@torch.no_grad()
def test_openai_archive(library: str, tmp_path: Path) -> None:
    model = clip()
    path = archive(model, tmp_path / "ViT-B-16.pt")
    model = model.half().float()
    architecture, arguments = {"open_clip": (QUICK, CLIP_VISION), "timm": (TIMM_QUICK, VIT)}[library]
    teacher = loaded(spec(architecture, path, library, input_size=SIDE, arguments=arguments))
    values = pixels(SIDE)
    seen = as_upstream(values, teacher.mean, teacher.std)
    assert torch.allclose(
        teacher.features(values).tokens_BND, all_tokens(model.visual, seen), rtol=0, atol=2e-5
    )
    assert teacher.fingerprint["weights"] == "ViT-B-16.pt"


@pytest.mark.parametrize(
    ("library", "architecture", "arguments", "remedy"),
    [("open_clip", EXACT, CLIP_VISION, QUICK), ("timm", TIMM_EXACT, VIT, TIMM_QUICK)],
)
@pytest.mark.parametrize("kind", ["archive", "state dict"])
def test_openai_weights_without_quickgelu_are_refused(
    library: str, architecture: str, arguments: Any, remedy: str, kind: str, tmp_path: Path
) -> None:
    path = tmp_path / "ViT-B-16.pt"
    if kind == "archive":
        archive(clip(), path)
    else:
        torch.save(Archive(clip()).state_dict(), path)
    with pytest.raises(TeacherError, match=f"OpenAI's CLIPs, was trained with QuickGELU.*{remedy}"):
        loaded(spec(architecture, path, library, input_size=SIDE, arguments=arguments))


@pytest.mark.parametrize(
    ("library", "architecture", "arguments"), [("open_clip", EXACT, CLIP_VISION), ("timm", TIMM_EXACT, VIT)]
)
def test_other_clip_files_without_quickgelu_are_warned_of(
    library: str, architecture: str, arguments: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = saved(clip(quick_gelu=False).state_dict(), tmp_path / "clip.safetensors")
    loaded(spec(architecture, path, library, input_size=SIDE, arguments=arguments))
    assert "does not say which GELU" in caplog.text


@pytest.mark.parametrize(("library", "architecture"), [("open_clip", EXACT), ("timm", TIMM_EXACT)])
def test_openai_tag_without_quickgelu_is_refused(library: str, architecture: str) -> None:
    with pytest.raises(TeacherError, match="weights 'openai' was trained with QuickGELU"):
        loaded(spec(architecture, "openai", library))


@torch.no_grad()
def test_open_clip_tag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real code of a tag, from the point on where its file has been fetched."""
    model = clip()
    path = saved(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    monkeypatch.setattr("fd_scale.teachers.open_clip.download_pretrained", lambda settings: str(path))
    teacher = loaded(spec(QUICK, "openai", "open_clip", input_size=SIDE, arguments=CLIP_VISION))
    values = pixels(SIDE)
    seen = as_upstream(values, teacher.mean, teacher.std)
    assert torch.allclose(
        teacher.features(values).tokens_BND, all_tokens(model.visual, seen), rtol=0, atol=2e-5
    )
    assert teacher.fingerprint["weights"] == "openai"


def test_unknown_names_and_arguments() -> None:
    with pytest.raises(
        TeacherError, match=r"unknown open_clip architecture 'ViT-B-61'; did you mean .*ViT-B-16"
    ):
        loaded(spec("ViT-B-61", library="open_clip"))
    with pytest.raises(TeacherError, match="'openia' is no tag of ViT-B-16-quickgelu; did you mean openai"):
        loaded(spec(QUICK, "openia", "open_clip"))
    with pytest.raises(TeacherError, match="takes no argument 'widht'; did you mean width"):
        loaded(spec(QUICK, library="open_clip", arguments={"widht": 3}))
    with pytest.raises(TeacherError, match=r"'image_size'; teacher.input_size says it"):
        loaded(spec(QUICK, library="open_clip", arguments={"image_size": 32}))
    with pytest.raises(TeacherError, match="open_clip cannot build ViT-B-16-quickgelu"):
        loaded(spec(QUICK, library="open_clip", arguments={"width": 30, "head_width": 64}))


def test_a_file_must_say_its_statistics_where_tags_differ(tmp_path: Path) -> None:
    path = saved(clip(quick_gelu=False).state_dict(), tmp_path / "clip.safetensors")
    asked = {"input_size": SIDE, "arguments": CLIP_VISION}
    with pytest.raises(
        TeacherError, match=r"set teacher.arguments.pretrained to .*laion2b_s32b_b82k \(mean 0.500"
    ):
        loaded(spec("ViT-L-14", path, "open_clip", **asked))
    asked["arguments"] = {**CLIP_VISION, "pretrained": "laion2b_s32b_b82k"}
    assert loaded(spec("ViT-L-14", path, "open_clip", **asked)).mean == (0.5, 0.5, 0.5)


def test_the_text_tower_is_never_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_clip.model, "_build_text_tower", None)
    loaded(
        spec(
            "roberta-ViT-B-32",
            library="open_clip",
            input_size=64,
            arguments={**CLIP_VISION, "patch_size": 32},
        )
    )
