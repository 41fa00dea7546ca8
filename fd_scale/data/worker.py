"""How does a data worker end? With the training process that reads from it, and never for another reason.

A worker that a signal took away would break a save; one that outlived its training process would hold memory
and shards for ever. What workers do is the loader's.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing.process import BaseProcess


def on_start(_: int) -> None:
    """Leave Ctrl-C and SIGTERM to the main process, which saves and then ends its workers itself; follow it
    when it is gone.

    A terminal and a batch system send them to every process of a job.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None, "called in a worker alone"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        # Blocked for the threads that start from here on too.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_leave_when_told, args=(parent,), daemon=True).start()
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()


@contextlib.contextmanager
def quiet_child_signal() -> Iterator[None]:
    """Leave the signal of a dead child as it is.

    PyTorch would raise from it wherever the training process happens to be; without it a death is found where
    the batch is waited for, and can be reported.
    """
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread() and before is not None:
            signal.signal(signal.SIGCHLD, before)


def _leave_when_told(parent: BaseProcess) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent.pid:
        continue
    os._exit(0)


def _leave_with(parent: BaseProcess) -> None:
    """End when the parent is gone, however it went.

    PyTorch's own watch asks for ``getppid``, which is the fork server where one started the worker and so
    never changes, and asks between two batches alone. The parent's sentinel tells of its end in any case.
    """
    parent.join()
    os._exit(0)
