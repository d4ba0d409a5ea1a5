"""Elements of HTML and SVG as strings, with everything escaped that is not markup already."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

VOID = frozenset({"meta", "br", "hr", "col"})


class Markup(str):
    """Text that is HTML: what `tag` returns, and what is put in as it is."""


def tag(name: str, /, *children: object, **attributes: object) -> Markup:
    """An element.

    Args:
        name: Of the element.
        children: Markup, text (escaped), numbers, lists of these; None is left out.
        attributes: `class_="a"` is class, `stroke_width=2` is stroke-width; None and False are left out.
    """
    head = name + "".join(
        _attribute(key, value) for key, value in attributes.items() if value is not None and value is not False
    )
    if name in VOID:
        return Markup(f"<{head}>")
    return Markup(f"<{head}>{''.join(_texts(children))}</{name}>")


def join(*parts: object) -> Markup:
    """Parts after one another."""
    return Markup("".join(_texts(parts)))


def _attribute(key: str, value: object) -> str:
    name = key.rstrip("_").replace("_", "-")
    return f' {name}="{"" if value is True else escape(_clean(str(value)), quote=True)}"'


def _texts(parts: Iterable[object]) -> Iterable[str]:
    for part in parts:
        if isinstance(part, Markup):
            yield part
        elif isinstance(part, (list, tuple)):
            yield from _texts(part)
        elif part is not None:
            yield escape(_clean(str(part)), quote=False)


def _clean(text: str) -> str:
    """Without what HTML can't hold: control characters, and halves of surrogate pairs."""
    text = text.encode("utf-8", "replace").decode("utf-8")
    return "".join(c if c >= " " or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
