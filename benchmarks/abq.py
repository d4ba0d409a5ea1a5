"""What ABQ-LLM's parts are worth, beside OmniQuant and LRQuant, and a budget of bits beside uniform bits.

    python benchmarks/abq.py grid parts tasks budget --model DIR --calibration wikitext2=wikitext2-valid.txt \\
        --text wikitext2=wikitext2-test.txt --text c4=c4-train.jsonl --include_path DIR --jobs 8 --work /tmp/abq \\
        --results FILE.jsonl

`benchmarks/rows.py` says how rows are made. `benchmarks/abq_tables.py` makes the tables of docs/methods/abq.md.

Plans:
    grid    methods by schemes
    parts   abq with each of its parts taken away, or changed, by schemes
    tasks   zero-shot tasks at W4A4, and of the model as it is
    budget  bits by layer within a budget, beside uniform bits of the same size
    start   clipping that begins where a search finds it, at 3 bits and fewer
    tiny    some of each
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import rows  # noqa: E402
from benchmarks.accuracy import Run  # noqa: E402

LONG = ("w4a4", "w2a8")
SCHEMES = (*LONG, "w6a6", "w2a16", "w2ba8", "w3a16")
METHODS = ("omniquant", "lrquant", "abq")
WITHOUT: dict[str, tuple[str, ...]] = {
    "no DLC": ("--model.objective.dlc", "0"),
    "exact AKL": ("--model.objective.akl_mode", "exact"),
    "no AKL": ("--model.objective.akl", "0"),
    "no compensation": ("--model.transforms", "[{smooth}]"),
    "no s5": ("--model.transforms", "[{smooth_without_fc2}, {compensate}]"),
}
"""What takes a part of the recipe away, or changes it; it has the faithful AKL. Braces: a part as the recipe has it."""
BUDGETS = {"w2a16": 2, "w3a16": 3, "w4a16": 4}
SEARCH = ("--model.weight_quantizer.initial", "search")
ON_INPUTS = ("--model.weight_quantizer.initial", "search_on_inputs")
STARTS = {SEARCH: "search", ON_INPUTS: "search on inputs"}
TASKS = ("piqa", "arc_easy", "arc_challenge", "boolq", "hellaswag", "winogrande", "openbookqa", "lambada_openai")
PLANS = ("grid", "parts", "tasks", "budget", "start", "tiny")


@dataclass(frozen=True)
class Job(rows.Job):
    """One row; further to `rows.Job`:

    Args:
        tasks: Zero-shot tasks that are measured, too.
        source: Measure the model as it is, beside.
    """

    tasks: tuple[str, ...] = ()
    source: bool = False

    def at_a_time(self, args: argparse.Namespace) -> int:
        return 16 if self.tasks else 8

    def measure(self, args: argparse.Namespace, run: Path, found: Path) -> list[str]:
        options = super().measure(args, run, found)
        if self.tasks:
            options += ["--tasks", ",".join(f"{task}_local" for task in self.tasks)]
            options += ["--include_path", str(args.include_path)]
            options += ["--limit", str(args.limit)] if args.limit else []
        return options + (["--compare_source", "true"] if self.source else [])

    def more(self) -> dict[str, Any]:
        return {"tasks_of": list(self.tasks)} if self.tasks else {}


def epochs(args: argparse.Namespace, scheme: str) -> int:
    return args.epochs if scheme in LONG else args.short_epochs


def job(
    args: argparse.Namespace,
    plan: str,
    label: str,
    method: str,
    scheme: str,
    options: tuple[str, ...] = (),
    **more: Any,
) -> Job:
    """A row on the first text; its run is called by the label if it has options of its own, of which a search has one
    name in all plans."""
    label_of_run = f"{method} {STARTS[options]}" if options in STARTS else label  # type: ignore[index]
    name = re.sub(r"\W+", "_", label_of_run) if options else ""
    count = 0 if method == "rtn" else epochs(args, scheme)
    return Job(plan, label, Run(method, scheme, count, options, name), next(iter(args.calibrations)), **more)


def written_out(options: tuple[str, ...]) -> tuple[str, ...]:
    """With the recipe's own parts in the place of their names: a list of parts on the command line replaces its own."""
    says = yaml.safe_load((ROOT / "configs/methods/abq.yaml").read_text(encoding="utf-8"))["model"]
    smooth, compensate = says["transforms"]
    sites = [site for site in smooth["init_args"]["sites"] if site != "fc2"]
    parts = {
        "{smooth}": smooth,
        "{smooth_without_fc2}": {**smooth, "init_args": {**smooth["init_args"], "sites": sites}},
        "{compensate}": compensate,
    }
    return tuple(re.sub(r"{\w+}", lambda m: json.dumps(parts[m[0]]), option) for option in options)


def grid_jobs(args: argparse.Namespace) -> list[Job]:
    texts = tuple(args.texts)
    return [job(args, "grid", method, method, scheme, texts=texts) for scheme in SCHEMES for method in METHODS]


def parts_jobs(args: argparse.Namespace) -> list[Job]:
    """The recipe itself is in `grid`."""
    texts = tuple(args.texts)
    return [
        job(args, "parts", label, "abq", scheme, written_out(options), texts=texts)
        for scheme in SCHEMES
        for label, options in WITHOUT.items()
    ]


def tasks_jobs(args: argparse.Namespace, tasks: tuple[str, ...] = TASKS) -> list[Job]:
    """The model as it is is measured beside the first."""
    return [
        job(args, "tasks", method, method, "w4a4", texts=(), tasks=tasks, source=method == "rtn")
        for method in ("rtn", "lrquant", "abq")
    ]


def budget_jobs(args: argparse.Namespace) -> list[Job]:
    """At half a bit, uniform is every other block at 2 bits and at 3. All begin where a search on inputs finds it.

    Each with `args.seeds` seeds, of the data and of everything else, of which the first is the usual one.
    """
    texts, jobs = tuple(args.texts), []
    halves = "{" + ", ".join(f"layers.{index}: 3" for index in range(1, args.blocks, 2)) + "}"
    for scheme, bits in BUDGETS.items():
        half = bits == 2
        uniform = ("uniform: 2 and 3 by turns", ("--model.layers", halves)) if half else ("uniform", ())
        budget = f"{args.half_bits if half else args.whole_bits + bits:g}"
        for label, options in (uniform, (f"budget {budget}", ("--bits_budget", budget))):
            usual = job(args, "budget", label, "omniquant", scheme, (*ON_INPUTS, *options), texts=texts)
            if options:
                usual = replace(usual, run=replace(usual.run, label=f"{usual.run.label}_on_inputs"))
            jobs += [seeded(usual, seed) for seed in range(rows.SEED, rows.SEED + args.seeds)]
    return jobs


def seeded(usual: Job, seed: int) -> Job:
    """The same row with another seed; the usual one's name has none."""
    if seed == rows.SEED:
        return usual
    options = (*usual.run.extra, "--seed_everything", str(seed), "--data.seed", str(seed))
    return replace(usual, run=replace(usual.run, extra=options, label=f"{usual.run.label}_s{seed}"), seed=seed)


def start_jobs(args: argparse.Namespace) -> list[Job]:
    texts = tuple(args.texts)
    return [
        job(args, "start", f"{method} {words}", method, scheme, options, texts=texts)
        for scheme in ("w2a8", "w2a16", "w2ba8", "w3a16")
        for method in ("omniquant", "abq")
        for options, words in STARTS.items()
    ]


def planned(args: argparse.Namespace) -> list[Job]:
    """The rows of all plans."""
    made = {
        "grid": grid_jobs,
        "parts": parts_jobs,
        "tasks": tasks_jobs,
        "budget": budget_jobs,
        "start": start_jobs,
        "tiny": lambda args: [*grid_jobs(args)[2:3], *parts_jobs(args)[1:2], *tasks_jobs(args, TASKS[:1])[2:]],
    }
    return rows.shared_last([job for plan in args.plans for job in made[plan](args)], args)


def main(arguments: list[str] | None = None) -> int:
    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--short_epochs", type=int, default=5, help="where weights alone, or six bits, are rounded")
        parser.add_argument("--include_path", type=Path, metavar="DIR", help="task files, for `tasks`")
        parser.add_argument("--limit", type=int, help="items of each task; all by default")
        parser.add_argument("--blocks", type=int, default=30, help="of the model, for `budget`")
        parser.add_argument("--seeds", type=int, default=3, help="of each row of `budget`")
        parser.add_argument("--half_bits", type=float, default=2.535, help="true bits of 2 and 3 by turns")
        parser.add_argument("--whole_bits", type=float, default=0.0355, help="what scales and zero points take of each")

    return rows.main(__doc__, PLANS, planned, arguments, more)


if __name__ == "__main__":
    sys.exit(main())
