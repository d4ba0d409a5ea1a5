"""Tables of the results that `benchmarks/ptq161.py` writes; needs no GPU.

    python benchmarks/ptq161_tables.py FILE.jsonl ...
    python benchmarks/ptq161_tables.py FILE.jsonl --docs docs/methods/ptq161.md

The second puts each table between the lines <!-- begin: NAME --> and <!-- end: NAME --> of the Markdown file that has
them, NAME being parts, ablations or restoration; a table without rows leaves what is there.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.abq_tables import Row, Tables, bits, ppl_cells, run, texts_of  # noqa: E402
from benchmarks.calibration_tables import markdown  # noqa: E402
from benchmarks.ptq161 import ABLATIONS, BASELINES, PARTS, RESTORED  # noqa: E402
from benchmarks.tables import NONE  # noqa: E402


def parts_table(rows: list[Row]) -> str:
    """A row each, the other methods first."""
    return _table(rows, [*BASELINES, *PARTS])


def ablations_table(rows: list[Row]) -> str:
    """A row each, below the recipe itself."""
    return _table([row for row in rows if row["label"] in ("ptq161", *ABLATIONS)], ["ptq161", *ABLATIONS])


def restoration_table(rows: list[Row]) -> str:
    """A row each: what LoRA had, what it made before that was rounded again, and the result."""
    texts, order = texts_of(rows), ["ptq161", *RESTORED]
    lines = []
    for row in sorted(rows, key=lambda row: order.index(row["label"])):
        lora = row.get("restored", {})
        before = ppl_cells(lora or None, texts)
        steps, tokens = (f"{lora[key]:,}" if lora else NONE for key in ("steps", "tokens"))
        lines.append([row["label"], str(row["epochs"]), bits(row), steps, tokens, *before, *ppl_cells(row, texts)])
    head = ["", "epochs", "bits per weight", "LoRA's steps", "and tokens"]
    head += [f"{text} ppl, restored" for text in texts] + [f"{text} ppl" for text in texts]
    return markdown(head, lines, words=1)


def _table(rows: list[Row], order: list[str]) -> str:
    texts = texts_of(rows)
    lines = [
        [row["label"], str(row["epochs"]), bits(row), *ppl_cells(row, texts)]
        for row in sorted(rows, key=lambda row: order.index(row["label"]))
    ]
    return markdown(["", "epochs", "bits per weight", *(f"{text} ppl" for text in texts)], lines, words=1)


TABLES: Tables = {
    "parts": (parts_table, ("baselines",)),
    "ablations": (ablations_table, ("parts",)),
    "restoration": (restoration_table, ()),
}


def main(arguments: list[str] | None = None) -> None:
    run(__doc__, TABLES, ("parts", "baselines", "ablations", "restoration"), "benchmarks/ptq161.py", arguments)


if __name__ == "__main__":
    main()
