"""What reordering and clusters are worth: RPTQ beside the same without them, and beside rounding to nearest.

    python benchmarks/rptq.py grid clusters ranges weights learned codes --model DIR --calibration NAME=FILE \\
        --text wikitext2=wikitext2-test.txt --text c4=c4-train.jsonl --jobs 8 --work /tmp/rptq --results FILE.jsonl

`benchmarks/rows.py` says how rows are made. `benchmarks/rptq_tables.py` makes the tables of docs/methods/rptq.md and
gptq.md.

Plans:
    grid      schemes, with reordering and without, by fixed grids and dynamic ones
    clusters  how many clusters a site has, at W4A4
    ranges    how ranges are found, at W4A4
    weights   how weights are rounded, at W4A16 and W3A16
    learned   smoothing and clipping that are learned after channels have changed places, at W4A4
    codes     GPTQ's codes on ranges that were learned, at W3A16 and W2A16 in groups of 64
    tiny      some of each
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import rows  # noqa: E402
from benchmarks.abq import ON_INPUTS  # noqa: E402
from benchmarks.accuracy import Run  # noqa: E402

CACHE = "--model.activation.kv_bits"
SCHEMES: dict[str, tuple[str, tuple[str, ...]]] = {
    "W4A16": ("w4a16", ()),
    "W4A8": ("w4a8", ()),
    "W4A4, 8 bits after norms": ("w4a4_rptq", ()),
    "W4A4": ("w4a4", ()),
    "W4A4KV": ("w4a16", (CACHE, "4")),
    "W4A3KV": ("w4a16", (CACHE, "3")),
    "W3A3KV": ("w3a16", (CACHE, "3")),
}
"""As the paper calls them; with KV at the end, keys and values alone."""
FIXED = ("--model.activation_quantizer", "StaticClusters", "--model.activation_quantizer.ranges", "minmax")
PLAIN = ("--model.transforms", "[]", "--model.weight.clustered", "false")
Kinds = dict[str, tuple[str, tuple[str, ...]]]
"""Method and options, by what they are called."""
KINDS: Kinds = {
    "rptq": ("rptq", ()),
    "rptq, ranges by mse": ("rptq", ("--model.activation_quantizer.ranges", "mse")),
    "not reordered": ("rptq", PLAIN),
    "rtn, a grid for each tensor": ("rtn", FIXED),
    "rtn, a range for each token": ("rtn", ()),
}
COUNTS = (1, 4, 8, 32)
RANGES: dict[str, tuple[str, ...]] = {
    "minmax": ("--model.activation_quantizer.ranges", "minmax"),
    "2^b steps": ("--model.activation_quantizer.faithful", "true"),
}
"""Each beside the recipe, whose row is in `grid`, as is that of `mse`."""
GROUPS = ("--model.weight.group_size", "64")
CLIPPED = ("--model.weight_quantizer.clip", "true", *ON_INPUTS)
ROUNDED: Kinds = {
    "rtn, a scale for each row": ("rtn", ()),
    "rtn, a scale for each row, clipped on inputs": ("rtn", CLIPPED),
    "rtn, groups of 64": ("rtn", GROUPS),
    "rtn, groups of 64, clipped on inputs": ("rtn", (*GROUPS, *CLIPPED)),
    "gptq, a scale for each row": ("gptq", ()),
    "gptq, a scale for each row, clipped on inputs": ("gptq", CLIPPED),
    "gptq, groups of 64": ("gptq", GROUPS),
    "gptq, groups of 64, clipped on inputs": ("gptq", (*GROUPS, *CLIPPED)),
    "gptq, groups of 64, in order": ("gptq", (*GROUPS, "--model.weight_quantizer.act_order", "false")),
    "rptq's: gptq, scales of clusters": ("rptq", ()),
}
LATER = ({"class_path": "ptql.parts.transforms.Permute"}, {"class_path": "ptql.parts.transforms.Smooth"})
LEARNED: dict[str, tuple[str, ...]] = {
    "clipping": ("--model.weight_quantizer", "Affine", "--model.weight_quantizer.clip", "true"),
    "clipping and smoothing": (
        *("--model.transforms", json.dumps(LATER)),
        *("--model.weight_quantizer", "Affine", "--model.weight_quantizer.clip", "true"),
    ),
    "clipping and smoothing, gptq": (
        *("--model.transforms", json.dumps(LATER)),
        *("--model.weight_quantizer.clip", "true"),
    ),
}
BY_GPTQ = ("--model.weight_quantizer", "Gptq")
CODES: Kinds = {
    "gptq": ("gptq", ()),
    "gptq, clipped on inputs": ("gptq", CLIPPED),
    "omniquant": ("omniquant", ()),
    "omniquant, clipped on inputs": ("omniquant", ON_INPUTS),
    "omniquant, gptq": ("omniquant", BY_GPTQ),
    "omniquant, gptq, clipped on inputs": ("omniquant", (*BY_GPTQ, *ON_INPUTS)),
    "abq, clipped on inputs": ("abq", ON_INPUTS),
    "abq, gptq, clipped on inputs": ("abq", (*BY_GPTQ, *ON_INPUTS)),
}


def by_width(kinds: Kinds, *schemes: str) -> dict[str, tuple[str, str, tuple[str, ...]]]:
    """Each kind with each scheme, called by the width: method, scheme, options."""
    return {
        f"{scheme[:2].upper()}: {label}": (method, scheme, options)
        for scheme in schemes
        for label, (method, options) in kinds.items()
    }


WEIGHTS = by_width(ROUNDED, "w4a16", "w3a16")
GROUPED = by_width(CODES, "w3a16g64", "w2a16g64")
PLANS = ("grid", "clusters", "ranges", "weights", "learned", "codes", "tiny")


def job(
    args: argparse.Namespace, plan: str, label: str, method: str, scheme: str, options: tuple[str, ...], epochs: int = 0
) -> rows.Job:
    """A row on the first text, measured on all."""
    name = re.sub(r"\W+", "_", f"{plan} {label}" if options else "")
    run = Run(method, scheme, epochs, options, name)
    return rows.Job(plan, label, run, next(iter(args.calibrations)), tuple(args.texts))


def grid_jobs(args: argparse.Namespace) -> list[rows.Job]:
    found = []
    for name, (scheme, options) in SCHEMES.items():
        for kind, (method, own) in KINDS.items():
            static = bool(options) or scheme != "w4a16"
            if (kind in ("rptq, ranges by mse", "rtn, a range for each token")) and not static:
                continue  # with weights alone there are no ranges
            if scheme == "w4a4_rptq" and method == "rtn":
                own = tuple(word for word in own if word not in FIXED[:2])  # the scheme says so already
                if kind == "rtn, a range for each token":
                    continue
            found.append(job(args, "grid", f"{name}: {kind}", method, scheme, (*options, *own)))
    return found


def cluster_jobs(args: argparse.Namespace) -> list[rows.Job]:
    """The same number at all sites, in each head or in all channels."""
    found = []
    for count in COUNTS:
        clusters = json.dumps(dict.fromkeys(("qkv", "qkt", "out", "fc1", "fc2"), count))
        options = ("--model.transforms.clusters", clusters)
        found.append(job(args, "clusters", f"{count}", "rptq", "w4a4", options))
    return found


def planned(args: argparse.Namespace) -> list[rows.Job]:
    """The rows of all plans."""
    made = {"grid": grid_jobs(args), "clusters": cluster_jobs(args)}
    made["ranges"] = [job(args, "ranges", label, "rptq", "w4a4", options) for label, options in RANGES.items()]
    made["weights"] = [job(args, "weights", label, *how) for label, how in WEIGHTS.items()]
    made["learned"] = [
        job(args, "learned", label, "rptq", "w4a4", options, args.epochs) for label, options in LEARNED.items()
    ]
    made["codes"] = [
        job(args, "codes", label, *how, 0 if how[0] == "gptq" else args.short_epochs) for label, how in GROUPED.items()
    ]
    made["tiny"] = [made["grid"][3], made["clusters"][0], made["ranges"][0], made["weights"][3], made["learned"][1]]
    return rows.shared_last([job for plan in args.plans for job in made[plan]], args)


def main(arguments: list[str] | None = None) -> int:
    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--short_epochs", type=int, default=5, help="where weights alone are rounded, for `codes`")

    return rows.main(__doc__, PLANS, planned, arguments, more)


if __name__ == "__main__":
    sys.exit(main())
