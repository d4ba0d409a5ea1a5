"""Signals: Ctrl-C and SIGTERM let the step in hand end, so that it can be saved."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
if hasattr(signal, "SIGUSR1"):  # not on Windows; SLURM sends it before a job's time is up
    SIGNALS += (signal.SIGUSR1,)
PARENT = "PTQL_FIRST_PROCESS"


class Stopped(SystemExit):
    """A signal ended the run; what was finished is on disk.

    Its code is 128 + the signal's number in the first process, 0 in others: Lightning kills the first process
    when another ends with a code.
    """

    def __init__(self, signum: int, first: bool = True) -> None:
        super().__init__(128 + signum if first else 0)


class StopSignals:
    """Context manager: the run's own handling of SIGINT, SIGTERM and SIGUSR1.

    While a block learns (`learning` is True) a signal is only noted, and the loop ends after the step. Elsewhere,
    and at the second signal, `Stopped` is raised at once: nothing is lost but the work since the last save.
    Processes other than the first only note signals: they end when the first one says so, or is gone.
    """

    def __init__(self, first: bool = True) -> None:
        self.first = first
        self.received: int | None = None
        self.learning = False
        self._count = 0
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopSignals:
        self._before = {number: signal.getsignal(number) for number in SIGNALS} if _main_thread() else {}
        self.take_over()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def take_over(self) -> None:
        """Put our handler in place, also of the one that Lightning installs for each fit.

        Lightning's sends a collective message from inside the handler, which meets other collectives by chance.
        """
        if _main_thread():
            for number in SIGNALS:
                signal.signal(number, self._handle)

    def _handle(self, signum: int, _: FrameType | None) -> None:
        self.received = signum
        self._count += 1
        if self._count > 1 or (self.first and not self.learning):
            raise Stopped(signum)


def tell_children() -> None:
    """Let the processes that this one starts from now on know whom to watch."""
    os.environ[PARENT] = str(os.getpid())


def tell_children_no_more() -> None:
    """Processes that are started from now on are no part of the run."""
    os.environ.pop(PARENT, None)


def end_with_parent(poll_seconds: float = 2.0) -> None:
    """End this process when the one that started it is gone: it would wait for its messages for half an hour.

    Does nothing in a process that no `tell_children` preceded.
    """
    parent = int(os.environ.pop(PARENT, "0"))
    if parent in (0, os.getpid()):
        return

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(poll_seconds)
        print(f"ptql: process {os.getpid()}: the first process is gone, so this one ends", file=sys.stderr, flush=True)
        os._exit(1)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()


def _main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
