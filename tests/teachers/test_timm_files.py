"""Checkpoints of DINO, MAE, DeiT, DINOv2 and EsViT as they were published, and timm's tags, into timm's
networks."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from fd_scale.errors import TeacherError
from tests.teachers.tiny import VIT, as_upstream, loaded, pixels, saved, shaken, spec

SIDE = 32
SWIN: dict[str, Any] = {"embed_dim": 8, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 8), "window_size": 4}


def network(architecture: str = "vit_base_patch16_224", side: int = SIDE, **more: Any) -> Any:
    torch.manual_seed(0)
    return shaken(timm.create_model(architecture, img_size=side, num_classes=0, **{**VIT, **more}))


def map_of(model: Any, teacher: Any) -> tuple[Tensor, Tensor]:
    """The teacher's tokens and the network's own."""
    values = pixels(teacher.input_size)
    with torch.no_grad():
        expected = model.forward_features(as_upstream(values, teacher.mean, teacher.std))
    expected = expected.flatten(1, 2) if expected.ndim == 4 else expected
    return teacher.features(values).tokens_BND, expected


def assert_same_map(model: Any, teacher: Any) -> None:
    # The same operations in the same order: 0 seen.
    assert torch.allclose(*map_of(model, teacher), rtol=0, atol=1e-5)


def asked(path: Path | str, tag: str, architecture: str = "vit_base_patch16_224", **more: Any) -> Any:
    return spec(architecture, path, input_size=SIDE, arguments={**VIT, "pretrained_cfg": tag}, **more)


def test_dino_backbone_and_full_checkpoint(tmp_path: Path) -> None:
    model = network()
    torch.save(model.state_dict(), tmp_path / "backbone.pth")
    assert_same_map(model, loaded(asked(tmp_path / "backbone.pth", "dino")))

    teacher = {f"backbone.{name}": tensor for name, tensor in model.state_dict().items()}
    teacher |= {"head.mlp.0.weight": torch.ones(2, 2), "head.last_layer.weight_g": torch.ones(2, 1)}
    student = {f"module.{name}": torch.zeros_like(tensor) for name, tensor in teacher.items()}
    content = {
        "student": student,
        "teacher": teacher,
        "epoch": 800,
        "args": argparse.Namespace(arch="vit_base"),
    }
    torch.save(content, tmp_path / "full.pth")
    with pytest.raises(TeacherError, match="several networks"):
        loaded(asked(tmp_path / "full.pth", "dino"))
    assert_same_map(model, loaded(asked(f"{tmp_path / 'full.pth'}#teacher", "dino")))


def test_mae_with_its_decoder(tmp_path: Path) -> None:
    model = network()
    decoder = {"mask_token": torch.ones(1, 1, 8), "decoder_pos_embed": torch.ones(1, 5, 8)}
    decoder |= {"decoder_blocks.0.norm1.weight": torch.ones(8)}
    torch.save({"model": {**model.state_dict(), **decoder}}, tmp_path / "mae.pth")
    assert_same_map(model, loaded(asked(tmp_path / "mae.pth", "mae")))


def test_deit_with_its_classifier(tmp_path: Path) -> None:
    model = network("deit_base_patch16_224")
    head = {"head.weight": torch.ones(1000, 24), "head.bias": torch.ones(1000)}
    torch.save({"model": {**model.state_dict(), **head}}, tmp_path / "deit.pth")
    teacher = loaded(spec("deit_base_patch16_224", tmp_path / "deit.pth", input_size=SIDE, arguments=VIT))
    assert_same_map(model, teacher)


def test_deit3_names_its_layer_scale_otherwise(tmp_path: Path) -> None:
    model = network("deit3_base_patch16_224")
    published = {
        re.sub(r"\.ls([12])\.gamma", r".gamma_\1", name): t for name, t in model.state_dict().items()
    }
    torch.save({"model": published}, tmp_path / "deit3.pth")
    assert_same_map(
        model, loaded(spec("deit3_base_patch16_224", tmp_path / "deit3.pth", input_size=SIDE, arguments=VIT))
    )


def test_dinov2_with_registers(tmp_path: Path) -> None:
    name = "vit_base_patch14_reg4_dinov2"
    model = network(name, side=28)
    published = dict(model.state_dict())
    published["register_tokens"] = published.pop("reg_token")
    published["pos_embed"] = torch.cat((torch.full((1, 1, 24), 0.5), published["pos_embed"]), dim=1)
    published["cls_token"] = published["cls_token"] - 0.5
    published["mask_token"] = torch.zeros(1, 24)
    published = {re.sub(r"\.ls([12])\.gamma", r".ls\1.gamma", key): value for key, value in published.items()}
    torch.save(published, tmp_path / "dinov2.pth")
    teacher = loaded(spec(name, tmp_path / "dinov2.pth", input_size=28, arguments=VIT))
    # The class token is taken apart and put together again: 5e-7 seen.
    assert torch.allclose(*map_of(model, teacher), rtol=0, atol=1e-5)
    assert teacher.num_prefix_tokens == 5


def as_esvit(model: Any) -> dict[str, Tensor]:
    """A Swin of timm under the names of the original code, with the heads that EsViT trains."""
    published = {}
    for name, tensor in model.state_dict().items():
        name = re.sub(r"layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", name)
        published[f"module.{name}"] = tensor
    for index in range(4):
        published[f"module.layers.{index}.blocks.0.attn.relative_position_index"] = torch.zeros(16, 16).long()
    for head in ("head", "head_dense"):
        published[f"module.{head}.mlp.0.weight"] = torch.ones(2, 2)
        published[f"module.{head}.last_layer.weight_v"] = torch.ones(2, 2)
    return published


def test_esvit_swin(tmp_path: Path) -> None:
    """As for Swin-B with windows of 14, which the last map of 7 cuts down: here 4 and 2."""
    name = "swin_base_patch4_window7_224"
    torch.manual_seed(0)
    model: Any = shaken(timm.create_model(name, img_size=64, num_classes=0, **SWIN))
    assert model.layers[3].blocks[0].attn.relative_position_bias_table.shape == (9, 8)
    published = as_esvit(model)
    content = {
        "student": published,
        "teacher": {key: torch.zeros_like(value) for key, value in published.items()},
        "epoch": 300,
        "args": argparse.Namespace(cfg="swin.yaml"),
    }
    path = tmp_path / "checkpoint_best.pth"
    torch.save(content, path)
    teacher = loaded(spec(name, f"{path}#student", input_size=64, arguments=SWIN))
    assert_same_map(model, teacher)
    assert (teacher.grid, teacher.num_prefix_tokens, teacher.width) == ((2, 2), 0, 64)
    assert teacher.fingerprint["weights"] == "checkpoint_best.pth#student"


def test_another_input_size_resamples_as_timm_does(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = network()
    path = saved(model.state_dict(), tmp_path / "w.safetensors")
    larger: Any = timm.create_model(
        "vit_base_patch16_224",
        img_size=48,
        num_classes=0,
        pretrained=True,
        pretrained_cfg_overlay={"file": str(path), "num_classes": 0},
        **VIT,
    )
    arguments = {**VIT, "pretrained_cfg": "dino"}
    teacher = loaded(spec("vit_base_patch16_224", path, input_size=48, arguments=arguments))
    assert_same_map(larger.eval(), teacher)
    assert "position tables were fitted to this network, from [5] rows to [10]" in caplog.text
    assert teacher.grid == (3, 3)


def test_weights_of_something_else_are_listed(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save(network(depth=3).state_dict(), path)
    with pytest.raises(TeacherError, match=r"not in the network: blocks\.2\.norm1\.weight.* and \d+ more"):
        loaded(asked(path, "dino"))
    torch.save(network(embed_dim=36).state_dict(), path)
    with pytest.raises(TeacherError, match=r"of another shape: cls_token \(1, 1, 36\), network \(1, 1, 24\)"):
        loaded(asked(path, "dino"))
    torch.save({"conv.weight": torch.ones(1)}, path)
    with pytest.raises(TeacherError, match=r"missing in the file: .*and \d+ more"):
        loaded(asked(path, "dino"))
    torch.save(network().state_dict(), path)
    with pytest.raises(TeacherError, match=r"do not fit teacher swin_base|are not of swin_base"):
        loaded(spec("swin_base_patch4_window7_224", path, input_size=64, arguments=SWIN))


def test_a_file_must_say_its_statistics_where_tags_differ(tmp_path: Path) -> None:
    path = saved(network().state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(TeacherError, match=r"teacher.arguments.pretrained_cfg to .*dino \(mean 0.485"):
        loaded(spec("vit_base_patch16_224", path, input_size=SIDE, arguments=VIT))
    with pytest.raises(TeacherError, match="'dimo' is no tag of vit_base_patch16_224; did you mean dino"):
        loaded(asked(path, "dimo"))
    assert loaded(asked(path, "dino")).mean == (0.485, 0.456, 0.406)
    assert loaded(asked(path, "augreg_in1k")).mean == (0.5, 0.5, 0.5)


def test_names_tags_and_arguments_that_timm_does_not_have() -> None:
    with pytest.raises(TeacherError, match="unknown timm architecture 'vit_bse_patch16_224'; did you mean"):
        loaded(spec("vit_bse_patch16_224"))
    with pytest.raises(TeacherError, match="give architecture='vit_base_patch16_224' and weights='dino'"):
        loaded(spec("vit_base_patch16_224.dino"))
    with pytest.raises(
        TeacherError, match="'fb_in2k' is no tag of deit_base_patch16_224; did you mean fb_in1k"
    ):
        loaded(spec("deit_base_patch16_224", "fb_in2k"))
    with pytest.raises(TeacherError, match=r"'mae' contradicts teacher.weights='dino'"):
        loaded(spec("vit_base_patch16_224", "dino", arguments={"pretrained_cfg": "mae"}))
    with pytest.raises(TeacherError, match=r"argument 'img_size' is not given.*input_size says it"):
        loaded(spec("vit_base_patch16_224", arguments={"img_size": 32}))
    with pytest.raises(
        TeacherError, match=r"timm cannot build vit_base_patch16_224 with .*unexpected keyword"
    ):
        loaded(spec("vit_base_patch16_224", arguments={"widht": 32}))
    with pytest.raises(TeacherError, match=r"gives no map at 8 px.*teacher\.input_size"):
        loaded(spec("vit_base_patch16_224", input_size=8, arguments=VIT))


@torch.no_grad()
def test_tag_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm's own loading, from the point on where its file has been fetched."""
    torch.manual_seed(0)
    model: Any = shaken(timm.create_model("deit_base_patch16_224", img_size=SIDE, **VIT))
    monkeypatch.setattr(
        "timm.models._builder.load_state_dict_from_hf", lambda *a, **k: dict(model.state_dict())
    )
    wanted = spec("deit_base_patch16_224", "fb_in1k", input_size=SIDE, arguments=VIT)
    teacher = loaded(wanted)
    assert_same_map(model, teacher)
    assert not any(name.startswith("head") for name in teacher.network.state_dict())

    partial = {name: tensor for name, tensor in model.state_dict().items() if "norm" not in name}
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *a, **k: dict(partial))
    with pytest.raises(TeacherError, match="'fb_in1k' of deit_base_patch16_224 could not be loaded"):
        loaded(wanted)


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    wanted = spec("deit_base_patch16_224", "fb_in1k", input_size=SIDE, arguments=VIT)
    with pytest.raises(
        TeacherError, match=r"could not be loaded from the hub:.*\n.*--set teacher.weights=/path"
    ):
        loaded(wanted)
