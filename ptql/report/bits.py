"""The bits that each matrix got out of a budget: blocks by layers, as a heat map."""

from __future__ import annotations

import math

from ptql.report.html import Markup, join, tag
from ptql.report.numbers import figure, real
from ptql.report.run_files import RunFiles, section
from ptql.report.tables import titled
from ptql.report.weight_error import Shade, heat_map


def bits(run: RunFiles) -> Markup:
    """The section with the heat map; nothing for a run without a budget."""
    found = section(run.metrics, "bits")
    layers, names = section(found, "layers"), run.layer_names
    if not layers or not names:
        return join()
    cells = [[_width(layers.get(f"{block.index}.{name}")) for block in run.blocks] for name in names]
    shade = Shade([value for row in cells for value in row])
    reached, budget = figure(real(found.get("reached"))), real(found.get("budget"))
    shares = section(found, "share_of_weights").items()
    parts = ", ".join(f"{100 * real(share):.0f} % at {width}" for width, share in shares)
    words = f"Chosen to meet a budget of {budget:g} bits per weight; {reached} are stored, scales and all. "
    words += f"Widths of codes, by the weights that have them: {parts}."
    lost, alike = real(found.get("divergence")), section(found, "uniform")
    if math.isfinite(lost):
        words += f" Before learning, predictions are {figure(lost, 3)} nats from full precision on calibration text; "
        words += f"with {alike.get('bits')} bits for all, {figure(real(alike.get('divergence')), 3)}."
    drawn = heat_map(run, names, cells, shade, "Bits", digits=1)
    return titled("Bits per layer", "bits", tag("p", words), tag("figure", shade.legend(), drawn))


def _width(name: object) -> float:
    """Of codes called `4`, `2b` or `1b`."""
    return real(float(text)) if (text := str(name).removesuffix("b")).isdecimal() else math.nan
