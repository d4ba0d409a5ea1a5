"""Where the time of a learning step goes: kernels of the first block's steps, group by group.

    python benchmarks/step_profile.py MODEL_DIR --method lrquant --scheme w4a4 --json FILE.json
    python benchmarks/step_profile.py MODEL_DIR --set data.batch_size=4 --set model.engine=plain

An ordinary `ptql fit` of one epoch with a callback that lets torch's profiler look at steps 5 to 15 of block 0; give a
model of one block (`benchmarks/shapes.py MODEL OUT --blocks 1`). Prints a Markdown table: milliseconds and launches a
step, and how long the GPU was idle. The profiler itself slows the host, so idle time is an upper bound; time inside
kernels is not touched. On a CPU, operators take the place of kernels, each without those that it calls.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import ptql  # noqa: E402
from benchmarks.accuracy import machine  # noqa: E402

ptql.__path__.append(str(ROOT))  # callbacks/ and configs/ of a checkout that is not installed

ACTIVATIONS, WEIGHTS = "activation rounding", "weight folding and rounding"
GROUPS = (
    ("copies", r"^memcpy|^memset|^aten::(copy_|_to_copy|clone)$"),
    ("optimiser and gradient norm", r"multi_tensor|fused_?adam|^aten::_foreach_"),
    ("attention", r"flash|fmha|sdpa|scaled_dot_product|attention"),
    (ACTIVATIONS, r"^_round_tokens"),
    (WEIGHTS, r"^_(fold|round|matvec)"),
    (
        "matrix products",
        r"gemm|gemv|nvjet|cutlass|cublas|xmma|splitk|triton_(tem|mm|bmm)|^aten::(mm|addmm|bmm|baddbmm|mv)$",
    ),
    ("fused element-wise (compiled)", r"^triton_"),
)
"""Group and the names that belong to it, without regard to case; the first that fits."""
OTHER = "other element-wise"
GPU_KINDS = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})


@dataclass(frozen=True)
class Work:
    """What ran: a kernel or a copy on the GPU, or an operator on the CPU.

    Args:
        name: Of the kernel.
        begin: Microseconds.
        length: Microseconds.
        calls: How many of this name, where they are not listed one by one.
    """

    name: str
    begin: float
    length: float
    calls: int = 1


class StepProfile(Callback):
    """Profiles some steps of the first block, and writes down what ran.

    Args:
        out: JSON file.
        first: Steps of the block that pass unseen, for compiling and capture.
        steps: Steps that are looked at.
    """

    def __init__(self, out: str, first: int = 5, steps: int = 10) -> None:
        self.out, self.first, self.steps = out, first, steps
        self._seen = 0
        self._profiler: torch.profiler.profile | None = None
        self._began = 0.0

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Wake the profiler before a step is captured as a CUDA graph: it may not see into older ones."""
        os.environ |= {"TEARDOWN_CUPTI": "0", "DISABLE_CUPTI_LAZY_REINIT": "1"}
        if trainer.block == 0:
            with torch.profiler.profile():
                _now()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self._seen == self.first and trainer.block == 0:
            self._profiler = torch.profiler.profile()
            self._profiler.start()
            self._began = _now()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._seen += 1
        if self._profiler is not None and self._seen == self.first + self.steps:
            seconds = _now() - self._began
            self._profiler.stop()
            found = {"steps": self.steps, "seconds": seconds, "work": [asdict(work) for work in ran(self._profiler)]}
            Path(self.out).write_text(json.dumps(found), encoding="utf-8")
            self._profiler = None


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def ran(profiler: torch.profiler.profile) -> list[Work]:
    """Everything on the GPU, one by one, from the profiler's trace; or operators of the CPU, summed by name."""
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(str(trace := Path(folder) / "trace.json"))
        found = on_gpu(json.loads(trace.read_text(encoding="utf-8")))
    if found:
        return found
    names = re.compile(r"(?!autograd::)\w+::\w+$")  # neither nodes of autograd nor ranges of Python code
    sums = [entry for entry in profiler.key_averages() if names.match(entry.key)]
    return [Work(entry.key, 0.0, entry.self_cpu_time_total, entry.count) for entry in sums]


def on_gpu(trace: dict[str, Any]) -> list[Work]:
    """The kernels, copies and fills in a trace, as Chrome reads it."""
    events = [event for event in trace["traceEvents"] if event.get("cat") in GPU_KINDS]
    return [Work(event["name"], float(event["ts"]), float(event["dur"])) for event in events]


@cache
def own_kernels() -> dict[str, str]:
    """The group of each of ptql's Triton kernels by name: a file named after tokens rounds activations."""
    return {
        name: ACTIVATIONS if "token" in file.stem else WEIGHTS
        for file in (ROOT / "ptql" / "kernels").glob("*.py")
        for name in re.findall(r"^@[\w.]*jit\b.*\ndef (\w+)", file.read_text(encoding="utf-8"), re.MULTILINE)
    }


def group_of(name: str) -> str:
    """The group of a kernel or an operator."""
    if name in own_kernels():
        return own_kernels()[name]
    return next((group for group, names in GROUPS if re.search(names, name, re.IGNORECASE)), OTHER)


def busy(work: Iterable[Work]) -> float:
    """Microseconds in which at least one of them ran."""
    total, until = 0.0, float("-inf")
    for begin, end in sorted((w.begin, w.begin + w.length) for w in work):
        total += max(end - max(begin, until), 0.0)
        until = max(until, end)
    return total


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """What `StepProfile` wrote, per step and group.

    Returns:
        `ms_per_step` of the clock; `groups` with `ms`, `launches` and the five longest names; `idle`, the share of time
        in which nothing ran, None on a CPU.
    """
    steps, work = found["steps"], [Work(**item) for item in found["work"]]
    groups: dict[str, dict[str, Any]] = {}
    for name in [*(name for name, _ in GROUPS), OTHER]:
        own = [w for w in work if group_of(w.name) == name]
        by_name: dict[str, float] = {}
        for w in own:
            by_name[w.name] = by_name.get(w.name, 0.0) + w.length / 1000 / steps
        longest = sorted(by_name.items(), key=lambda item: -item[1])[:5]
        total, launches = sum(by_name.values()), sum(w.calls for w in own) / steps
        groups[name] = {"ms": total, "launches": launches, "longest": dict(longest)}
    on_clock = any(w.begin for w in work)  # summed operators have no place on it
    idle = max(1 - busy(work) / 1e6 / found["seconds"], 0.0) if on_clock else None
    return {"ms_per_step": 1000 * found["seconds"] / steps, "idle": idle, "groups": groups}


def table(found: dict[str, Any]) -> str:
    """A summary in Markdown, the longest group first, ending with a newline."""
    whole = sum(group["ms"] for group in found["groups"].values())
    lines = [["group", "ms per step", "share", "launches per step"], ["---", "---:", "---:", "---:"]]
    for name, group in sorted(found["groups"].items(), key=lambda item: -item[1]["ms"]):
        if group["launches"]:
            share = f"{100 * group['ms'] / whole:.0f} %"
            lines.append([name, f"{group['ms']:.3f}", share, f"{group['launches']:.1f}"])
    launches = sum(group["launches"] for group in found["groups"].values())
    lines.append(["all", f"{whole:.3f}", "100 %", f"{launches:.1f}"])
    words = f"{found['ms_per_step']:.3f} ms a step by the clock"
    if found["idle"] is not None:
        words += f", the GPU idle for {100 * found['idle']:.0f} % of it"
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + f"\n{words}.\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--method", default="lrquant")
    parser.add_argument("--scheme", default="w4a4")
    parser.add_argument("--text", default="pydoc")
    parser.add_argument("--first", type=int, default=5, help="steps that pass unseen")
    parser.add_argument("--steps", type=int, default=10, help="steps that are looked at")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="any option of ptql fit")
    parser.add_argument("--json", type=Path, help="for the summary, with the longest kernels of each group")
    args = parser.parse_args(arguments)
    from ptql.cli import main as ptql

    folder = Path(tempfile.mkdtemp(prefix="step-profile-"))
    raw = folder / "profile.json"
    callback = {
        "class_path": "benchmarks.step_profile.StepProfile",
        "init_args": {"out": str(raw), "first": args.first, "steps": args.steps},
    }
    options = {
        "model.source": args.model,
        "data.text": args.text,
        "data.samples": args.batch_size * (args.first + args.steps),
        "data.batch_size": args.batch_size,
        "trainer.max_epochs": 1,
        "trainer.precision": "bf16-mixed" if torch.cuda.is_available() else "32-true",
        "trainer.logger": "false",
        "trainer.enable_progress_bar": "false",
        "trainer.callbacks": json.dumps([callback]),
        "trainer.default_root_dir": folder / "run",
        **dict(item.split("=", 1) for item in args.set),
    }
    command = ["fit", "-c", f"methods/{args.method}", "-c", f"schemes/{args.scheme}"]
    try:
        if code := ptql([*command, *(f"--{name}={value}" for name, value in options.items())]):
            return code
        if not raw.is_file():
            needed = args.first + args.steps
            print(f"step_profile: block 0 made fewer than {needed} steps; take fewer with --steps", file=sys.stderr)
            return 1
        found = summary(json.loads(raw.read_text(encoding="utf-8")))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if args.json is not None:
        command = f"python benchmarks/step_profile.py {args.model.name}"
        command += "".join(f" --set {item}" for item in args.set)
        about = {**machine(), "command": command}
        args.json.write_text(json.dumps({**about, **found}, indent=1) + "\n", encoding="utf-8")
    print(table(found), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
