"""Plans of PTQ1.61's figures run what they say, each once; the tables hold what the rows say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import ptq161, ptq161_tables
from benchmarks.abq_tables import read_rows, tables
from benchmarks.accuracy import fit_command
from ptql.cli import main
from tests.benchmarks.pages import assert_filled, results
from tests.benchmarks.test_abq_benchmark import arguments, row
from tests.benchmarks.test_lrquant_benchmark import cells
from tests.words import save_source, save_text

PLANS = ("parts", "baselines", "ablations")


def test_each_row_has_a_name_and_each_calibration_one_command() -> None:
    args = arguments(*PLANS)
    jobs = ptq161.planned(args)
    assert len({job.name(args) for job in jobs}) == len({job.fit_name(args) for job in jobs}) == len(jobs) == 17
    commands = {tuple(fit_command(job.run, args, "/t/wiki.txt", Path("/w/run"))) for job in jobs}
    assert len(commands) == len(jobs)
    assert {job.label for job in jobs if not job.run.epochs} == {"signs alone", "salient channels", "rtn"}
    assert all(job.texts == ("a", "b") for job in jobs)


@pytest.mark.parametrize("job", ptq161.planned(arguments(*PLANS)), ids=lambda job: re.sub(r"\W+", "_", job.label))
def test_its_command_is_taken(job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PTQL_CACHE", str(tmp_path / "cache"))
    source, text = save_source(tmp_path / "model"), save_text(tmp_path / "words.txt")
    args = arguments(*PLANS, model=source, samples=4, length=16, batch_size=2, precision="32-true")
    command = fit_command(job.run, args, str(text), tmp_path / "run")
    assert main([*command, "--trainer.accelerator", "cpu", "--trainer.fast_dev_run", "true"]) == 0


def test_the_tables() -> None:
    own = {"method": "ptq161", "scheme": "w1.61a16", "bits_per_weight": 1.65}
    found = [row("ablations", "no NLC", **own, ppl={"a": 9.0, "b": 8.0}), row("parts", "ptq161", **own)]
    found += [row("parts", "signs alone", **own), row("baselines", "rtn", "w2a16", "rtn", bits_per_weight=2.1)]
    made = tables(found, ptq161_tables.TABLES)
    head = ["", "epochs", "bits per weight", "a ppl", "b ppl"]
    assert [line[0] for line in cells(made["parts"])[2:]] == ["rtn", "signs alone", "ptq161"]
    assert cells(made["ablations"])[0] == head
    assert cells(made["ablations"])[2:] == [
        ["ptq161", "20", "1.650", "100.0", "200.0"],
        ["no NLC", "20", "1.650", "9.000", "8.000"],
    ]


def test_a_foreign_line_is_named(tmp_path: Path) -> None:
    file = tmp_path / "r.jsonl"
    file.write_text(json.dumps(row("grid", "abq")) + "\n")
    with pytest.raises(SystemExit, match=r"r\.jsonl:1: not a line of benchmarks/ptq161\.py"):
        read_rows([file], PLANS, "benchmarks/ptq161.py")


def test_the_page_has_what_the_results_say(tmp_path: Path) -> None:
    files = results("ptq161-*.jsonl")
    assert_filled("docs/methods/ptq161.md", tmp_path, lambda copy: ptq161_tables.main([*files, "--docs", copy]))
