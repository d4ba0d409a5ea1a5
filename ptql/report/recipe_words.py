"""A run's recipe in words: model, method, scheme."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from ptql.report.numbers import real
from ptql.report.run_files import RunFiles, section


@dataclass(frozen=True)
class Recipe:
    """What a run is called.

    Args:
        source: Directory or hub id of the full-precision model; "" if not known.
        model: Last part of the source's name.
        method: Of the recipe; "" if not known.
        scheme: `w4a4`, `w2a16g64`; "" if not known.
        words: The scheme in words; "" if not known.
    """

    source: str
    model: str
    method: str
    scheme: str
    words: str


def recipe_of(run: RunFiles) -> Recipe:
    """From the metrics, the ledger and the configuration, whichever of them is there."""
    fit = section(run.metrics, "fit")
    source = str(fit.get("original") or fit.get("source") or section(run.config, "model").get("source") or "")
    method = fit.get("method") or section(run.config, "model").get("method") or ""
    weight = _either(run, "weight")
    activation = _either(run, "activation")
    bits, group, act = real(weight.get("bits")), real(weight.get("group_size")), real(activation.get("bits"))
    if bits != bits:
        return Recipe(source, PurePath(source).name or "A model", str(method), "", "")
    budget = real(section(run.identity, "bits").get("bits"))
    mixed = budget == budget
    bits = budget if mixed else bits
    act, cache = (16 if act != act else act), real(activation.get("kv_bits"))
    grouped, balanced = group > 0, weight.get("balanced") is True and not mixed
    share, wide = real(weight.get("salient")), real(weight.get("salient_bits"))
    if share == share:
        bits = share * wide + 1 - share
    scheme = f"w{bits:g}{'b' if balanced else ''}a{act:g}"
    scheme += (f"kv{cache:g}" if cache == cache else "") + (f"g{group:g}" if grouped else "")
    rows = f"groups of {group:g} columns" if grouped else "a scale per row"
    rows += " and cluster of columns" if weight.get("clustered") is True else ""
    kind = ", symmetric" if weight.get("symmetric") is True else ""
    levels = "three-level" if bits == 1 else "five-level"
    what = levels if balanced else f"{bits:g}-bit" if mixed or share != share else _signs(bits, share, wide)
    words = f"{what} weights{' on average' if mixed else ''} ({rows}{kind}), "
    words += f"{act:g}-bit activations" if act < 16 else "activations as they are"
    words += f", {cache:g}-bit keys and values" if cache == cache else ""
    if apart := section(run.identity, "recipe").get("layers"):
        words += f"; other formats for {', '.join(str(pattern) for pattern, _ in apart)}"
    return Recipe(source, PurePath(source).name or "A model", str(method), scheme, words)


def _signs(bits: float, share: float, wide: float) -> str:
    return f"signs for most weights, {wide:g} bits in {100 * share:g} % of the input channels: {bits:.3g}-bit"


def _either(run: RunFiles, key: str) -> dict[str, Any]:
    return section(run.identity, "recipe", key) or section(run.config, "model", key)
