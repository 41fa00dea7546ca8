"""``fd-scale evaluate``: what was gained, measured by one task on one network or several.

``cli.py`` hangs the function below the entry point; each task is a function of ``fd_scale.evaluate``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from fd_scale.errors import UserError, near_misses

if TYPE_CHECKING:
    from fd_scale.run.transfer import TransferRecipe

FROZEN = ("knn", "linear_fast")
TRAINED = {"finetune": "fd_base", "linear": "linear"}
"""Tasks that are runs of their own, with their default preset."""
ZEROSHOT, RETRIEVAL = "zeroshot", "retrieval"
IN_WORDS = (ZEROSHOT, RETRIEVAL)
"""Tasks of networks that can be asked in words."""
TASKS = (*FROZEN, *TRAINED, *IN_WORDS)
SUITES = ("classification",)

NetworksArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="NETWORK...",
        help="A run directory, the average of its weights (RUN#ema), its teacher (RUN#teacher), an exported "
        ".safetensors, or LIBRARY:NAME@WEIGHTS (timm:vit_base_patch16_224.dino, "
        "open_clip:ViT-B-16-quickgelu@openai).",
    ),
]


def evaluate(
    networks: NetworksArgument,
    test: Annotated[
        Path, typer.Option(metavar="SHARDS", help="Labelled shards to measure on; retrieval: with captions.")
    ],
    train: Annotated[
        Path | None,
        typer.Option(
            metavar="SHARDS",
            help="Labelled shards to learn from; zeroshot, retrieval: to fit destandardised on.",
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="knn; linear_fast (L-BFGS on cached features); linear (LARS, as the papers); finetune; "
            "zeroshot; retrieval (of images and captions)."
        ),
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(help="classification: knn and linear_fast, in a table with what else was measured."),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(metavar="NETWORK", help="--suite: the network before; RUN#teacher by default."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the records; by default the run's reports/, or reports/.")
    ] = None,
    step: Annotated[
        int | None, typer.Option(help="Step of a run's checkpoint; the newest by default.")
    ] = None,
    input_size: Annotated[
        int | None, typer.Option(min=1, help="Side of the input, pixels; the network's own by default.")
    ] = None,
    crop_pct: Annotated[
        float | None,
        typer.Option(
            min=0.01,
            max=1,
            help="Share of the resized side that the central crop keeps (0.875, or the preset's).",
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="knn, linear_fast: images per forward pass.")] = 256,
    workers: Annotated[int, typer.Option(min=0, help="Decoding processes per rank.")] = 0,
    cache: Annotated[
        Path | None, typer.Option(help="Folder in which features are kept for next time.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="finetune, linear: a name of `fd-scale presets` (fd_base, linear).")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="finetune, linear: change one field, section.field=value. May be given often."
        ),
    ] = None,
    held_out: Annotated[
        Path | None,
        typer.Option(metavar="SHARDS", help="Shards set aside from training, to select the best save by."),
    ] = None,
    global_batch: Annotated[
        int | None,
        typer.Option(min=1, help="Images per optimizer step; learning rates follow by the preset's rule."),
    ] = None,
    seeds: Annotated[str, typer.Option(help="finetune, linear: seeds, one run each, as 0,1,2.")] = "0",
    clip: Annotated[
        str | None,
        typer.Option(
            metavar="NAME@WEIGHTS", help="zeroshot, retrieval of a run: open_clip's name of its teacher."
        ),
    ] = None,
    classes: Annotated[
        Path | None, typer.Option(help="zeroshot: class names, one per line, in the order of labels.")
    ] = None,
    templates: Annotated[
        Path | None, typer.Option(help="zeroshot: templates, one per line with {}; CLIP's 80 by default.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the effective hyper-parameters and stop.")
    ] = False,
) -> None:
    """Measure networks on labelled shards, and write one JSON record per evaluation.

    One process by itself, or several under torchrun, srun or mpirun, which share the work. Fine-tuning and
    probes are runs: the same command goes on where a stopped one left off.
    """
    _check_words(task, suite, networks)
    if out is not None and out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file: name a folder for the records")
    of_runs: dict[str, object] = {"--preset": preset, "--set": set_, "--held-out": held_out}
    of_runs |= {"--global-batch": global_batch, "--dry-run": dry_run or None}
    of_runs |= {"--seeds": None if seeds == "0" else seeds}
    _refuse_unused(task or "a suite", tuple(TRAINED), of_runs)
    _refuse_unused(task or "a suite", (*FROZEN, *TRAINED), {"--input-size": input_size})
    _refuse_unused(task or "a suite", (*FROZEN, "a suite"), {"--cache": cache})
    _refuse_unused(task or "a suite", ("a suite",), {"--against": against})
    _refuse_unused(task or "a suite", IN_WORDS, {"--clip": clip})
    _refuse_unused(task or "a suite", (ZEROSHOT,), {"--classes": classes, "--templates": templates})
    if task in IN_WORDS:
        from fd_scale.evaluate.clip import Question
        from fd_scale.evaluate.retrieval import retrieval
        from fd_scale.evaluate.zeroshot import zeroshot

        question = Question(networks, test, train, clip, crop_pct or 1.0, batch, workers, out, step)
        if task == RETRIEVAL:
            retrieval(question)
        else:
            zeroshot(question, classes=classes, templates=templates)
        return
    if train is None:
        raise UserError("--train is missing: labelled shards to learn from")
    if suite is not None or task in FROZEN:
        from fd_scale.evaluate import frozen
        from fd_scale.evaluate.naming import EMA, TEACHER

        reading = frozen.Reading(crop_pct=crop_pct or 0.875, batch=batch, workers=workers, cache=cache)
        if task is not None:
            frozen.run(task, networks, train, test, reading, out=out, step=step, input_size=input_size)
        else:
            before = against or f"{networks[0].removesuffix(EMA)}{TEACHER}"
            frozen.run_suite(networks[0], before, train, test, reading, out=out, step=step)
        return
    changes: dict[str, object] = {
        "start.network": networks[0],
        "data.shards": str(train),
        "data.test": str(test),
        "run.workers": workers,
    }
    for name, value in (
        ("start.step", step),
        ("start.input_size", input_size),
        ("measure.crop_pct", crop_pct),
    ):
        changes |= {} if value is None else {name: value}
    if held_out is not None:
        changes |= {"data.held_out": str(held_out), "measure.select": "held_out"}
    if seed := next((word for word in set_ or [] if word.partition("=")[0].strip() == "seed"), None):
        raise UserError(f"--set {seed}: seeds are given as --seeds {seed.partition('=')[2].strip()}")
    recipe = _recipe(str(task), preset, train, global_batch, changes, set_ or [])
    if dry_run:
        from fd_scale.evaluate.outline import outline

        Console(soft_wrap=True).print(outline(recipe))
        return
    from fd_scale.run.recipe import derive

    asked = [derive(recipe, seed=seed) for seed in _seeds(seeds)]
    if task == "finetune":
        from fd_scale.evaluate.finetune import finetune

        finetune(asked, out=out)
        return
    from fd_scale.evaluate.linear import probe

    probe(asked, out=out)


def _check_words(task: str | None, suite: str | None, networks: list[str]) -> None:
    if (task is None) == (suite is None):
        raise UserError("give either --task or --suite")
    if suite is not None and suite not in SUITES:
        raise UserError(f"unknown --suite {suite!r} (suites: {', '.join(SUITES)})")
    if task is not None and task not in TASKS:
        raise UserError(f"unknown --task {task!r}{near_misses(task, TASKS)} (tasks: {', '.join(TASKS)})")
    if len(networks) > 1 and task not in (*FROZEN, *IN_WORDS):
        raise UserError(f"{task or 'a suite'} takes one network at a time, not {len(networks)}")


def _refuse_unused(task: str, tasks: tuple[str, ...], given: Mapping[str, object]) -> None:
    """Refuse options that ``task`` would not look at; they belong to ``tasks``."""
    unused = [name for name, value in given.items() if value is not None]
    if unused and task not in tasks:
        raise UserError(f"{', '.join(unused)}: of no use to {task}; for {', '.join(tasks)}")


def presets() -> None:
    """List the presets of fine-tuning and of the linear probe."""
    from fd_scale.run.presets import table

    Console(soft_wrap=True).print(table())


def _recipe(
    task: str,
    preset: str | None,
    train: Path,
    global_batch: int | None,
    changes: dict[str, object],
    assignments: list[str],
) -> TransferRecipe:
    from fd_scale.data.index import ShardSet
    from fd_scale.run.presets import find, recipe_of
    from fd_scale.run.recipe import apply_overrides, derive

    name = preset or TRAINED[task]
    if find(name).task != task:
        raise UserError(f"preset {name} is for --task {find(name).task}, not {task}")
    images = ShardSet.open(train).num_samples
    recipe = recipe_of(name, images=images, global_batch=global_batch)
    return apply_overrides(derive(recipe, **changes), assignments)


def _seeds(text: str) -> list[int]:
    try:
        found = [int(word) for word in text.split(",")]
    except ValueError:
        raise UserError(f"--seeds {text!r} is not a list of whole numbers such as 0,1,2") from None
    if len(set(found)) < len(found):
        raise UserError(f"--seeds {text!r} names a seed twice")
    return found
