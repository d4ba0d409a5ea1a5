"""What a restoration can't do is said in one line, and nothing is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ptql.cli import main
from tests.callbacks.adapted import SMALL, snapshot
from tests.models import CONTEXT
from tests.restoration.lora import NAME, PTQ161, callback, fitted, options, thrice

pytestmark = pytest.mark.usefixtures("one_thread")

ELSEWHERE = "give another --trainer.default_root_dir"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RUN in three stages and ONCE in one pass; no test changes them."""
    folder = tmp_path_factory.mktemp("runs")
    fitted(folder, {**SMALL, "trainer.callbacks": None, "trainer.max_epochs": 0}, name="ONCE")
    return fitted(folder, thrice({"trainer.max_epochs": 0})).parent


def fit(runs: Path, run: Path, settings: dict[str, Any], *recipe: str) -> list[str]:
    places = {"model.source": str(runs / "source"), "data.text": str(runs / "words.txt")}
    given = {"trainer.max_epochs": 0, **settings, **places, "trainer.default_root_dir": str(run)}
    return ["fit", *(recipe or PTQ161), *options(given)]


def refused(args: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What is said, without `ptql: error: `; the folder is as it was."""
    before = snapshot(folder)
    capsys.readouterr()
    assert main(args) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert snapshot(folder) == before
    assert last.startswith("ptql: error: ")
    return last.removeprefix("ptql: error: ")


@pytest.mark.parametrize(
    ("lesson", "more", "message"),
    [
        ({"r": 0}, {}, "restoration r=0: a whole number, 1 or more, is needed"),
        ({"length": 1}, {}, "restoration length=1: a whole number, 2 or more, is needed"),
        ({"dropout": 1}, {}, "restoration dropout=1.0: a share from 0 to 1 is needed; leave it out for the usual"),
        ({"warmup": -0.1}, {}, "restoration warmup=-0.1: a share from 0 to 1 is needed; leave it out for the usual"),
        ({"alpha": 0}, {}, "restoration alpha=0.0: a number above 0 is needed; 16 is usual"),
        ({"gradient_clip": -1}, {}, "restoration gradient_clip=-1.0: 0 or more is needed; leave it out for the usual"),
        ({"masks": "x"}, {}, "masks"),
        ({"lr": 0}, {}, "leave the restoration out to learn nothing"),
        (
            {"length": CONTEXT + 1},
            {},
            "restoration length=65: a sample is at most the model's context of 64 tokens; use that or less",
        ),
        (
            {"samples": 5, "accumulate": 6},
            {},
            "restoration samples=5: a step of all 1 processes takes 6; use more",
        ),
        (
            {"targets": ["q_proj", "proj"]},
            {},
            "restoration targets: 'proj' is no layer of a block; its layers are self_attn.q_proj, self_attn.k_proj, "
            "self_attn.v_proj, self_attn.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj",
        ),
        (
            {},
            {"trainer.precision": "16-mixed"},
            "precision=16-mixed with LoRARestoration: its gradients would vanish; use --trainer.precision bf16-mixed, "
            "or leave it out",
        ),
        (
            {"text": ["none.txt"]},
            {},
            "restoration text 'none.txt': no such file; give .txt or .jsonl files, pydoc, wikitext2, c4, ptb, or a hub "
            "set (owner/name)",
        ),
    ],
)
def test_settings(
    runs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    lesson: dict[str, Any],
    more: dict[str, Any],
    message: str,
) -> None:
    said = refused(fit(runs, tmp_path / "run", thrice(more, **lesson)), tmp_path, capsys)
    assert message in said
    if len(message) > 50:
        assert said.endswith(message)


def test_a_text_without_words(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty, short = tmp_path / "empty.jsonl", tmp_path / "short.jsonl"
    empty.write_text('{"text": " "}\n')
    short.write_text('{"text": "w3"}\n{"text": "w4"}\n')
    said = refused(fit(runs, tmp_path / "run", thrice(text=[str(empty)])), tmp_path, capsys)
    assert said == f"restoration text {empty}: it has no documents; give a text with words"
    said = refused(fit(runs, tmp_path / "run", thrice(text=[str(short)])), tmp_path, capsys)
    assert said == "restoration text: no document has 2 tokens; give a text with longer ones"


def test_runs_of_another_number_of_stages(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, once = runs / "RUN", runs / "ONCE"
    said = refused(fit(runs, run, {**SMALL, "trainer.max_epochs": 0, "trainer.callbacks": None}), runs, capsys)
    assert said == (
        f"{run}: holds a run of three stages, and without LoRARestoration there is one; {ELSEWHERE}, or leave the "
        "callback in"
    )
    said = refused(fit(runs, once, thrice({"trainer.max_epochs": 0})), runs, capsys)
    assert said == (
        f"{once}: holds a run of one pass, and with LoRARestoration there are three stages; {ELSEWHERE}, or leave the "
        "callback out"
    )


@pytest.mark.parametrize("finished", [True, False])
def test_a_stage_that_began_in_another_way(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], finished: bool
) -> None:
    run = runs / "RUN"
    if not finished:
        run = tmp_path / "RUN"
        (run / "restored").mkdir(parents=True)
        (run / "restored/restoration.json").write_text((runs / "RUN/restored/restoration.json").read_text())
        (run / "restored/partial-00000-0.ckpt").touch()  # something was learned
    said = refused(fit(runs, run, thrice({"trainer.max_epochs": 0}, lr=2e-3)), run, capsys)
    remedy = "give another directory, or remove this one"
    assert said == f"{run}/restored: restored in another way: lr was 0.001 and is 0.002 now; {remedy}"


def test_a_stage_that_learned_nothing_may_begin_in_another_way(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As after too little memory: with smaller batches, or on other devices."""
    folder = tmp_path / "RUN/restored"
    folder.mkdir(parents=True)
    (folder / "restoration.json").write_text((runs / "RUN/restored/restoration.json").read_text())
    assert main([*fit(runs, tmp_path / "RUN", thrice(lr=2e-3)), "--trainer.fast_dev_run", "true"]) == 0


def test_what_lies_where_a_stage_should_be(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "RUN/restored"
    folder.mkdir(parents=True)
    (folder / "words.txt").write_text("mine")
    said = refused(fit(runs, tmp_path / "RUN", thrice()), tmp_path, capsys)
    assert said == f"{folder}: holds files, but no restoration.json; move them away"
    (folder / "restoration.json").write_text("{")
    said = refused(fit(runs, tmp_path / "RUN", thrice()), tmp_path, capsys)
    assert said.startswith(f"{folder}/restoration.json: damaged (JSONDecodeError")
    assert said.endswith(f"; remove {folder}")


def test_recipes(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A budget, and biases that a plain model has no place for."""
    recipe = ("-c", "methods/lrquant", "-c", "schemes/w4a4")
    command = [*fit(runs, tmp_path / "run", thrice(), *recipe), "--bits_budget", "3"]
    said = refused(command, tmp_path, capsys)
    assert said == "bits_budget with LoRARestoration: bits are chosen for one pass; leave one of them out"
    said = refused(fit(runs, tmp_path / "run", thrice(), *recipe), tmp_path, capsys)
    assert said.startswith("LoRARestoration with a recipe that leaves biases that the family does not have (")
    assert said.endswith("): nothing can be merged into such a model; use a recipe without them (`learn_shift: false`)")


def test_two_callbacks(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {**SMALL, "trainer.callbacks": [callback(), callback()]}
    said = refused(fit(runs, tmp_path / "run", settings), tmp_path, capsys)
    assert said == "callbacks: 2 of LoRARestoration; a run is restored once, so leave one"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "--run is missing: say which run's model is restored"),
        (("--run", "{runs}/ONCE"), "--out is missing: say where the restored model of {runs}/ONCE shall lie"),
        (
            ("--run", "{runs}/RUN", "--out", "{here}/o"),
            "out={here}/o: {runs}/RUN is a run of three stages, and has its own place for it; leave it out",
        ),
        (
            ("--run", "{here}/half", "--out", "{here}/o"),
            "{here}/half: no finished run, it has no model/; let `ptql fit` finish it",
        ),
        (
            ("--run", "{here}/none", "--out", "{here}/o"),
            "{here}/none: no finished run, it has no model/; let `ptql fit` finish it",
        ),
        (
            ("--run", "{runs}/ONCE", "--out", "{here}/o", "--model.source", "{runs}/source"),
            "model: what is restored is a finished run's model, as it is; give --run RUN alone",
        ),
        (
            ("--run", "{runs}/ONCE", "--out", "{here}/o", "--model.weight.bits", "3"),
            "model: what is restored is a finished run's model, as it is; give --run RUN alone",
        ),
        (
            ("--run", "{runs}/ONCE", "--out", "{here}/o", "--data.length", "9"),
            "data: these are the windows to calibrate on; the text to learn on is --trainer.callbacks.text",
        ),
        (
            ("--run", "{runs}/ONCE", "--out", "{runs}/ONCE"),
            "{runs}/ONCE: holds files, but no restoration.json; move them away",
        ),
        (
            ("--run", "{runs}/RUN", "--trainer.callbacks", NAME, "--trainer.callbacks.samples", "8"),
            "{runs}/RUN/restored: restored in another way: length was 32 and is 64 now; give another directory, or "
            "remove this one",
        ),
    ],
)
def test_restore(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], message: str
) -> None:
    (tmp_path / "half/ledger").mkdir(parents=True)
    places = {"runs": runs, "here": tmp_path}
    command = ["restore", *(option.format(**places) for option in options), "--trainer.accelerator", "cpu"]
    for folder in (runs, tmp_path):
        assert refused(command, folder, capsys) == message.format(**places)


def test_another_first_pass(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    known = json.loads((runs / "RUN/restored/restoration.json").read_text())
    known["identity"]["first"] = "0" * 16
    (folder / "restoration.json").write_text(json.dumps(known))
    (folder / "partial-00000-0.ckpt").touch()
    command = ["restore", "--run", str(runs / "ONCE"), "--out", str(folder), "--trainer.accelerator", "cpu"]
    lesson = options({f"trainer.callbacks.{name}": value for name, value in callback()["init_args"].items()})
    said = refused([*command, "--trainer.callbacks", NAME, *lesson, "--trainer.logger", "false"], tmp_path, capsys)
    assert said == f"{folder}: restores another first pass than {runs}/ONCE; remove it, to do it again"
