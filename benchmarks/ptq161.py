"""What PTQ1.61's parts are worth, beside other methods at two bits and fewer.

    python benchmarks/ptq161.py parts baselines ablations --model DIR --calibration wikitext2=wikitext2-valid.txt \\
        --text wikitext2=wikitext2-test.txt --text c4=c4-train.jsonl --text austen=austen-test.txt --jobs 8 \\
        --work /tmp/ptq161 --results FILE.jsonl

`benchmarks/rows.py` says how rows are made. `benchmarks/ptq161_tables.py` makes the tables of docs/methods/ptq161.md.

Plans:
    parts      signs alone, salient channels beside them, what is learned
    baselines  other methods at two bits and fewer, which begin where clipping is searched for
    ablations  the recipe with one setting changed
    restoration  the recipe before and after LoRA, which learns on the texts --learn; a text that is measured, too, is
                 divided: nine documents of ten are learned, the tenth is measured
    tiny       some of each
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import rows  # noqa: E402
from benchmarks.abq import SEARCH  # noqa: E402
from benchmarks.accuracy import Run  # noqa: E402

ROUNDS = "--model.weight_quantizer"
TENTH = 10
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
    "omniquant, three levels": ("omniquant", "w1ba16", SEARCH),
    "omniquant, three levels, groups of 128": ("omniquant", "w1ba16g128", SEARCH),
}
ONCE = ("--trainer.callbacks", "null")
"""The recipe's single pass."""
OURS = (f"{ROUNDS}.statistic", "mean", f"{ROUNDS}.faithful", "false")
LORA = "--trainer.callbacks"
PACKED = {"packing": "true", "batch_size": "4", "accumulate": "1", "gradient_checkpointing": "false"}
RESTORED: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "restored as published": ((), {"gradient_checkpointing": "false", "passes": "3"}),
    "restored, packed": ((), {**PACKED, "lr": "5e-4"}),
    "restored, packed, higher rate": ((), {**PACKED, "lr": "2e-3"}),
    "restored, packed, new masks": ((), {**PACKED, "lr": "2e-3", "masks": "new"}),
    "restored, packed, distilled": ((), {**PACKED, "lr": "2e-3", "distil": "0.5"}),
    "mean and own range": (OURS, {}),
    "mean and own range, restored": (OURS, {**PACKED, "lr": "2e-3"}),
}
"""Settings of the recipe, and of its restoration; `passes` over the text in place of --passes. None: a single pass."""
PLANS = ("parts", "baselines", "ablations", "restoration", "tiny")


def job(
    args: argparse.Namespace, plan: str, label: str, method: str, scheme: str, options: tuple[str, ...]
) -> rows.Job:
    """A row on the first text, measured on all."""
    learns = method != "rtn" and NOT_LEARNED[0] not in options
    name = re.sub(r"\W+", "_", label) if options else ""
    once = ONCE if method == "ptq161" else ()
    run = Run(method, scheme, args.epochs if learns else 0, (*options, *once), name)
    return rows.Job(plan, label, run, next(iter(args.calibrations)), args.whole)


def restoration_jobs(args: argparse.Namespace) -> list[rows.Job]:
    """The recipe's single pass, and rows that begin with it or with one of other settings; on what is held out."""
    texts = tuple(f"{name}_held_out" if name in args.divided else name for name in args.whole)
    plain = job(args, "restoration", "ptq161", "ptq161", "w1.61a16", ())
    found = [replace(plain, texts=texts)]
    firsts: dict[tuple[str, ...], Run] = {(): plain.run}
    for label, (options, lora) in RESTORED.items():
        once = job(args, "restoration", label, "ptq161", "w1.61a16", options)
        if not lora:
            firsts[options] = once.run
            found.append(replace(once, texts=texts))
            continue
        settings = {name: value for name, value in lora.items() if name != "passes"}
        settings["samples"] = str(args.samples_of(lora))
        words = [f"{LORA}.text", json.dumps(args.learn)]
        words += [word for name, value in settings.items() for word in (f"{LORA}.{name}", value)]
        run = Run("ptq161", "w1.61a16", args.epochs, (*options, *words), re.sub(r"\W+", "_", label))
        found.append(replace(once, run=run, texts=texts, first=firsts[options]))
    return found


def divide(args: argparse.Namespace) -> None:
    """Put what is learned of a text that is measured, too, and what is held out into files of the work directory."""
    if not args.learn:
        sys.exit("restoration: it learns on texts; give --learn FILE, once or more")
    args.divided, args.learn = [], [str(Path(file).absolute()) for file in args.learn]
    for name, file in list(args.texts.items()):
        if file not in args.learn:
            continue
        lines = Path(file).read_text(encoding="utf-8").splitlines(keepends=True)
        if Path(file).suffix != ".jsonl" or len(lines) < TENTH:
            sys.exit(f"{file}: measured and learned on, and has no {TENTH} lines of documents to divide")
        for part, chosen in (("learned", lambda k: k % TENTH), ("held_out", lambda k: not k % TENTH)):
            into = args.work / f"{name}_{part}.jsonl"
            into.write_text("".join(line for k, line in enumerate(lines) if chosen(k)), encoding="utf-8")
        args.learn[args.learn.index(file)] = str(args.work / f"{name}_learned.jsonl")
        args.texts[f"{name}_held_out"] = str(args.work / f"{name}_held_out.jsonl")
        args.divided.append(name)


def how_many(args: argparse.Namespace) -> Callable[[dict[str, str]], int]:
    """Samples of so many passes over the text: its documents, or, where these are packed, windows of its tokens."""
    from ptql.calibration.tokens import load_tokenizer, tokenize
    from ptql.restoration.documents import read_documents

    tokenizer = load_tokenizer(args.model)
    length = args.length
    documents = read_documents(args.learn, tokenizer, length)
    tokens = sum(len(d if isinstance(d, Tensor) else tokenize(tokenizer, d)) + 1 for d in documents)

    def count(lora: dict[str, str]) -> int:
        passes = int(lora.get("passes") or args.passes)
        found = passes * (tokens // length if lora.get("packing") == "true" else len(documents))
        return max(found // 8, 1) * 8  # a whole number of steps

    return count


def planned(args: argparse.Namespace) -> list[rows.Job]:
    """The rows of all plans."""
    args.whole = tuple(args.texts)
    own = {"parts": PARTS, "ablations": ABLATIONS}
    made = {
        plan: [job(args, plan, label, "ptq161", "w1.61a16", options) for label, options in variants.items()]
        for plan, variants in own.items()
    }
    if "restoration" in args.plans or ("tiny" in args.plans and args.learn):
        divide(args)
        args.samples_of = how_many(args)
        made["restoration"] = restoration_jobs(args)
    made["baselines"] = [job(args, "baselines", label, *how) for label, how in BASELINES.items()]
    if "tiny" in args.plans:
        made["tiny"] = [made["parts"][2], made["baselines"][0], made["ablations"][4], *made.get("restoration", [])[2:3]]
    return rows.shared_last([job for plan in args.plans for job in made[plan]], args)


def more(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--learn", action="append", default=[], metavar="FILE", help="for `restoration`; repeated")
    parser.add_argument("--passes", type=int, default=10, help="over the texts that LoRA learns on")


if __name__ == "__main__":
    sys.exit(rows.main(__doc__, PLANS, planned, more=more))
