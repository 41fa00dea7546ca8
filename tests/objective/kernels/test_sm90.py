"""What the compiler makes of the kernels for Hopper, without a GPU: no spills, few registers, 16-byte
accesses.

The launches are the real ones: ``launch_rows`` runs on CPU tensors with the kernels replaced by
recorders, and what it would have launched is compiled ahead of time and read back with the binary tools
in triton's wheel.
"""

from __future__ import annotations

import importlib
import re
import subprocess
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fd_scale.objective import kernels
from fd_scale.objective.kernels.choice import INTERPRETED
from tests.objective.kernels.cases import features, norm_of, statistics_of

triton = pytest.importorskip("triton", reason="needs triton: pip install triton")
pytestmark = pytest.mark.skipif(
    INTERPRETED, reason="an interpreted kernel has no machine code: unset TRITON_INTERPRET"
)

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.uint8: "*u8"}


@dataclass(frozen=True)
class Binary:
    """What one compiled kernel takes from a multiprocessor."""

    registers: int
    spilled_bytes: int
    accesses: Counter[str]
    """Machine instructions on global memory, such as ``LDG.E.128``."""

    def wide(self, kind: str) -> int:
        """Loads (LDG) or stores (STG) of 16 bytes."""
        return sum(n for name, n in self.accesses.items() if name.startswith(kind) and ".128" in name)

    def narrow(self, kind: str) -> int:
        """All others but the bytes and single words that masks and scalars are."""
        return sum(
            n for name, n in self.accesses.items() if name.startswith(kind) and re.search(r"\.64|16", name)
        )


class Recorder:
    """Stands for a kernel, and keeps what it is launched with."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.arguments: dict[str, Any] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*positional: Any, **named: Any) -> None:
            self.arguments = {**dict(zip(self.kernel.arg_names, positional, strict=False)), **named}

        return launch

    def compiled(self, folder: Path) -> Binary:
        """The machine code of the launch for compute capability 9.0, specialised as a launch specialises."""
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        signature: dict[str, str] = {}
        constants: dict[tuple[int], Any] = {}
        hints: dict[tuple[int], list[list[Any]]] = {}
        options = dict(self.arguments)
        for index, parameter in enumerate(self.kernel.params):
            value = options.pop(parameter.name)
            multiple = False
            if isinstance(value, Tensor):
                signature[parameter.name] = TYPES[value.dtype]
                multiple = value.data_ptr() % 16 == 0
            elif parameter.is_constexpr or value is None:
                signature[parameter.name], constants[(index,)] = "constexpr", value
            else:
                signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
                multiple = isinstance(value, int) and value % 16 == 0 and not parameter.do_not_specialize
            if multiple:
                hints[(index,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature, constants, hints)
        built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        return read(built.asm["cubin"], folder)


def read(cubin: bytes, folder: Path) -> Binary:
    """Resources and memory instructions of machine code."""
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    resources, code = (
        subprocess.run([*command, str(path)], capture_output=True, text=True, check=True).stdout
        for command in ((str(TOOLS / "cuobjdump"), "--dump-resource-usage"), (str(TOOLS / "nvdisasm"), "-c"))
    )
    used = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", resources)}
    found = Counter(re.findall(r"\b((?:LDG|STG|LDL|STL)\b[.\w]*)", code))
    assert any(name.startswith("STG") for name in found), "no store found: the disassembly reads differently"
    local = sum(n for name, n in found.items() if name.startswith(("LDL", "STL")))
    return Binary(used["REG"], used["STACK"] + used["LOCAL"] + local, found)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> dict[str, Recorder]:
    """Recorders in the place of the kernels, and the Triton path taken for tensors of the CPU."""
    row_kernels = importlib.import_module("fd_scale.objective.kernels.row_kernels")
    operator = importlib.import_module("fd_scale.objective.kernels.whitened_smooth_l1")
    recorders = {
        name: Recorder(getattr(row_kernels, name)) for name in ("row_kernel", "total_kernel", "scale_kernel")
    }
    for name, recorder in recorders.items():
        monkeypatch.setattr(row_kernels, name, recorder)
    monkeypatch.setattr(operator, "choose", lambda *_, **__: kernels.Choice("triton", "recorded"))
    return recorders


# (width, dtype, options), most demanding first. Registers seen with triton 3.9 and 3.6: 64 at the widest
# row in float32 with the teacher's norm (the limit: 65536 over 1024 threads), 42 with it at 8192, at most 32
# without it.
QUICK = [
    (16384, torch.float32, "norm"),
    (8192, torch.float32, "norm"),
    (4096, torch.bfloat16, "weights and mask"),
    (1000, torch.bfloat16, "weights and mask"),
    (768, torch.float16, "scaled plain L1"),
]
ALL = [
    (width, dtype, variant)
    for width in (384, 768, 1000, 1024, 1408, 1536, 4096, 8192, 16384)
    for dtype in (torch.bfloat16, torch.float32)
    for variant in ("", "norm", "channel", "l2", "none", "weights and mask", "scaled plain L1")
]


def options_of(variant: str, teacher: Tensor) -> dict[str, Any]:
    num_tokens, width = teacher.shape[1:]
    return {
        "": {},
        "norm": {"teacher_norm": norm_of(width)},
        "channel": {"target": "channel", "channel": statistics_of(teacher)},
        "l2": {"target": "l2"},
        "none": {"target": "none"},
        "weights and mask": {
            "token_weight": torch.ones(num_tokens),
            "token_mask": torch.ones(num_tokens, dtype=torch.bool),
            "normaliser": "weighted_mean",
        },
        "scaled plain L1": {"loss_scale": torch.tensor(2.0), "beta": 0.0},
    }[variant]


def check(width: int, dtype: torch.dtype, variant: str, launched: dict[str, Recorder], folder: Path) -> None:
    prediction, teacher = features((2, 8, width), dtype)
    kernels.whitened_smooth_l1(prediction, teacher, **options_of(variant, teacher))
    binary = launched["row_kernel"].compiled(folder)
    assert binary.spilled_bytes == 0
    assert binary.registers <= (48 if width <= 8192 else 64)
    assert binary.wide("LDG") >= 2
    assert binary.wide("STG") >= 1
    assert binary.narrow("LDG") == binary.narrow("STG") == 0


@pytest.mark.parametrize(("width", "dtype", "variant"), QUICK, ids=str)
def test_row_kernel(
    width: int, dtype: torch.dtype, variant: str, launched: dict[str, Recorder], tmp_path: Path
) -> None:
    check(width, dtype, variant, launched, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("width", "dtype", "variant"), ALL, ids=str)
def test_every_row_kernel(
    width: int, dtype: torch.dtype, variant: str, launched: dict[str, Recorder], tmp_path: Path
) -> None:
    check(width, dtype, variant, launched, tmp_path)


def test_a_class_token_sliced_off_keeps_wide_accesses(launched: dict[str, Recorder], tmp_path: Path) -> None:
    prediction, teacher = features((2, 9, 768), torch.bfloat16)
    kernels.whitened_smooth_l1(prediction[:, 1:], teacher[:, 1:])
    binary = launched["row_kernel"].compiled(tmp_path)
    assert binary.wide("LDG") == 2
    assert binary.narrow("LDG") == 0


def test_rows_off_their_16_bytes_are_read_singly_and_still_fit(
    launched: dict[str, Recorder], tmp_path: Path
) -> None:
    prediction, teacher = features((2, 8, 769), torch.bfloat16)
    kernels.whitened_smooth_l1(prediction[..., 1:], teacher[..., 1:])
    binary = launched["row_kernel"].compiled(tmp_path)
    assert binary.spilled_bytes == 0
    assert binary.registers <= 48
    assert binary.wide("LDG") == 0


def test_contraction_is_asked_for_by_name(launched: dict[str, Recorder]) -> None:
    """Its default differs between versions of Triton, and with it the last bits."""
    prediction, teacher = features((2, 8, 96), torch.bfloat16)
    kernels.whitened_smooth_l1(prediction, teacher)
    importlib.import_module("fd_scale.objective.kernels.row_kernels").launch_scale(
        prediction, torch.tensor(2.0), None
    )
    for name, recorder in launched.items():
        assert recorder.arguments["enable_fp_fusion"] is True, name


def test_total_and_scale_kernels(launched: dict[str, Recorder], tmp_path: Path) -> None:
    prediction, teacher = features((2, 8, 96), torch.bfloat16)
    kernels.whitened_smooth_l1(prediction, teacher)
    importlib.import_module("fd_scale.objective.kernels.row_kernels").launch_scale(
        prediction, torch.tensor(2.0), None
    )
    for name in ("total_kernel", "scale_kernel"):
        binary = launched[name].compiled(tmp_path)
        assert binary.spilled_bytes == 0
        assert binary.registers <= 64
        assert binary.wide("LDG") >= 1
        assert binary.narrow("LDG") == 0
