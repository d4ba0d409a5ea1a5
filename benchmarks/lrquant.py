"""What LRQuant's steps are worth: test-time adaptation, losses, starts of the scales, and what LRQuant+ adds.

    python benchmarks/lrquant.py tta ablation --model DIR --calibration wikitext2=wikitext2-valid.txt \\
        --text wikitext2=wikitext2-test.txt --text c4=c4-train.jsonl --jobs 8 --work /tmp/lrquant --results FILE.jsonl

Each row is a real `ptql fit`, which rows may share, and a real `ptql eval`. One JSON line a row goes to the results
file; a row that is in it already is not repeated, stopped calibrations go on, and with `--deadline` nothing begins
later than that. `benchmarks/lrquant_tables.py` makes the tables of docs/methods/lrquant.md.

Plans:
    tta       each calibration, adapted to each text in every shipped way
    ablation  transductive adaptation of the first calibration: learning rate, epochs, blocks
    nlc       losses and starts of the scales over seeds of the data and of everything else
    plus      LRQuant+ and its variants beside LRQuant
    tiny      one or two rows of each
"""

from __future__ import annotations

import argparse
import inspect
import json
import shlex
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.accuracy import Run, call, eval_options, fit_command, portable  # noqa: E402
from benchmarks.calibration import probed_apart, read_rows  # noqa: E402

SCHEME = "w4a4"
SEED = 2
SEEDS = (2, 3, 4)
TTA = ("transductive", "prefix", "online", "best", "best_online", "rlq")
LEARNING_RATES = (1e-5, 1e-4, 1e-3, 1e-2)
LOSSES = {"MSE": (1, 0), "NLC": (0, 1), "MSE + NLC": (1, 1)}
ADAPTED_BY: dict[str, dict[str, Any]] = {
    f"{name}, {target}": {"mse": mse, "nlc": nlc, "targets": [stream]}
    for name, (mse, nlc) in LOSSES.items()
    for target, stream in (("T1", "fp"), ("T2", "fp_on_quantised"))
}
PLUS = {"LRQuant+": (), "sum of losses": ("balance=sum",), "no factors": ("rank=0",), "rank 4": ("rank=4",)}
OPTIONS = {"balance": "--model.objective.balance", "rank": "--model.weight_quantizer.factor_rank"}
PLANS = ("tta", "ablation", "nlc", "plus", "tiny")


@dataclass(frozen=True)
class Setting:
    """One transductive adaptation, as `ptql.callbacks.TestTimeAdaptation` takes it; None is the recipe's rate.

    `loss` is one of ADAPTED_BY.
    """

    lr: float | None
    weight_lr: float | None
    epochs: int
    blocks: int
    loss: str = "MSE + NLC, T1"

    @property
    def name(self) -> str:
        rates = dict.fromkeys("recipe's" if rate is None else f"{rate:g}" for rate in (self.lr, self.weight_lr))
        return f"lr {' and '.join(rates)}, {self.epochs} epochs, {self.blocks} blocks, {self.loss}"

    def callback(self) -> dict[str, Any]:
        """As a configuration has it."""
        given = {name: value for name, value in asdict(self).items() if value is not None and name != "loss"}
        objective = {"class_path": "ptql.parts.objectives.Reconstruction", "init_args": ADAPTED_BY[self.loss]}
        own = {"mode": "transductive", "name": self.name, **given, "objective": objective}
        return {"class_path": "ptql.callbacks.TestTimeAdaptation", "init_args": own}


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
        shipped: Shipped configurations of the measurement.
        settings: Further adaptations.
    """

    plan: str
    label: str
    run: Run
    calibration: str
    texts: tuple[str, ...]
    seed: int = SEED
    shipped: tuple[str, ...] = ()
    settings: tuple[Setting, ...] = ()

    def fit_name(self, args: argparse.Namespace) -> str:
        """Of the calibration's directory: the same for the same calibration only."""
        return f"{self.calibration}-{self.run.name}-{args.samples}x{args.length}"

    def name(self, args: argparse.Namespace) -> str:
        """Of the row; no two rows have the same."""
        parts = [self.plan, self.fit_name(args), *self.texts, f"w{self.windows(args) or 'all'}"]
        return "-".join([*parts, f"{len(self.settings)}s"] if self.settings else parts)

    def windows(self, args: argparse.Namespace) -> int | None:
        return args.ablation_windows if self.plan == "ablation" else args.windows


def calibration(
    epochs: int, method: str = "lrquant", seed: int = SEED, label: str = "", options: tuple[str, ...] = ()
) -> Run:
    """A calibration with this seed for the places of windows and for all else."""
    seeds = ("--seed_everything", str(seed), "--data.seed", str(seed))
    return Run(method, SCHEME, epochs, (*seeds, *options), "-".join(filter(None, (label, f"s{seed}"))))


def tta_jobs(args: argparse.Namespace) -> list[Job]:
    shipped = tuple(f"tta/{name}" for name in TTA)
    run = calibration(args.epochs)
    return [Job("tta", "LRQuant", run, name, tuple(args.texts), shipped=shipped) for name in args.calibrations]


def ablation_jobs(args: argparse.Namespace, most: int | None = None) -> list[Job]:
    """A text a row, so that texts are measured at the same time."""
    run, first = calibration(args.epochs), next(iter(args.calibrations))
    settings = tuple(grid(recipe())[:most])
    return [Job("ablation", "LRQuant", run, first, (text,), settings=settings) for text in args.texts]


def grid(base: Setting) -> list[Setting]:
    """Each setting of the recipe's adaptation varied by itself, and blocks with the losses; the recipe's comes once."""
    rates = [replace(base, lr=rate, weight_lr=rate, epochs=5, blocks=1) for rate in LEARNING_RATES]
    epochs = [replace(base, epochs=count) for count in (1, 3, 5)]
    blocks = [replace(base, blocks=count) for count in (1, 2, 4)]
    losses = [replace(base, loss=loss, blocks=count) for loss in ADAPTED_BY for count in (1, 4)]
    return list(dict.fromkeys([*rates, *epochs, *blocks, *losses]))


@cache
def recipe() -> Setting:
    """The numbers of the shipped transductive adaptation."""
    from ptql.callbacks import TestTimeAdaptation

    defaults = {name: p.default for name, p in inspect.signature(TestTimeAdaptation).parameters.items()}
    says = yaml.safe_load((ROOT / "configs/tta/transductive.yaml").read_text(encoding="utf-8"))["trainer"]
    (callback,) = says.get("callbacks") or says["callbacks+"]
    found = {**defaults, **callback.get("init_args", {})}
    rates = [None if found[name] is None else float(found[name]) for name in ("lr", "weight_lr")]
    return Setting(rates[0], rates[1], found["epochs"], found["blocks"])


def nlc_jobs(args: argparse.Namespace, seeds: tuple[int, ...] = SEEDS) -> list[Job]:
    """Losses with the usual start of the scales, then other starts with the usual loss."""
    first, jobs = next(iter(args.calibrations)), []
    variants = {f"{loss}, log": (loss, "log") for loss in LOSSES}
    variants |= {f"MSE + NLC, {start}": ("MSE + NLC", start) for start in ("balanced", "ones")}
    for label, (loss, start) in variants.items():
        mse, nlc = LOSSES[loss]
        options = ("--model.objective.mse", str(mse), "--model.objective.nlc", str(nlc))
        options += ("--model.transforms.initial", start)
        usual = label == "MSE + NLC, log"  # the recipe itself, which other plans calibrate too
        for seed in seeds:
            run = calibration(args.epochs, "lrquant", seed, "" if usual else slug(label), () if usual else options)
            jobs.append(Job("nlc", label, run, first, tuple(args.texts), seed))
    return jobs


def plus_jobs(args: argparse.Namespace) -> list[Job]:
    first, texts = next(iter(args.calibrations)), tuple(args.texts)
    jobs = [Job("plus", "LRQuant", calibration(args.epochs), first, texts)]
    for label, changes in PLUS.items():
        pairs = [change.partition("=") for change in changes]
        options = tuple(part for name, _, value in pairs for part in (OPTIONS[name], value))
        run = calibration(args.epochs, "lrquant_plus", SEED, slug(label) if changes else "", options)
        jobs.append(Job("plus", label, run, first, texts))
    return jobs


def slug(label: str) -> str:
    """A label as a part of a file's name."""
    return "_".join(label.replace("+", " ").replace(",", " ").split())


def planned(args: argparse.Namespace) -> list[Job]:
    """The rows of all plans; those whose calibration an earlier one makes come last, not to wait for it."""
    made = {
        "tta": tta_jobs,
        "ablation": ablation_jobs,
        "nlc": nlc_jobs,
        "plus": plus_jobs,
        "tiny": lambda args: [
            *tta_jobs(args)[:1],
            *ablation_jobs(args, 2)[:1],
            *nlc_jobs(args, SEEDS[:1])[:1],
            *plus_jobs(args)[:2],
        ],
    }
    jobs = {job.name(args): job for plan in args.plans for job in made[plan](args)}
    seen: set[str] = set()
    first, later = [], []
    for job in jobs.values():
        fit = job.fit_name(args)
        (later if fit in seen else first).append(job)
        seen.add(fit)
    return first + later


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

    def row(self, job: Job) -> dict[str, Any] | None:
        """Calibrate and measure; None if a command fails, with its last words on stderr, or it is too late."""
        args, name = self.args, job.name(self.args)
        folder = args.work / job.fit_name(args)
        fit = fit_command(job.run, args, args.calibrations[job.calibration], folder)
        if not self._calibrated(folder, fit):
            return None
        found = folder.with_name(f"{name}.json")
        found.unlink(missing_ok=True)
        measure = self.measure(job, folder, found)
        began = time.monotonic()
        if self._late(name) or not call(measure, folder.with_name(name)):
            return None
        seconds = time.monotonic() - began
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
            "settings": {setting.name: asdict(setting) for setting in job.settings},
            "command": self._portable(fit, folder),
            "eval_command": self._portable(measure, folder),
            "jobs_at_once": args.jobs,
            "seconds_eval": round(seconds, 1),
            **self.machine,
            "fit": {**of_fit["fit"], "source": "MODEL"},
            **{key: of_fit[key] for key in ("bits_per_weight", "size_bytes") if key in of_fit},
            **json.loads(found.read_text(encoding="utf-8")),
        }

    def measure(self, job: Job, folder: Path, found: Path) -> list[str]:
        """The measurement, without `ptql`; settings are written to a configuration beside the run."""
        args = self.args
        configs = list(job.shipped)
        if job.settings:
            callbacks = [setting.callback() for setting in job.settings]
            file = found.with_suffix(".yaml")
            file.write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}, sort_keys=False), encoding="utf-8")
            configs.append(str(file))
        own = argparse.Namespace(**{**vars(args), "windows": job.windows(args)})
        options = eval_options(own, {name: args.texts[name] for name in job.texts})
        command = ["eval", *(part for config in configs for part in ("-c", config)), "--run", str(folder)]
        command += ["--compare_source", "true"] if job.shipped else []
        return [*command, "--json", str(found), "--batch_size", str(args.batch_size), *options]

    def _calibrated(self, folder: Path, fit: list[str]) -> bool:
        with self._names:
            lock = self._locks[folder.name]
        with lock:
            if folder.name not in self._fitted:
                self._fitted[folder.name] = not self._late(folder.name) and call(fit, folder)
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
        return portable(words, argparse.Namespace(model=str(self.args.model)), folder)


def said(row: dict[str, Any]) -> str:
    """A row in one line."""
    adapted = {name: values["ppl"] for name, values in row.get("tta", {}).items()}
    return f"{row['name']}: ppl {row['ppl']}" + (f", adapted {adapted}" if adapted else "")


def named(parser: argparse.ArgumentParser, option: str, given: list[str]) -> dict[str, str]:
    """NAME=FILE pairs, each name once; a file that is there as an absolute path."""
    pairs = [item.partition("=") for item in given]
    if not all(name and file for name, _, file in pairs) or len({name for name, *_ in pairs}) < len(pairs):
        parser.error(f"{option} {shlex.join(given)}: NAME=FILE is needed, each name once")
    return {name: str(Path(file).absolute()) if Path(file).exists() else file for name, _, file in pairs}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plans", nargs="+", choices=PLANS, metavar="PLAN", help=", ".join(PLANS))
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
    parser.add_argument("--ablation_windows", type=int, default=32, help="windows of each text in `ablation`")
    parser.add_argument("--precision", help="bf16-mixed on a GPU by default, else 32-true")
    parser.add_argument("--deadline", type=float, default=float("inf"), metavar="SECONDS", help="none begins later")
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


if __name__ == "__main__":
    sys.exit(main())
