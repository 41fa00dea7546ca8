"""What two ranks see of saves that go well, overlap, fail on one of them, or lose the disk."""

from __future__ import annotations

import resource
import time
from pathlib import Path
from typing import Any

from fd_scale.engine import saving
from fd_scale.run.world import World
from tests.engine import problem
from tests.engine.problem import Setting

SETTING = Setting(3, micro_batch=4, drop_path=0.3, steps=12)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def complaint(action: Any) -> str:
    """What ``action`` raises, as ``type: text``."""
    try:
        action()
    except (OSError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


class OneProcess:
    """Stands where a ``World`` of one process would, without a process group."""

    rank, size = 0, 1

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def on_main(self, action: Any) -> Any:
        return action()

    together = on_main


class Story:
    """One engine that trains between saves of every kind."""

    def __init__(self, world: World, folder: Path) -> None:
        self.world, self.folder = world, folder
        self.engine, self.resolved = problem.make_engine(world, SETTING, str(folder))
        self.pause_s = 0.0
        self.committed: list[int] = []
        self.partials: list[int] = []

    def before_commit(self) -> None:
        self.partials.append(len(list((self.folder / "background").glob("*.partial"))))
        time.sleep(self.pause_s)

    def saver(self, name: str, *, background: bool, stage: Path | None = None) -> saving.Saver:
        return saving.Saver(
            self.folder / name,
            self.world,
            background=background,
            last_step=None,
            before_commit=self.before_commit,
            committed=self.committed.append,
            stage=stage,
        )

    def advance(self) -> None:
        problem.advance(self.engine, self.resolved, self.world, self.engine.step_number + 1)


def room(world: World, size: int) -> None:
    """How large a file rank 1 may write, bytes."""
    if world.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def tell(world: World, folder: str) -> dict[str, Any]:
    """Facts of this rank about each kind of save, by name."""
    story = Story(world, Path(folder))
    place = story.folder / "background"
    saver = story.saver("background", background=True)
    facts: dict[str, Any] = {}

    story.advance()
    saving.save(story.folder / "blocking", story.engine, world, {})
    saver.save(story.engine, {})
    story.advance()  # the weights change while they are written
    saver.wait()

    story.pause_s = 1.5
    began = time.monotonic()
    saver.save(story.engine, {})
    facts["first_s"] = time.monotonic() - began
    story.advance()
    saver.save(story.engine, {})
    facts["second_s"] = time.monotonic() - began
    saver.save(story.engine, {})  # the same step again
    saver.wait()
    story.pause_s = 0.0
    facts["committed"], facts["partials"] = list(story.committed), list(story.partials)

    room(world, 10_000)
    story.advance()
    saver.save(story.engine, {})
    facts["full"] = complaint(saver.wait)
    facts["full, not in the background"] = complaint(
        lambda: story.saver("background", background=False).save(story.engine, {})
    )
    facts["after full"] = names(place)
    room(world, resource.RLIM_INFINITY)

    again = story.saver("background", background=True)
    again.save(story.engine, {})
    again.wait()
    facts["after more room"] = names(place)

    lost = story.saver("lost/checkpoints", background=True)  # lost/ was never there, as after an unmount
    lost.save(story.engine, {})
    facts["lost"] = complaint(lost.wait)
    facts["grown"] = (story.folder / "lost").exists()
    return facts | staged(story)


def staged(story: Story) -> dict[str, Any]:
    """Saves by way of the node's own disk, with enough room there and without."""
    disk = story.folder / f"disk-{story.world.rank}"
    disk.mkdir()
    saving.save(story.folder / "direct", story.engine, story.world, {})
    saver = story.saver("staged", background=True, stage=disk)
    saver.save(story.engine, {})
    saver.wait()
    room(story.world, 10_000)
    story.advance()
    saver.save(story.engine, {})
    facts = {"disk full": complaint(saver.wait), "left on the disk": names(disk)}
    room(story.world, resource.RLIM_INFINITY)
    return facts
