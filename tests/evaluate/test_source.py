"""Words that name a network, and words that do not."""

import pytest
import torch

from fd_scale.errors import RunError, TeacherError
from fd_scale.evaluate.naming import LibraryNetwork, SourceError, meaning, reports_of
from fd_scale.evaluate.source import open_source
from fd_scale.evaluate.start import find
from fd_scale.run import presets
from fd_scale.run.transfer import Start
from fd_scale.teachers import load
from tests.evaluate.test_backbone import pixels, recipe


def test_a_library_is_asked_by_name_and_weights():
    backbone = open_source("timm:test_vit@random", input_size=32)
    spec = recipe().teacher.model_copy(update={"architecture": "test_vit", "input_size": 32, "arguments": {}})
    taught = load(spec, device="cpu", dtype=torch.float32, seed=0)
    assert torch.equal(backbone.tokens(pixels(2, 32)).tokens_BND, taught.features(pixels(2, 32)).tokens_BND)
    assert backbone.fingerprint["sha256"] == taught.fingerprint["sha256"]


@pytest.mark.parametrize(
    ("text", "architecture", "weights", "arguments"),
    [
        ("timm:vit_base_patch16_224.dino", "vit_base_patch16_224", "dino", {}),
        ("timm:vit_base_patch16_224@a.b.pth", "vit_base_patch16_224", "a.b.pth", {}),
        ("timm:vit_base_patch16_224.dino@a.pth", "vit_base_patch16_224", "a.pth", {"pretrained_cfg": "dino"}),
        ("open_clip:ViT-B-16-quickgelu@openai", "ViT-B-16-quickgelu", "openai", {}),
    ],
)
def test_words_of_libraries_are_read_by_one_grammar(text, architecture, weights, arguments):
    found = meaning(text)
    assert isinstance(found, LibraryNetwork)
    assert (found.spec.architecture, found.spec.weights) == (architecture, weights)
    assert found.spec.arguments == arguments


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("tim:resnet", SourceError, "unknown library 'tim'; did you mean timm"),
        ("timm:vit_base_patch16_224", SourceError, "names no weights: append @ and a tag, a file, or random"),
        ("timm:vit_base_patch16_224.dyno", TeacherError, "did you mean dino"),
        ("timm:vit_bass_patch16_224@random", TeacherError, "vit_base_patch16_224"),
        ("runs/absent", SourceError, r"runs/absent does not exist; a network is a run directory"),
    ],
)
def test_other_words_are_refused(text, error, message):
    with pytest.raises(error, match=message):
        open_source(text)


def test_choices_that_a_network_does_not_have_are_refused(tmp_path):
    with pytest.raises(SourceError, match="--step 3 is for runs, and timm:test_vit@random is none"):
        open_source("timm:test_vit@random", step=3)
    with pytest.raises(SourceError, match=r"--input-size 48: student.safetensors is measured at the size"):
        open_source("student.safetensors", input_size=48)
    (tmp_path / "recipe.json").write_text(presets.recipe_of("linear").to_json())
    with pytest.raises(RunError, match="is a linear probe, which leaves its network as it was"):
        open_source(str(tmp_path))
    with pytest.raises(SourceError, match=r"start.weights='average' is for runs, and timm"):
        find(Start(network="timm:test_vit@random", weights="average"))


def test_records_go_to_the_run_that_they_are_about(tmp_path):
    run = tmp_path / "runs" / "demo-00000000"
    (run / "exports").mkdir(parents=True)
    (run / "recipe.json").write_text("{}")
    for text in (
        str(run),
        f"{run}#ema",
        f"{run}#teacher",
        str(run / "exports" / "step-00000001.safetensors"),
    ):
        assert reports_of(text) == run / "reports"
    assert str(reports_of("timm:test_vit@random")) == "reports"
