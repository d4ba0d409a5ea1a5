"""Kill a small run at random moments, start it again, and compare the result with that of a run left alone.

    python benchmarks/kills.py MODEL_DIR --text FILE [--kills 10] [--processes 1 2] [--seed 7]

SIGKILL goes to the first process, at a moment drawn between its manifest's appearance and its end. Prints a line a
kill, and ends with 1 if a model differs in a byte.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

COMMAND = [sys.executable, str(Path(__file__).parents[1] / "cli.py"), "fit"]
SETTINGS = (
    *("--data.samples", "16", "--data.length", "96"),
    *("--trainer.max_epochs", "8", "--trainer.accelerator", "cpu"),
    *("--trainer.callbacks", "ptql.callbacks.BlockCheckpoint", "--trainer.callbacks.every_seconds", "0"),
)


@dataclass(frozen=True)
class Small:
    """A run small enough to be killed often.

    Args:
        source: Model directory.
        text: To calibrate on.
        processes: 1, or several on this machine (gloo).
        recipe: Method and scheme, and settings that differ.
    """

    source: Path
    text: str
    processes: int = 1
    recipe: tuple[str, ...] = ("-c", "methods/lrquant", "-c", "schemes/w4a4")

    def command(self, run: Path) -> list[str]:
        places = ("--model.source", str(self.source), "--data.text", self.text, "--trainer.default_root_dir", str(run))
        spread = ("--trainer.devices", str(self.processes), "--trainer.strategy", "ddp") if self.processes > 1 else ()
        return [*COMMAND, *self.recipe, *SETTINGS, *places, *spread, "--data.batch_size", str(4 // self.processes)]


@dataclass(frozen=True)
class Kill:
    """What came of a kill.

    Args:
        after: Seconds after the manifest appeared.
        blocks: Finished by then.
        inside: Whether the block in hand had been saved.
        gone: Seconds until no process of the run was left.
        same: Whether the run that went on ended in the same bytes.
    """

    after: float
    blocks: int
    inside: bool
    gone: float
    same: bool


def kills(small: Small, folder: Path, count: int, seed: int) -> Iterator[Kill]:
    """A clean run, then `count` runs that are killed and started again."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    clean = folder / "clean"
    with subprocess.Popen(small.command(clean), env=environment, stderr=subprocess.DEVNULL) as process:
        began = _manifest(clean, process)
        assert process.wait() == 0
    work = time.monotonic() - began
    wanted = digest(clean / "model")
    draw = random.Random(seed)
    for number in range(count):
        run = folder / f"killed-{number}"
        with subprocess.Popen(small.command(run), env=environment, stderr=subprocess.DEVNULL) as process:
            began = _manifest(run, process)
            time.sleep(draw.uniform(0, work))
            process.send_signal(signal.SIGKILL)
            process.wait()
        after, killed = time.monotonic() - began, time.monotonic()
        while alive(run):
            assert time.monotonic() - killed < 60, "a process outlived its run by a minute"
            time.sleep(0.1)
        gone = time.monotonic() - killed
        blocks = len(list((run / "ledger").glob("block-*.safetensors")))
        inside = bool(list((run / "ledger").glob("partial-*.ckpt")))
        subprocess.run(small.command(run), env=environment, check=True, capture_output=True)
        yield Kill(after, blocks, inside, gone, digest(run / "model") == wanted)


def _manifest(run: Path, process: subprocess.Popen[bytes]) -> float:
    """When the run's manifest appeared."""
    while not (run / "ledger/manifest.json").exists():
        assert process.poll() is None, "the run ended before it began"
        time.sleep(0.02)
    return time.monotonic()


def digest(model: Path) -> str:
    """SHA-256 over names and bytes of a model's files."""
    found = hashlib.sha256()
    for path in sorted(model.iterdir()):
        found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()


def alive(run: Path) -> bool:
    """Whether a process has the run's directory among its arguments."""
    wanted = str(run).encode()
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if wanted in entry.read_bytes().split(b"\0"):
                return True
        except OSError:  # it has just ended
            continue
    return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--text", default="pydoc")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    different = 0
    for processes in args.processes:
        with tempfile.TemporaryDirectory() as folder:
            small = Small(args.source, args.text, processes)
            for number, kill in enumerate(kills(small, Path(folder), args.kills, args.seed), start=1):
                different += not kill.same
                state = f"{kill.blocks} blocks finished" + (", one begun" if kill.inside else "")
                print(
                    f"{processes} process(es), kill {number}: after {kill.after:.1f} s, {state}; all gone after "
                    f"{kill.gone:.1f} s; the same bytes: {'yes' if kill.same else 'NO'}",
                    flush=True,
                )
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main())
