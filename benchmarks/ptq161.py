"""What PTQ1.61's parts are worth, beside other methods at two bits and fewer.

    python benchmarks/ptq161.py parts baselines ablations --model DIR --calibration wikitext2=wikitext2-valid.txt \\
        --text wikitext2=wikitext2-test.txt --text c4=c4-train.jsonl --text austen=austen-test.txt --jobs 8 \\
        --work /tmp/ptq161 --results FILE.jsonl

`benchmarks/rows.py` says how rows are made. `benchmarks/ptq161_tables.py` makes the tables of docs/methods/ptq161.md.

Plans:
    parts      signs alone, salient channels beside them, what is learned
    baselines  other methods at two bits and fewer, which begin where clipping is searched for
    ablations  the recipe with one setting changed
    tiny       some of each
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import rows  # noqa: E402
from benchmarks.abq import SEARCH  # noqa: E402
from benchmarks.accuracy import Run  # noqa: E402

ROUNDS = "--model.weight_quantizer"
NOT_LEARNED = (f"{ROUNDS}.learn", "false")
PARTS: dict[str, tuple[str, ...]] = {
    "signs alone": ("--model.weight.salient", "0", *NOT_LEARNED),
    "signs alone, learned": ("--model.weight.salient", "0"),
    "salient channels": NOT_LEARNED,
    "ptq161": (),
}
ABLATIONS: dict[str, tuple[str, ...]] = {
    "no NLC": ("--model.objective.nlc", "0"),
    "channels by mean": (f"{ROUNDS}.statistic", "mean"),
    "10 % salient": ("--model.weight.salient", "0.1"),
    "30 % salient": ("--model.weight.salient", "0.3"),
    "own range": (f"{ROUNDS}.faithful", "false"),
    "rates tenfold": (f"{ROUNDS}.lr", "5e-3", f"{ROUNDS}.factor_lr", "1e-2"),
    "rates of Llama 2": (f"{ROUNDS}.lr", "9e-5", f"{ROUNDS}.factor_lr", "9e-3"),
}
"""Each beside the recipe, whose row is in `parts`."""
BASELINES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "rtn": ("rtn", "w2a16", ()),
    "omniquant": ("omniquant", "w2a16", SEARCH),
    "omniquant, groups of 64": ("omniquant", "w2a16g64", SEARCH),
    "omniquant, one bit, groups of 32": (
        "omniquant",
        "w2a16",
        (*SEARCH, "--model.weight", "{bits: 1, group_size: 32}"),
    ),
}
PLANS = ("parts", "baselines", "ablations", "tiny")


def job(
    args: argparse.Namespace, plan: str, label: str, method: str, scheme: str, options: tuple[str, ...]
) -> rows.Job:
    """A row on the first text, measured on all."""
    learns = method != "rtn" and NOT_LEARNED[0] not in options
    name = re.sub(r"\W+", "_", label) if options else ""
    run = Run(method, scheme, args.epochs if learns else 0, options, name)
    return rows.Job(plan, label, run, next(iter(args.calibrations)), tuple(args.texts))


def planned(args: argparse.Namespace) -> list[rows.Job]:
    """The rows of all plans."""
    own = {"parts": PARTS, "ablations": ABLATIONS}
    made = {
        plan: [job(args, plan, label, "ptq161", "w1.61a16", options) for label, options in variants.items()]
        for plan, variants in own.items()
    }
    made["baselines"] = [job(args, "baselines", label, *how) for label, how in BASELINES.items()]
    made["tiny"] = [made["parts"][2], made["baselines"][0], made["ablations"][4]]
    return rows.shared_last([job for plan in args.plans for job in made[plan]], args)


if __name__ == "__main__":
    sys.exit(rows.main(__doc__, PLANS, planned))
