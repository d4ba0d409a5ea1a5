"""The tables hold what the result files hold, and README.md holds the tables."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import tables

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def run(method: str, scheme: str, epochs: int = 0, label: str = "", **other: Any) -> dict[str, Any]:
    """A line as `benchmarks/accuracy.py` writes it, less what no table shows."""
    learned = {"seconds_per_block_epoch": 1.2993 if epochs else None, "jobs_at_once": 10}
    size = {"bits_per_weight": 4.03515625, "bits_per_weight_with_embeddings": 9.9282585}
    of_fit = {**learned, **size, "fit": {"peak_gpu_bytes": 2768517120}} if method != "fp" else {}
    row = {"method": method, "scheme": scheme, "epochs": epochs, "label": label, **of_fit}
    return {**row, "ppl": {"wikitext2": 108.7875, "c4": 147.6986}, **other}


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def columns(markdown: str, *names: str) -> list[tuple[str, ...]]:
    """The named columns, row by row, by splitting at bars."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines()]
    places = [lines[0].index(name) for name in names]
    return [tuple(line[place] for place in places) for line in lines[2:]]


@pytest.mark.parametrize(
    ("ppl", "shown"),
    [
        (21.6, "21.60"),
        (5.0, "5.000"),
        (0.98765, "0.9877"),
        (691.44, "691.4"),
        (2051.386, "2051"),
        (9999.4, "9999"),
        (9999.6, "1.0e4"),
        (10000.0, "1.0e4"),
        (921749.5, "9.2e5"),
        (5061430.9, "5.1e6"),
        (3.2e12, "3.2e12"),
        ("inf", "inf"),
        ("nan", "nan"),
    ],
)
def test_perplexities_are_short(ppl: float | str, shown: str) -> None:
    assert tables.short(ppl) == shown


def test_a_learned_row_shows_everything(tmp_path: Path) -> None:
    made = tables.table(tables.read_rows(write(tmp_path / "r.jsonl", run("lrquant", "w4a4", 20, "rse"))))
    head, rule, row = made.splitlines()
    assert row == "| w4a4 | lrquant (rse) | 20 | 108.8 | 147.7 | 4.035 | 9.928 | 1.30 (10) | 2.58 |"
    assert head.count("|") == rule.count("|") == row.count("|")
    assert made.endswith("|\n")


def test_what_a_row_does_not_have_is_a_dash(tmp_path: Path) -> None:
    on_cpu = run("rtn", "w4a4", fit={}, ppl={"c4": 21.0})
    made = tables.table(tables.read_rows(write(tmp_path / "r.jsonl", on_cpu, run("fp", "-"))))
    assert made.splitlines()[2:] == [
        "| - | fp | – | 108.8 | 147.7 | – | – | – | – |",
        "| w4a4 | rtn | 0 | – | 21.00 | 4.035 | 9.928 | – | – |",
    ]


def test_rows_are_grouped_by_scheme_then_method(tmp_path: Path) -> None:
    schemes = ["fp -", "w4a16", "w4a16g128", "w4a16g64", "w2a16", "w8a8", "w4a8", "w6a6", "w4a4"]
    methods = [("rtn", 0, ""), ("omniquant", 20, ""), ("lrquant", 5, ""), ("lrquant", 20, "")]
    methods += [("lrquant", 5, "rse"), ("another", 5, "")]
    rows = [run(m, s, e, label) for s in schemes[1:] for m, e, label in methods]
    made = tables.table(tables.read_rows(write(tmp_path / "r.jsonl", *reversed(rows), run("fp", "-"))))
    cells = columns(made, "scheme", "method", "epochs")
    assert [scheme for scheme, *_ in cells if scheme] == ["-", *schemes[1:]]
    order = [(f"{m} ({label})" if label else m, str(e)) for m, e, label in methods]
    assert [(method, epochs) for _, method, epochs in cells[1:]] == order * 8


def test_later_lines_of_a_run_replace_earlier_ones(tmp_path: Path) -> None:
    again = run("lrquant", "w4a4", 20, ppl={"wikitext2": 3.0})
    others = [run("lrquant", "w4a4", 5), run("lrquant", "w4a4", 20, "rse"), run("omniquant", "w4a4", 20)]
    file = write(tmp_path / "r.jsonl", run("lrquant", "w4a4", 20), *others, again)
    assert again in tables.read_rows(file)
    assert len(tables.read_rows(file)) == 4


@pytest.mark.parametrize("line", ["{", "[]", "3", '{"method": "rtn"}'])
def test_a_foreign_line_is_named(tmp_path: Path, line: str) -> None:
    file = write(tmp_path / "r.jsonl", run("rtn", "w4a4"))
    file.write_text(file.read_text() + line + "\n")
    with pytest.raises(SystemExit, match=r"r\.jsonl:2: not a line of .*; remove it"):
        tables.read_rows(file)


def test_only_what_is_between_the_markers_is_replaced(tmp_path: Path) -> None:
    text = "# A\n\n<!-- table: {} -->\n{}<!-- /table -->\nbetween\n<!-- table: other -->\nkeep\n<!-- /table -->\n"
    readme, file = tmp_path / "README.md", write(tmp_path / "one.jsonl", run("rtn", "w4a4"))
    readme.write_text(text.format("one", "old\n\nolder\n"), encoding="utf-8")
    for _ in range(2):
        tables.main(["--readme", str(readme), str(file)])
        assert readme.read_text(encoding="utf-8") == text.format("one", tables.table(tables.read_rows(file)))


def test_a_table_without_a_place_is_refused(tmp_path: Path) -> None:
    readme, file = tmp_path / "README.md", write(tmp_path / "one.jsonl", run("rtn", "w4a4"))
    readme.write_text("<!-- table: two -->\n<!-- /table -->\n", encoding="utf-8")
    with pytest.raises(SystemExit, match=r"table one: .*write a line <!-- table: one -->"):
        tables.main(["--readme", str(readme), str(file)])
    assert readme.read_text(encoding="utf-8") == "<!-- table: two -->\n<!-- /table -->\n"


def test_tables_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [write(tmp_path / f"{name}.jsonl", run("rtn", name)) for name in ("w4a4", "w6a6")]
    tables.main([str(file) for file in files])
    assert capsys.readouterr().out == "\n".join(tables.table(tables.read_rows(file)) for file in files)


def test_the_readme_agrees_with_the_results() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    names = re.findall(r"<!-- table: (\S+) -->", text)
    assert names, "README.md has lost its tables"
    made = {name: tables.table(tables.read_rows(RESULTS / f"{name}.jsonl")) for name in names}
    remedy = "python benchmarks/tables.py --readme README.md benchmarks/results/accuracy-*.jsonl"
    assert tables.fill(text, made) == text, f"README.md is behind its results: {remedy}"
