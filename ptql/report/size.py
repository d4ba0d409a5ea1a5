"""Where the stored bytes are."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ptql.evaluation.size import BITS
from ptql.report.html import Markup, tag
from ptql.report.numbers import figure, megabytes, plural, real
from ptql.report.plot import legend, percent
from ptql.report.run_files import RunFiles, section
from ptql.report.tables import DASH, absent, table, titled

HEADING, NAME = "Size", "size"
KINDS = ("codes", "scales and zero points", "biases of these layers", "rest of the blocks", "embeddings, head, norm")


def size(run: RunFiles) -> Markup:
    """The section on true bits and what they are spent on."""
    parts = stored_bytes(run.path / "model")
    bits = real(run.metrics.get("bits_per_weight"))
    if not parts and not math.isfinite(bits):
        return absent(HEADING, NAME, "The packed model is not there yet.")
    shown: list[Markup] = [tag("p", _words(run))] if math.isfinite(bits) else []
    if parts:
        shown += [_strip(parts), _table(parts, real(run.metrics.get("weights")))]
    return titled(HEADING, NAME, shown)


def stored_bytes(model: Path) -> dict[str, float]:
    """Bytes of the tensors of a packed model by what they are for; only headers are read. Empty if there are none."""
    try:
        packed = section(json.loads((model / "config.json").read_text(encoding="utf-8")), "quantization_config")
        found: dict[str, float] = dict.fromkeys(KINDS, 0.0)
        for file in sorted(model.glob("*.safetensors")):
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118
                    one = tensors.get_slice(name)
                    found[kind_of(name, packed)] += math.prod(one.get_shape()) * BITS[one.get_dtype()] / 8
    except (OSError, ValueError, KeyError, SafetensorError):
        return {}
    return {kind: count for kind, count in found.items() if count}


def kind_of(name: str, packed: dict[str, Any]) -> str:
    """Which of `KINDS` a tensor of a packed model is; `packed` is its quantization_config."""
    blocks, linears = str(packed.get("blocks", "")), packed.get("linears")
    if not blocks or not name.startswith(f"{blocks}."):
        return KINDS[4]
    inner = name.removeprefix(f"{blocks}.").partition(".")[2]
    layer, _, part = inner.rpartition(".")
    if not isinstance(linears, list) or layer not in linears:
        return KINDS[3]
    return {"codes": KINDS[0], "signs": KINDS[0], "weight": KINDS[0], "bias": KINDS[2]}.get(part, KINDS[1])


def _words(run: RunFiles) -> str:
    bits, whole, weights, parameters = (
        real(run.metrics.get(key))
        for key in ("bits_per_weight", "bits_per_weight_with_embeddings", "weights", "parameters")
    )
    over = f" over {plural(int(weights), 'weight')}" if math.isfinite(weights) else ""
    words = f"{figure(bits)} bits per quantised weight: everything stored for the quantised matrices{over}."
    if math.isfinite(whole):
        all_of = f" {plural(int(parameters), 'parameter')}" if math.isfinite(parameters) else " parameters"
        words += f" {figure(whole)} bits over all{all_of}, embeddings included."
    return words


def _strip(parts: dict[str, float]) -> Markup:
    total, at, bars = sum(parts.values()), 0.0, []
    for kind, count in parts.items():
        words = f"{kind}: {megabytes(count)}, {100 * count / total:.1f} %"
        rect = tag("rect", tag("title", words), x=percent(at), width=percent(count / total), height=26)
        bars.append(tag("g", rect, class_=_class(kind)))
        at += count / total
    label = "Share of the stored bytes by kind"
    drawing = tag("svg", bars, width="100%", height=26, role="img", aria_label=label, class_="strip")
    return tag("figure", legend(*((_class(kind), kind) for kind in parts)), drawing)


def _class(kind: str) -> str:
    return f"kind{KINDS.index(kind)}"


def _table(parts: dict[str, float], weights: float) -> Markup:
    total = sum(parts.values())
    rows: list[list[object]] = [
        [
            kind,
            megabytes(count),
            f"{100 * count / total:.1f} %",
            figure(count * 8 / weights, 3) if weights > 0 and kind in KINDS[:3] else DASH,
        ]
        for kind, count in parts.items()
    ]
    rows.append([tag("strong", "all tensors"), tag("strong", megabytes(total)), "100 %", ""])
    return table(["Stored for", "Size", "Share", "Bits per weight"], rows, "Stored bytes by kind")
