"""Tables that may be wider than the screen: they scroll by themselves, the page does not."""

from __future__ import annotations

from collections.abc import Sequence

from ptql.report.html import Markup, tag

DASH = "–"  # a figure that there is not


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], caption: str, text_columns: int = 1) -> Markup:
    """A table; the first `text_columns` columns are text, the others figures. Columns without any are left out.

    Args:
        columns: Their headings.
        rows: Cells, as many as there are columns.
        caption: What the table shows, for those who do not see it.
        text_columns: How many columns are set left.
    """

    used = [i for i in range(len(columns)) if not rows or any(str(row[i]) not in ("", DASH) for row in rows)]

    def kind(place: int) -> str | None:
        return None if place < text_columns else "n"

    heads = [tag("th", name, scope="col", class_=kind(i)) for i, name in enumerate(columns) if i in used]
    body = [tag("tr", [tag("td", row[i], class_=kind(i)) for i in used]) for row in rows]
    inner = tag("table", tag("thead", tag("tr", heads)), tag("tbody", body))
    return tag("div", inner, class_="scroll", role="region", tabindex=0, aria_label=caption)


def titled(heading: str, name: str, *parts: object) -> Markup:
    """A section of the page, `name` is its id."""
    return tag("section", tag("h2", heading), parts, id=name)


def absent(heading: str, name: str, *reason: object) -> Markup:
    """A section whose figures the run does not have."""
    return titled(heading, name, tag("p", reason, class_="absent"))
