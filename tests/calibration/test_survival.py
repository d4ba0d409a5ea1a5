"""Runs that are killed, stopped, starved of room, or spread over processes, as a user would see them."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.kills import Small, alive, digest, kills

pytestmark = [pytest.mark.shared, pytest.mark.slow]
CLI = str(Path(__file__).parents[2] / "cli.py")
Command = Callable[..., list[str]]


@pytest.fixture(scope="module", autouse=True)
def one_thread(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PTQL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def command(stories_dir: Path, shared_dir: Path) -> Command:
    def made(run: Path, *more: str, method: str = "lrquant", scheme: str = "w4a4", batch: int = 4) -> list[str]:
        text = shared_dir / "data/text/tinystories-train.jsonl"
        return [
            *(sys.executable, CLI, "fit", "-c", f"methods/{method}", "-c", f"schemes/{scheme}"),
            *("--model.source", str(stories_dir), "--data.text", str(text), "--trainer.default_root_dir", str(run)),
            *("--data.samples", "18", "--data.length", "48", "--data.batch_size", str(batch)),
            *("--trainer.max_epochs", "2", "--trainer.accelerator", "cpu", *more),
        ]

    return made


SPREAD = ("--trainer.devices", "2", "--trainer.strategy", "ddp")


# Killed


@pytest.mark.timeout(900)
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_killed_at_random_ends_in_the_same_bytes(stories_dir: Path, tmp_path: Path, processes: int) -> None:
    found = list(kills(Small(stories_dir, "pydoc", processes), tmp_path, count=3, seed=11))
    assert [kill.same for kill in found] == [True] * 3
    assert max(kill.gone for kill in found) < 30


@pytest.mark.timeout(600)
def test_a_killed_run_finds_its_salient_channels_again(stories_dir: Path, tmp_path: Path) -> None:
    mean = ("--model.weight_quantizer.statistic", "mean", "--model.weight_quantizer.faithful", "false")
    small = Small(stories_dir, "pydoc", recipe=("-c", "methods/ptq161", "--trainer.callbacks", "null", *mean))
    assert [kill.same for kill in kills(small, tmp_path, count=2, seed=5)] == [True, True]


# Stopped


def stopped(args: list[str], run: Path, name: str, group: bool = False) -> tuple[int, str]:
    """Send the signal in the first block's middle; the exit code and what was said."""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(args, start_new_session=True, **pipes) as process:
        while not list((run / "tensorboard").glob("events*")):  # the first block learns
            assert process.poll() is None
            time.sleep(0.05)
        time.sleep(0.5)
        (os.killpg if group else os.kill)(process.pid, getattr(signal, name))
        out, _ = process.communicate(timeout=60)
    assert not alive(run)
    return process.returncode, out


@pytest.mark.parametrize(
    ("processes", "name", "group"),
    [(1, "SIGTERM", False), (1, "SIGINT", True), (2, "SIGTERM", False)],
)
def test_a_signal_saves_the_step_and_says_how_to_go_on(
    command: Command, tmp_path: Path, processes: int, name: str, group: bool
) -> None:
    def args(run: Path) -> list[str]:
        return command(run, "--trainer.max_epochs", "30", *(SPREAD if processes > 1 else ()), batch=4 // processes)

    run, whole = tmp_path / "run", tmp_path / "whole"
    code, out = stopped(args(run), run, name, group)
    assert code == 128 + getattr(signal, name)
    assert out.splitlines()[-1] == "ptql: stopped; the same command goes on from here"
    assert "Traceback" not in out
    assert len(list((run / "ledger").glob("partial-00000-*.ckpt"))) == 1  # in the middle of an epoch, most likely
    again = subprocess.run(args(run), capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "ptql: block 1/5: goes on from partial-00000-" in again.stderr
    assert not list((run / "ledger").glob("partial*"))
    if name == "SIGTERM":
        subprocess.run(args(whole), check=True, capture_output=True)
        assert digest(run / "model") == digest(whole / "model")


def test_a_damaged_checkpoint_is_not_used(command: Command, tmp_path: Path) -> None:
    run = tmp_path / "run"
    args = command(run, "--trainer.max_epochs", "40")
    stopped(args, run, "SIGTERM")
    (partial,) = (run / "ledger").glob("partial-*.ckpt")
    partial.write_bytes(partial.read_bytes()[:-1])
    again = subprocess.run(args, capture_output=True, text=True)
    assert again.returncode == 0
    assert f"ptql: {partial}: not what was written (checksum); the block begins anew" in again.stderr
    assert "goes on from" not in again.stderr


# Several processes


def learned(run: Path) -> list[dict[str, torch.Tensor]]:
    files = sorted((run / "ledger").glob("block-*.safetensors"))
    return [{k: v for k, v in load_file(file).items() if k.startswith("learned.")} for file in files]


def test_two_processes_learn_what_one_learns_on_the_same_global_batch(command: Command, tmp_path: Path) -> None:
    """18 samples: the last batch of each process holds one. No rounded activations: they make a last bit a jump."""
    one, two = tmp_path / "one", tmp_path / "two"
    subprocess.run(command(one, scheme="w3a16"), check=True, capture_output=True)
    subprocess.run(command(two, *SPREAD, scheme="w3a16", batch=2), check=True, capture_output=True)
    for mine, theirs in zip(learned(one), learned(two), strict=True):
        assert mine
        for name, value in mine.items():
            torch.testing.assert_close(theirs[name], value, rtol=1e-3, atol=1e-4)
    moved = [any((value - 4).abs().max() > 0.01 for value in block.values()) for block in learned(two)]
    assert sum(moved) >= 3  # the others fell back to their start
    notes = [json.loads((run / "ledger/manifest.json").read_text())["blocks"] for run in (one, two)]
    for block, other in zip(notes[0].values(), notes[1].values(), strict=True):
        assert other["steps"] == block["steps"] == 10
        for key in ("loss", "loss_start", "loss_learned", "mse"):
            assert other[key] == pytest.approx(block[key], rel=1e-3)
    assert json.loads((two / "metrics.json").read_text())["fit"]["processes"] == 2


def test_samples_that_do_not_divide_are_dropped_and_said(command: Command, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = subprocess.run(command(run, *SPREAD, "--data.samples", "5", batch=2), capture_output=True, text=True)
    assert done.returncode == 0
    line = "5 samples do not divide by 2 processes: the last 1 are left out"
    assert done.stdout.count(line) == 1
    assert line in json.loads((run / "metrics.json").read_text())["fit"]["warnings"]
    other = subprocess.run(command(run, "--data.samples", "5"), capture_output=True, text=True)
    assert other.returncode == 2
    assert "data.batch_size was 2 and is 4 now" in other.stderr
    alone = subprocess.run(command(run, "--data.samples", "5", batch=2), capture_output=True, text=True)
    assert alone.returncode == 2
    assert "processes was 2 and is 1 now" in alone.stderr


def test_a_process_that_dies_ends_the_others_with_the_reason(command: Command, tmp_path: Path) -> None:
    run = tmp_path / "run"
    args = command(run, "--trainer.max_epochs", "500", *SPREAD)
    with subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        while not list((run / "tensorboard").glob("events*")):
            assert process.poll() is None
            time.sleep(0.05)
        time.sleep(0.5)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[0]), signal.SIGKILL)
        died = time.monotonic()
        out, _ = process.communicate(timeout=60)
    while alive(run):
        assert time.monotonic() - died < 60
        time.sleep(0.1)
    assert process.returncode != 0
    # whichever of the two sees it first: ours, or Lightning's watch over its processes
    assert "ended with signal SIGKILL, so all of them end" in out or "terminated with code -9" in out


def test_torchrun_starts_the_processes_too(command: Command, tmp_path: Path) -> None:
    run = tmp_path / "run"
    program = command(run, *SPREAD, batch=2)[1:]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*torchrun, *program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    subprocess.run(command(tmp_path / "own", *SPREAD, batch=2), check=True, capture_output=True)
    assert digest(run / "model") == digest(tmp_path / "own/model")


# No room


@pytest.mark.parametrize("limit", [20_000, 60_000])  # in the dry run, and when the model is written
def test_a_file_that_can_not_be_written_is_said_and_nothing_is_half_written(
    command: Command, tmp_path: Path, limit: int
) -> None:
    run = tmp_path / "run"
    args = command(run, "--trainer.logger", "false")
    subprocess.run(command(tmp_path / "whole", "--trainer.logger", "false"), check=True, capture_output=True)

    def little() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    full = subprocess.run(args, capture_output=True, text=True, preexec_fn=little)
    assert full.returncode == 2
    last = full.stderr.splitlines()[-1]
    assert f"ptql: error: {run}: the disk is full or a limit is reached (File too large)" in last
    assert "Traceback" not in full.stderr
    assert not (run / "model").exists()
    assert run.exists() == (limit > 50_000)
    assert not [path for path in run.rglob("*") if path.name.endswith(".tmp")]
    again = subprocess.run(args, capture_output=True, text=True)
    assert again.returncode == 0
    assert digest(run / "model") == digest(tmp_path / "whole/model")
