"""What cannot be a start of fine-tuning is refused, with the word that named it."""

from __future__ import annotations

import pytest
import torch

from fd_scale.errors import RunError
from fd_scale.evaluate import start
from fd_scale.evaluate.naming import SourceError
from fd_scale.run.transfer import Start


def test_weights_of_another_architecture_are_listed() -> None:
    network = torch.nn.Linear(3, 2)
    tensors = {"weight": torch.zeros(5, 3), "gamma": torch.zeros(1)}
    with pytest.raises(RunError) as caught:
        start._load(network, tensors, "runs/other")
    said = str(caught.value)
    assert "the weights of runs/other do not fit (3 tensors)" in said
    assert "weight: (5, 3) there, (2, 3) in the network" in said
    assert "gamma: (1,) there, absent in the network" in said
    assert "check start.network and start.input_size" in said


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (Start(), "start.network is not set: name a run, an exported file or LIBRARY:NAME@WEIGHTS"),
        (Start(network="open_clip:ViT-B-16@openai"), "cannot be fine-tuned: name the same network in timm"),
        (Start(network="timm:test_vit@random", step=3), "--step 3 is for runs"),
        (
            Start(network="timm:test_vit@random", weights="average"),
            "is for runs, and timm:test_vit",
        ),
    ],
)
def test_words_that_name_nothing_trainable_are_refused(asked: Start, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        start.find(asked)
