"""kNN and the fast linear probe of networks, from shards to records.

Nothing is trained but a classifier on features computed once. Over several processes each computes its part
of the features; kNN keeps the training features apart, the probe is fitted by the first process.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console

from fd_scale.data.index import ShardSet
from fd_scale.evaluate import knn, linear_fast, overlap, suite
from fd_scale.evaluate.backbone import Backbone
from fd_scale.evaluate.features import (
    CROP_PCT,
    EvaluationError,
    LabelledFeatures,
    check_classes,
    data_record,
    of_shards,
    together,
)
from fd_scale.evaluate.job import launch
from fd_scale.evaluate.naming import reports_of
from fd_scale.evaluate.record import Record, table, write_all
from fd_scale.evaluate.source import open_source
from fd_scale.run.folder import environment
from fd_scale.run.world import World

log = logging.getLogger("fd_scale")


@dataclass(frozen=True)
class Reading:
    """How labelled shards are read."""

    crop_pct: float = CROP_PCT
    """Share of the resized image's side that the central crop keeps."""
    batch: int = 256
    """Images per forward pass."""
    workers: int = 0
    """Decoding processes per rank."""
    cache: Path | None = None
    """Folder in which features are kept."""


def run_suite(
    network: str,
    against: str,
    train: Path,
    test: Path,
    reading: Reading,
    *,
    out: Path | None,
    step: int | None,
) -> None:
    """Measure two networks, ``network`` at ``step`` of its run, by every task of ``TASKS``, and put them side
    by side with whatever else was measured of them into the same folder; ends the process and never
    returns."""

    def action(world: World) -> None:
        folder = out or reports_of(network)
        pair = open_pair(train, test, world)
        before, after = (
            world.together(partial(open_source, text, step=chosen, device=world.device))
            for text, chosen in ((against, None), (network, step))
        )
        if before.input_size != after.input_size:
            raise EvaluationError(
                f"{before.name} takes {before.input_size} pixels and {after.name} {after.input_size}, which "
                "do not compare: give --against a network of the same size, or measure each by --task"
            )
        for backbone in (before, after):
            for task in TASKS:
                found = measure(task, backbone, pair, reading, world)
                world.on_main(partial(write_all, found, folder))
        names = {before.name, after.name}
        kept = [one for one in world.on_main(lambda: suite.read_all([folder])) if one.model in names]
        compared = suite.compare(kept, before.name)
        for path in world.on_main(lambda: suite.write_reports(compared, folder)):
            log.info("%s", path)
        if world.is_main:
            Console(soft_wrap=True).print(suite.console_table(compared), suite.LEGEND)

    launch(action)


def run(
    task: str,
    networks: Sequence[str],
    train: Path,
    test: Path,
    reading: Reading,
    *,
    out: Path | None,
    step: int | None,
    input_size: int | None,
) -> None:
    """Measure each network (``source.py`` says how they are named), print a table, and write the records
    into ``out``, or the ``reports`` of the run that the network is of; ends the process and never returns.
    """

    def action(world: World) -> None:
        pair = open_pair(train, test, world)
        records = []
        for name in networks:
            opened = partial(open_source, name, step=step, input_size=input_size, device=world.device)
            found = measure(task, world.together(opened), pair, reading, world)
            records += found
            for path in world.on_main(partial(write_all, found, out or reports_of(name))):
                log.info("%s", path)
        if world.is_main:
            Console(soft_wrap=True).print(table(records))

    launch(action)


def open_pair(train: Path, test: Path, world: World) -> tuple[ShardSet, ShardSet]:
    """Shards to learn from and to measure on; says so when images of one are in the other. Collective.

    Raises ``ShardError`` for folders that are no shards, ``EvaluationError`` for unequal classes.
    """
    pair = world.together(lambda: (ShardSet.open(train), ShardSet.open(test)))
    world.together(lambda: check_classes(*pair))
    if words := world.on_main(lambda: overlap.warning(*pair)):
        log.warning("warning: %s", words)
    return pair


def measure(
    task: str, backbone: Backbone, pair: tuple[ShardSet, ShardSet], reading: Reading, world: World
) -> list[Record]:
    """One record per kind of pooling; ``task`` is a name of ``TASKS``. Collective.

    Raises ``EvaluationError`` for labels that are missing or cannot be used.
    """
    begin = time.perf_counter()
    parts = []
    for shards in pair:
        features = partial(
            of_shards,
            backbone,
            shards,
            crop_pct=reading.crop_pct,
            batch=reading.batch,
            workers=reading.workers,
            cache=reading.cache,
            rank=world.rank,
            world_size=world.size,
        )
        parts.append(world.together(features))
    train, test = parts
    records = TASKS[task](train, together(world.gather(test)), world)
    wall_s = time.perf_counter() - begin
    shared = {
        "network": backbone.fingerprint,
        "data": {"train": data_record(pair[0]), "test": data_record(pair[1])},
        "environment": environment(),
        "wall_s": wall_s,
    }
    where = {"input_size": backbone.input_size, "crop_pct": reading.crop_pct}
    return [
        Record(**{**vars(record), "protocol": {**record.protocol, **where}, **shared}) for record in records
    ]


def _knn(train: LabelledFeatures, test: LabelledFeatures, world: World) -> list[Record]:
    results = knn.evaluate(train, test, device=world.device, gather=world.gather)
    return [
        Record(
            task=result.task,
            model=result.model,
            feature=result.pooling,
            network={},
            protocol={"source": "DINO", "k": list(result.accuracy), "temperature": result.temperature},
            data={},
            metrics={f"top1_k{k}": [accuracy] for k, accuracy in result.accuracy.items()},
            headline=f"top1_k{max(k for k in result.accuracy if k <= knn.HEADLINE)}",
            num_test=result.num_test,
            facts={"num_left_out": result.num_left_out, "num_classes": result.num_classes},
        )
        for result in results
    ]


def _linear_fast(train: LabelledFeatures, test: LabelledFeatures, world: World) -> list[Record]:
    whole = together(world.gather(train))
    results = world.on_main(lambda: linear_fast.evaluate(whole, test, device=world.device))
    return [
        Record(
            task=result.task,
            model=result.model,
            feature=result.pooling,
            network={},
            protocol={
                "source": result.protocol,
                "l2_grid": list(linear_fast.L2_GRID),
                "split_seed": result.seed,
            },
            data={},
            metrics={"top1": [result.accuracy]},
            headline="top1",
            num_test=result.num_test,
            facts={
                "num_left_out": result.num_left_out,
                "num_classes": result.num_classes,
                "l2": result.l2,
                "l2_at_edge": result.l2_at_edge,
                "validation": {str(l2): accuracy for l2, accuracy in result.validation.items()},
            },
        )
        for result in results
    ]


TASKS: dict[str, Callable[[LabelledFeatures, LabelledFeatures, World], list[Record]]] = {
    "knn": _knn,
    "linear_fast": _linear_fast,
}
"""What is made of frozen features, by the name of the task."""
