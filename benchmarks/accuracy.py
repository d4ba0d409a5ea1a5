"""Perplexity of quantised models: the table methods x schemes, each a real `fit` and `eval`, several at a time.

    python benchmarks/accuracy.py MODEL --calibration wikitext2-valid.txt --text wikitext2=wikitext2-test.txt \
        --text c4=c4-train.jsonl --grid rtn --grid learned --jobs 8 --work /tmp/accuracy --results FILE.jsonl

Stopped runs go on with the same command, finished ones are not repeated. One JSON line a run goes to the results
file: machine, versions, command, perplexities, true bits, seconds, peak memory. `benchmarks/tables.py` makes the
README's tables of them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).resolve().parents[1]
ENV = {"OMP_NUM_THREADS": "2", **os.environ}  # several runs at once would fight for the cores
SCHEMES = sorted(file.stem for file in (ROOT / "configs/schemes").glob("*.yaml") if "." not in file.stem)
"""For any method; the one with a point in its name is PTQ1.61's."""


@dataclass(frozen=True)
class Run:
    """One row of a table: `method` is a shipped recipe, `extra` further options of `ptql fit`."""

    method: str
    scheme: str
    epochs: int = 0
    extra: tuple[str, ...] = ()
    label: str = ""

    @property
    def name(self) -> str:
        return "-".join(filter(None, (self.method, self.scheme, f"e{self.epochs}", self.label)))


def learned(scheme: str, epochs: int) -> list[Run]:
    return [Run(method, scheme, epochs) for method in ("omniquant", "lrquant")]


GRIDS: dict[str, list[Run]] = {
    "rtn": [Run("rtn", scheme) for scheme in SCHEMES],
    "w4a4": learned("w4a4", 20),
    "w4a4-short": learned("w4a4", 2),
    "learned": [run for scheme in ("w2a16g64", "w3a16g64", "w4a16", "w6a6") for run in learned(scheme, 5)],
    "probe": [Run("lrquant", "w4a4", 1)],
    "tiny": [Run("rtn", "w4a4"), Run("lrquant", "w4a4", 1)],
}


def fit_command(run: Run, args: argparse.Namespace, calibration: str, folder: Path) -> list[str]:
    """The calibration of a row, without `ptql`."""
    return [
        *("fit", "-c", f"methods/{run.method}", "-c", f"schemes/{run.scheme}", "--model.source", str(args.model)),
        *("--data.text", calibration, "--data.samples", str(args.samples), "--data.length", str(args.length)),
        *("--data.batch_size", str(args.batch_size), "--trainer.max_epochs", str(run.epochs)),
        *("--trainer.default_root_dir", str(folder), "--trainer.logger", "false"),
        *("--trainer.precision", args.precision, *run.extra),
    ]


def eval_options(args: argparse.Namespace, texts: dict[str, str]) -> list[str]:
    """The texts of a measurement, and which windows of them."""
    options = ["--length", str(args.length)]
    options += [part for name, file in texts.items() for part in (f"--text.{name}", file)]
    return options + (["--windows", str(args.windows)] if args.windows else [])


def execute(run: Run, args: argparse.Namespace, texts: dict[str, str]) -> dict[str, object] | None:
    """Fit and measure one row; None if a command fails, with its last words on stderr."""
    folder = Path(args.work) / run.name
    fit = fit_command(run, args, args.calibration, folder)
    measure = ["eval", "--run", str(folder), "--batch_size", "8", *eval_options(args, texts)]
    if not all(call(command, folder) for command in (fit, measure)):
        return None
    metrics = json.loads((folder / "metrics.json").read_text())
    steps = run.epochs * metrics["fit"]["blocks"]
    return {
        "method": run.method,
        "scheme": run.scheme,
        "epochs": run.epochs,
        "label": run.label,
        "command": portable(["ptql", *fit], args, folder),
        "seconds_per_block_epoch": metrics["fit"]["seconds_learning"] / steps if steps else None,
        "jobs_at_once": args.jobs,
        **machine(),
        **metrics,
        "fit": {**metrics["fit"], "source": "MODEL"},
    }


def source_row(args: argparse.Namespace, texts: dict[str, str]) -> dict[str, object] | None:
    """The model as it is."""
    out = Path(args.work) / "source.json"
    command = ["eval", "--model.source", args.model, "--json", str(out), *eval_options(args, texts)]
    if not call(command, out.with_suffix("")):
        return None
    name = portable(["ptql", *command], args, out)
    return {
        "method": "fp",
        "scheme": "-",
        "epochs": 0,
        "label": "",
        "command": name,
        **machine(),
        **json.loads(out.read_text()),
    }


def portable(command: list[str], args: argparse.Namespace, run: Path) -> str:
    """The command without this machine's paths: MODEL, RUN, and the bare names of texts."""
    names = {args.model: "MODEL", str(run): "RUN"}
    return shlex.join(names.get(part, Path(part).name if Path(part).is_absolute() else part) for part in command)


def call(command: list[str], folder: Path, environment: dict[str, str] | None = None) -> bool:
    """Run `ptql` with a command; its words go to a log beside the folder. False, and the last of them, if it fails."""
    log = Path(f"{folder}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    env = {**ENV, **(environment or {})}
    with open(log, "a") as sink:
        done = subprocess.run([sys.executable, str(ROOT / "cli.py"), *command], stdout=sink, stderr=sink, env=env)
    if done.returncode:
        print(
            f"{folder.name}: exit {done.returncode}\n" + "\n".join(log.read_text().splitlines()[-12:]),
            file=sys.stderr,
        )
    return done.returncode == 0


def machine() -> dict[str, object]:
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {
        "machine": gpu or f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--grid", action="append", choices=GRIDS, default=[])
    parser.add_argument("--run", action="append", default=[], metavar="METHOD:SCHEME:EPOCHS[:LABEL[:OPTION ...]]")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--precision", default="bf16-mixed" if torch.cuda.is_available() else "32-true")
    parser.add_argument("--windows", type=int, help="windows of each text; all by default")
    parser.add_argument("--work", required=True)
    parser.add_argument("--results", required=True, type=Path)
    args = parser.parse_args()
    texts = dict(item.split("=", 1) for item in args.text)
    runs = [run for grid in args.grid for run in GRIDS[grid]] + [parse_run(text) for text in args.run]
    args.results.parent.mkdir(parents=True, exist_ok=True)
    done = (
        {row_name(json.loads(line)) for line in args.results.read_text().splitlines()}
        if args.results.exists()
        else set()
    )

    def record(row: dict[str, object] | None) -> bool:
        if row is None:
            return False
        with open(args.results, "a") as sink:
            sink.write(json.dumps(row) + "\n")
        ppl = {name: round(value, 3) for name, value in row.get("ppl", {}).items()}  # type: ignore[attr-defined]
        pace = row.get("seconds_per_block_epoch")
        print(
            f"{time.strftime('%T')} {row_name(row)} {ppl} bits {row.get('bits_per_weight')} s/block-epoch {pace}",
            flush=True,
        )
        return True

    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = [] if "fp---e0" in done else [pool.submit(lambda: record(source_row(args, texts)))]
        jobs += [pool.submit(lambda r=run: record(execute(r, args, texts))) for run in runs if run.name not in done]
        return 0 if all([job.result() for job in jobs]) else 1


def row_name(row: dict[str, object]) -> str:
    return Run(str(row["method"]), str(row["scheme"]), int(str(row["epochs"])), (), str(row["label"])).name


def parse_run(text: str) -> Run:
    method, scheme, epochs, *rest = text.split(":", 4)
    return Run(
        method,
        scheme,
        int(epochs),
        tuple(shlex.split(rest[1])) if len(rest) > 1 else (),
        rest[0] if rest else "",
    )


if __name__ == "__main__":
    sys.exit(main())
