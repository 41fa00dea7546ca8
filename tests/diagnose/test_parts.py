"""Parts come back bit for bit, and only for the facts that they were made of."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch

from fd_scale.diagnose.parts import Parts, plain, slug


def test_content_comes_back_as_it_was(tmp_path: Path) -> None:
    parts = Parts(tmp_path / "parts")
    content = {
        "name": "x",
        "none": None,
        "list": [1, 2.5, math.nan],
        "nested": {
            "double": torch.tensor([[1 / 3, math.inf]], dtype=torch.float64),
            "whole": torch.arange(3),
        },
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 2),
    }
    parts.write("part", {"seed": 1}, content)
    found = parts.read("part", {"seed": 1})
    assert found["list"][:2] == [1, 2.5]
    assert math.isnan(found["list"][2])
    assert found["none"] is None
    for path in (("nested", "double"), ("nested", "whole"), ("scalar",), ("empty",)):
        one, other = content, found
        for key in path:
            one, other = one[key], other[key]  # type: ignore[index]
        assert torch.equal(one, other)  # type: ignore[arg-type]
        assert one.dtype == other.dtype  # type: ignore[attr-defined]


def test_other_facts_are_another_part(tmp_path: Path) -> None:
    parts = Parts(tmp_path)
    parts.write("part", {"seed": 1}, 5)
    assert parts.read("part", {"seed": 2}) is None
    assert parts.read("other", {"seed": 1}) is None
    (file,) = tmp_path.iterdir()
    assert json.loads(file.read_text()) == {"facts": {"seed": 1}, "content": 5}


def test_numbers_for_other_programs_are_json() -> None:
    found = plain({"a": torch.tensor([1.0, math.nan]), 2: [math.inf, (True, "x")]})
    assert found == {"a": [1.0, None], "2": [None, [True, "x"]]}


def test_slugs() -> None:
    assert slug("student, step 1,024") == "student__step_1_024"
