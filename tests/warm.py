"""The command line many times over for one round of imports: a process that has made them forks per command.

Imports are nearly all of what a start on a tiny problem costs. A forked child runs ``fd_scale.cli.main`` with
its own words, output and exit status, as a fresh interpreter would after the same imports; several find each
other as under torchrun, whose variables they get.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from fd_scale.run.world import free_port


class Warm:
    """A process that is ready to ``start`` commands; ``close`` ends it, and what it started."""

    def __init__(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        environment["PYTHONPATH"] = str(Path(__file__).parents[1])
        self._outputs = tempfile.TemporaryDirectory()
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,
        )

    def start(self, *words: str, ranks: int = 0) -> Started:
        """``fd-scale words`` in so many ranks, or in one process without a launcher."""
        descriptor, output = tempfile.mkstemp(dir=self._outputs.name)
        os.close(descriptor)
        variables: list[dict[str, str]] = [{}]
        if ranks:
            group = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
            variables = [group | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
        pids = self.ask({"words": words, "variables": variables, "output": output})
        return Started(self, pids, Path(output))

    def ask(self, question: dict[str, Any]) -> list[int]:
        """What the process answers."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline() or "null")

    def close(self) -> None:
        """End it, with all that it started."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._outputs.cleanup()


class Started:
    """A command under way, in one or more processes."""

    def __init__(self, warm: Warm, pids: list[int], output: Path) -> None:
        self.pids = pids
        self._warm, self._output = warm, output

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to every rank."""
        for pid in self.pids:
            os.kill(pid, number)

    def output(self) -> str:
        """What all ranks have said so far, both streams together."""
        return self._output.read_text()

    def wait(self) -> tuple[int, str]:
        """The exit status furthest from 0 (of a killed rank: minus the signal's number), and the output."""
        statuses = self._warm.ask({"wait": self.pids})
        return max(statuses, key=abs), self.output()


def serve() -> None:
    """Fork for each line of the standard input; answer with pids, and with exit statuses once asked."""
    import fd_scale.distill  # noqa: F401

    for line in sys.stdin:
        asked = json.loads(line)
        if "wait" in asked:
            answer = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in asked["wait"]]
        else:
            answer = [fork(asked["words"], each, asked["output"]) for each in asked["variables"]]
        print(json.dumps(answer), flush=True)


def fork(words: list[str], variables: dict[str, str], output: str) -> int:
    """A child that runs the command; its pid."""
    from fd_scale import cli

    if child := os.fork():
        return child
    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(variables)
    sys.argv = ["fd_scale", *words]
    status = 0
    try:
        cli.main()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    sys.stdout.flush()
    os._exit(status)


if __name__ == "__main__":
    serve()
