"""What a reader must know before trusting the figures."""

from __future__ import annotations

import math
import re

from ptql.report.html import Markup, tag
from ptql.report.numbers import plural, ranges_of, real
from ptql.report.ranges import not_finite
from ptql.report.run_files import Block, RunFiles, section


def notices(run: RunFiles) -> list[str]:
    """Sentences: files that are missing, what the run warned of, and what its blocks say."""
    fit = section(run.metrics, "fit")
    warned = fit.get("warnings")
    found = [*run.troubles, *(grouped(list(map(str, warned))) if isinstance(warned, list) else _of_blocks(run.blocks))]
    blocks, expected = run.blocks, real(fit.get("blocks"))
    if math.isfinite(expected) and len(blocks) < expected:
        found.append(f"Only {len(blocks)} of {plural(int(expected), 'block')} are in the ledger.")
    if odd := [b for b in blocks if "loss" in b.summary and not math.isfinite(b.number("loss"))]:
        found.append(f"The loss of {_named(odd)} is not finite.")
    if odd := [b for b in blocks if _odd_ranges(run, b)]:
        found.append(f"Activations that are not finite reach linear layers of {_named(odd)}.")
    return found


def grouped(warnings: list[str]) -> list[str]:
    """Warnings of single blocks ("block 3: …") that say the same drawn together ("blocks 3–5: …")."""
    said: dict[str, list[int]] = {}
    for warning in warnings:
        found = re.fullmatch(r"block (\d{1,9}): (.*)", warning, re.DOTALL)
        said.setdefault(found[2] if found else warning, []).extend([int(found[1])] if found else [])
    return [f"B{_numbered(indices)[1:]}: {text}" if indices else text for text, indices in said.items()]


def _of_blocks(blocks: list[Block]) -> list[str]:
    """The same from the ledger, for a run that is not finished or noted no warnings."""
    found = []
    if fell := [b for b in blocks if b.summary.get("fell_back") is True]:
        found.append(f"Learning made {_named(fell)} worse, so the initial values were kept there.")
    if skipped := [b for b in blocks if b.number("skipped_steps") > 0]:
        steps = plural(int(sum(b.number("skipped_steps") for b in skipped)), "step")
        found.append(f"{steps} with gradients that were not finite left out in {_named(skipped)}.")
    return found + grouped(
        [f"block {b.index}: {name}: {remark}" for b in blocks for name, remark in section(b.summary, "remarks").items()]
    )


def box(run: RunFiles) -> Markup:
    """The notices as a list, or the line that there are none."""
    found = notices(run)
    if not found:
        words = "No warnings: no block fell back to its start, no step was skipped, all losses are finite."
        return tag("p", words, class_="fine", id="warnings")
    items = [tag("li", text) for text in found]
    return tag("section", tag("h2", "Warnings"), tag("ul", items), class_="warnings", id="warnings")


def _named(blocks: list[Block]) -> str:
    return _numbered([block.index for block in blocks])


def _numbered(indices: list[int]) -> str:
    return ("block " if len(indices) == 1 else "blocks ") + ranges_of(indices)


def _odd_ranges(run: RunFiles, block: Block) -> bool:
    return any(not_finite(peaks) for pair in run.ranges(block).values() for peaks in pair if peaks is not None)
