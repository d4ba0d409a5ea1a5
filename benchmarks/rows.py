"""Rows of a benchmark: each a real `ptql fit`, which rows may share, and a real `ptql eval`, several at a time.

`benchmarks/lrquant.py` and `benchmarks/abq.py` say which rows; here is how they are made. One JSON line a row goes to
the results file; a row that is in it already is not repeated, stopped calibrations go on, and with `--deadline` nothing
begins later than that.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from threading import Lock
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.accuracy import Run, call, eval_options, fit_command, portable  # noqa: E402
from benchmarks.calibration import probed_apart, read_rows  # noqa: E402

SEED = 2


@dataclass(frozen=True)
class Job:
    """One row.

    Args:
        plan: Whose table it stands in.
        label: What differs, in words.
        run: The calibration; its label is unique among those on one text.
        calibration: Name of its text.
        texts: Names of those that are measured.
        seed: Of the windows, and of everything else.
        first: The run that is the first pass of this one, of which it is restored; None where it has no such.
    """

    plan: str
    label: str
    run: Run
    calibration: str
    texts: tuple[str, ...]
    seed: int = SEED
    first: Run | None = None

    def fit_name(self, args: argparse.Namespace, run: Run | None = None) -> str:
        """Of the calibration's directory: the same for the same calibration only."""
        return f"{self.calibration}-{(run or self.run).name}-{args.samples}x{args.length}"

    def name(self, args: argparse.Namespace) -> str:
        """Of the row; no two rows have the same."""
        return "-".join([self.plan, self.fit_name(args), *self.texts, f"w{self.windows(args) or 'all'}"])

    def windows(self, args: argparse.Namespace) -> int | None:
        """Of each text; None for all."""
        return args.windows

    def at_a_time(self, args: argparse.Namespace) -> int:
        """Windows, or items, that are measured at a time."""
        return args.batch_size

    def measure(self, args: argparse.Namespace, run: Path, found: Path) -> list[str]:
        """The command of the measurement, without `ptql`, whose results go to the file `found`."""
        own = argparse.Namespace(**{**vars(args), "windows": self.windows(args)})
        options = eval_options(own, {name: args.texts[name] for name in self.texts})
        at_a_time = str(self.at_a_time(args))
        return ["eval", "--run", str(run), "--json", str(found), "--batch_size", at_a_time, *options]

    def more(self) -> dict[str, Any]:
        """What else its line says."""
        return {}


def shared_last(jobs: Sequence[Any], args: argparse.Namespace) -> list[Any]:
    """Each row once; those whose calibration an earlier one makes come last, not to wait for it."""
    seen: set[str] = set()
    first, later = [], []
    for job in {job.name(args): job for job in jobs}.values():
        fit = job.fit_name(args)
        (later if fit in seen else first).append(job)
        seen.add(fit)
    return first + later


SIZES = ("bits_per_weight", "bits_per_weight_with_embeddings", "size_bytes")


class Bench:
    """Makes rows. A calibration that several rows share is made once.

    Args:
        args: The command line.
        machine: What `probed_apart` found.
    """

    def __init__(self, args: argparse.Namespace, machine: dict[str, Any]) -> None:
        self.args, self.machine = args, machine
        self.began = time.monotonic()
        self._fitted: dict[str, bool] = {}
        self._locks: dict[str, Lock] = defaultdict(Lock)
        self._names = Lock()
        gpus = machine.get("gpus") or 0
        self._devices: Queue[int | None] = Queue()
        for index in range(args.jobs):
            self._devices.put(index % gpus if gpus > 1 else None)

    def row(self, job: Job) -> dict[str, Any] | None:
        """Calibrate and measure; None if a command fails, with its last words on stderr, or it is too late."""
        device = self._devices.get()  # with several GPUs, as many rows on each
        try:
            return self._row(job, {} if device is None else {"CUDA_VISIBLE_DEVICES": str(device)})
        finally:
            self._devices.put(device)

    def _row(self, job: Job, environment: dict[str, str]) -> dict[str, Any] | None:
        args, name = self.args, job.name(self.args)
        folder = args.work / job.fit_name(args)
        fit = fit_command(job.run, args, args.calibrations[job.calibration], folder)
        if job.first is not None and not self._begun(job, job.first, folder, environment):
            return None
        if not self._calibrated(folder, fit, environment):
            return None
        found = folder.with_name(f"{name}.json")
        found.unlink(missing_ok=True)
        measure = job.measure(args, folder, found)
        began = time.monotonic()
        if self._late(name) or not call(measure, folder.with_name(name), environment):
            return None
        seconds = time.monotonic() - began
        restored = {} if job.first is None else self._restored(job, folder, environment)
        of_fit = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        return {
            "plan": job.plan,
            "name": name,
            "label": job.label,
            "method": job.run.method,
            "scheme": job.run.scheme,
            "epochs": job.run.epochs,
            "seed": job.seed,
            "calibration": job.calibration,
            "samples": args.samples,
            "length": args.length,
            "command": self._portable(fit, folder),
            "eval_command": self._portable(measure, folder),
            "jobs_at_once": args.jobs,
            "seconds_eval": round(seconds, 1),
            **self.machine,
            "fit": {**of_fit["fit"], **{key: "MODEL" for key in ("source", "original") if key in of_fit["fit"]}},
            **{key: of_fit[key] for key in SIZES if key in of_fit},
            **_chosen(of_fit),
            **json.loads(found.read_text(encoding="utf-8")),
            **restored,
            **job.more(),
        }

    def _begun(self, job: Job, first: Run, folder: Path, environment: dict[str, str]) -> bool:
        """Give a run that is to be restored its first pass, which is a run like others; False if that fails."""
        args, whole = self.args, self.args.work / job.fit_name(self.args, first)
        fit = fit_command(first, args, args.calibrations[job.calibration], whole)
        if not self._calibrated(whole, fit, environment):
            return False
        if not (folder / "first").exists():
            shutil.copytree(whole, folder / "part", dirs_exist_ok=True)
            (folder / "part").rename(folder / "first")
        return True

    def _restored(self, job: Job, folder: Path, environment: dict[str, str]) -> dict[str, Any]:
        """What the restored model is, before it is rounded again."""
        found = folder.with_name(f"{folder.name}-restored.json")
        measure = job.measure(self.args, folder, found)
        where = measure.index("--run")
        measure[where : where + 2] = ["--model.source", str(folder / "restored" / "model")]
        if not call(measure, found.with_suffix(""), environment):
            return {}
        facts = json.loads((folder / "restored" / "restoration.json").read_text(encoding="utf-8"))
        kept = ("steps", "tokens", "seconds", "losses", "skipped_steps")
        of_model = json.loads(found.read_text(encoding="utf-8"))
        return {"restored": {**{key: facts[key] for key in kept}, "ppl": of_model["ppl"]}}

    def _calibrated(self, folder: Path, fit: list[str], environment: dict[str, str]) -> bool:
        with self._names:
            lock = self._locks[folder.name]
        with lock:
            if folder.name not in self._fitted:
                self._fitted[folder.name] = not self._late(folder.name) and call(fit, folder, environment)
            return self._fitted[folder.name]

    def _late(self, name: str) -> bool:
        late = time.monotonic() - self.began > self.args.deadline
        if late:
            print(f"{name}: not begun, after the deadline", file=sys.stderr, flush=True)
        return late

    def _portable(self, command: list[str], folder: Path) -> str:
        """Without this machine's paths; texts by their files' names, wherever these lie."""
        texts = {*self.args.calibrations.values(), *self.args.texts.values()}
        words = [Path(part).name if part in texts else part for part in ["ptql", *command]]
        for file in getattr(self.args, "learn", ()):  # in a list
            words = [word.replace(file, Path(file).name) for word in words]
        return portable(words, argparse.Namespace(model=str(self.args.model)), folder)


def _chosen(metrics: dict[str, Any]) -> dict[str, Any]:
    """What a budget of bits came to, but for the layers' own."""
    if "bits" not in metrics:
        return {}
    return {"bits": {key: value for key, value in metrics["bits"].items() if key != "layers"}}


def said(row: dict[str, Any]) -> str:
    """A row in one line."""
    adapted = {name: values["ppl"] for name, values in row.get("tta", {}).items()}
    return f"{row['name']}: ppl {row.get('ppl')}" + (f", adapted {adapted}" if adapted else "")


def named(parser: argparse.ArgumentParser, option: str, given: list[str]) -> dict[str, str]:
    """NAME=FILE pairs, each name once; a file that is there as an absolute path."""
    pairs = [item.partition("=") for item in given]
    if not all(name and file for name, _, file in pairs) or len({name for name, *_ in pairs}) < len(pairs):
        parser.error(f"{option} {shlex.join(given)}: NAME=FILE is needed, each name once")
    return {name: str(Path(file).absolute()) if Path(file).exists() else file for name, _, file in pairs}


def main(
    doc: str | None,
    plans: Sequence[str],
    planned: Callable[[argparse.Namespace], list[Any]],
    arguments: list[str] | None = None,
    more: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
) -> int:
    """Make the rows of the plans that the command line names; 0 if all are there.

    Args:
        doc: What the benchmark is, for --help.
        plans: That there are.
        planned: The rows of `args.plans`.
        arguments: The command line.
        more: Adds options of the benchmark's own.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plans", nargs="+", choices=plans, metavar="PLAN", help=", ".join(plans))
    parser.add_argument("--model", required=True, type=Path, metavar="DIR")
    parser.add_argument("--calibration", action="append", required=True, metavar="NAME=FILE", help="may be repeated")
    parser.add_argument("--text", action="append", required=True, metavar="NAME=FILE", help="may be repeated")
    parser.add_argument("--work", required=True, type=Path, help="for runs and logs")
    parser.add_argument("--results", required=True, type=Path)
    parser.add_argument("--jobs", type=int, default=1, help="rows at once; more than one disturb each other's times")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--windows", type=int, help="windows of each text; all by default")
    parser.add_argument("--precision", help="bf16-mixed on a GPU by default, else 32-true")
    parser.add_argument("--deadline", type=float, default=float("inf"), metavar="SECONDS", help="none begins later")
    more(parser)
    args = parser.parse_args(arguments)
    args.calibrations = named(parser, "--calibration", args.calibration)
    args.texts = named(parser, "--text", args.text)
    args.model, args.work = args.model.absolute(), args.work.absolute()
    probed = probed_apart()
    args.precision = args.precision or ("bf16-mixed" if probed["gpus"] else "32-true")
    for folder in (args.work, args.results.parent):
        folder.mkdir(parents=True, exist_ok=True)
    done = {(row["name"], row["machine"]) for row in read_rows(args.results)}
    bench, writing = Bench(args, probed), Lock()

    def record(job: Job) -> bool:
        if (job.name(args), probed["machine"]) in done:
            return True
        try:
            row = bench.row(job)
        except (OSError, ValueError, LookupError) as error:  # no room, a file of another version
            print(f"{job.name(args)}: {error!r}", file=sys.stderr, flush=True)
            return False
        if row is None:
            return False
        with writing, open(args.results, "a", encoding="utf-8") as sink:
            sink.write(json.dumps(row) + "\n")
        print(f"{time.strftime('%T')} {said(row)}", flush=True)
        return True

    with ThreadPoolExecutor(args.jobs) as pool:
        return 0 if all([job.result() for job in [pool.submit(record, job) for job in planned(args)]]) else 1
