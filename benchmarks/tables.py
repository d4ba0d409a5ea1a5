"""Markdown tables of the results that `benchmarks/accuracy.py` writes, one a file.

    python benchmarks/tables.py FILE.jsonl ...
    python benchmarks/tables.py --readme README.md FILE.jsonl ...

The second puts each table between the lines <!-- table: FILE --> and <!-- /table --> of README.md, FILE without
folder and ending.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

Row = dict[str, Any]
METHODS = ("fp", "rtn", "omniquant", "lrquant")  # further ones come after them, by name
SCHEME = re.compile(r"w(\d+)(b?)a(\d+)(?:g(\d+))?")
MARKED = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- /table -->)", re.DOTALL)
BITS = ("bits_per_weight", "bits_per_weight_with_embeddings")
NONE = "–"


def read_rows(file: Path) -> list[Row]:
    """The runs in a results file, in the order of the table; of the lines of one run the last counts."""
    rows: dict[tuple[Any, ...], Row] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            rows[place(row)] = row
        except (ValueError, LookupError, TypeError) as error:
            reason = f"not a line of benchmarks/accuracy.py ({error!r})"
            raise SystemExit(f"{file}:{number}: {reason}; remove it") from None
    return [rows[key] for key in sorted(rows)]


def place(row: Row) -> tuple[Any, ...]:
    """Where a run stands in the table: the model as it is, then weights alone, wider before narrower.

    Within a scheme, by method, plain before labelled, and by epochs. Two runs never have the same place.
    """
    method, scheme = row["method"], row["scheme"]
    sizes = SCHEME.fullmatch(scheme)
    weight, five, activation, group = sizes.groups() if sizes else ("99", "", "99", "")
    rank = METHODS.index(method) if method in METHODS else len(METHODS)
    coarse_first = -int(group) if group else float("-inf")
    return -int(activation), -int(weight), not five, coarse_first, scheme, rank, method, row["label"], row["epochs"]


def table(rows: list[Row]) -> str:
    """The table in Markdown, ending with a newline; a scheme is named in its first row only."""
    texts = list(dict.fromkeys(name for row in rows for name in row["ppl"]))
    heads = ["scheme", "method", "epochs", *(f"{name} ppl" for name in texts)]
    heads += ["bits per weight", "with embeddings", "s per block-epoch (runs at once)", "peak GPU GiB"]
    lines = [heads, ["---", "---"] + ["---:"] * (len(heads) - 2)]
    scheme = None
    for row in rows:
        lines.append([row["scheme"] if row["scheme"] != scheme else "", *cells(row, texts)])
        scheme = row["scheme"]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def cells(row: Row, texts: list[str]) -> list[str]:
    """All cells of a row but its scheme."""
    pace, peak = row.get("seconds_per_block_epoch"), row.get("fit", {}).get("peak_gpu_bytes")
    return [
        f"{row['method']} ({row['label']})" if row["label"] else row["method"],
        NONE if row["method"] == "fp" else str(row["epochs"]),
        *(short(row["ppl"][name]) if name in row["ppl"] else NONE for name in texts),
        *(f"{row[key]:.3f}" if key in row else NONE for key in BITS),
        NONE if pace is None else f"{pace:.2f} ({row['jobs_at_once']})",
        NONE if peak is None else f"{peak / 2**30:.2f}",
    ]


def short(ppl: float | str) -> str:
    """Four significant digits, two from 10,000 up: 21.60, 2051, 9.2e5. Text ("inf", "nan") as it is."""
    if isinstance(ppl, str):
        return ppl
    exponent = int(f"{ppl:.3e}".partition("e")[2])  # of the rounded number: 9999.9 counts as 10,000
    if exponent < 4:
        return f"{ppl:.{3 - exponent}f}"
    mantissa, _, power = f"{ppl:.1e}".partition("e")
    return f"{mantissa}e{int(power)}"


def fill(text: str, tables: dict[str, str]) -> str:
    """`text` with each of `tables` between the markers of its name; other markers keep what they hold."""
    for name in tables.keys() - {match[2] for match in MARKED.finditer(text)}:
        remedy = f"write a line <!-- table: {name} --> and, after it, a line <!-- /table -->"
        raise SystemExit(f"table {name}: there is no place for it; {remedy}")
    return MARKED.sub(lambda m: m[1] + tables[m[2]] + m[3] if m[2] in tables else m[0], text)


def main(arguments: list[str] | None = None) -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--readme", type=Path, metavar="README.md")
    args = parser.parse_args(arguments)
    tables = {file.stem: table(read_rows(file)) for file in args.files}
    if args.readme is None:
        print("\n".join(tables.values()), end="")
    else:
        args.readme.write_text(fill(args.readme.read_text(encoding="utf-8"), tables), encoding="utf-8")


if __name__ == "__main__":
    main()
