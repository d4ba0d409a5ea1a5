"""Time and memory of calibration: named plans of `ptql fit` on real shapes with random weights, or on a real model.

    python benchmarks/calibration.py headline growth --tokenizer DIR --work /tmp/calibration --results FILE.jsonl
    python benchmarks/calibration.py smollm2 --model DIR --calibration TEXT --text wikitext2=FILE --jobs 4 ...

One JSON line a run goes to the results file; a run that is in it already is not repeated, and with `--deadline` none
begins later than that. Models are written by `benchmarks/shapes.py` into the work directory, once a shape; the text
only fills windows with tokens there. `benchmarks/calibration_tables.py` makes the tables and the plot.

Seconds per block-epoch are the median over all blocks but the first, whose own come with compiling. The seconds of the
whole model are extrapolated from them. The share of the matrix product rate is what the arithmetic asks for
(`Shape.learning_flops`) over the time it took, beside 8192 x 8192 products in bfloat16 on the same machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from threading import RLock
from typing import Any

import torch
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.accuracy import call, machine, portable  # noqa: E402
from benchmarks.shapes import SHAPES, Shape, first_blocks, write_shape  # noqa: E402

MODEL_EPOCHS = 20  # of the methods as published, and so of the whole model that is extrapolated
KEPT = ("seconds", "seconds_learning", "steps", "peak_gpu_bytes", "peak_gpu_reserved_bytes", "peak_host_bytes")
KEPT += ("loss", "loss_start", "loss_learned", "epoch_losses", "best_epoch", "fell_back", "skipped_steps")


@dataclass(frozen=True)
class Run:
    """One calibration.

    Args:
        shape: Of the model; None in a plan stands for that of --model.
        method: Shipped recipe.
        scheme: Shipped bits.
        engine: Of `--model.engine`; None leaves the option out.
        blocks: Calibrated blocks of a random model.
        epochs: Of each block.
        samples: Windows.
        length: Tokens of a window.
        batch_size: Windows in a step of one process.
        processes: One GPU each.
        memory: Of `--data.memory`; None leaves the option out.
        preset: Shipped preset, which says epochs and batch size; `preset` makes such a run.
        real: The model is that of --model, all of it, and its perplexity is measured.
        akl_mode: Of `--model.objective.akl_mode`; `none` looks at no attention, None leaves the option out.
    """

    shape: Shape | None
    method: str
    scheme: str
    engine: str | None = "auto"
    blocks: int = 2
    epochs: int = 3
    samples: int = 128
    length: int = 2048
    batch_size: int = 4
    processes: int = 1
    memory: str | None = None
    preset: str | None = None
    real: bool = False
    akl_mode: str | None = None

    @property
    def name(self) -> str:
        """Of the run's directory; no two runs have the same."""
        parts = [self.shape.name if self.shape else "", self.method, self.scheme, self.engine or "default"]
        parts += [f"{self.blocks}b", f"{self.epochs}e", f"{self.samples}x{self.length}", f"batch{self.batch_size}"]
        parts += [f"{self.processes}p"] if self.processes > 1 else []
        parts += [self.preset] if self.preset else []
        parts += [self.akl_mode] if self.akl_mode else []
        return "-".join([*parts, self.memory] if self.memory else parts)

    def fit(self, model: Path, text: str, precision: str, folder: Path) -> list[str]:
        """The command, without `ptql`."""
        options = {
            "model.source": model,
            "model.engine": self.engine,
            "model.objective.akl_mode": self.akl_mode if self.akl_mode != "none" else None,
            "model.objective.akl": 0 if self.akl_mode == "none" else None,
            "data.text": text,
            "data.samples": self.samples,
            "data.length": self.length,
            "data.batch_size": None if self.preset else self.batch_size,
            "data.memory": self.memory,
            "trainer.max_epochs": None if self.preset else self.epochs,
            "trainer.precision": precision,
            "trainer.devices": self.processes if self.processes > 1 else None,
            "trainer.logger": "false",
            "trainer.default_root_dir": folder,
        }
        configs = [f"methods/{self.method}", f"schemes/{self.scheme}"]
        configs += ["strategies/ddp"] if self.processes > 1 else []
        configs += [f"presets/{self.preset}"] if self.preset else []
        if self.method == "ptq161":
            options["trainer.callbacks"] = "null"  # its single pass
        command = ["fit", *(part for config in configs for part in ("-c", config))]
        return command + [part for name, v in options.items() if v is not None for part in (f"--{name}", str(v))]


def preset(run: Run, name: str) -> Run:
    """The run with a shipped preset."""
    says = yaml.safe_load((ROOT / f"configs/presets/{name}.yaml").read_text(encoding="utf-8"))
    batch_size = says.get("data", {}).get("batch_size", run.batch_size)
    return replace(run, preset=name, epochs=says["trainer"]["max_epochs"], batch_size=batch_size)


LLAMA2 = SHAPES["llama2-7b"]
BASE = Run(LLAMA2, "lrquant", "w4a4")
WEIGHTS = Run(LLAMA2, "omniquant", "w4a16")
HUGE = Run(SHAPES["llama3-405b"], "lrquant", "w4a4", epochs=1, samples=16, batch_size=1)
REAL = Run(None, "lrquant", "w4a4", epochs=20)
TINY = Run(Shape("tiny", 64, 172, 4, 2, 5), "lrquant", "w4a4", None, samples=4, length=64, batch_size=2, epochs=2)
WIDTHS = tuple(Shape(f"width-{128 * heads}", 128 * heads, 344 * heads, heads, heads) for heads in (16, 64))

PLANS: dict[str, list[Run]] = {
    "headline": [
        replace(BASE, epochs=20),
        replace(BASE, memory="8GiB"),
        replace(BASE, engine="plain", epochs=2),
    ],
    "steps": [replace(BASE, batch_size=1, epochs=2)],  # as many as the originals make
    "weights": [WEIGHTS, replace(WEIGHTS, engine="plain", epochs=2)],
    "abq": [
        replace(BASE, epochs=5),  # beside those that follow
        *(replace(BASE, method="abq", epochs=5, akl_mode=mode) for mode in ("faithful", "exact", "none")),
    ],
    "ptq161": [
        replace(WEIGHTS, epochs=5),  # beside it
        replace(WEIGHTS, method="ptq161", scheme="w1.61a16", epochs=5),
    ],
    "llama70b": [replace(BASE, shape=SHAPES["llama2-70b"], epochs=2)],
    "huge": [replace(HUGE, method="omniquant", scheme="w4a16"), HUGE],
    "samples": [replace(BASE, samples=samples) for samples in (32, 64, 128, 256)],
    "length": [replace(BASE, length=length) for length in (512, 1024, 4096)],
    "width": [replace(BASE, shape=shape) for shape in WIDTHS],
    "blocks": [replace(BASE, blocks=blocks) for blocks in (1, 3, 4)],
    "gpus": [BASE, replace(BASE, processes=2, batch_size=2), replace(BASE, processes=2)],
    "smollm2": [replace(REAL, engine=engine) for engine in ("auto", "plain")],
    "parity": [
        replace(REAL, method=method, scheme=scheme, engine=engine, epochs=5)
        for method, scheme in (("omniquant", "w4a16"), ("lrquant", "w4a4"))
        for engine in ("auto", "plain")
    ],
    "presets": [
        preset(REAL, "best"),
        replace(REAL, method="omniquant"),
        *(preset(replace(REAL, method=method), "fast") for method in ("lrquant", "omniquant")),
    ],
    "tiny": [TINY, replace(TINY, shape=None, epochs=1, length=32)],
}
PLANS["growth"] = [run for plan in ("samples", "length", "width", "blocks") for run in PLANS[plan]]
Job = tuple[str, Run]  # of a plan


class Models:
    """Model directories of random weights, written when they are first asked for.

    Args:
        folder: Where they are written.
        runs: Those that may ask: of each shape as many blocks are written as the longest one needs.
        tokenizer: Directory whose tokenizer they get.
    """

    def __init__(self, folder: Path, runs: list[Run], tokenizer: Path | None) -> None:
        self.folder, self.tokenizer = folder, tokenizer
        self._writing = RLock()
        self.most = {shape: max(r.blocks for r in runs if r.shape == shape) for shape in {r.shape for r in runs}}

    def directory(self, shape: Shape, blocks: int) -> Path:
        """A model of so many blocks; fewer than the most are links to the others' files."""
        out = self.folder / f"{shape.name}-{blocks}"
        with self._writing:
            if not out.exists():
                shutil.rmtree(part := out.with_name(f"{out.name}.part"), ignore_errors=True)  # of a killed process
                if blocks < self.most[shape]:
                    first_blocks(self.directory(shape, self.most[shape]), part, blocks)
                else:
                    write_shape(shape, part, blocks, self.tokenizer)
                part.rename(out)
        return out


def shape_of(model: Path) -> Shape:
    """The shape of a model directory of the Llama type."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads", heads)
    sizes = (config["hidden_size"], config["intermediate_size"], heads, kv_heads)
    return Shape(model.absolute().name, *sizes, config["num_hidden_layers"])


def execute(plan: str, run: Run, models: Models, probed: dict[str, Any], args: argparse.Namespace) -> dict | None:
    """Calibrate, and measure where the model is real; None if a command fails, with its last words on stderr."""
    folder = args.work / "runs" / run.name
    log = Path(f"{folder}.log")
    shutil.rmtree(folder, ignore_errors=True)  # of a run that failed: going on would be timed as if it were whole
    log.unlink(missing_ok=True)
    shape = run.shape or shape_of(args.model)
    model = args.model if run.real else models.directory(shape, run.blocks)
    fit = run.fit(model, args.calibration, args.precision, folder)
    began = time.monotonic()
    if not call(fit, folder):
        return None
    wall = time.monotonic() - began
    if run.real and args.texts:
        measure = ["eval", "--run", str(folder), "--batch_size", "8", "--length", str(run.length)]
        measure += [part for name, file in args.texts.items() for part in (f"--text.{name}", file)]
        measure += ["--windows", str(args.windows)] if args.windows else []
        if not call(measure, folder):
            return None
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    manifest = json.loads((folder / "ledger" / "manifest.json").read_text(encoding="utf-8"))
    blocks = [manifest["blocks"][str(index)] for index in range(len(manifest["blocks"]))]
    shutil.rmtree(folder)  # only its log is kept: models of these shapes fill a disk
    return {
        "plan": plan,
        "name": run.name,
        "command": portable(["ptql", *fit], argparse.Namespace(model=str(args.model)), folder),
        **asdict(run),
        "engine_told": told(log.read_text(encoding="utf-8", errors="replace")),
        "jobs_at_once": args.jobs,
        **probed,
        **pace(blocks, run.epochs, shape.blocks),
        **share(shape, run, blocks, probed.get("bf16_flops")),
        **peaks(blocks),
        "seconds_wall": round(wall, 1),
        "seconds_this_process": metrics["fit"]["seconds_this_process"],
        "checksum": metrics["fit"]["checksum"],
        **({"ppl": metrics["ppl"]} if "ppl" in metrics else {}),
        "each_block": [{key: block[key] for key in KEPT if key in block} for block in blocks],
    }


def told(log: str) -> list[str]:
    """What the engine said of itself: that it fell back, and why."""
    return [line.removeprefix("ptql: ") for line in log.splitlines() if line.startswith("ptql: engine: ")]


def block_epoch(blocks: list[dict[str, Any]], epochs: int) -> float:
    """Median seconds of an epoch over the blocks after the first, or of the only one."""
    return statistics.median(block["seconds_learning"] / epochs for block in blocks[1:] or blocks)


def pace(blocks: list[dict[str, Any]], epochs: int, real_blocks: int) -> dict[str, Any]:
    """Seconds of blocks, from the ledger's summaries, and of the whole model, extrapolated.

    Args:
        blocks: What the ledger says of each.
        epochs: That each learned for, 1 or more.
        real_blocks: Of the whole model; 0 if there is no such model.
    """
    first, per_epoch = blocks[0], block_epoch(blocks, epochs)
    overhead = statistics.median(block["seconds"] - block["seconds_learning"] for block in blocks[1:] or blocks)
    found = {
        "seconds_per_block_epoch": per_epoch,
        "first_block_seconds_per_block_epoch": first["seconds_learning"] / epochs,
        "seconds_of_block_beside_learning": overhead,
    }
    if real_blocks:
        extra = max(first["seconds"] - epochs * per_epoch - overhead, 0.0)
        found |= {
            "extrapolated_seconds_of_model": real_blocks * (MODEL_EPOCHS * per_epoch + overhead) + extra,
            "extrapolated_blocks": real_blocks,
            "extrapolated_epochs": MODEL_EPOCHS,
        }
    return found


def share(shape: Shape, run: Run, blocks: list[dict[str, Any]], rate: float | None) -> dict[str, float]:
    """Floating-point operations a second of all processes, and their share of the rate of matrix products."""
    achieved = shape.learning_flops(run.samples, run.length) / block_epoch(blocks, run.epochs)
    found = {"tflops_achieved": achieved / 1e12}
    if rate:
        found["share_of_bf16_rate"] = achieved / (rate * run.processes)
    return found


def peaks(blocks: list[dict[str, Any]]) -> dict[str, int]:
    """The most memory that any block took, of each kind that was noted."""
    kinds = ("peak_gpu_bytes", "peak_gpu_reserved_bytes", "peak_host_bytes")
    return {kind: max(found) for kind in kinds if (found := [block[kind] for block in blocks if kind in block])}


def probe() -> None:
    """Print, as JSON, what this machine is and how fast its matrix products are."""
    found: dict[str, Any] = {**machine(), "cpu": _cpu(), "gpus": torch.cuda.device_count()}
    for name in ("triton", "lightning"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    found["bf16_flops"] = _product_rate() if torch.cuda.is_available() else None
    print(json.dumps(found))


def _product_rate(size: int = 8192, count: int = 20) -> float:
    """Floating-point operations a second of square bfloat16 products."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(5):
        torch.mm(a, b)
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(count):
        torch.mm(a, b)
    torch.cuda.synchronize()
    return 2 * size**3 * count / (time.perf_counter() - began)


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} threads"


def probed_apart() -> dict[str, Any]:
    """What `probe` prints, from a process of its own: this one must hold no memory on the GPU."""
    code = "from benchmarks.calibration import probe; probe()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def planned(args: argparse.Namespace) -> list[Job]:
    """The runs of all plans, with what the command line changes in them, each once."""
    changes = {name: value for name in ("epochs", "blocks") if (value := getattr(args, name)) is not None}
    chosen = {name: getattr(args, name) for name in ("method", "engine")}
    jobs: dict[str, Job] = {}
    for plan in args.plans:
        for run in PLANS[plan]:
            if any(only is not None and getattr(run, name) != only for name, only in chosen.items()):
                continue
            changed = replace(run, **changes)
            if run.shape is None and args.model is not None:
                shape = shape_of(args.model)
                changed = replace(changed, shape=shape, blocks=shape.blocks, real=True)
            jobs.setdefault(changed.name, (plan, changed))
    return list(jobs.values())


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The lines of a results file; none if it is not there."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def said(row: dict[str, Any]) -> str:
    """A run in one line."""
    line = f"{row['name']}: {row['seconds_per_block_epoch']:.3f} s per block-epoch"
    line += f" (first block {row['first_block_seconds_per_block_epoch']:.3f})"
    line += f", {row['seconds_of_block_beside_learning']:.1f} s a block beside; {row['seconds_wall']:.0f} s in all"
    if "share_of_bf16_rate" in row:
        line += f"; {row['share_of_bf16_rate']:.1%} of the bf16 rate"
    line += "".join(f"; {words}" for words in row["engine_told"])
    if "peak_gpu_bytes" in row:
        line += f"; {row['peak_gpu_bytes'] / 2**30:.2f} GiB"
    return line + (f"; ppl {row['ppl']}" if "ppl" in row else "")


def main(arguments: list[str] | None = None) -> int:
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plans", nargs="+", choices=PLANS, metavar="PLAN", help=", ".join(PLANS))
    parser.add_argument("--work", required=True, type=Path, help="for models and logs")
    parser.add_argument("--results", required=True, type=Path)
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="model directory whose tokenizer shapes get")
    parser.add_argument("--calibration", default="pydoc", help="text that fills the windows")
    parser.add_argument("--model", type=Path, metavar="DIR", help="a real model, for smollm2")
    parser.add_argument("--text", action="append", default=[], metavar="NAME=FILE", help="for its perplexity")
    parser.add_argument("--windows", type=int, help="windows of each text; all by default")
    parser.add_argument("--method", help="only the plans' runs of this recipe")
    parser.add_argument("--engine", help="only the plans' runs of this engine")
    parser.add_argument("--epochs", type=int, help="of every run, in place of the plan's")
    parser.add_argument("--blocks", type=int, help="of every random model, in place of the plan's")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once; more than one disturb each other's times")
    parser.add_argument("--deadline", type=float, default=float("inf"), metavar="SECONDS", help="no run begins later")
    parser.add_argument("--precision", help="bf16-mixed on a GPU by default")
    args = parser.parse_args(arguments)
    args.texts = dict(item.split("=", 1) for item in args.text)
    args.work = args.work.absolute()
    jobs = planned(args)
    if args.model is None and any(run.shape is None for _, run in jobs):
        parser.error("this plan runs on a real model; give --model DIR")
    if args.tokenizer is None and not all(run.real for _, run in jobs):
        parser.error("this plan runs on random models; give --tokenizer DIR, any model directory")
    probed = probed_apart()
    args.precision = args.precision or ("bf16-mixed" if probed["gpus"] else "32-true")
    models = Models(args.work / "models", [run for _, run in jobs if not run.real], args.tokenizer)
    args.results.parent.mkdir(parents=True, exist_ok=True)
    done = {(row["name"], row["machine"]) for row in read_rows(args.results)}

    def record(plan: str, run: Run) -> bool:
        if (run.name, probed["machine"]) in done:
            return True
        if time.monotonic() - began > args.deadline:
            print(f"{run.name}: not begun, after the deadline", file=sys.stderr, flush=True)
            return False
        try:
            row = execute(plan, run, models, probed, args)
        except (OSError, ValueError, LookupError) as error:  # no room for a model, a ledger of another version
            print(f"{run.name}: {error!r}", file=sys.stderr, flush=True)
            return False
        if row is None:
            return False
        with open(args.results, "a", encoding="utf-8") as sink:
            sink.write(json.dumps(row) + "\n")
        print(f"{time.strftime('%T')} {said(row)}", flush=True)
        return True

    with ThreadPoolExecutor(args.jobs) as pool:
        return 0 if all([job.result() for job in [pool.submit(record, *job) for job in jobs]]) else 1


if __name__ == "__main__":
    sys.exit(main())
