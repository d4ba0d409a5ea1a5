"""Plans of ABQ-LLM's figures run what they say, each once; the tables hold what the rows say."""

from __future__ import annotations

import argparse
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks import abq, abq_tables, rows
from benchmarks.accuracy import fit_command
from tests.benchmarks.pages import assert_filled, results
from tests.benchmarks.test_lrquant_benchmark import cells

ROOT = Path(__file__).parents[2]
H100 = "NVIDIA H100 80GB HBM3"


def arguments(*plans: str, **changes: Any) -> argparse.Namespace:
    """A parsed command line."""
    texts = {"calibrations": {"wiki": "/t/wiki.txt"}, "texts": {"a": "/t/a.txt", "b": "/t/b.txt"}}
    sizes = {"epochs": 20, "short_epochs": 5, "samples": 128, "length": 2048, "batch_size": 4, "windows": None}
    budget = {"blocks": 4, "half_bits": 2.535, "whole_bits": 0.0355, "include_path": Path("/tasks"), "limit": None}
    budget |= {"seeds": 1}
    others = {"model": Path("/m"), "work": Path("/w"), "precision": "bf16-mixed", "jobs": 4, "deadline": float("inf")}
    return argparse.Namespace(plans=list(plans), **{**texts, **sizes, **budget, **others, **changes})


def options(command: list[str], name: str) -> list[str]:
    return [value for option, value in pairwise(command) if option == name]


def test_each_row_has_a_name_and_each_calibration_one_command() -> None:
    args = arguments("grid", "parts", "tasks", "budget", "start")
    jobs = abq.planned(args)
    assert len({job.name(args) for job in jobs}) == len(jobs) == 6 * 3 + 6 * 5 + 3 + 6 + 16
    commands: dict[str, set[tuple[str, ...]]] = {}
    for job in jobs:
        fit = fit_command(job.run, args, "/t/wiki.txt", Path("/w/run"))
        commands.setdefault(job.fit_name(args), set()).add(tuple(fit))
    assert {len(found) for found in commands.values()} == {1}
    assert len(set.union(*commands.values())) == len(commands) == len(jobs) - 3  # two of tasks, one of budget
    assert all(
        job.run.epochs == (20 if job.run.scheme in ("w4a4", "w2a8") else 5) for job in jobs if job.label != "rtn"
    )


def test_taking_a_part_away_leaves_the_others_as_they_are() -> None:
    recipe = yaml.safe_load((ROOT / "configs/methods/abq.yaml").read_text())["model"]
    smooth, compensate = recipe["transforms"]
    by_label = {job.label: job.run.extra for job in abq.planned(arguments("parts"))}
    assert json.loads(by_label["no compensation"][1]) == [smooth]
    without, other = json.loads(by_label["no s5"][1])
    assert other == compensate
    sites = smooth["init_args"]["sites"]
    assert without == {
        **smooth,
        "init_args": {**smooth["init_args"], "sites": [site for site in sites if site != "fc2"]},
    }
    assert "fc2" in sites
    assert recipe["objective"]["init_args"]["akl_mode"] == "faithful"  # so that "exact AKL" is another


def test_a_budget_stands_beside_uniform_bits_from_the_same_start() -> None:
    jobs = abq.planned(arguments("budget"))
    assert [(job.run.scheme, job.label) for job in jobs] == [
        *(("w2a16", "uniform: 2 and 3 by turns"), ("w2a16", "budget 2.535")),
        *(("w3a16", "uniform"), ("w3a16", "budget 3.0355"), ("w4a16", "uniform"), ("w4a16", "budget 4.0355")),
    ]
    assert all(options(list(job.run.extra), "--model.weight_quantizer.initial") == ["search_on_inputs"] for job in jobs)
    assert options(list(jobs[0].run.extra), "--model.layers") == ["{layers.1: 3, layers.3: 3}"]
    assert options(list(jobs[1].run.extra), "--bits_budget") == ["2.535"]


def test_each_seed_is_a_run_of_its_own_beside_the_usual_one() -> None:
    one, three = (arguments("budget", seeds=seeds) for seeds in (1, 3))
    usual, jobs = abq.planned(one), abq.planned(three)
    assert {job.name(one) for job in usual} < {job.name(three) for job in jobs}
    assert len({job.fit_name(three) for job in jobs}) == len(jobs) == 3 * len(usual)
    for job in jobs:
        given = [options(list(job.run.extra), name) for name in ("--seed_everything", "--data.seed")]
        assert given == ([[], []] if job.seed == rows.SEED else [[str(job.seed)]] * 2)
    assert {job.seed for job in jobs} == {2, 3, 4}


def test_tasks_are_measured_in_full_and_the_source_once() -> None:
    args = arguments("tasks")
    commands = [job.measure(args, Path("/run"), Path("/found.json")) for job in abq.planned(args)]
    assert all(len(options(command, "--tasks")[0].split(",")) == 8 for command in commands)
    assert all("--limit" not in command for command in commands)
    assert [bool(options(command, "--compare_source")) for command in commands] == [True, False, False]


def test_with_several_gpus_rows_are_spread_over_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[str] = []

    def call(command: list[str], folder: Path, environment: dict[str, str]) -> bool:
        if command[0] == "fit":
            seen.append(environment["CUDA_VISIBLE_DEVICES"])
            run = Path(options(command, "--trainer.default_root_dir")[0])
            run.mkdir(parents=True)
            bits = {"divergence": 1.5, "layers": {"0.q_proj": 3}}
            (run / "metrics.json").write_text(json.dumps({"fit": {"blocks": 5}, "bits": bits}))
        else:
            Path(options(command, "--json")[0]).write_text(json.dumps({"ppl": {"a": 2.0}}))
        return True

    monkeypatch.setattr(rows, "call", call)
    monkeypatch.setattr(rows, "probed_apart", lambda: {"gpus": 2, "machine": H100})
    places = ["--model", "/m", "--work", str(tmp_path / "w"), "--results", str(tmp_path / "r.jsonl"), "--jobs", "4"]
    assert abq.main(["grid", *places, "--calibration", "wiki=wiki.txt", "--text", "a=a.txt"]) == 0
    assert sorted(set(seen)) == ["0", "1"]
    assert len(seen) == 18
    found = abq_tables.read_rows([tmp_path / "r.jsonl"])
    assert len(found) == 18
    assert found[0]["bits"] == {"divergence": 1.5}


# Tables


def row(plan: str, label: str, scheme: str = "w4a4", method: str = "abq", **other: Any) -> dict[str, Any]:
    """A line as `benchmarks/abq.py` writes it."""
    own = {"plan": plan, "name": f"{plan}-{label}-{scheme}-{method}", "label": label, "scheme": scheme}
    own |= {"method": method, "epochs": 20, "seed": 2, "calibration": "wiki", "samples": 128, "length": 2048}
    machine = {"machine": H100, "torch": "2.11.0", "jobs_at_once": 14, "bits_per_weight": 4.0352}
    return {**own, **machine, "ppl": {"a": 100.0, "b": 200.0}, **other}


def test_the_grid_has_a_column_for_each_method_and_text() -> None:
    found = [
        row("grid", method, method=method, ppl={"a": 10.0 * k, "b": 20.0 * k}) for k, method in enumerate(abq.METHODS)
    ]
    made = cells(abq_tables.tables(found)["grid"])
    assert made[0][2:] == [f"{method}, {text}" for text in "ab" for method in abq.METHODS] + ["bits per weight"]
    assert made[2] == ["w4a4", "20", "0.000", "10.00", "20.00", "0.000", "20.00", "40.00", "4.035"]


def test_parts_stand_below_the_recipe_of_the_grid() -> None:
    found = [row("grid", "abq", ppl={"a": 7.0}), row("parts", "no DLC", ppl={"a": 8.0})]
    made = cells(abq_tables.tables(found)["parts"])
    assert made[0] == ["abq, a ppl", "w4a4"]
    assert [line[0] for line in made[2:]] == ["as shipped", *abq.WITHOUT]
    assert [line[1] for line in made[2:]] == ["7.000", "8.000", "–", "–", "–", "–"]


def test_tasks_show_both_metrics_and_their_means() -> None:
    def tasks(acc: float) -> dict[str, Any]:
        return {"results": {"piqa_local": {"acc": acc, "acc_norm": acc + 0.1}, "boolq_local": {"acc": acc}}}

    found = [row("tasks", "abq", tasks=tasks(0.4)), row("tasks", "rtn", tasks=tasks(0.2), source={"tasks": tasks(0.6)})]
    made = cells(abq_tables.tables(found)["tasks"])
    assert made[0] == ["W4A4", "piqa", "boolq", "mean acc", "mean acc_norm, else acc"]
    assert made[2:] == [
        ["fp", "60.0 / 70.0", "60.0", "60.00", "65.00"],
        ["rtn", "20.0 / 30.0", "20.0", "20.00", "25.00"],
        ["abq", "40.0 / 50.0", "40.0", "40.00", "45.00"],
    ]


def test_a_budgets_seeds_are_one_line() -> None:
    search, on_inputs = ({"scheme": "w3a16", "command": " ".join(["ptql fit", *start])} for start in abq.STARTS)
    found = [row("budget", "budget 3", name=str(v), ppl={"a": v}, **search) for v in (10.0, 12.0, 14.0)]
    found += [row("budget", "uniform", ppl={"a": 5.0}, **search)]
    found += [row("budget", "budget 3", name="other", ppl={"a": 7.0}, **on_inputs)]
    made = cells(abq_tables.tables(found)["budget"])
    assert made[0] == ["scheme", "clipping begins by", "bits", "seeds", "epochs", "tokens", "bits per weight", "a ppl"]
    assert made[2:] == [
        ["w3a16", "search", "uniform", "1", "20", "128 × 2048", "4.035", "5.000"],
        ["w3a16", "search", "budget 3", "3", "20", "128 × 2048", "4.035", "12.00 (10.00 to 14.00)"],
        ["w3a16", "search on inputs", "budget 3", "1", "20", "128 × 2048", "4.035", "7.000"],
    ]


def test_a_start_stands_beside_the_usual_one_only() -> None:
    found = [row("grid", method, "w3a16", method) for method in ("abq", "lrquant")]
    made = cells(abq_tables.tables([*found, row("start", "abq search", "w3a16")])["start"])
    assert [line[1] for line in made[2:]] == ["abq", "abq search"]


def test_the_pages_tables_are_those_of_the_results(tmp_path: Path) -> None:
    for page in ("docs/methods/abq.md", "docs/schemes.md"):
        assert_filled(page, tmp_path, lambda copy: abq_tables.main([*results("abq-*.jsonl"), "--docs", copy]))


@pytest.mark.parametrize("line", ["{}", "no JSON", '{"plan": "other", "name": "x", "machine": "y"}'])
def test_a_foreign_line_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "r.jsonl"
    file.write_text(line + "\n")
    with pytest.raises(SystemExit, match=r"r\.jsonl:1: not a line of benchmarks/abq\.py"):
        abq_tables.main([str(file)])
