"""What LRQuant's steps are worth: test-time adaptation, losses, starts of the scales, and what LRQuant+ adds.

    python benchmarks/lrquant.py tta ablation --model DIR --calibration wikitext2=wikitext2-valid.txt \\
        --text wikitext2=wikitext2-test.txt --text c4=c4-train.jsonl --jobs 8 --work /tmp/lrquant --results FILE.jsonl

`benchmarks/rows.py` says how rows are made. `benchmarks/lrquant_tables.py` makes the tables of docs/methods/lrquant.md.

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
import sys
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import rows  # noqa: E402
from benchmarks.accuracy import Run  # noqa: E402
from benchmarks.rows import SEED  # noqa: E402

SCHEME = "w4a4"
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
class Job(rows.Job):
    """One row; further to `rows.Job`:

    Args:
        shipped: Shipped configurations of the measurement.
        settings: Further adaptations.
    """

    shipped: tuple[str, ...] = ()
    settings: tuple[Setting, ...] = ()

    def name(self, args: argparse.Namespace) -> str:
        return "-".join([super().name(args), *([f"{len(self.settings)}s"] if self.settings else [])])

    def windows(self, args: argparse.Namespace) -> int | None:
        return args.ablation_windows if self.plan == "ablation" else args.windows

    def measure(self, args: argparse.Namespace, run: Path, found: Path) -> list[str]:
        """Settings are written to a configuration beside the run."""
        configs = list(self.shipped)
        if self.settings:
            callbacks = [setting.callback() for setting in self.settings]
            file = found.with_suffix(".yaml")
            file.write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}, sort_keys=False), encoding="utf-8")
            configs.append(str(file))
        command, *options = super().measure(args, run, found)
        options += ["--compare_source", "true"] if self.shipped else []
        return [command, *(part for config in configs for part in ("-c", config)), *options]

    def more(self) -> dict[str, Any]:
        return {"settings": {setting.name: asdict(setting) for setting in self.settings}}


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
    """The rows of all plans."""
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
    return rows.shared_last([job for plan in args.plans for job in made[plan](args)], args)


def main(arguments: list[str] | None = None) -> int:
    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--ablation_windows", type=int, default=32, help="windows of each text in `ablation`")

    return rows.main(__doc__, PLANS, planned, arguments, more)


if __name__ == "__main__":
    sys.exit(main())
