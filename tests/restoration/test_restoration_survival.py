"""Runs in three stages that are killed, stopped, or spread over processes, as a user would see them."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.kills import alive
from tests.callbacks.adapted import SMALL
from tests.models import CONFIGS
from tests.restoration.lora import (
    LESSON,
    NAME,
    PTQ161,
    callback,
    checksum,
    facts,
    fitted,
    once,
    options,
    thrice,
    weights,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
CLI = str(Path(__file__).parents[2] / "cli.py")
EACH_STEP = [callback(samples=60, every_seconds=0)]
EACH_STEP += [{"class_path": "ptql.callbacks.BlockCheckpoint", "init_args": {"every_seconds": 0}}]
SPREAD = {"trainer.devices": 2, "trainer.strategy": "ddp"}
SHARDED = """
trainer:
  strategy:
    class_path: ptql.restoration.fsdp2.FSDP2
"""


@pytest.fixture(scope="module", autouse=True)
def one_thread(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PTQL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def fit(run: Path, settings: dict[str, Any]) -> list[str]:
    """A process's command; source and text lie beside the run."""
    places = {"model.source": str(run.parent / "source"), "data.text": str(run.parent / "words.txt")}
    given = {**settings, **places, "trainer.default_root_dir": str(run)}
    return [sys.executable, CLI, "fit", *PTQ161, *options(given)]


def restore(run: Path, *more: str, **lesson: Any) -> list[str]:
    learned = {f"trainer.callbacks.{name}": value for name, value in {**LESSON, **lesson}.items()}
    command = [sys.executable, CLI, "restore", "--run", str(run), "--trainer.accelerator", "cpu", *more]
    return [*command, "--trainer.callbacks", NAME, *options(learned)]


def interrupted(args: list[str], folder: Path, name: str, after: float) -> tuple[int, str]:
    """Send the signal so long after a step has been saved in the folder; exit code and what was said."""
    before = set(folder.glob("partial-*.ckpt"))
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(args, **pipes) as process:
        while not set(folder.glob("partial-*.ckpt")) - before:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.005)
        time.sleep(after)
        process.send_signal(getattr(signal, name))
        out, _ = process.communicate(timeout=60)
    while alive(folder.parent):
        time.sleep(0.05)
    return process.returncode, out


def done(args: list[str]) -> str:
    found = subprocess.run(args, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    return found.stderr


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_killed_in_each_of_its_stages_ends_in_the_same_bytes(tmp_path: Path, processes: int) -> None:
    settings = {**SMALL, "trainer.max_epochs": 6, "trainer.callbacks": EACH_STEP}
    settings |= {**SPREAD, "data.samples": 4, "data.batch_size": 1} if processes > 1 else {}
    run = fitted(tmp_path, once(), name="unused").parent / "run"
    done(fit(tmp_path / "whole", settings))
    draw = random.Random(processes)
    for stage in ("first/ledger", "restored", "restored", "ledger"):
        assert interrupted(fit(run, settings), run / stage, "SIGKILL", draw.uniform(0, 0.1))[0] == -signal.SIGKILL
        assert not (run / "model").exists()
        assert (run / "first/model").exists() == (stage != "first/ledger")
        assert (run / "restored/model").exists() == (stage == "ledger")
    said = done(fit(run, settings))
    assert "stage 1" not in said
    assert "restored earlier" in said
    assert checksum(run / "first") == checksum(tmp_path / "whole/first")
    assert weights(run / "restored") == weights(tmp_path / "whole/restored")
    assert checksum(run) == checksum(tmp_path / "whole")
    for name in ("losses", "tokens", "identity", "skipped_steps"):
        assert facts(run / "restored")[name] == facts(tmp_path / "whole/restored")[name], name
    assert not list(run.rglob("partial*"))


def test_a_signal_while_lora_learns_saves_the_step_and_a_damaged_one_is_told(tmp_path: Path) -> None:
    """The step is saved though its time has not come."""
    settings = thrice(samples=300, length=16)
    run = fitted(tmp_path, once(), name="first").parent / "run"
    done(fit(tmp_path / "whole", settings))
    folder = run / "restored"

    def stopped(after: float = 1.5) -> Path:
        with subprocess.Popen(fit(run, settings), stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            for line in process.stderr:
                if line.startswith("ptql: stage 2 of 3"):
                    break
            time.sleep(after)
            process.send_signal(signal.SIGTERM)
            said = process.stderr.read()
        assert process.returncode == 143, said
        assert said.splitlines()[-1] == "ptql: stopped; the same command goes on from here"
        assert "Traceback" not in said
        found = list(folder.glob("partial-*.ckpt"))
        return found[0] if found else stopped(2 * after)  # it had not begun to learn

    partial = stopped()
    partial.write_bytes(partial.read_bytes()[:-1])
    other = stopped()
    said = done(fit(run, settings))
    assert "ptql: restoration: goes on behind step " in said
    assert "not what was written" not in said
    assert not list(run.rglob("partial*"))
    assert weights(folder) == weights(tmp_path / "whole/restored")
    assert checksum(run) == checksum(tmp_path / "whole")
    assert other != partial


def test_a_damaged_step_is_told_and_begun_anew(tmp_path: Path) -> None:
    first = fitted(tmp_path, once(), name="first")
    args = restore(first, "--out", str(tmp_path / "out"), samples=60, every_seconds=0)
    assert interrupted(args, tmp_path / "out", "SIGKILL", 0.1)[0] == -signal.SIGKILL
    (partial,) = (tmp_path / "out").glob("partial-*.ckpt")
    partial.write_bytes(partial.read_bytes()[:-1])
    said = done(args)
    assert f"ptql: restoration: {partial}: not what was written (checksum); it begins anew" in said
    assert "goes on" not in said
    done(restore(first, "--out", str(tmp_path / "whole"), samples=60))
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


def test_two_processes_learn_what_one_learns_with_larger_batches(tmp_path: Path) -> None:
    """Samples of the same length, and no dropout, whose random numbers are a process's own."""
    first = fitted(tmp_path, once(), name="first")
    same = {"packing": True, "dropout": 0, "length": 24}
    done(restore(first, "--out", str(tmp_path / "one"), batch_size=2, **same))
    spread = ("--trainer.devices", "2", "--trainer.strategy", "ddp")
    done(restore(first, "--out", str(tmp_path / "two"), *spread, batch_size=1, **same))
    one, two = (load_file(tmp_path / name / "model/model.safetensors") for name in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-4)
    losses = [torch.tensor([loss for _, loss in facts(tmp_path / name)["losses"]]) for name in ("one", "two")]
    torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("family", "precision"), [("llama", "32-true"), ("llama_untied", "bf16-mixed")])
def test_sharded_weights_learn_what_whole_ones_learn_and_go_on(tmp_path: Path, family: str, precision: str) -> None:
    first = fitted(tmp_path, once(), CONFIGS[family], name="first")
    (tmp_path / "fsdp2.yaml").write_text(SHARDED)
    lesson = {"samples": 80, "every_seconds": 0, "distil": 0.5}
    two = ("--trainer.devices", "2", "--trainer.precision", precision)
    done(restore(first, "--out", str(tmp_path / "whole"), *two, "--trainer.strategy", "ddp", **lesson))
    args = restore(first, "--out", str(tmp_path / "parts"), *two, "-c", str(tmp_path / "fsdp2.yaml"), **lesson)
    assert interrupted(args, tmp_path / "parts", "SIGKILL", 0.1)[0] == -signal.SIGKILL
    assert "goes on behind step " in done(args)
    whole, parts = (load_file(tmp_path / name / "model/model.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys() == load_file(tmp_path / "source/model.safetensors").keys()
    near = 1e-4 if precision == "32-true" else 3e-2
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=near, atol=near)
    losses = [torch.tensor([loss for _, loss in facts(tmp_path / name)["losses"]]) for name in ("whole", "parts")]
    torch.testing.assert_close(*losses, rtol=10 * near, atol=10 * near)
