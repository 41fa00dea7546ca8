"""Files of weights: what is taken off, what is refused, and that nothing in them is ever run."""

from __future__ import annotations

import argparse
import io
import logging
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fd_scale.errors import TeacherError
from fd_scale.teachers import weights
from fd_scale.teachers.torchscript import is_archive, read_archive
from tests.teachers.tiny import saved


def tensors(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "norm.weight": torch.randn(3, generator=generator),
        "proj.weight": torch.randn(3, 2, generator=generator),
    }


def read(content: Any, folder: Path, key: str = "") -> weights.Checkpoint:
    path = folder / "weights.pth"
    torch.save(content, path)
    return weights.read(weights.source(f"{path}{key}"))


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name


def prefixed(prefix: str, named: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in named.items()}


WRAPPED: dict[str, Any] = {
    "bare": tensors(),
    "timm": {"epoch": 3, "arch": "vit", "state_dict": tensors()},
    "mae and deit": {"model": tensors(), "args": argparse.Namespace(lr=1e-3, output_dir=None)},
    "eva": {"module": tensors()},
    "ema": {"model_ema": tensors(), "optimizer": {"state": {}, "param_groups": []}},
    "distributed": prefixed("module.", tensors()),
    "compiled": {"model": prefixed("_orig_mod.", tensors())},
    "dino": {"teacher": prefixed("module.backbone.", tensors()), "epoch": 100},
    "nested": {"teacher": {"state_dict": prefixed("backbone.", tensors())}},
    "numbers among tensors": {"model": {**tensors(), "step": 7, "name": "x"}},
}


@pytest.mark.parametrize("name", WRAPPED)
def test_wrappings_of_public_checkpoints(name: str, tmp_path: Path) -> None:
    assert_equal(read(WRAPPED[name], tmp_path).tensors, tensors())


def test_what_was_taken_off_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "fd_scale"):
        read(WRAPPED["dino"], tmp_path)
    assert "weights.pth: took key 'teacher', names after 'module.', names after 'backbone.'" in caplog.text


def test_safetensors(tmp_path: Path) -> None:
    path = saved(tensors(), tmp_path / "weights.safetensors")
    checkpoint = weights.read(weights.source(str(path)))
    assert_equal(checkpoint.tensors, tensors())
    assert checkpoint.label == "weights.safetensors"
    assert not checkpoint.is_openai


def test_names_beside_the_backbone_stay(tmp_path: Path) -> None:
    content = {**prefixed("backbone.", tensors()), "head.mlp.weight": torch.ones(1)}
    assert read({"teacher": content}, tmp_path).tensors.keys() == {*tensors(), "head.mlp.weight"}


def test_a_choice_of_networks_is_the_users(tmp_path: Path) -> None:
    content = {"student": prefixed("module.", tensors(0)), "teacher": tensors(1), "epoch": 1}
    with pytest.raises(TeacherError, match=r"holds several networks; say which: .*#teacher or .*#student"):
        read(content, tmp_path)
    student = read(content, tmp_path, "#student")
    assert_equal(student.tensors, tensors(0))
    assert student.label == "weights.pth#student"
    assert_equal(read(content, tmp_path, "#teacher").tensors, tensors(1))
    with pytest.raises(TeacherError, match="no weights under 'techer'; did you mean teacher"):
        read(content, tmp_path, "#techer")
    with pytest.raises(TeacherError, match="none, it holds tensors themselves"):
        read(tensors(), tmp_path, "#model")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([torch.ones(1)], "holds a list, not named tensors"),
        (torch.ones(1), "holds a Tensor, not named tensors"),
        ({"epoch": 3, "lr": 0.1}, "holds no tensors under epoch, lr"),
        ({"model": {}}, "holds no tensors under model"),
        ({"module.a": torch.ones(1), "a": torch.ones(1)}, "both with and without 'module.'"),
    ],
)
def test_files_without_weights(content: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match=words):
        read(content, tmp_path)


def test_sources(tmp_path: Path) -> None:
    assert weights.source("random").is_random
    assert weights.source("fb_in1k").path is None
    assert weights.source("fb_in1k").label == "fb_in1k"
    path = saved(tensors(), tmp_path / "w.safetensors")
    assert weights.source(str(path)).label == "w.safetensors"
    with pytest.raises(TeacherError, match=r"weights file .*no\.pth does not exist"):
        weights.source(str(tmp_path / "no.pth"))
    with pytest.raises(TeacherError, match=r"looks like a file, but only \.safetensors, \.pth, \.pt, \.bin"):
        weights.source(str(tmp_path / "weights.npz"))
    with pytest.raises(ValueError, match="is not a file"):
        weights.read(weights.source("random"))


class Trap:
    """An object whose unpickling writes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return (Path.write_text, (self.target, "caught"))


def test_code_in_a_pickle_is_not_run(tmp_path: Path) -> None:
    caught = tmp_path / "caught"
    with pytest.raises(TeacherError, match="cannot be read safely"):
        read({"model": tensors(), "extra": Trap(caught)}, tmp_path)
    assert not caught.exists()


def script_archive(path: Path, pickled: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("net/data.pkl", pickled)
        file.writestr("net/code/__torch__.py", "")
        file.writestr("net/data/0", b"\0" * 8)
    return path


def test_code_in_an_archive_is_not_run(tmp_path: Path) -> None:
    caught = tmp_path / "caught"
    path = script_archive(tmp_path / "net.pt", pickle.dumps(Trap(caught)))
    assert is_archive(path)
    with pytest.raises(TeacherError, match=r"cannot be read safely: it holds a pathlib"):
        weights.read(weights.source(str(path)))
    assert not caught.exists()


def test_an_archive_that_points_elsewhere(tmp_path: Path) -> None:
    class Pickler(pickle.Pickler):
        def persistent_id(self, thing: Any) -> Any:
            return ("storage", "os", "../../x", "cpu", 1) if thing == "here" else None

    stream = io.BytesIO()
    Pickler(stream, protocol=2).dump("here")
    path = script_archive(tmp_path / "net.pt", stream.getvalue())
    with pytest.raises(TeacherError, match="which is no tensor"):
        weights.read(weights.source(str(path)))


def test_an_archive_whose_tensor_outgrows_its_storage(tmp_path: Path) -> None:
    pickled = (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
        b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x02tQK\x00(K\x63t(K\x01t\x89ccollections\nOrderedDict\n)RtR."
    )
    path = script_archive(tmp_path / "net.pt", pickled)
    with pytest.raises(TeacherError, match=r"cannot be read safely: .*out of bounds"):
        weights.read(weights.source(str(path)))


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 3))
        self.register_buffer("count", torch.tensor(5))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.sizes = [1, 2]
        self.label = "inner"

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Inner(), Inner()])
        self.turned = nn.Parameter(torch.randn(4, 3).t())
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.halved = nn.Parameter(torch.randn(5).half())

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x @ self.turned @ self.turned.t())[:, :2]
        return x


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_an_archive_gives_its_state_dict(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Outer()
    path = tmp_path / "net.pt"
    torch.jit.script(network).save(str(path))
    assert_equal(read_archive(path), dict(network.state_dict()))
    assert not is_archive(saved(tensors(), tmp_path / "x.safetensors"))
    torch.save(tensors(), tmp_path / "plain.pth")
    assert not is_archive(tmp_path / "plain.pth")


@pytest.mark.parametrize("name", ["broken.pth", "broken.safetensors", "broken.pt"])
@pytest.mark.parametrize("content", [b"", b"not a checkpoint at all", b"PK\x03\x04 cut short"])
def test_broken_files(name: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(TeacherError, match=f"weights file .*{name} cannot be read safely"):
        weights.read(weights.source(str(path)))


def test_a_truncated_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(tensors(), path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(TeacherError, match="cannot be read safely"):
        weights.read(weights.source(str(path)))


def test_fit_lists_every_kind_of_misfit() -> None:
    network = nn.ModuleDict({"norm": nn.LayerNorm(3), "proj": nn.Linear(2, 3)})
    given = {"norm.weight": torch.ones(3), "proj.weight": torch.ones(3, 5), "extra.a": torch.ones(1)}
    given |= {f"more.{n}": torch.ones(1) for n in range(10)} | {"head.weight": torch.ones(9)}
    with pytest.raises(TeacherError) as caught:
        weights.fit(network, given, of="w.pth", into="net", heads=("head.",))
    text = str(caught.value)
    assert "weights w.pth do not fit teacher net" in text
    assert "missing in the file: norm.bias, proj.bias\n" in text
    assert "not in the network: extra.a, more.0, more.1, more.2, more.3, more.4 and 5 more\n" in text
    assert "of another shape: proj.weight (3, 5), network (3, 2)\n" in text
    assert "head.weight" not in text
    assert "teacher.architecture" in text


def test_fit_leaves_out_heads_alone_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    network = nn.ModuleDict({"head": nn.ModuleDict({"norm": nn.LayerNorm(3)})})
    given = {"head.norm.weight": torch.full((3,), 2.0), "head.norm.bias": torch.ones(3)}
    with caplog.at_level(logging.INFO, "fd_scale"):
        weights.fit(network, {**given, "head.fc.weight": torch.ones(2)}, of="w", into="n", heads=("head.",))
    assert_equal(dict(network.state_dict()), given)
    assert "left out its head (head.fc.weight)" in caplog.text


def test_random_weights_are_seeded_announced_and_disturb_no_other_draw(
    caplog: pytest.LogCaptureFixture,
) -> None:
    torch.manual_seed(1)
    undisturbed = torch.rand(3)
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(1)
        with weights.drawn_from(seed, "vit"):
            drawn.append(torch.rand(4))
        assert torch.equal(torch.rand(3), undisturbed)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert "TEACHER vit HAS RANDOM WEIGHTS (seed 1)" in caplog.text
