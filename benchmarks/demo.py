"""`make demo`: a real 135M model to 3 bits on a CPU, measured before and after.

Fetches SmolLM2-135M-Instruct, quantises it to 3 bits in groups of 64 twice, by rounding to nearest and with
learned clipping, measures perplexity on text that neither saw, and lets each model say something.

    python benchmarks/demo.py [--out demo-run]
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import ptql  # noqa: E402, F401  (registers the packed format with transformers)
from benchmarks.smollm2 import FetchError, fetch  # noqa: E402
from ptql.formats.ptql import unpack_block  # noqa: E402

MODEL = ROOT / "models" / "SmolLM2-135M-Instruct-bf16"
SCHEME = "w3a16g64"
PROMPT = "A list in Python is"
WINDOWS, LENGTH = 12, 1024


def ptql_command(*args: str) -> None:
    command = [sys.executable, str(ROOT / "cli.py"), *args]
    print("\n$ ptql " + " ".join(args), flush=True)
    done = subprocess.run(command)
    if done.returncode:
        sys.exit(done.returncode)


def quantise(method: str, out: Path) -> float:
    """Seconds that `ptql fit` took; the run is in `out`."""
    began = time.monotonic()
    ptql_command(
        *("fit", "-c", f"methods/{method}", "-c", f"schemes/{SCHEME}", "-c", "demo"),
        *(("--trainer.max_epochs", "0") if method == "rtn" else ()),
        *("--model.source", str(MODEL), "--trainer.default_root_dir", str(out)),
    )
    return time.monotonic() - began


def measure(*model: str, json_file: Path) -> dict:
    """What `eval` finds; of a run it goes to the run's own metrics.json and report."""
    elsewhere = () if "--run" in model else ("--json", str(json_file))
    ptql_command(
        *("eval", *model, "--text.pydoc", "pydoc", "--length", str(LENGTH), "--windows", str(WINDOWS)),
        *("--trainer.accelerator", "cpu", *elsewhere),
    )
    return json.loads(json_file.read_text(encoding="utf-8"))


def say(directory: Path) -> str:
    """What the model makes of the prompt, greedily."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    unpack_block(model)
    prompt = tokenizer(PROMPT, return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=24, do_sample=False)  # pyright: ignore[reportAttributeAccessIssue]
    return " ".join(tokenizer.decode(answer[0], skip_special_tokens=True).split())


def size_on_disk(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "demo-run")
    out = parser.parse_args().out
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    began = time.monotonic()
    try:
        fetch(MODEL, "bfloat16")
    except FetchError as error:
        print(f"demo: the model could not be had: {error}", file=sys.stderr)
        return 1
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    rows = []
    source = measure("--model.source", str(MODEL), json_file=out / "source.json")
    parameters = 134_515_008
    rows.append(("source, bfloat16", source["ppl"]["pydoc"], 16.0, 8 * size_on_disk(MODEL) / parameters, MODEL, 0.0))
    for method, name in (("rtn", "round to nearest"), ("lrquant", "learned clipping")):
        seconds = quantise(method, out / method)
        metrics = measure("--run", str(out / method), json_file=out / method / "metrics.json")
        bits, with_embeddings = metrics["bits_per_weight"], metrics["bits_per_weight_with_embeddings"]
        rows.append(
            (
                f"{SCHEME}, {name}",
                metrics["ppl"]["pydoc"],
                bits,
                with_embeddings,
                out / method / "model",
                seconds,
            )
        )
    table = Table("model", "perplexity", "bits/weight", "with embeddings", "MB on disk", "seconds")
    for name, ppl, bits, with_embeddings, directory, seconds in rows:
        megabytes = size_on_disk(directory) / 1e6
        numbers = (
            f"{ppl:.2f}",
            f"{bits:.2f}",
            f"{with_embeddings:.2f}",
            f"{megabytes:.0f}",
            f"{seconds:.0f}",
        )
        table.add_row(name, *numbers)
    console = Console(width=100)
    console.print()
    console.print(table)
    console.print(f"Perplexity: {WINDOWS} windows of {LENGTH} tokens of Python's documentation, not calibrated on.\n")
    for name, *_, directory, _seconds in rows:
        console.print(f"[bold]{name}[/bold]: {say(directory)}", highlight=False)
    console.print(f"\n{time.monotonic() - began:.0f} seconds in all. The quantised model: {out / 'lrquant' / 'model'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
