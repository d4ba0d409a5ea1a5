"""Tables and a plot of the results that `benchmarks/calibration.py` writes; needs no GPU.

    python benchmarks/calibration_tables.py FILE.jsonl ...
    python benchmarks/calibration_tables.py benchmarks/results/calibration-*.jsonl --docs docs/speed.md \\
        --plot docs/images/growth.svg --step benchmarks/results/step-llama2-7b-h100.json

The second puts the tables between the lines <!-- begin: calibration --> and <!-- end: calibration --> of the Markdown
file, that of a step between those of `step`, and draws how time grows with samples, length, width and blocks. Of the
lines of one run the last counts.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.calibration import BASE, PLANS  # noqa: E402
from benchmarks.shapes import SHAPES, Shape  # noqa: E402
from benchmarks.step_profile import table as step_table  # noqa: E402
from benchmarks.tables import NONE, short  # noqa: E402
from ptql.report.axes import Axis, linear_axis  # noqa: E402
from ptql.report.html import Markup, join, tag  # noqa: E402
from ptql.report.style import CSS  # noqa: E402

Row = dict[str, Any]
BASE_FIELDS = {**asdict(BASE), "shape": BASE.shape.name if BASE.shape else ""}
AXES = ("samples", "length", "width", "blocks")
WIDTHS = {run.shape.name for run in PLANS["growth"] if run.shape is not None}


@dataclass(frozen=True)
class Original:
    """A published code, timed by us on the block of Llama-2-7B.

    Args:
        system: What it is called.
        setting: Bits.
        pace: Seconds per block-epoch, measured.
        hours: 32 blocks and 20 epochs, extrapolated.
        gigabytes: Peak GPU memory allocated.
    """

    system: str
    setting: str
    pace: float
    hours: float
    gigabytes: float


# shared/research/calibration_h100.md beside the checkout, section 1: one H100 80GB, torch 2.11, transformers 4.37,
# 128 windows of 2048 tokens, batch 1. Pace of the second block where two were run.
ORIGINALS = (
    Original("OmniQuant", "w4a4", 6.64, 1.20, 13.0),
    Original("LRQuant", "w4a4", 6.82, 1.23, 17.2),
    Original("ABQ-LLM", "w4a4", 7.50, 1.36, 17.8),
    Original("OmniQuant", "w4a16", 3.87, 0.70, 11.5),
    Original("PTQ1.61 (block step)", "w4a16", 4.45, 0.81, 14.1),
)
FLOOR = (("plain, batch 1", 0.737), ("compiled, batch 4", 0.557))  # section 2: the block itself, nothing quantised
ORIGINALS_RATE = 785e12  # bf16 8192^3 product of that machine, cold
SOURCE = (
    "Originals: OmniQuant 95fae1b, LRQuant 7d85356, ABQ-LLM de2e849, PTQ1.61 03d066b, each with its own code on one "
    "H100 80GB (torch 2.11), batch 1; GB as torch allocated them. Floor: forward and backward of the block in "
    "bfloat16, nothing quantised, no optimiser. Their shares are of 785 TFLOP/s, measured there. Whole models are "
    "extrapolated to 20 epochs from the blocks that were timed."
)


def read_rows(files: list[Path]) -> list[Row]:
    """The runs of all files; of the lines of one run on one machine the last counts."""
    rows: dict[tuple[str, str], Row] = {}
    for file in files:
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                row = json.loads(line)
                assert row["seconds_per_block_epoch"] > 0
                rows[row["machine"], row["name"]] = row
            except (ValueError, LookupError, TypeError, AssertionError) as error:
                reason = f"not a line of benchmarks/calibration.py ({error!r})"
                raise SystemExit(f"{file}:{number}: {reason}; remove it") from None
    return list(rows.values())


def tables(rows: list[Row]) -> str:
    """All tables in Markdown, machine by machine, ending with a newline."""
    parts = []
    for machine in dict.fromkeys(row["machine"] for row in rows):
        own = [row for row in rows if row["machine"] == machine]
        made = [block_table(own), other_table(own), growth_table(own), gpu_table(own), real_table(own)]
        words = f"{machine}; {own[-1]['cpu']}; " + ", ".join(
            f"{name} {own[-1][name]}" for name in ("torch", "triton", "lightning", "transformers") if own[-1].get(name)
        )
        if own[-1].get("bf16_flops"):
            words += f"; 8192 × 8192 products in bfloat16 at {own[-1]['bf16_flops'] / 1e12:.0f} TFLOP/s"
        parts += [f"{words}.\n", *filter(None, made)]
    return "\n".join(parts)


def block_table(rows: list[Row]) -> str:
    """One block of Llama-2-7B beside the originals and the floor."""
    own = longest([row for row in rows if row["shape"]["name"] == "llama2-7b" and usual_data(row)])
    if not own:
        return ""
    lines = [[engine(row), setting(row), *figures(row)] for row in own if row["processes"] == 1]
    epoch, real = SHAPES["llama2-7b"].learning_flops(128, 2048), SHAPES["llama2-7b"].blocks
    for old in ORIGINALS:
        cells = [f"{old.pace:.2f}", f"{60 * old.hours:.0f}", percent(epoch / old.pace / ORIGINALS_RATE)]
        lines.append([old.system, f"{old.setting}, batch 1", *cells, f"{old.gigabytes:.1f} GB", NONE, NONE])
    for words, seconds in FLOOR:
        cells = [f"{seconds:.2f}", f"{real * 20 * seconds / 60:.0f}", percent(epoch / seconds / ORIGINALS_RATE)]
        lines.append(["floor", words, *cells, NONE, NONE, NONE])
    heads = ["one block of Llama-2-7B", "setting", *FIGURES]
    return f"{markdown(heads, lines, words=2)}\n{SOURCE}\n"


def other_table(rows: list[Row]) -> str:
    """Blocks of other real shapes."""
    names = SHAPES.keys() - {"llama2-7b"}
    own = longest([row for row in rows if row["shape"]["name"] in names])
    lines = [[row["shape"]["name"], engine(row), f"{setting(row)}, {data(row)}", *figures(row)] for row in own]
    return markdown(["shape", "engine", "setting", *FIGURES], lines, words=3)


def growth_table(rows: list[Row]) -> str:
    """What changes when one number does."""
    lines = [
        [
            *("" if number else axis, str(at)),
            f"{row['seconds_per_block_epoch']:.3f}" if row["blocks"] > 1 else NONE,  # compiling is in a first block
            f"{row['seconds_wall']:.0f}",
            percent(row.get("share_of_bf16_rate") if row["blocks"] > 1 else None),
            gib(row.get("peak_gpu_bytes")),
        ]
        for axis in AXES
        for number, (at, row) in enumerate(points(rows, axis))
    ]
    heads = ["what grows", "to", "s per block-epoch", "s in all", "of the bf16 rate", "peak GPU GiB"]
    return markdown(heads, lines, words=1)


def gpu_table(rows: list[Row]) -> str:
    """The same calibration by one process and by several."""
    free = ("processes", "batch_size")
    own = [row for row in rows if like_base(row, *free) and (row["processes"] > 1 or like_base(row))]
    if not any(row["processes"] > 1 for row in own):
        return ""
    one = next((row["seconds_per_block_epoch"] for row in own if row["processes"] == 1), None)
    lines = []
    for row in sorted(own, key=lambda row: (row["processes"], row["batch_size"])):
        pace = row["seconds_per_block_epoch"]
        times = NONE if one is None else f"{one / pace:.2f}"
        step = row["processes"] * row["batch_size"]
        lines.append(
            [str(row["processes"]), str(row["batch_size"]), str(step), f"{pace:.3f}", times, *figures(row)[2:]]
        )
    heads = ["GPUs", "windows each", "windows a step", "s per block-epoch", "times one GPU", *FIGURES[2:]]
    return markdown(heads, lines, words=0)


def real_table(rows: list[Row]) -> str:
    """A real model, all of it: what the engines make of it."""
    own = [row for row in rows if row["real"]]
    texts = list(dict.fromkeys(name for row in own for name in row.get("ppl", {})))
    lines = []
    for row in sorted(own, key=lambda row: (row["scheme"], row["method"], row["epochs"], row["engine"] or "")):
        ppl = [short(row["ppl"][name]) if name in row.get("ppl", {}) else NONE for name in texts]
        learned = mean_ratio(row["each_block"])
        recipe = f"{row['method']} {row['scheme']}" + (f", {row['preset']}" if row.get("preset") else "")
        cells = [row["shape"]["name"], recipe, engine(row), f"{row['epochs']}, {row['batch_size']}"]
        cells += [*ppl, NONE if learned is None else f"{learned:.4f}"]
        cells += [f"{row['seconds_per_block_epoch']:.3f} ({row['jobs_at_once']})", f"{row['seconds_wall']:.0f}"]
        lines.append(cells)
    heads = ["model", "recipe", "engine", "epochs, batch", *(f"{name} ppl" for name in texts)]
    heads += ["loss after / before, mean", "s per block-epoch (runs at once)", "s in all"]
    found = [curve_words(row, other) for row in own for other in own if same_calibration(row, other)]
    return markdown(heads, lines, words=3) + "".join(f"\n{words}\n" for words in found)


def same_calibration(row: Row, other: Row) -> bool:
    """Whether `other` is the calibration of `row` made again, by `plain` or once more by the same engine."""
    left_out = ("engine", "shape", "preset")
    same = all(row.get(name) == other.get(name) for name in settings(row) if name not in left_out)
    again = (row["engine"], other["engine"]) in (("auto", "plain"), ("auto", "auto")) and row["name"] != other["name"]
    return same and row["shape"] == other["shape"] and again and (other["engine"] == "plain" or bool(other["preset"]))


def curve_words(row: Row, other: Row) -> str:
    """How far the loss curves of two runs are apart, in the first third of the blocks and in all."""
    curves = [
        [ours / theirs - 1 for ours, theirs in zip(one["epoch_losses"], two["epoch_losses"], strict=True) if theirs]
        for one, two in zip(row["each_block"], other["each_block"], strict=True)
        if "epoch_losses" in one and "epoch_losses" in two
    ]
    if not curves:
        return ""
    kind = "`auto` and `plain`" if other["engine"] == "plain" else "two runs of `auto`"
    parts = [
        f"{100 * statistics.median(map(abs, found)):.2g} % in the median and {100 * max(map(abs, found)):.2g} % at most"
        for blocks in (curves[: max(len(curves) // 3, 1)], curves)
        if (found := [pair for block in blocks for pair in block])
    ]
    return (
        f"{row['shape']['name']} {row['method']} {row['scheme']}, {row['epochs']} epochs: the losses of {kind}, block "
        f"by block and epoch by epoch, differ by {parts[0]} in the first third of the blocks, by {parts[-1]} in all."
    )


FIGURES = ["s per block-epoch", "whole model, min (extrapolated)", "of the bf16 rate"]
FIGURES += ["peak GPU GiB", "GPU GiB reserved", "peak host GiB"]


def figures(row: Row) -> list[str]:
    """The cells of FIGURES."""
    alone = row["blocks"] == 1  # a first block, which carries compiling
    whole = None if alone else row.get("extrapolated_seconds_of_model")
    return [
        f"{row['seconds_per_block_epoch']:.2f}" + (" with compiling" if alone else ""),
        NONE if whole is None else f"{whole / 60:.1f}",
        percent(None if alone else row.get("share_of_bf16_rate")),
        gib(row.get("peak_gpu_bytes")),
        gib(row.get("peak_gpu_reserved_bytes")),
        gib(row.get("peak_host_bytes")),
    ]


def engine(row: Row) -> str:
    """The engine that was asked for, and the one that it fell back to."""
    words = f"ptql {row['engine']}" if row["engine"] else "ptql"
    fallbacks = [line.removeprefix("engine: ").partition(",")[0] for line in row["engine_told"]]
    return f"{words} (fell back to {fallbacks[-1]})" if fallbacks else words


def setting(row: Row) -> str:
    """Recipe, batch, and where hidden states must fit."""
    words = f"{row['method']} {row['scheme']}, batch {row['batch_size']}"
    words += f", {row['akl_mode']} AKL" if row.get("akl_mode") else ""
    return words + (f", data in {row['memory']}" if row["memory"] else "")


def data(row: Row) -> str:
    return f"{row['samples']} × {row['length']}"


def percent(share: float | None) -> str:
    return NONE if share is None else f"{100 * share:.0f} %"


def gib(count: int | None) -> str:
    return NONE if count is None else f"{count / 2**30:.1f}"


def mean_ratio(blocks: list[Row]) -> float | None:
    """Geometric mean over blocks of the measured loss after learning over that before; None if it is not known."""
    pairs = [(block.get("loss"), block.get("loss_start")) for block in blocks]
    logs = [math.log(now / before) for now, before in pairs if now and before and now > 0 and before > 0]
    return math.exp(sum(logs) / len(logs)) if len(logs) == len(blocks) else None


def markdown(heads: list[str], lines: list[list[str]], words: int) -> str:
    """A table whose first columns hold words, the others numbers; nothing without lines."""
    rule = ["---"] * words + ["---:"] * (len(heads) - words)
    return "".join(f"| {' | '.join(line)} |\n" for line in [heads, rule, *lines]) if lines else ""


# Which rows belong together


def settings(row: Row) -> Row:
    """What `Run` holds, with the shape by name."""
    return {name: row.get(name) for name in BASE_FIELDS} | {"shape": row["shape"]["name"]}


def like_base(row: Row, *free: str) -> bool:
    """Whether a run differs from the usual one in `free` and the number of epochs at most."""
    found = settings(row)
    return all(found[name] == value for name, value in BASE_FIELDS.items() if name not in (*free, "epochs"))


def usual_data(row: Row) -> bool:
    return (row["samples"], row["length"]) == (BASE.samples, BASE.length)


def longest(rows: list[Row]) -> list[Row]:
    """Of runs that differ in the number of blocks and epochs only, the one that did most, in the order of `rows`."""
    best: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        key = tuple(value for name, value in settings(row).items() if name not in ("blocks", "epochs"))
        if key not in best or row["blocks"] * row["epochs"] > best[key]["blocks"] * best[key]["epochs"]:
            best[key] = row
    return list(best.values())


def points(rows: list[Row], axis: str) -> list[tuple[int, Row]]:
    """The runs along an axis, all else as usual: where each lies, and the run.

    Runs of other numbers of epochs than most on the axis are left out: what comes once a block weighs otherwise.
    """
    name = "shape" if axis == "width" else axis
    own = [row for row in rows if like_base(row, name) and (axis != "width" or row["shape"]["name"] in WIDTHS)]
    epochs = [row["epochs"] for row in own]
    own = [row for row in own if row["epochs"] == max(set(epochs), key=epochs.count)]
    found = {row["shape"]["hidden"] if axis == "width" else row[axis]: row for row in own}
    return sorted(found.items()) if len(found) > 1 else []


# The plot

WIDTH, HEIGHT, LEFT, TOP, ACROSS, DOWN = 270, 150, 48, 50, 350, 244
STYLE = (
    CSS.partition("* {")[0]
    + """
text { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
text { fill: var(--muted); }
.title { font-weight: 600; font-size: 13px; fill: var(--ink); }
.end { text-anchor: end; }
.mid { text-anchor: middle; }
.paper { fill: var(--paper); }
.grid { stroke: var(--rule); }
.base { stroke: var(--before); }
.model { fill: none; stroke: var(--before); stroke-width: 1.5; stroke-dasharray: 5 4; }
.measured { fill: none; stroke: var(--after); stroke-width: 1.75; }
.dot { fill: var(--after); }
"""
)


def plot(rows: list[Row]) -> str:
    """An SVG of four panels, seconds over samples, length, width and blocks; it follows the reader's light or dark."""
    panels = []
    for place, axis in enumerate(AXES):
        x, y = LEFT + place % 2 * ACROSS, TOP + place // 2 * DOWN
        found = points(rows, axis)
        whose = ""
        if axis == "blocks" and not found:
            whose, found = passing(rows)
        panels.append(tag("g", panel(axis, found, whose), transform=f"translate({x} {y})"))
    width, height = 2 * ACROSS, 2 * DOWN + 24
    words = "Dashed: the usual run's time, scaled with the arithmetic; over blocks, the line that fits best."
    return tag(
        "svg",
        tag("style", Markup(STYLE)),
        tag("rect", width=width, height=height, class_="paper"),
        panels,
        tag("text", words, x=LEFT, y=height - 14),
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {width} {height}",
        width=width,
        height=height,
        role="img",
        aria_label="Seconds of calibration over samples, length, width and blocks",
    )


def passing(rows: list[Row]) -> tuple[str, list[tuple[int, Row]]]:
    """The longest run of a real model by itself: its name, and the seconds that had passed after some of its blocks."""
    alone = [row for row in rows if row["real"] and row["engine"] == "auto" and row["jobs_at_once"] == 1]
    if not alone:
        return "", []
    row = max(alone, key=lambda row: row["blocks"] * row["epochs"])
    seconds = [block["seconds"] for block in row["each_block"]]
    after = sorted({1, *(round(len(seconds) * k / 6) for k in range(1, 7))})
    words = f" of {row['shape']['name']}"
    return words, [(count, {**row, "seconds_wall": sum(seconds[:count])}) for count in after if count]


def panel(axis: str, found: list[tuple[int, Row]], whose: str = "") -> Markup:
    """Dots and a line through them over the dashed line, with axes from zero."""
    over_blocks = axis == "blocks"
    words = f"{'s in all' if over_blocks else 's per block-epoch'} over {axis}{whose}"
    title = tag("text", words, y=-16, class_="title")
    if not found:
        return join(title, tag("text", "not measured", x=WIDTH / 2, y=HEIGHT / 2, class_="mid"))
    values = [(float(at), row["seconds_wall" if over_blocks else "seconds_per_block_epoch"]) for at, row in found]
    dashed, words = straight(values) if over_blocks else (scaled(axis, values), None)
    x = linear_axis([at for at, _ in values])
    y = linear_axis([value for _, value in [*values, *dashed] if value > 0])

    def path(line: list[tuple[float, float]], name: str) -> Markup:
        steps = (f"{WIDTH * x.at(at):.1f} {place(y, value)}" for at, value in line)
        return tag("path", d="M" + "L".join(steps), class_=name)

    grid = [
        join(
            tag("line", x1=0, x2=WIDTH, y1=place(y, value), y2=place(y, value), class_="grid"),
            tag("text", text, x=-8, y=place(y, value), dy=".32em", class_="end"),
        )
        for value, text in y.ticks
    ]
    ticks = [tag("text", f"{at:g}", x=f"{WIDTH * x.at(at):.1f}", y=HEIGHT + 17, class_="mid") for at, _ in values]
    dots = [
        tag("circle", tag("title", f"{at:g}: {value:.3f} s"), cx=f"{WIDTH * x.at(at):.1f}", cy=place(y, value), r=3.5)
        for at, value in values
    ]
    base = tag("line", x1=0, x2=WIDTH, y1=HEIGHT, y2=HEIGHT, class_="base")
    note = tag("text", words, x=WIDTH, y=HEIGHT - 10, class_="end") if words else None
    lines = [path(dashed, "model"), path(values, "measured")]
    return join(title, grid, base, ticks, lines, tag("g", dots, class_="dot"), note)


def place(y: Axis, value: float) -> str:
    """Pixels below the upper edge of a panel."""
    return f"{HEIGHT * (1 - y.at(value)):.1f}"


def scaled(axis: str, values: list[tuple[float, float]], steps: int = 32) -> list[tuple[float, float]]:
    """The usual run's seconds, or the last one's without it, as they were if only the arithmetic counted."""
    usual = {"samples": BASE.samples, "length": BASE.length, "width": SHAPES["llama2-7b"].hidden}[axis]
    at, seconds = next((value for value in values if value[0] == usual), values[-1])

    def flops(size: float) -> float:
        value = round(size)
        heads = max(value // 128, 1)
        shape = Shape("scaled", 128 * heads, 344 * heads, heads, heads) if axis == "width" else SHAPES["llama2-7b"]
        changed = {"samples": BASE.samples, "length": BASE.length} | ({} if axis == "width" else {axis: value})
        return shape.learning_flops(**changed)

    last = values[-1][0]
    return [(last * k / steps, seconds * flops(last * k / steps) / flops(at)) for k in range(1, steps + 1)]


def straight(values: list[tuple[float, float]]) -> tuple[list[tuple[float, float]], str]:
    """The line through seconds over blocks by least squares, from no block on, and what it says in words."""
    middle, mean = (sum(column) / len(values) for column in zip(*values, strict=True))
    slope = sum((at - middle) * (v - mean) for at, v in values) / sum((at - middle) ** 2 for at, _ in values)
    fixed = mean - slope * middle
    return [(0.0, fixed), (values[-1][0], fixed + slope * values[-1][0])], f"{fixed:.0f} s + {slope:.1f} s a block"


def fill(page: str, made: str, name: str = "calibration") -> str:
    """A Markdown page with `made` between the lines that begin and end the part `name`."""
    begin, end = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
    before, found, rest = page.partition(f"{begin}\n")
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise SystemExit(f"no line {begin} and, after it, a line {end} in the page; write them where the part belongs")
    return f"{before}{begin}\n{made}{end}{after}"


def step_part(found: Row) -> str:
    """Where a step's time went, as `benchmarks/step_profile.py` found it."""
    return f"{found['machine']}, torch {found['torch']}; `{found['command']}`:\n\n{step_table(found)}"


def main(arguments: list[str] | None = None) -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--docs", type=Path, metavar="PAGE.md")
    parser.add_argument("--plot", type=Path, metavar="IMAGE.svg")
    parser.add_argument("--step", type=Path, metavar="FILE.json", help="of benchmarks/step_profile.py")
    args = parser.parse_args(arguments)
    rows = read_rows(args.files)
    if args.docs is None:
        print(tables(rows), end="")
    else:
        page = fill(args.docs.read_text(encoding="utf-8"), tables(rows))
        if args.step is not None:
            page = fill(page, step_part(json.loads(args.step.read_text(encoding="utf-8"))), "step")
        args.docs.write_text(page, encoding="utf-8")
    if args.plot is not None:
        args.plot.parent.mkdir(parents=True, exist_ok=True)
        args.plot.write_text(plot(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
