"""How do existing tars become a set of shards? Their headers are read once, and they stay where they are.

Tars of this machine are indexed in place; those behind URLs are fetched one at a time, read, and forgotten.
How samples are read afterwards is the business of ``index``.
"""

from __future__ import annotations

import dataclasses
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.progress import Progress

from fd_scale.data import manifest, offsets
from fd_scale.data.faults import LostShardError
from fd_scale.data.manifest import Shard, is_remote
from fd_scale.data.offsets import Ignored, Table
from fd_scale.data.pool import bar, each
from fd_scale.data.remote import Patience, Remote
from fd_scale.errors import ShardError

_MAX_BRACES = 10**6
"""Most names that one pattern may stand for."""
_PATIENCE = Patience()


@dataclass(frozen=True)
class IndexReport:
    """What was indexed, and every member that was left out."""

    folder: Path
    num_shards: int
    num_samples: int
    ignored: tuple[Ignored, ...]


def find_tars(folder: Path) -> list[Path]:
    """The tar files directly in a folder, by name; raises ``ShardError`` when there is none."""
    tars = sorted(path for path in folder.glob("*.tar") if path.is_file())
    if not tars:
        raise ShardError(f"no .tar files in {folder}")
    return tars


def expanded(pattern: str) -> list[str]:
    """The names that ``part-{000..127}.tar`` stands for; a name without such braces is itself."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not found:
        return [pattern]
    first, last = found.groups()
    if int(last) - int(first) >= _MAX_BRACES:
        raise ShardError(f"{pattern!r} stands for more than {_MAX_BRACES:,} names")
    numbers = [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
    rest = expanded(pattern[found.end() :])
    return [pattern[: found.start()] + number + end for number in numbers for end in rest]


def build_index(
    tars: Sequence[Path | str],
    folder: Path,
    *,
    classes: Sequence[str] | None = None,
    workers: int = 1,
    progress: Progress | None = None,
    patience: Patience = _PATIENCE,
    allow_pipe: bool = False,
) -> IndexReport:
    """Index existing tar files (paths, or URLs), in this order, and write the manifest into ``folder``.

    Raises ``ShardError`` that lists every tar that is damaged or cannot be had, or when no sample has an
    image.
    """
    (folder / "offsets").mkdir(parents=True, exist_ok=True)
    Remote(patience, allow_pipe=allow_pipe).check([str(tar) for tar in tars if is_remote(str(tar))])
    shards: list[Shard] = []
    ignored: list[Ignored] = []
    damaged: list[str] = []
    work = _Scan(folder, patience, allow_pipe)
    with bar(progress, f"indexing into {folder}", len(tars)) as advance:
        for shard, left_out, fault in each(work, list(enumerate(tars)), workers):
            advance(1)
            ignored += left_out
            if shard is None:
                damaged.append(fault)
            else:
                shards.append(shard)
    if damaged:
        raise ShardError(manifest.listed("damaged shards; replace them, or leave them out:", damaged))
    total = sum(shard.num_samples for shard in shards)
    if not total:
        raise ShardError(
            f"no sample with an image in {len(tars)} tar files; extensions looked for: "
            f"{', '.join(offsets.IMAGE_EXTENSIONS)}" + "".join(f"; {i.name}: {i.reason}" for i in ignored[:3])
        )
    manifest.write(folder, shards, classes)
    return IndexReport(folder, len(shards), total, tuple(ignored))


def describe(table: Table, tar: Path, folder: Path, number: int, sha256: str | None = None) -> Shard:
    """The manifest line of shard ``number``; its table of offsets is to be saved under the name there."""
    tar, folder = tar.resolve(), folder.resolve()
    url = str(tar.relative_to(folder)) if tar.is_relative_to(folder) else str(tar)
    return Shard(url, table.num_samples, table.file_size, f"offsets/{number:06d}", sha256)


@dataclass(frozen=True)
class _Scan:
    """Reads the headers of one tar and saves its table, in whichever process."""

    folder: Path
    patience: Patience
    allow_pipe: bool

    def __call__(self, numbered: tuple[int, Path | str]) -> tuple[Shard | None, list[Ignored], str]:
        number, tar = numbered
        try:
            table, left_out = offsets.scan(Path(tar)) if not is_remote(str(tar)) else self._far(str(tar))
        except (ShardError, LostShardError) as error:
            return None, [], str(error)
        shard = describe(table, Path(tar), self.folder, number)
        if is_remote(str(tar)):
            shard = dataclasses.replace(shard, url=str(tar))
        offsets.save(table, self.folder / shard.offsets)
        return shard, left_out, ""

    def _far(self, url: str) -> tuple[Table, list[Ignored]]:
        with tempfile.TemporaryDirectory(prefix="fd_scale-") as scratch:
            copy = Path(scratch, "shard.tar")
            with copy.open("wb") as file:
                if url.startswith("pipe:"):
                    _run(url.removeprefix("pipe:"), file.fileno())
                else:
                    remote = Remote(self.patience, allow_pipe=self.allow_pipe)
                    size = remote.size(url)
                    if size is None:
                        raise ShardError(f"{url}: the server does not say how large it is")
                    file.writelines(remote.stream(url, 0, size, size))
            try:
                return offsets.scan(copy)
            except ShardError as error:
                raise ShardError(str(error).replace(str(copy), url)) from None


def _run(command: str, output: int) -> None:
    """The output of a command; its status counts, as nothing else says whether all of it came."""
    done = subprocess.run(["/bin/sh", "-c", command], stdin=subprocess.DEVNULL, stdout=output)
    if done.returncode:
        raise ShardError(f"pipe:{command} ended with status {done.returncode}")
