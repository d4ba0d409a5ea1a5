"""Tables of the results that `benchmarks/ptq161.py` writes; needs no GPU.

    python benchmarks/ptq161_tables.py FILE.jsonl ...
    python benchmarks/ptq161_tables.py FILE.jsonl --docs docs/methods/ptq161.md

The second puts each table between the lines <!-- begin: NAME --> and <!-- end: NAME --> of the Markdown file that has
them, NAME being parts or ablations; a table without rows leaves what is there.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.abq_tables import Row, Tables, bits, ppl_cells, run, texts_of  # noqa: E402
from benchmarks.calibration_tables import markdown  # noqa: E402
from benchmarks.ptq161 import ABLATIONS, BASELINES, PARTS  # noqa: E402


def parts_table(rows: list[Row]) -> str:
    """A row each, the other methods first."""
    return _table(rows, [*BASELINES, *PARTS])


def ablations_table(rows: list[Row]) -> str:
    """A row each, below the recipe itself."""
    return _table([row for row in rows if row["label"] in ("ptq161", *ABLATIONS)], ["ptq161", *ABLATIONS])


def _table(rows: list[Row], order: list[str]) -> str:
    texts = texts_of(rows)
    lines = [
        [row["label"], str(row["epochs"]), bits(row), *ppl_cells(row, texts)]
        for row in sorted(rows, key=lambda row: order.index(row["label"]))
    ]
    return markdown(["", "epochs", "bits per weight", *(f"{text} ppl" for text in texts)], lines, words=1)


TABLES: Tables = {"parts": (parts_table, ("baselines",)), "ablations": (ablations_table, ("parts",))}


def main(arguments: list[str] | None = None) -> None:
    run(__doc__, TABLES, ("parts", "baselines", "ablations"), "benchmarks/ptq161.py", arguments)


if __name__ == "__main__":
    main()
