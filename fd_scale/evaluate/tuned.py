"""What did a fine-tuning leave? Its classifier, and the network in it.

The network is read up to the classifier's own norm, on every token. Weights are those of a checkpoint, or
their moving average; what the run did not train comes from the network that it started from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fd_scale.engine.checkpoint import Pieces, kind_of_weights
from fd_scale.errors import RunError
from fd_scale.evaluate.backbone import Backbone, of_network
from fd_scale.evaluate.classifier import FINAL_NORM, Classifier
from fd_scale.evaluate.naming import EMA, LabelledRun, label
from fd_scale.evaluate.start import Trainable, prepare
from fd_scale.export import choose


@dataclass(frozen=True, eq=False)
class Tuned:
    """A fine-tuned network, on the CPU, in eval mode, without gradients."""

    classifier: Classifier
    """Normalised pixels to logits."""
    start: Trainable
    """Its form, mean and std, which fine-tuning does not change."""
    name: str
    facts: dict[str, Any]
    """Which run, step and weights."""

    def backbone(self, device: torch.device | str = "cpu") -> Backbone:
        """The network alone. The classifier gives up its norm to it, and is of no use afterwards."""
        network = self.classifier.network
        if isinstance(getattr(network, FINAL_NORM, None), torch.nn.Identity):
            setattr(network, FINAL_NORM, self.classifier.norm)
        return of_network(
            network.to(device),
            self.start.form,
            name=self.name,
            input_size=self.start.input_size,
            architecture=self.start.spec.architecture,
            mean=self.start.mean,
            std=self.start.std,
            **self.facts,
        )


def load(run: LabelledRun, *, step: int | None = None) -> Tuned:
    """The classifier of a fine-tuned run's checkpoint, the newest or that of ``step``.

    Raises ``RunError`` for a linear probe, whose network is that which it started from, and as ``choose`` and
    ``start.prepare`` do.
    """
    recipe, path = run.recipe, run.folder.path
    if recipe.task != "finetune":
        raise RunError(f"{path} is a linear probe, which leaves its network as it was: name that instead")
    checkpoint = choose(run.folder, step)
    start = prepare(recipe.start)
    classifier = Classifier(start, recipe.head, num_classes=len(checkpoint.facts["classes"]))
    pieces, kind = Pieces(checkpoint), kind_of_weights(checkpoint, average=run.average)
    trained = {name: pieces.whole(kind, name) for name in checkpoint.manifest["parameters"]}
    classifier.load_state_dict(classifier.state_dict() | trained | pieces.buffers())
    classifier.eval().requires_grad_(False)
    name = label(f"{path}{EMA * run.average}", checkpoint.step)
    return Tuned(classifier, start, name, {"fine_tuned": kind})
