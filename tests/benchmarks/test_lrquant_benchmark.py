"""Plans of LRQuant's figures run what they say, each once; the tables hold what the rows say."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks import lrquant, lrquant_tables, rows
from benchmarks.accuracy import fit_command
from benchmarks.lrquant import ADAPTED_BY, LEARNING_RATES, SEEDS, TTA, Job, Setting, grid, planned

ROOT = Path(__file__).parents[2]
H100 = "NVIDIA H100 80GB HBM3"
SHIPPED = Setting(None, None, 5, 1)
NEEDED = ("tta", "methods/lrquant_plus.yaml")


@pytest.fixture
def shipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe of adaptation, whatever the shipped one is."""
    monkeypatch.setattr(lrquant, "recipe", lambda: SHIPPED)


def arguments(*plans: str, **changes: Any) -> argparse.Namespace:
    """A parsed command line."""
    texts = {"calibrations": {"wiki": "/t/wiki.txt", "c4": "/t/c4.jsonl"}, "texts": {"a": "/t/a.txt", "b": "pydoc"}}
    sizes = {"epochs": 20, "samples": 128, "length": 2048, "batch_size": 4, "windows": None, "ablation_windows": 32}
    others = {"model": Path("/m"), "work": Path("/w"), "precision": "bf16-mixed", "jobs": 1, "deadline": float("inf")}
    return argparse.Namespace(plans=list(plans), **{**texts, **sizes, **others, **changes})


def cells(markdown: str) -> list[list[str]]:
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def pairs(command: list[str], option: str) -> list[str]:
    """What an option was given, each time."""
    return [value for name, value in pairwise(command) if name == option]


# Plans


@pytest.mark.usefixtures("shipped")
def test_rows_have_different_names_and_shared_calibrations_come_last() -> None:
    args = arguments("tta", "ablation", "nlc", "plus")
    jobs = planned(args)
    assert len({job.name(args) for job in jobs}) == len(jobs) == 2 + 2 + 15 + 5
    fits = [job.fit_name(args) for job in jobs]
    different = len(set(fits))
    assert len(set(fits[:different])) == different == 2 + 14 + 4
    # the recipe itself on the first text is calibrated once for all plans
    assert fits.count("wiki-lrquant-w4a4-e20-s2-128x2048") == 5
    assert [(job.plan, job.label) for job in jobs[different:]] == [
        *[("ablation", "LRQuant")] * 2,
        ("nlc", "MSE + NLC, log"),
        ("plus", "LRQuant"),
    ]


@pytest.mark.usefixtures("shipped")
def test_calibrations_of_one_name_are_the_same_command() -> None:
    commands: dict[str, set[tuple[str, ...]]] = {}
    args = arguments("tta", "ablation", "nlc", "plus")
    for job in planned(args):
        fit = fit_command(job.run, args, args.calibrations[job.calibration], Path("/w/run"))
        commands.setdefault(job.fit_name(args), set()).add(tuple(fit))
    assert {len(found) for found in commands.values()} == {1}
    assert len(set.union(*commands.values())) == len(commands)


def test_seeds_are_those_of_the_windows_too() -> None:
    args = arguments("nlc")
    jobs = planned(args)
    assert {job.label for job in jobs} == {
        *("MSE, log", "NLC, log", "MSE + NLC, log"),
        *("MSE + NLC, balanced", "MSE + NLC, ones"),
    }
    for job in jobs:
        command = fit_command(job.run, args, "t", Path("/w/run"))
        assert pairs(command, "--seed_everything") == pairs(command, "--data.seed") == [str(job.seed)]
    assert {job.seed for job in jobs} == set(SEEDS)


def test_variants_say_what_they_change() -> None:
    (usual, plus, together, none, four) = planned(arguments("plus"))
    assert (usual.run.method, plus.run.method) == ("lrquant", "lrquant_plus")
    assert plus.run.extra == usual.run.extra
    assert together.run.extra[-2:] == ("--model.objective.balance", "sum")
    assert none.run.extra[-2:] == ("--model.weight_quantizer.factor_rank", "0")
    assert four.run.extra[-2:] == ("--model.weight_quantizer.factor_rank", "4")
    mse = planned(arguments("nlc"))[0].run.extra
    assert mse[-6:] == (
        *("--model.objective.mse", "1", "--model.objective.nlc", "0"),
        *("--model.transforms.initial", "log"),
    )


def test_each_part_of_the_recipe_is_varied_by_itself() -> None:
    settings = grid(SHIPPED)
    assert len(settings) == len({setting.name for setting in settings}) == 1 + 4 + 2 + 2 + 2 * 5
    assert SHIPPED in settings
    assert {(s.lr, s.weight_lr) for s in settings} == {(None, None), *((rate, rate) for rate in LEARNING_RATES)}
    assert {(s.loss, s.blocks) for s in settings} >= {(loss, blocks) for loss in ADAPTED_BY for blocks in (1, 4)}
    assert SHIPPED.name == "lr recipe's, 5 epochs, 1 blocks, MSE + NLC, T1"
    assert replace(SHIPPED, lr=1e-4, weight_lr=0.01).name == "lr 0.0001 and 0.01, 5 epochs, 1 blocks, MSE + NLC, T1"


def test_the_measurement_of_a_grid_names_its_settings_in_a_file(tmp_path: Path) -> None:
    args = arguments(work=tmp_path)
    settings = (SHIPPED, Setting(1e-5, 1e-5, 5, 1, "NLC, T2"))
    job = Job("ablation", "LRQuant", lrquant.calibration(20), "wiki", ("b",), settings=settings)
    command = job.measure(args, tmp_path / "run", tmp_path / "found.json")
    (file,) = pairs(command, "-c")
    recipe, slow = yaml.safe_load(Path(file).read_text())["trainer"]["callbacks"]
    assert recipe["init_args"].pop("objective")["init_args"] == {"mse": 1, "nlc": 1, "targets": ["fp"]}
    assert recipe["init_args"] == {"mode": "transductive", "name": SHIPPED.name, "epochs": 5, "blocks": 1}
    assert slow["class_path"] == "ptql.callbacks.TestTimeAdaptation"
    assert (slow["init_args"]["lr"], slow["init_args"]["weight_lr"]) == (1e-5, 1e-5)
    assert slow["init_args"]["objective"]["init_args"] == {"mse": 0, "nlc": 1, "targets": ["fp_on_quantised"]}
    assert pairs(command, "--text.b") == ["pydoc"]
    assert pairs(command, "--windows") == ["32"]
    assert not pairs(command, "--text.a")


def test_all_shipped_adaptations_are_one_measurement(tmp_path: Path) -> None:
    args = arguments("tta", windows=7)
    job = planned(args)[0]
    command = job.measure(args, tmp_path / "run", tmp_path / "found.json")
    assert pairs(command, "-c") == [f"tta/{name}" for name in TTA]
    assert (pairs(command, "--text.a"), pairs(command, "--windows")) == (["/t/a.txt"], ["7"])


# Runs


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands that were run; instead of running they leave the files that are read."""
    made: list[list[str]] = []

    def call(command: list[str], folder: Path, environment: dict[str, str]) -> bool:
        made.append(command)
        if command[0] == "fit":
            run = Path(pairs(command, "--trainer.default_root_dir")[0])
            run.mkdir(parents=True, exist_ok=True)
            fit = {"blocks": 5, "seconds_learning": 10.0, "source": "/m"}
            (run / "metrics.json").write_text(json.dumps({"fit": fit, "bits_per_weight": 4.1}))
            return pairs(command, "--data.seed") != ["3"]
        ppl = {part.partition(".")[2]: 2.0 for part in command if part.startswith("--text.")}
        Path(pairs(command, "--json")[0]).write_text(json.dumps({"ppl": ppl}))
        return True

    monkeypatch.setattr(rows, "call", call)
    monkeypatch.setattr(rows, "probed_apart", lambda: {"gpus": 1, "machine": H100, "torch": "2.11.0"})
    return made


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    places = ["--model", "/m", "--work", str(tmp_path / "w"), "--results", str(tmp_path / "out" / "r.jsonl")]
    return [*places, "--calibration", "wiki=wiki.txt", "--text", "a=a.txt", "--text", "b=b.txt"]


@pytest.mark.usefixtures("shipped")
def test_a_shared_calibration_is_made_once_and_a_row_is_not_repeated(
    calls: list[list[str]], command: list[str], tmp_path: Path
) -> None:
    assert lrquant.main(["tta", "ablation", *command, "--jobs", "3"]) == 0
    assert sorted(words[0] for words in calls) == ["eval", "eval", "eval", "fit"]
    assert calls[0][calls[0].index("--trainer.precision") + 1] == "bf16-mixed"
    found = lrquant_tables.read_rows([tmp_path / "out" / "r.jsonl"])
    assert sorted(row["plan"] for row in found) == ["ablation", "ablation", "tta"]
    assert found[0]["command"].startswith("ptql fit -c methods/lrquant -c schemes/w4a4 --model.source MODEL")
    assert found[0]["fit"] == {"blocks": 5, "seconds_learning": 10.0, "source": "MODEL"}
    assert str(tmp_path) not in json.dumps(found)
    assert lrquant.main(["tta", "ablation", *command]) == 0
    assert len(calls) == 4
    assert lrquant.main(["tta", *command, "--windows", "3"]) == 0
    assert len(calls) == 6


@pytest.mark.usefixtures("calls")
def test_a_failed_calibration_does_not_end_the_plan(command: list[str], tmp_path: Path) -> None:
    assert lrquant.main(["nlc", *command]) == 1
    found = lrquant_tables.read_rows([tmp_path / "out" / "r.jsonl"])
    assert [row["seed"] for row in found] == [2, 4] * 5


def test_nothing_begins_after_the_deadline(
    calls: list[list[str]], command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert lrquant.main(["nlc", *command, "--deadline", "-1"]) == 1
    assert calls == []
    assert capsys.readouterr().err.count("not begun, after the deadline") == 15


@pytest.mark.parametrize("given", ["wiki.txt", "=x", "wiki=", "a=1 a=2"])
def test_names_of_texts_are_needed_and_differ(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = [part for item in given.split() for part in ("--text", item)]
    with pytest.raises(SystemExit):
        lrquant.main(["tta", "--model", "m", "--work", "w", "--results", "r", "--calibration", "a=b", *options])
    assert "NAME=FILE is needed, each name once" in capsys.readouterr().err


# Tables


def row(plan: str, label: str = "LRQuant", seed: int = 2, **other: Any) -> dict[str, Any]:
    """A line as `benchmarks/lrquant.py` writes it."""
    name = f"{plan}-{label}-{seed}-{other.get('calibration')}-{'-'.join(other.get('ppl', {}))}"
    own = {"plan": plan, "name": name, "label": label, "seed": seed, "calibration": "wiki", "epochs": 20}
    sizes = {"scheme": "w4a4", "samples": 128, "length": 2048, "jobs_at_once": 2, "bits_per_weight": 4.0352}
    machine = {"machine": H100, "torch": "2.11.0", "lightning": "2.6.6", "transformers": "5.23.0"}
    fit = {"fit": {"blocks": 30, "seconds_learning": 900.0}}
    return {**own, **sizes, **machine, **fit, "ppl": {"a": 100.0, "b": 200.0}, **other}


def adapted(calibration: str = "wiki") -> dict[str, Any]:
    """A row of `tta` in which `online` was not measured on the second text."""
    details = {text: {"windows": 40, "length": 2048, "seconds": 3.4, "domain": "unseen"} for text in "ab"}
    details["a"]["domain"] = "calibration"
    modes = {
        name: {
            "ppl": {"a": 90.0 + place, "b": 190.0 + place},
            "without": {"a": 100.0, "b": 200.0},
            "details": {text: {"windows": 40, "adapted_on": 40, "seconds": 10.0 + place} for text in "ab"},
        }
        for place, name in enumerate(TTA)
    }
    modes["prefix"]["without"] = {"a": 101.0, "b": 201.0}
    for text in "ab":
        modes["prefix"]["details"][text]["windows"] = 24
    del modes["online"]["ppl"]["b"]
    source = {"ppl": {"a": 20.0, "b": 21.0}}
    return row("tta", calibration=calibration, ppl_details=details, tta=modes, source=source)


def test_adaptation_is_shown_beside_what_it_began_with() -> None:
    made = cells(lrquant_tables.tables([adapted(), adapted("c4")])["tta"])
    assert made[0] == [
        *("calibrated on", "text", "domain", "windows", "source", "without (s)", "transductive (s)"),
        *("the rest without", "prefix (s)", "online (s)", "best (s)", "best_online (s)", "rlq (s)"),
    ]
    assert [line[:3] for line in made[2:]] == [
        ["wiki", "a", "calibration"],
        ["wiki", "b", "unseen"],
        ["c4", "a", "calibration"],
        ["c4", "b", "unseen"],
    ]
    assert made[2][3:7] == ["40", "20.00", "100.0 (3.4)", "90.00 (10)"]
    assert made[2][7:] == ["101.0 on 24", "91.00 (11)", "92.00 (12)", "93.00 (13)", "94.00 (14)", "95.00 (15)"]
    assert made[3][9:11] == ["–", "193.0 (13)"]


def test_the_ablation_varies_one_number_a_part() -> None:
    settings = {setting.name: vars(setting) for setting in grid(SHIPPED)}
    losses = ["MSE + NLC, T1", *(loss for loss in ADAPTED_BY if loss != "MSE + NLC, T1")]  # the recipe's came first

    def measured(text: str, factor: float) -> dict[str, Any]:
        tta = {
            name: {"ppl": {text: factor * (place + 1)}, "details": {text: {"seconds": 5.0, "windows": 32}}}
            for place, name in enumerate(settings)
        }
        details = {text: {"windows": 32, "seconds": 1.0}}
        return row("ablation", settings=settings, ppl={text: 100 * factor}, ppl_details=details, tta=tta)

    made = lrquant_tables.tables([measured("a", 1.0), measured("b", 2.0)])["ablation"]
    words = "elsewhere learning rates recipe's, epochs 5, blocks 1, MSE + NLC, T1 (T1 is the fp block"
    assert f"Calibrated on wiki; windows: 32; {words}" in made
    lines = cells(made)
    assert lines[0] == ["what changes", "to", "a ppl", "s", "b ppl", "s"]
    assert lines[2] == ["without", "", "100.0", "–", "200.0", "–"]
    assert [line[:2] for line in lines[3:]] == [
        *(["learning rate", "recipe's"], ["", "1e-05"], ["", "0.0001"], ["", "0.001"], ["", "0.01"]),
        *(["epochs", "1"], ["", "3"], ["", "5"]),
        *(["blocks", "1"], ["", "2"], ["", "4"]),
        *([name, loss] for name, loss in zip(["loss", *[""] * 5], losses, strict=True)),
        *([name, loss] for name, loss in zip(["loss, 4 blocks", *[""] * 5], losses, strict=True)),
    ]
    assert lines[4] == ["", "1e-05", "1.000", "5.0", "2.000", "5.0"]
    assert lines[3][2] == lines[10][2] == lines[11][2] == lines[14][2]  # the recipe's own setting
    one_text = lrquant_tables.tables([{**measured("a", 1.0), "tta": {}}])["ablation"]
    assert cells(one_text)[3] == ["learning rate", "recipe's", "–", "–"]


def test_seeds_are_a_mean_a_deviation_and_extremes() -> None:
    found = [row("nlc", "MSE, log", seed, ppl={"a": value}) for seed, value in zip(SEEDS, (1.0, 2.0, 6.0), strict=True)]
    found += [row("nlc", "NLC, log", 2, ppl={"a": 7.0}), row("nlc", "both", 3, ppl={"a": "nan"})]
    made = cells(lrquant_tables.tables(found)["nlc"])
    assert made[0] == ["loss, start of the scales", "seeds", "a ppl, mean", "deviation", "min – max"]
    deviation = ((4.0 + 1.0 + 9.0) / 2) ** 0.5  # by hand, around the mean of 3
    assert made[2] == ["MSE, log", "2, 3, 4", "3.000", f"{deviation:.3f}", "1.000 – 6.000"]
    assert made[3] == ["NLC, log", "2", "7.000", "–", "7.000 – 7.000"]
    assert made[4] == ["both", "3", "nan", "–", "–"]


def test_variants_stand_below_the_plain_recipe() -> None:
    found = [row("plus", "LRQuant+", bits_per_weight=4.2), row("plus", "rank 4"), row("plus")]
    made = cells(lrquant_tables.tables(found)["plus"])
    assert [line[0] for line in made[2:]] == ["LRQuant", "LRQuant+", "rank 4"]
    assert made[3] == ["LRQuant+", "100.0", "200.0", "4.200", "1.50"]


def test_each_machine_is_named_before_its_rows() -> None:
    other = row("plus", machine="x86_64 CPU, 2 threads")
    made = lrquant_tables.tables([row("plus"), other])["plus"]
    begin = f"{H100}; torch 2.11.0, lightning 2.6.6, transformers 5.23.0; w4a4, 20 epochs, 128 × 2048 tokens; runs at "
    assert made.startswith(f"{begin}once: 2.\n\nCalibrated on wiki.\n\n| recipe |")
    assert made.count("| LRQuant |") == 2
    assert "\n\nx86_64 CPU, 2 threads; torch" in made


def test_only_tables_with_rows_are_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, page = tmp_path / "r.jsonl", tmp_path / "page.md"
    again = row("plus", ppl={"a": 5.0})
    file.write_text("".join(json.dumps({**found, "name": "same"}) + "\n" for found in (row("plus"), again)))
    text = "# A\n\n<!-- begin: nlc -->\nkeep\n<!-- end: nlc -->\n<!-- begin: plus -->\n{}<!-- end: plus -->\n"
    page.write_text(text.format("old\n"), encoding="utf-8")
    expected = lrquant_tables.tables([{**again, "name": "same"}])["plus"]
    for _ in range(2):
        lrquant_tables.main([str(file), "--docs", str(page)])
        assert page.read_text(encoding="utf-8") == text.format(expected)
    lrquant_tables.main([str(file)])
    assert capsys.readouterr().out == expected
    page.write_text("# A\n")
    with pytest.raises(SystemExit, match="no line <!-- begin: plus -->"):
        lrquant_tables.main([str(file), "--docs", str(page)])


@pytest.mark.parametrize("line", ["{", "[]", '{"plan": "tta"}', '{"plan": "other", "ppl": {"a": 1}}'])
def test_a_foreign_line_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "r.jsonl"
    file.write_text(json.dumps(row("plus")) + "\n" + line + "\n")
    with pytest.raises(SystemExit, match=r"r\.jsonl:2: not a line of .*; remove it"):
        lrquant_tables.read_rows([file])


# All of it


@pytest.mark.slow
@pytest.mark.shared
def test_the_tiny_plan_end_to_end(stories_dir: Path, shared_dir: Path, tmp_path: Path) -> None:
    if missing := [name for name in NEEDED if not (ROOT / "configs" / name).exists()]:
        pytest.skip(f"configs/{missing[0]} is not there: the plan runs it")
    results, page = tmp_path / "r.jsonl", tmp_path / "page.md"
    texts = shared_dir / "data" / "text"
    command = ["tiny", "--model", str(stories_dir), "--calibration", f"stories={texts / 'tinystories-train.jsonl'}"]
    command += ["--text", f"stories={texts / 'tinystories-test.jsonl'}", "--text", "pydoc=pydoc"]
    command += ["--epochs", "1", "--samples", "4", "--length", "32", "--windows", "20", "--ablation_windows", "4"]
    command += ["--jobs", "2"]
    assert lrquant.main([*command, "--work", str(tmp_path / "work"), "--results", str(results)]) == 0
    made = lrquant_tables.read_rows([results])
    assert [row["plan"] for row in made].count("plus") == 2
    (tta,) = (row for row in made if row["plan"] == "tta")
    assert tta["tta"].keys() == set(TTA)
    assert tta["tta"]["rlq"]["compat"] == "rlq"
    for name, found in tta["tta"].items():
        details = found["details"]["pydoc"]
        assert found["ppl"].keys() == found["without"].keys() == {"stories", "pydoc"}
        assert (found["without"]["pydoc"] == tta["ppl"]["pydoc"]) == (name != "prefix")
        assert details["windows"] + (details["adapted_on"] if name == "prefix" else 0) == 20
    (ablation,) = (row for row in made if row["plan"] == "ablation")
    assert ablation["tta"].keys() == ablation["settings"].keys()
    assert len(ablation["settings"]) == 2
    parts = [f"<!-- begin: {name} -->\n<!-- end: {name} -->\n" for name in lrquant_tables.TABLES]
    page.write_text("".join(parts), encoding="utf-8")
    lrquant_tables.main([str(results), "--docs", str(page)])
    assert page.read_text(encoding="utf-8").count("| --- |") >= 4
