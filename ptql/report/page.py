"""The page as a whole."""

from __future__ import annotations

from datetime import datetime

from ptql.report.bits import bits
from ptql.report.cost import cost
from ptql.report.html import Markup, join, tag
from ptql.report.losses import losses
from ptql.report.notices import box
from ptql.report.outliers import outliers
from ptql.report.quality import quality
from ptql.report.recipe_words import recipe_of
from ptql.report.restoration import restoration
from ptql.report.run_files import RunFiles
from ptql.report.setup import setup
from ptql.report.size import size
from ptql.report.style import CSS
from ptql.report.summary import head
from ptql.report.weight_error import weight_error

# Nothing is fetched and nothing runs, whatever the files of a run hold.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def page(run: RunFiles) -> Markup:
    """The page: one document without references to other files or hosts."""
    recipe = recipe_of(run)
    title = " ".join(part for part in (recipe.model, recipe.method, recipe.scheme) if part)
    sections = (quality, restoration, losses, bits, weight_error, outliers, size, cost, setup)
    written = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    body = tag("main", head(run), box(run), [section(run) for section in sections])
    head_ = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"{title} – ptql"),
        tag("style", Markup(CSS)),
    )
    foot = tag("footer", f"Written by ptql, {written}.")
    return join(Markup("<!doctype html>\n"), tag("html", head_, tag("body", body, foot), lang="en"), "\n")
