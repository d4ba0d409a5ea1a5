"""Plans of RPTQ's figures run what they say, each once; the tables hold what the rows say; clustering is timed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import clustering, rptq, rptq_tables
from benchmarks.abq_tables import read_rows, tables
from benchmarks.accuracy import fit_command
from ptql.cli import main
from tests.benchmarks.pages import assert_filled, in_one, results
from tests.benchmarks.test_abq_benchmark import arguments, options, row
from tests.benchmarks.test_lrquant_benchmark import cells
from tests.words import save_source, save_text

PLANS = ("grid", "clusters", "ranges", "weights", "learned", "codes")


def test_each_row_has_a_name_and_each_calibration_one_command() -> None:
    args = arguments(*PLANS)
    jobs = rptq.planned(args)
    assert len({job.name(args) for job in jobs}) == len(jobs)
    commands: dict[str, set[tuple[str, ...]]] = {}
    for job in jobs:
        fit = fit_command(job.run, args, "/t/wiki.txt", Path("/w/run"))
        commands.setdefault(job.fit_name(args), set()).add(tuple(fit))
    assert {len(found) for found in commands.values()} == {1}
    assert len(set.union(*commands.values())) == len(commands)
    labels = {job.label for job in jobs if job.plan == "grid"}
    assert {label.partition(": ")[0] for label in labels} == set(rptq.SCHEMES)
    for name in rptq.SCHEMES:
        assert {f"{name}: rptq", f"{name}: not reordered", f"{name}: rtn, a grid for each tensor"} <= labels
    assert {job.run.epochs for job in jobs if job.plan not in ("learned", "codes")} == {0}
    assert {job.label for job in jobs if job.plan != "grid"} < set(rptq_tables.ORDER)
    learned = {job.run.method: job.run.epochs for job in jobs if job.plan == "codes"}
    assert learned == {"gptq": 0, "omniquant": args.short_epochs, "abq": args.short_epochs}


def test_nothing_is_reordered_where_the_label_says_so() -> None:
    for job in rptq.planned(arguments("grid")):
        plain = "not reordered" in job.label
        assert (options(list(job.run.extra), "--model.transforms") == ["[]"]) == plain
        assert (options(list(job.run.extra), "--model.weight.clustered") == ["false"]) == plain


@pytest.mark.parametrize("job", rptq.planned(arguments("tiny")), ids=lambda job: re.sub(r"\W+", "_", job.label))
def test_its_command_is_taken(job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PTQL_CACHE", str(tmp_path / "cache"))
    source, text = save_source(tmp_path / "model"), save_text(tmp_path / "words.txt")
    args = arguments("tiny", model=source, samples=4, length=16, batch_size=2, precision="32-true")
    command = fit_command(job.run, args, str(text), tmp_path / "run")
    assert main([*command, "--trainer.accelerator", "cpu", "--trainer.fast_dev_run", "true"]) == 0


def test_the_tables() -> None:
    found = [row("grid", f"W4A4: {kind}", "w4a4", "rptq", bits_per_weight=4.2) for kind in rptq.KINDS]
    found.append(row("clusters", "8", "w4a4", "rptq", bits_per_weight=4.1, ppl={"a": 9.0, "b": 8.0}))
    found.append(row("clusters", "4", "w4a4", "rptq", bits_per_weight=4.1, ppl={"a": 9.5, "b": 8.5}))
    found.append(row("ranges", "minmax", "w4a4", "rptq", bits_per_weight=4.2, ppl={"a": 7.0, "b": 6.0}))
    made = tables(found, rptq_tables.TABLES)
    grid = cells(made["grid"])
    assert grid[0] == ["a ppl", *rptq.KINDS, "bits per weight, rptq"]
    assert grid[2] == ["W4A4", *["100.0"] * 5, "4.200"]
    assert cells(made["clusters"])[2:] == [
        ["4", "20", "4.100", "9.500", "8.500"],
        ["8", "20", "4.100", "9.000", "8.000"],
    ]
    assert [line[0] for line in cells(made["ranges"])[2:]] == ["W4A4: rptq", "W4A4: rptq, ranges by mse", "minmax"]


def test_a_foreign_line_is_named(tmp_path: Path) -> None:
    file = tmp_path / "r.jsonl"
    file.write_text(json.dumps(row("tasks", "abq")) + "\n")
    with pytest.raises(SystemExit, match=r"r\.jsonl:1: not a line of benchmarks/rptq\.py"):
        read_rows([file], rptq.PLANS, "benchmarks/rptq.py")


def test_the_pages_have_what_the_results_say(tmp_path: Path) -> None:
    def filled(copy: str) -> None:
        rptq_tables.main([*results("rptq-*.jsonl"), "--docs", copy])

    timed = in_one("clustering-*.jsonl", tmp_path)
    assert_filled("docs/methods/gptq.md", tmp_path, filled)
    assert_filled(
        *("docs/methods/rptq.md", tmp_path, filled),
        lambda copy: clustering.main(["--results", timed, "--docs", copy]),
    )


def test_clustering_is_timed_beside_the_originals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clustering, "SHAPES", {"toy": [(1, 40, 2, 6), (2, 16, 4, 3)]})
    results, page = tmp_path / "r.jsonl", tmp_path / "page.md"
    assert clustering.main(["--results", str(results)]) == 0
    (found,) = [json.loads(line) for line in results.read_text().splitlines()]
    assert found["seconds"] > 0
    assert found["spread"] == pytest.approx(found["spread_scikit_learn"], rel=0.05)
    page.write_text("<!-- begin: clustering -->\n<!-- end: clustering -->\n")
    assert clustering.main(["--results", str(results), "--docs", str(page)]) == 0
    assert cells(page.read_text())[2][0] == "toy"


def test_the_spread_is_that_of_clusters() -> None:
    points = torch.tensor([[[0.0], [2.0], [10.0]]])
    assert clustering.spread(points, torch.tensor([[0, 0, 1]])) == pytest.approx(2.0)
