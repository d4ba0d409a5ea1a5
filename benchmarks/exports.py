"""Which scheme goes into which format, and what the runtimes of these make of it.

    python benchmarks/exports.py --model SmolLM2 --work WORK --results RESULTS.jsonl \\
        --python gptq=/other/venv/bin/python --python gguf=/another/venv/bin/python

Each scheme is a real `ptql fit` (rounding to nearest, which is quick: what is looked at is the formats), each cell a
real `ptql export`, which loads what it wrote with the format's own runtime. One JSON line a cell; a cell that is in the
results already is not repeated. With `--docs FILE` no run is made: the table goes between the lines
<!-- begin: exports --> and <!-- end: exports --> of that Markdown file.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.calibration import probed_apart, read_rows  # noqa: E402
from benchmarks.calibration_tables import fill, markdown  # noqa: E402
from benchmarks.tables import short  # noqa: E402

SERVED = ["-c", "presets/served"]
ASYMMETRIC = ["--model.weight.symmetric=false", "--model.weight.scale_dtype=bfloat16"]
SCHEMES: dict[str, list[str]] = {
    "W4A16g32": ["-c", "schemes/w4a16", *SERVED, "--model.weight.group_size=32"],
    "W4A16g32, zero points": ["-c", "schemes/w4a16", *ASYMMETRIC, "--model.weight.group_size=32"],
    "W4A16g64": ["-c", "schemes/w4a16g64", *SERVED],
    "W3A16g64": ["-c", "schemes/w3a16g64", *SERVED],
    "W2A16g64": ["-c", "schemes/w2a16g64", *SERVED],
    "W2A16g64, zero points": ["-c", "schemes/w2a16g64", *ASYMMETRIC],
    "W8A16g32": ["-c", "schemes/w4a16", *SERVED, "--model.weight.bits=8", "--model.weight.group_size=32"],
    "W8A8": ["-c", "schemes/w8a8", *SERVED],
    "W4A8": ["-c", "schemes/w4a8", *SERVED],
}
GROUPS_OF_128 = {"W4A16g128": ["-c", "schemes/w4a16g128", *SERVED], "W3A16g128": ["-c", "schemes/w3a16g128", *SERVED]}
FORMATS = ("compressed-tensors", "gptq", "gptq_v2", "auto-round", "gguf", "dense")
PTQL = [sys.executable, str(ROOT / "cli.py")]


def fit(model: Path, scheme: str, options: list[str], work: Path) -> tuple[Path, list[str]]:
    """A finished run of the scheme, and the command that made it."""
    run = work / "runs" / re.sub(r"\W+", "-", scheme)
    small = ["--data.samples=4", "--data.length=128", "--trainer.accelerator=cpu"]
    command = ["fit", "-c", "methods/rtn", *options, *small, f"--model.source={model}"]
    if not (run / "report.html").is_file():
        subprocess.run([*PTQL, *command, f"--trainer.default_root_dir={run}"], check=True)
    return run, [word.replace(str(model), "MODEL") for word in command]


def cell(run: Path, target: str, python: str | None, out: Path, windows: int, length: int) -> dict[str, Any]:
    """What became of one export: `refused` and why, `failed` and why, or what was read back."""
    options = ["--format", target, "--windows", str(windows), "--length", str(length), "--trainer.accelerator=cpu"]
    where = ["--python", python] if python else []
    ended = subprocess.run(
        [*PTQL, "export", str(run), *options, *where, "--out", str(out)], capture_output=True, text=True
    )
    shown = ["ptql", "export", "RUN", *options, *(["--python", "PYTHON"] if python else []), "--out", "OUT"]
    command = " ".join(shown)
    if ended.returncode:
        why = ended.stderr.strip().splitlines()[-1].removeprefix("ptql: error: ")
        return {"command": command, "result": "refused" if ended.returncode == 2 else "failed", "why": why}
    facts = json.loads((out / "ptql_export.json").read_text(encoding="utf-8"))
    return {"command": command, "result": "loaded", **facts}


def table(rows: list[dict[str, Any]]) -> str:
    """A line for each cell that was loaded; below it, what was refused."""
    lines = []
    for row in rows:
        if row["result"] != "loaded":
            continue
        read = row["read_back"]
        lines.append(
            [
                row["scheme"],
                row["format"] + ("" if row["model"] == "SmolLM2" else f" ({row['model']})"),
                read["loader"],
                f"{row['size_bytes'] / 1e6:.1f}",
                f"{read['logits_off'] / read['logits_spread']:.1e}" if read["logits_off"] else "0",
                short(read["perplexity"]),
                short(read["perplexity_reloaded"]),
            ]
        )
    lines.sort(key=lambda line: (list(SCHEMES | GROUPS_OF_128).index(line[0]), line[1]))
    head = ["scheme", "format", "loader", "MB", "largest difference of a logit (of their spread)"]
    head += ["ppl, ptql", "ppl, loader"]
    why: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row["result"] != "loaded":
            reason = re.sub(r"\d+\.(self_attn|mlp)\.\w+", "a layer", row["why"].partition(";")[0])
            why.setdefault((row["format"], f"{row['result']}: {reason}"), []).append(row["scheme"])
    refused = [[target, ", ".join(dict.fromkeys(schemes)), reason] for (target, reason), schemes in why.items()]
    tables = markdown(head, lines, words=3)
    return tables + ("\n" + markdown(["format", "schemes", "not exported"], refused, words=3) if refused else "")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, metavar="DIR")
    parser.add_argument("--name", default="SmolLM2", help="of the model, for the table")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--groups_of_128", action="store_true", help="these schemes instead: of models they divide")
    parser.add_argument("--python", action="append", default=[], metavar="FORMAT=PATH", help="where its runtime is")
    parser.add_argument("--format", action="append", choices=FORMATS, help="only these")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--docs", type=Path, metavar="FILE.md", help="put the results' table there")
    args = parser.parse_args(arguments)
    if args.docs is not None:
        page = fill(args.docs.read_text(encoding="utf-8"), f"\n{table(read_rows(args.results))}\n", "exports")
        args.docs.write_text(page, encoding="utf-8")
        return 0
    if args.model is None or args.work is None:
        parser.error("--model and --work are needed, or --docs")
    pythons = dict(pair.split("=", 1) for pair in args.python)
    machine = probed_apart()
    done = {(row["model"], row["scheme"], row["format"]) for row in read_rows(args.results)}
    args.work.mkdir(parents=True, exist_ok=True)
    good = True
    for scheme, options in (GROUPS_OF_128 if args.groups_of_128 else SCHEMES).items():
        for target in args.format or FORMATS:
            if (args.name, scheme, target) in done:
                continue
            run, made = fit(args.model.absolute(), scheme, options, args.work.absolute())
            out = args.work.absolute() / re.sub(r"\W+", "-", f"{scheme} {target}")
            found = cell(run, target, pythons.get(target), out, args.windows, args.length)
            row = {"model": args.name, "scheme": scheme, "format": target, "fit": " ".join(["ptql", *made]), **found}
            with open(args.results, "a", encoding="utf-8") as sink:
                sink.write(json.dumps({**row, **machine}) + "\n")
            print(scheme, target, row["result"], row.get("why") or row["read_back"], flush=True)
            good &= row["result"] != "failed"
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
