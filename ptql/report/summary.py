"""The head of the page: what it is, how it went, and the figures that matter most."""

from __future__ import annotations

import math

from ptql.report.html import Markup, join, tag
from ptql.report.numbers import duration, figure, megabytes, real
from ptql.report.recipe_words import recipe_of
from ptql.report.run_files import RunFiles, section


def head(run: RunFiles) -> Markup:
    """Title, verdict and key figures."""
    recipe = recipe_of(run)
    title = join(recipe.model, " ", tag("span", f"{recipe.method} {recipe.scheme}".strip(), class_="recipe"))
    return tag(
        "header",
        tag("p", "ptql run", class_="kicker"),
        tag("h1", title),
        tag("p", verdict(run), class_="verdict"),
        tag("dl", _tiles(run), class_="tiles"),
    )


def verdict(run: RunFiles) -> str:
    """One or two sentences: what was made, at what loss, how large it is."""
    recipe = recipe_of(run)
    by, to = (f" with {recipe.method}" if recipe.method else ""), (f" to {recipe.words}" if recipe.words else "")
    made = f"Quantised{by}{to}." if by or to else "What was run is not known."
    bits = real(run.metrics.get("bits_per_weight"))
    stored = f" at {figure(bits, 3)} bits per weight" if math.isfinite(bits) else ""
    name, ours, source = first_perplexity(run)
    if not name:
        size = f" It stores {figure(bits, 3)} bits per weight." if stored else ""
        return f"{made} Perplexity has not been measured yet.{size}"
    if not math.isfinite(ours):
        return f"{made} The model is broken: its perplexity on {name} is {figure(ours)}{stored}."
    if not math.isfinite(source):
        return f"{made} Perplexity on {name} is {figure(ours)}{stored}; the full-precision model was not measured."
    change = ours / source
    if change < 0.995:
        return f"{made} Perplexity on {name} falls from {figure(source)} to {figure(ours)}{stored}."
    word = "stays at" if change < 1.005 else "rises from"
    figures = figure(ours) if change < 1.005 else f"{figure(source)} to {figure(ours)} (×{figure(change, 3)})"
    return f"{made} Perplexity on {name} {word} {figures}{stored}."


def first_perplexity(run: RunFiles) -> tuple[str, float, float]:
    """Name, perplexity, and the source's, of a text: one that was measured for both, if any; ("", nan, nan) if none."""
    ours, source = section(run.metrics, "ppl"), section(run.metrics, "source", "ppl")
    names = [name for name in ours if name in source] or list(ours)
    return (names[0], real(ours[names[0]]), real(source.get(names[0]))) if names else ("", math.nan, math.nan)


def _tiles(run: RunFiles) -> list[Markup]:
    tiles = []
    name, ours, source = first_perplexity(run)
    if name:
        note = f"{name}; source {figure(source)}" if math.isfinite(source) else name
        tiles.append(_tile("Perplexity", figure(ours), note))
    bits, whole = (real(run.metrics.get(key)) for key in ("bits_per_weight", "bits_per_weight_with_embeddings"))
    if math.isfinite(bits):
        note = f"{figure(whole, 3)} with embeddings" if math.isfinite(whole) else ""
        tiles.append(_tile("Bits per weight", figure(bits, 3), note))
    size, parameters = real(run.metrics.get("size_bytes")), real(run.metrics.get("parameters"))
    if math.isfinite(size):
        share = f"{100 * size / (2 * parameters):.0f} % of 16-bit" if parameters > 0 else ""
        tiles.append(_tile("On disk", megabytes(size), share))
    fit = section(run.metrics, "fit")
    if math.isfinite(seconds := real(fit.get("seconds"))):
        tiles.append(_tile("Time", duration(seconds), f"on {fit['device']}" if "device" in fit else ""))
    return tiles


def _tile(name: str, value: str, note: str) -> Markup:
    return tag(
        "div", tag("dt", name), tag("dd", value, class_="value"), tag("dd", note, class_="note") if note else None
    )
