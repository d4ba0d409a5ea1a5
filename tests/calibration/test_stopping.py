"""Signals: noted while a block learns, raised elsewhere; processes that lose their first one end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ptql.calibration.stopping import (
    PARENT,
    Stopped,
    StopSignals,
    end_with_parent,
    tell_children,
    tell_children_no_more,
)

ROOT = Path(__file__).parents[2]
BOTH = [signal.SIGINT, signal.SIGTERM]


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", BOTH)
def test_outside_of_learning_it_is_raised_at_once(number: signal.Signals) -> None:
    with pytest.raises(Stopped) as stop, StopSignals():
        send(number)
    assert stop.value.code == 128 + number


@pytest.mark.parametrize("number", BOTH)
def test_while_a_block_learns_it_is_noted_and_the_second_one_is_raised(number: signal.Signals) -> None:
    with StopSignals() as signals:
        signals.learning = True
        send(number)
        assert signals.received == number
        with pytest.raises(Stopped) as stop:
            send(signal.SIGTERM)
    assert stop.value.code == 143


def test_other_processes_note_the_first_one_always() -> None:
    with StopSignals(first=False) as signals:
        for learning in (False, True):
            signals.learning, signals._count, signals.received = learning, 0, None
            send(signal.SIGINT)
            assert signals.received == signal.SIGINT


def test_their_code_is_zero() -> None:
    assert Stopped(signal.SIGINT, first=False).code == 0
    assert Stopped(signal.SIGINT).code == 130
    assert isinstance(Stopped(signal.SIGTERM), SystemExit)


@pytest.mark.parametrize("ended", [None, ValueError])
def test_the_handlers_of_before_come_back(ended: type[Exception] | None) -> None:
    def mine(*_: object) -> None:
        raise AssertionError

    before = {number: signal.signal(number, mine) for number in BOTH}
    try:
        try:
            with StopSignals():
                assert all(signal.getsignal(number) is not mine for number in BOTH)
                if ended is not None:
                    raise ended
        except ValueError:
            pass
        assert all(signal.getsignal(number) is mine for number in BOTH)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_it_takes_over_again_from_whoever_came_between() -> None:
    with StopSignals() as signals:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signals.take_over()
        signals.learning = True
        send(signal.SIGTERM)
        assert signals.received == signal.SIGTERM


def test_in_another_thread_handlers_are_left_alone() -> None:
    handler, failed = signal.getsignal(signal.SIGINT), []

    def inside() -> None:
        try:
            with StopSignals() as signals:
                signals.take_over()
                assert signal.getsignal(signal.SIGINT) is handler
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert failed == []


# Processes that watch the first one


def test_who_is_to_be_watched_is_told_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PARENT, raising=False)
    threads = threading.active_count()
    end_with_parent()
    assert threading.active_count() == threads  # nobody said so
    tell_children()
    assert os.environ[PARENT] == str(os.getpid())
    end_with_parent()  # the first process itself
    assert threading.active_count() == threads
    tell_children()
    tell_children_no_more()
    assert PARENT not in os.environ


FIRST = """
import subprocess, sys, time
from ptql.calibration.stopping import tell_children
tell_children()
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]])
print(child.pid, flush=True)
time.sleep(60)
"""
OTHER = """
import os, time
from ptql.calibration.stopping import PARENT, end_with_parent
end_with_parent(poll_seconds=0.05)
assert PARENT not in os.environ  # what this one starts is no part of the run
print("ready", flush=True)
time.sleep(60)
"""


def test_an_orphan_ends() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", FIRST, OTHER], text=True, env=environment, **pipes) as first:
        assert first.stdout is not None
        lines = {first.stdout.readline().strip(), first.stdout.readline().strip()}
        (child,) = (int(line) for line in lines - {"ready"})
        time.sleep(0.3)
        os.kill(child, 0)  # it lives as long as the first one does
        first.kill()
        assert first.stderr is not None
        said = first.stderr.read()  # ends when the orphan has closed it, too
    assert said == f"ptql: process {child}: the first process is gone, so this one ends\n"
