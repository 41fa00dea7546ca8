"""How good is a finished network? Fine-tuning, kNN and the linear probe, every test image for itself.

Networks are read from their files, and head, groups, augmentation, loss, neighbours and probe are the
product's. Learning rates are chosen on held-out images of the training set; the test set chooses nothing.

Shape letters: N images, C classes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fd_scale.data import philox
from fd_scale.evaluate import knn, linear_fast
from fd_scale.evaluate.augment import Mixer
from fd_scale.evaluate.backbone import of_export
from fd_scale.evaluate.classifier import Classifier
from fd_scale.evaluate.features import LabelledFeatures, extract
from fd_scale.evaluate.finetune import groups_of, soft_cross_entropy
from fd_scale.evaluate.start import Trainable, prepare
from fd_scale.pixels import normalise
from fd_scale.run import recipe as recipes
from fd_scale.run import transfer
from fd_scale.run.sections import Schedule, View
from fd_scale.run.transfer import TransferRecipe
from studies import lockstep
from studies.lockstep import Learner
from studies.pictures import Parts, Pictures
from studies.settings import Bench
from studies.store import Piece, Store
from studies.views import central_view, random_view

DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
"""A predicted class as one character of a record."""
EVALUATED = 512
"""Images per forward pass of a measurement."""
FORWARD = 1 / 3
"""Work of a forward pass, in training steps of as many images."""


@dataclass(frozen=True)
class Measures:
    """What networks are measured on, and by which settings."""

    bench: Bench
    parts: Parts
    store: Store
    device: torch.device

    def finetuned(
        self, network: Piece, *, labels: int, lr: float, seed: int, changes: Mapping[str, Any] | None = None
    ) -> Piece:
        """One fine-tuning on so many labelled images; ``changes`` are of its recipe, by dotted fields.

        Its record has ``held_out_top1``, ``top1``, ``predictions`` and ``seconds``.
        """
        recipe = self.recipe(network, lr, seed, changes or {})
        facts = {
            "data": self.parts.fingerprint,
            "from": network.identity,
            "labels": labels,
            "recipe": _comparable(recipe),
            "device": self.device.type,
        }
        measured = len(self.parts.held_out) + len(self.parts.test)
        return self.store.piece(
            "finetuned",
            facts,
            lambda folder: self._finetune(recipe, labels),
            work=recipe.schedule.images + FORWARD * measured,
            suppose={"held_out_top1": 0.0, "top1": 0.0, "predictions": "0" * len(self.parts.test)},
        )

    def best_lr(self, network: Piece, *, labels: int, changes: Mapping[str, Any] | None = None) -> float:
        """The peak with the best accuracy on the held-out images, by the first fine-tuning seed; of equals
        the lower."""
        seed, lrs = self.bench.seeds.finetune[0], self.bench.finetuning.lrs
        if len(lrs) == 1:
            return lrs[0]
        scores = {
            lr: self.finetuned(network, labels=labels, lr=lr, seed=seed, changes=changes).record[
                "held_out_top1"
            ]
            for lr in sorted(lrs)
        }
        return max(scores, key=lambda lr: scores[lr])

    def frozen(self, network: Piece) -> Piece:
        """kNN (k 20) and the fast linear probe on class token and mean patch, all labelled images as bank.

        Its record has, by task and pooling, ``top1`` and ``predictions``.
        """
        facts = {"data": self.parts.fingerprint, "from": network.identity, "device": self.device.type}
        both = len(self.parts.labelled) + len(self.parts.test)
        nothing = {"top1": 0.0, "predictions": "0" * len(self.parts.test)}
        names = [f"{task} {pooling}" for task in ("knn", "linear") for pooling in ("cls", "gap")]
        return self.store.piece(
            "frozen",
            facts,
            lambda folder: self._frozen(network),
            work=FORWARD * both,
            suppose=dict.fromkeys(names, nothing),
        )

    def recipe(self, network: Piece, lr: float, seed: int, changes: Mapping[str, Any]) -> TransferRecipe:
        """The fine-tuning as the product knows it."""
        spec = self.bench.finetuning
        base = TransferRecipe(
            name="finetune",
            task="finetune",
            start=transfer.Start(network=str(network.weights), drop_path=spec.drop_path),
            augment=transfer.Augment(
                randaug=None, erase=0.0, mixup=0.0, cutmix=0.0, smoothing=spec.smoothing
            ),
            optim=transfer.TransferOptim(
                lr=lr, weight_decay=spec.weight_decay, clip_norm=5.0, layer_decay=spec.layer_decay
            ),
            schedule=Schedule(
                images=spec.images, warmup_images=spec.images // 10, warmup_lr=lr / 100, min_lr=lr / 100
            ),
            view=View(crop_scale=(spec.crop, 1.0), interpolation="bilinear"),
            global_batch=spec.batch,
            seed=seed,
            scale="cpu",
        )
        return recipes.derive(base, **dict(changes))

    def labelled(self, labels: int, seed: int) -> Pictures:
        """So many labelled images, drawn by the seed."""
        order = philox.permutation(philox.key("fd.labels", seed), len(self.parts.labelled))
        return self.parts.labelled.take(torch.from_numpy(order[:labels]).to(self.device))

    def _finetune(self, recipe: TransferRecipe, labels: int) -> dict[str, Any]:
        begin_s = time.perf_counter()
        start = prepare(recipe.start)
        torch.manual_seed(recipe.seed)
        module = Classifier(start, recipe.head, num_classes=len(self.parts.classes)).to(self.device)
        module.freeze(stem=recipe.start.freeze_stem, blocks=recipe.start.freeze_blocks)
        images = self.labelled(labels, recipe.seed)
        mixer = Mixer(recipe.augment, num_classes=len(self.parts.classes), device=self.device)
        decay = recipe.optim.average_decay
        mean = None if decay is None else AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(decay))
        draws = torch.Generator().manual_seed(recipe.seed)

        def share(index_N: Tensor) -> tuple[Tensor, Tensor]:
            picked = images.take(index_N)
            return random_view(picked.pixels, recipe.view, start.input_size, draws), picked.labels

        def loss(shared: tuple[Tensor, Tensor]) -> Tensor:
            values = normalise(shared[0], start.mean, start.std, torch.float32)
            valid = torch.ones(len(values), dtype=torch.bool, device=self.device)
            values, soft_NC, valid = mixer(values, shared[1], valid)
            return soft_cross_entropy(module(values), soft_NC, valid)

        learner = Learner(
            "finetune",
            recipe,
            module,
            loss,
            groups=groups_of(recipe, module),
            after_step=(lambda: None) if mean is None else (lambda: mean.update_parameters(module)),
        )
        batches = orders(len(images), recipe.global_batch, recipe.seed, self.device)
        course = lockstep.run(
            [learner],
            batches,
            share,
            steps=recipe.steps,
            device=self.device,
            title=f"fine-tuning, {labels} labels",
        )
        measured: nn.Module = module if mean is None else mean
        held_out, predicted = (
            predictions(measured, start, part, self.device) for part in (self.parts.held_out, self.parts.test)
        )
        record = {
            "held_out_top1": share_right(held_out, self.parts.held_out.labels),
            **as_record(predicted, self.parts.test.labels),
            "seconds": course.seconds["finetune"],
            "last_loss": course.losses["finetune"][-1],
            "lr": recipe.optim.lr,
            "seed": recipe.seed,
        }
        self.store.say(
            f"fine-tuned on {labels:,} labels, lr {recipe.optim.lr:g}, seed {recipe.seed}: "
            f"{100 * record['top1']:.2f} % ({time.perf_counter() - begin_s:.0f} s)"
        )
        return record

    def _frozen(self, network: Piece) -> dict[str, Any]:
        backbone = of_export(network.weights, device=self.device)
        bank, asked = (
            extract(backbone, _batches(part, backbone.input_size))
            for part in (self.parts.labelled, self.parts.test)
        )
        num_classes = len(self.parts.classes)
        record: dict[str, Any] = {}
        for pooling, features in bank.pooled.items():
            voted = knn.classify(
                features, bank.labels, asked.pooled[pooling], num_classes=num_classes, ks=(knn.HEADLINE,)
            )
            record[f"knn {pooling}"] = as_record(voted[knn.HEADLINE], asked.labels)
        record |= _linear(bank, asked, num_classes)
        shown = ", ".join(f"{name} {100 * one['top1']:.1f}" for name, one in record.items())
        self.store.say(f"frozen: {shown} %")
        return record


@dataclass(frozen=True, eq=False)
class Batch:
    """What the product's extraction of features asks of a batch."""

    pixels: Mapping[int, Tensor]
    labels: Tensor
    valid: Tensor


def _batches(part: Pictures, size: int) -> Iterator[Batch]:
    for first in range(0, len(part), EVALUATED):
        labels = part.labels[first : first + EVALUATED]
        pixels = central_view(part.pixels[first : first + EVALUATED], size)
        yield Batch({size: pixels}, labels, torch.ones(len(labels), dtype=torch.bool))


def _linear(bank: LabelledFeatures, asked: LabelledFeatures, num_classes: int) -> dict[str, Any]:
    """The probe's penalty is chosen on a fifth of the bank; its predictions are of the fit on all of it."""
    record = {}
    for result in linear_fast.evaluate(bank, asked):
        fitted = linear_fast.fit(
            bank.pooled[result.pooling], bank.labels, num_classes=num_classes, l2=result.l2
        )
        predicted = fitted.logits(asked.pooled[result.pooling]).argmax(1)
        record[f"linear {result.pooling}"] = as_record(predicted, asked.labels) | {"l2": result.l2}
    return record


@torch.no_grad()
def predictions(module: nn.Module, start: Trainable, part: Pictures, device: torch.device) -> Tensor:
    """The class (N,) that a classifier gives each image."""
    module.eval()
    found = []
    for first in range(0, len(part), EVALUATED):
        pixels = central_view(part.pixels[first : first + EVALUATED], start.input_size)
        with lockstep.autocast(device):
            found.append(module(normalise(pixels, start.mean, start.std, torch.float32)).argmax(1))
    return torch.cat(found)


def share_right(predicted_N: Tensor, labels_N: Tensor) -> float:
    """Accuracy, in [0, 1]."""
    return float((predicted_N.cpu() == labels_N.cpu()).double().mean())


def as_record(predicted_N: Tensor, labels_N: Tensor) -> dict[str, Any]:
    """Accuracy, and each prediction as a character."""
    return {
        "top1": share_right(predicted_N, labels_N),
        "predictions": "".join(DIGITS[label] for label in predicted_N.tolist()),
    }


def orders(count: int, batch: int, seed: int, device: torch.device) -> Iterator[Tensor]:
    """Numbers of the images of each batch without end: epoch after epoch, each in an order of its own; a
    batch may reach from one into the next."""
    draws, left = generator("fd.orders", seed), torch.empty(0, dtype=torch.int64)
    while True:
        while len(left) < batch:
            left = torch.cat((left, torch.randperm(count, generator=draws)))
        yield left[:batch].to(device)
        left = left[batch:]


def generator(purpose: str, seed: int) -> torch.Generator:
    """A generator of its own for a purpose, on the CPU."""
    return torch.Generator().manual_seed(int.from_bytes(philox.key(purpose, seed)[:7], "little"))


def _comparable(recipe: TransferRecipe) -> dict[str, Any]:
    """The science of a recipe without the place of its network, which is in the network's identity."""
    values: dict[str, Any] = recipe.science(defaults=False)
    del values["start"]["network"]
    return values
