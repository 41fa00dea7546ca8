"""The ``shards`` part of the command line: make tar shards and look into them.

Each verb checks its words and calls one function of ``fd_scale.data`` or ``fd_scale.shards``, which is
imported only then, so that ``--help`` needs no PyTorch. ``cli.py`` hangs this below ``fd-scale shards``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from fd_scale.errors import ShardError

if TYPE_CHECKING:
    from fd_scale.data.index import Access

FOUND_DAMAGE = 3
"""Exit status of ``verify`` when something is wrong with the shards."""

app = typer.Typer(help="Make and look into tar shards.", no_args_is_help=True, rich_markup_mode=None)

OutArgument = Annotated[Path, typer.Argument(metavar="OUT", help="New or empty folder for the shards.")]
SetArgument = Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder of shards with its index.")]
CountOption = Annotated[int, typer.Option("--max-count", min=1, help="Samples per shard, at most.")]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Decides what is drawn, and the order.")]
WorkersOption = Annotated[
    int | None, typer.Option("--workers", min=1, help="Processes; one per core by default.")
]
ClassesOption = Annotated[
    Path | None,
    typer.Option(
        "--classes",
        help="Class map: a JSON list of names or object of name: number, or a text file with a name per "
        "line; the sorted names by default.",
    ),
]
CacheOption = Annotated[Path | None, typer.Option("--cache", help="Folder for copies of remote shards.")]
PipeOption = Annotated[
    bool, typer.Option("--allow-pipe", help="Run the commands of pipe: shards on this machine.")
]


@app.command()
def pack(
    source: Annotated[
        str,
        typer.Argument(
            help="A folder of images, flat or with one folder per class; a list (.csv, .tsv, .jsonl) with a "
            "column path and, if wanted, label; a folder of shards with its index; or hf:NAME, a dataset of "
            "Hugging Face."
        ),
    ],
    out: OutArgument,
    max_count: CountOption = 10_000,
    max_bytes: Annotated[int, typer.Option(min=1, help="Bytes per shard, at most.")] = 2**30,
    seed: SeedOption = 0,
    limit: Annotated[int | None, typer.Option(min=1, help="Keep this many images of the shuffle.")] = None,
    classes: ClassesOption = None,
    root: Annotated[
        Path | None, typer.Option(help="Where the paths of a list begin; the list's own folder by default.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split of a Hugging Face dataset.")] = "train",
    image_column: Annotated[str, typer.Option(help="Its column of images.")] = "image",
    label_column: Annotated[str, typer.Option(help="Its column of labels, used if there.")] = "label",
    resize_short: Annotated[
        int | None,
        typer.Option(min=1, help="Shrink larger images to this short side, pixels; others keep their bytes."),
    ] = None,
    quality: Annotated[
        int | None,
        typer.Option(min=1, max=100, help="Write every image as JPEG of this quality; 95 if only shrunk."),
    ] = None,
    workers: WorkersOption = None,
) -> None:
    """Write images as shards: shuffled once, bytes kept, indexed, the same bytes for the same seed.

    The same command goes on where a stopped one left off.
    """
    from fd_scale.data import sources
    from fd_scale.data.pack import Encoding
    from fd_scale.data.pack import pack as write
    from fd_scale.data.pool import processes

    found = sources.open_source(
        source,
        classes=_class_map(classes),
        root=root,
        split=split,
        image_column=image_column,
        label_column=label_column,
    )
    report = write(
        found,
        out,
        max_count=max_count,
        max_bytes=max_bytes,
        seed=seed,
        limit=limit,
        encoding=Encoding(resize_short, quality),
        workers=processes(workers),
    )
    names = f", {len(report.classes)} classes" if report.classes else ""
    resumed = f", {report.num_resumed:,} of them done before" if report.num_resumed else ""
    typer.echo(
        f"{report.num_samples:,} images in {report.num_shards:,} shards{resumed}, "
        f"{report.num_bytes / 2**20:,.1f} MiB{names}: {report.folder}"
    )
    for what, count in sorted(report.skipped.items()):
        typer.echo(f"left out: {count:,} x {what}")
    for line in report.unreadable:
        typer.echo(f"left out, cannot be decoded: {line}")


@app.command()
def scenes(
    out: OutArgument,
    num_images: Annotated[int, typer.Option("--num-images", min=1, help="Scenes to draw.")] = 2000,
    image_size: Annotated[int, typer.Option("--image-size", min=16, help="Side of a picture, pixels.")] = 128,
    seed: SeedOption = 0,
    max_count: CountOption = 1000,
) -> None:
    """Draw labelled scenes as shards: a data set for trials that needs no download."""
    from fd_scale.data.scenes import write_scenes

    written = write_scenes(out, num_images=num_images, size=image_size, seed=seed, max_count=max_count)
    typer.echo(f"{num_images:,} scenes in {len(written):,} shards: {out}")


@app.command()
def index(
    tars: Annotated[
        list[str],
        typer.Argument(
            metavar="TARS...",
            help="A folder of tar files; or tar files and URLs, in order, where {000..127} counts.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder for the index; the folder of the tars by default."),
    ] = None,
    classes: ClassesOption = None,
    workers: WorkersOption = None,
    allow_pipe: PipeOption = False,
) -> None:
    """Make a set of shards of existing tars by reading their headers; the tars stay as and where they are."""
    from fd_scale.data import indexing
    from fd_scale.data.pool import processes

    if len(tars) == 1 and Path(tars[0]).is_dir():
        folder = out or Path(tars[0])
        named: list[Path | str] = list(indexing.find_tars(Path(tars[0])))
    elif out is None:
        raise ShardError("tar files or URLs need --out FOLDER, where their index is written")
    else:
        folder, named = out, [name for pattern in tars for name in indexing.expanded(pattern)]
    report = indexing.build_index(
        named, folder, classes=_class_map(classes), workers=processes(workers), allow_pipe=allow_pipe
    )
    typer.echo(f"{report.num_samples:,} images in {report.num_shards:,} shards: {report.folder}")
    for ignored in report.ignored[:20]:
        typer.echo(f"left out: {ignored.shard}: {ignored.name}: {ignored.reason}")
    if len(report.ignored) > 20:
        typer.echo(f"left out: {len(report.ignored) - 20:,} more")


@app.command()
def verify(
    folder: SetArgument,
    decode: Annotated[bool, typer.Option("--decode", help="Decode every image.")] = False,
    labels: Annotated[bool, typer.Option("--labels", help="With --decode, read the labels too.")] = False,
    hash_: Annotated[bool, typer.Option("--hash", help="Compare the SHA-256 of every shard.")] = False,
    only: Annotated[
        list[str] | None, typer.Option(help="Look at this shard alone. May be given often.")
    ] = None,
    exclude: Annotated[
        bool,
        typer.Option(
            "--exclude", help="Leave what is found out of the data set from now on (excluded.jsonl)."
        ),
    ] = False,
    workers: WorkersOption = None,
    cache: CacheOption = None,
    allow_pipe: PipeOption = False,
) -> None:
    """Check that shards are as they were indexed: sizes and headers, and more when asked.

    Exit status 0: all is well; 3: something is not, a line of JSON each on standard output.
    """
    from dataclasses import asdict

    from fd_scale.data.pool import processes
    from fd_scale.shards import verify as verifying

    verdict = verifying.verify(
        folder,
        depth=verifying.Depth(decode=decode, labels=labels, hash=hash_),
        only=only or [],
        access=_access(cache, allow_pipe),
        workers=processes(workers),
    )
    for finding in verdict.findings:
        typer.echo(json.dumps(asdict(finding)))
    say = Console(stderr=True, soft_wrap=True, highlight=False)
    say.print(
        f"{verdict.num_shards:,} shards, {verdict.num_samples:,} samples: {len(verdict.findings):,} faults"
    )
    if verdict.without_hash:
        say.print(f"{verdict.without_hash:,} shards have no checksum: they were not packed by this program")
    if exclude:
        count = verifying.exclude(folder, verdict, only or [])
        say.print(f"{count:,} samples or shards are excluded from the data set now")
    if verdict.findings:
        raise typer.Exit(FOUND_DAMAGE)


@app.command()
def show(
    folder: SetArgument,
    samples: Annotated[
        int, typer.Option("--samples", min=1, help="Images to look at, drawn from all.")
    ] = 1000,
    sheet: Annotated[
        Path | None, typer.Option("--sheet", help="Write a contact sheet, PNG, of the first of them.")
    ] = None,
    pictures: Annotated[int, typer.Option("--pictures", min=1, help="Images on the sheet.")] = 60,
    seed: SeedOption = 0,
    cache: CacheOption = None,
    allow_pipe: PipeOption = False,
) -> None:
    """Say what a set of shards holds: counts, sizes, formats, modes, mean and std of the channels."""
    from fd_scale.data.index import ShardSet
    from fd_scale.shards import show as showing

    shards = ShardSet.open(folder, access=_access(cache, allow_pipe))
    places = showing.chosen(shards, samples, seed)
    Console(soft_wrap=True).print(showing.table(shards, showing.look(shards, places)))
    if sheet is not None:
        showing.contact_sheet(shards, showing.chosen(shards, pictures, seed), sheet)
        typer.echo(f"contact sheet: {sheet}")


@app.command()
def plan(
    folders: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[FOLDER | FOLDER=WEIGHT...]",
            help="A folder of shards with its index; or several to mix, each with its sampling weight.",
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe", help="Take folders, weights, batch, seed and block from this recipe (name or .json)."
        ),
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Change one of its fields: section.field=value.")
    ] = None,
    global_batch: Annotated[
        int | None, typer.Option(min=1, help="Images per step, over all processes; needed without --recipe.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="The run's seed; 0 without --recipe.")] = None,
    epoch: Annotated[int, typer.Option(min=0, help="Counted from 0.")] = 0,
    step: Annotated[int, typer.Option(min=0, help="Within the epoch, counted from 0.")] = 0,
    world_size: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
    rank: Annotated[int, typer.Option(min=0, help="Which of them.")] = 0,
    block: Annotated[
        int | None, typer.Option(min=1, help="The run's data.block; 256 without --recipe.")
    ] = None,
    places: Annotated[
        bool, typer.Option("--places", help="Shard, index and key, with tabs between, not the key alone.")
    ] = False,
) -> None:
    """Print the keys of a rank's part of a step, one per line, in order.

    The same arguments as the run's give the run's own samples.
    """
    from fd_scale.data.sets import open_shards, plan_of
    from fd_scale.shards import listing

    fields = {"global_batch": global_batch, "seed": seed, "data.block": block}
    run = listing.run_of(folders or [], recipe, set_ or [], fields)
    shards = open_shards(run, check=False)
    order = plan_of(run, shards)
    for one in listing.samples(shards, order, epoch=epoch, step=step, rank=rank, world_size=world_size):
        typer.echo("\t".join(map(str, one)) if places else one.key)


@app.command()
def bench(
    folder: SetArgument,
    target: Annotated[
        float, typer.Option("--target", min=0, help="Images per second that are wanted, over all processes.")
    ] = 1000.0,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Images to measure with.")] = 256,
    size: Annotated[
        list[int] | None, typer.Option("--size", help="Side of a view, pixels; 224. May be given often.")
    ] = None,
    seed: SeedOption = 0,
    cache: CacheOption = None,
    allow_pipe: PipeOption = False,
) -> None:
    """Measure how many views per second one core makes of these images, by each decoder installed."""
    from fd_scale.data.index import ShardSet
    from fd_scale.run.sections import View
    from fd_scale.shards import bench as measuring
    from fd_scale.shards.show import chosen

    shards = ShardSet.open(folder, access=_access(cache, allow_pipe))
    found = measuring.bench(shards, chosen(shards, samples, seed), View(), size or [224])
    Console(soft_wrap=True).print(measuring.table(found, target))
    typer.echo(f"one process reads the shards at {found.read_mib_per_s:,.0f} MiB/s")
    if found.unusable:
        typer.echo(
            f"{found.unusable:,} images could not be decoded: fd-scale shards verify --decode {folder}"
        )


def _access(cache: Path | None, allow_pipe: bool) -> Access:
    from fd_scale.data.index import Access

    return Access(cache=cache, allow_pipe=allow_pipe)


def _class_map(path: Path | None) -> list[str] | None:
    """Class names in the order of their numbers."""
    if path is None:
        return None
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if path.suffix.lower() == ".json" else text.splitlines()
    except (OSError, ValueError) as error:
        raise ShardError(f"--classes {path} cannot be read: {error}") from None
    if isinstance(found, dict):
        numbers = {name: number for name, number in found.items() if type(number) is int}
        if sorted(numbers.values()) != list(range(len(found))):
            raise ShardError(f"--classes {path}: its numbers must be 0 to {len(found) - 1}, each once")
        found = sorted(numbers, key=lambda name: numbers[name])
    names = [name.strip() for name in found] if all(isinstance(name, str) for name in found) else []
    if not names or "" in names or len(set(names)) != len(names):
        raise ShardError(f"--classes {path}: expected different names, in the order of their numbers")
    return names
