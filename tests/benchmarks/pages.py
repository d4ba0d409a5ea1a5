"""Pages of docs/ hold the tables that the results in the repository make."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]


def results(pattern: str) -> list[str]:
    """The files of raw results that a pattern names, in order."""
    found = sorted((ROOT / "benchmarks/results").glob(pattern))
    assert found, pattern
    return [str(file) for file in found]


def in_one(pattern: str, folder: Path) -> str:
    """A file in `folder` with the lines of all of them."""
    file = folder / "results.jsonl"
    file.write_text("".join(Path(part).read_text(encoding="utf-8") for part in results(pattern)), encoding="utf-8")
    return str(file)


def assert_filled(page: str, folder: Path, *fill: Callable[[str], object]) -> None:
    """Filling a copy of a page, in `folder`, changes nothing."""
    text = (ROOT / page).read_text(encoding="utf-8")
    copy = folder / "page.md"
    copy.write_text(text, encoding="utf-8")
    for each in fill:
        each(str(copy))
    assert copy.read_text(encoding="utf-8") == text
