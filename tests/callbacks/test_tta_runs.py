"""Test-time adaptation from the command line: shipped configurations, what is said of texts, what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ptql.callbacks import BlockCallback, TestTimeAdaptation
from safetensors.torch import load_file, save_file

import ptql
from ptql.checkpoint import SINGLE, Checkpoint
from ptql.cli import main
from ptql.errors import InputError
from tests.callbacks.adapted import LENGTH, fitted, snapshot
from tests.words import save_text

MEASURED = ("--run", "RUN", "--text.mine", "mine.txt", "--length", str(LENGTH), "--trainer.accelerator", "cpu")
TTA = "--trainer.callbacks+=ptql.callbacks.TestTimeAdaptation"
EPOCH = "--trainer.callbacks.init_args.epochs=1"
Edit = Callable[[Path], Any]

pytestmark = pytest.mark.usefixtures("elsewhere")


class Noted(BlockCallback):
    """Adds the number of windows to what was found."""

    def on_eval_start(self, *_: Any) -> None:
        pass

    def on_text_measured(self, trainer: Any, text: Any, found: dict[str, Any]) -> None:
        found.setdefault("noted", {})[text.name] = len(text.windows)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fitted(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of a run and its source, and a text of twenty windows."""
    save_text(tmp_path / "mine.txt", 20 * LENGTH, seed=1)
    shutil.copytree(finished.parent / "source", tmp_path / "source")
    shutil.copytree(finished, tmp_path / "RUN")
    for name in ("metrics.json", "config.yaml"):
        file = tmp_path / "RUN" / name
        file.write_text(file.read_text().replace(str(finished.parent / "source"), str(tmp_path / "source")))
    return tmp_path / "RUN"


@pytest.fixture
def refused(run: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Runs `eval`, which must be refused before any block is read, and returns its one line."""

    def tried(*options: str, text: str = "mine.txt") -> str:
        before = snapshot(run)
        capfd.readouterr()
        with monkeypatch.context() as patched:
            patched.setattr(Checkpoint, "block", lambda *_: pytest.fail("a block was read"))
            code = main(["eval", *MEASURED, "--text.mine", text, *options])
        out, err = capfd.readouterr()
        assert (code, out) == (2, ""), err
        assert err.startswith("ptql: error: ")
        assert err.count("\n") == 1, err
        assert snapshot(run) == before
        return err

    return tried


def adaptations(file: str = "RUN/metrics.json") -> dict[str, Any]:
    return json.loads(Path(file).read_text())["tta"]


# Configurations


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("transductive", {"mode": "transductive", "blocks": 1, "epochs": 5, "batch_size": 1}),
        ("prefix", {"mode": "prefix", "prefix": 16, "blocks": 1, "epochs": 5}),
        ("online", {"mode": "online", "blocks": 1, "epochs": 5}),
        ("rlq", {"compat": "rlq", "mode": "transductive", "lr": 1e-3, "weight_lr": 1e-2, "epochs": 5}),
    ],
)
def test_each_shipped_configuration(run: Path, name: str, expected: dict[str, Any]) -> None:
    assert main(["eval", *MEASURED, "-c", f"tta/{name}"]) == 0
    ((found, tta),) = adaptations().items()
    assert found == name
    assert tta["settings"].items() >= expected.items()
    assert tta["ppl"]["mine"] != tta["without"]["mine"]
    assert tta["details"]["mine"]["seconds"] > 0
    assert tta["details"]["mine"]["windows"] == (4 if name == "prefix" else 20)


def test_configurations_and_own_callbacks_add_up(run: Path) -> None:
    """As if each had been asked for alone."""
    own = f"--trainer.callbacks+={__name__}.Noted"
    assert main(["eval", *MEASURED, "-c", "tta/transductive", "-c", "tta/online", own]) == 0
    together = adaptations()
    assert set(together) == {"transductive", "online"}
    assert json.loads(Path("RUN/metrics.json").read_text())["noted"] == {"mine": 20}
    for name in together:
        assert main(["eval", *MEASURED, "-c", f"tta/{name}", "--json", f"{name}.json"]) == 0
        assert adaptations(f"{name}.json")[name]["ppl"] == together[name]["ppl"]


def test_options_alone(run: Path) -> None:
    options = [TTA, EPOCH, "--trainer.callbacks.init_args.objective=ptql.parts.objectives.Reconstruction"]
    assert main(["eval", *MEASURED, *options, "--trainer.callbacks.init_args.objective.nlc=0"]) == 0
    settings = adaptations()["transductive"]["settings"]
    assert (settings["epochs"], settings["objective"]["nlc"]) == (1, 0)


def test_the_source_is_measured_without(run: Path) -> None:
    assert main(["eval", *MEASURED, "-c", "tta/transductive", "--compare_source", "true"]) == 0
    stored = json.loads(Path("RUN/metrics.json").read_text())
    assert set(stored["source"]) == {"ppl", "ppl_details"}
    assert set(stored["tta"]) == {"transductive"}


def test_a_recipe_with_an_optimiser_and_parts_of_its_own(tmp_path: Path) -> None:
    settings = {
        "model.optimizer": {"class_path": "torch.optim.Adam", "init_args": {"betas": [0.8, 0.9]}},
        "model.objective": {"class_path": "ptql.parts.objectives.Reconstruction", "init_args": {"nlc": 0}},
        "model.weight.group_size": 16,
    }
    run = fitted(tmp_path, settings=settings)
    text = save_text(tmp_path / "mine.txt", 4 * LENGTH, seed=1)
    found = ptql.evaluate(run, text=text, length=LENGTH, accelerator="cpu", callbacks=[TestTimeAdaptation("online")])
    assert found["tta"]["online"]["ppl"] != found["ppl"]


# Domains


def test_texts_of_the_calibrations_domain_are_told_by_their_names(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    expected = {
        "words": "calibration",
        "words-test": "calibration",
        "Words_2": "calibration",
        "wordsmith": "unseen",
        "other": "unseen",
    }
    texts = [option for name in expected for option in (f"--text.{name}", "mine.txt")]
    assert main(["eval", *MEASURED, "--windows", "1", *texts]) == 0
    stored = json.loads(Path("RUN/metrics.json").read_text())["ppl_details"]
    assert {name: stored[name]["domain"] for name in expected} == expected
    rows = [line.split() for line in capfd.readouterr().out.splitlines()]
    assert ["text", "domain", "perplexity"] in rows
    assert expected.items() <= {row[0]: row[1] for row in rows if len(row) == 3}.items()


@pytest.mark.parametrize("content", [None, "", "data: {}", "data: {text: 3}", "[1]", "data: [", b"\xff"])
def test_where_nobody_knows_the_calibration_no_domain_is_named(
    run: Path, capfd: pytest.CaptureFixture[str], content: str | bytes | None
) -> None:
    config = run / "config.yaml"
    config.unlink()
    if content is not None:
        config.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert main(["eval", *MEASURED, "--windows", "1"]) == 0
    assert "domain" not in json.loads((run / "metrics.json").read_text())["ppl_details"]["mine"]
    assert "domain" not in capfd.readouterr().out


# Refused


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mode": "offline"}, "offline"),
        ({"compat": "lrq"}, "lrq"),
        ({"epochs": 0}, "epochs=0: at least 1"),
        ({"blocks": 0}, "blocks=0: at least 1"),
        ({"batch_size": -1}, "batch_size=-1: at least 1"),
        ({"prefix": 0}, "prefix=0: at least 1"),
        ({"lr": 0.0}, "lr=0.0: .*above 0; leave it out for the recipe's"),
        ({"weight_lr": float("nan")}, "lr=nan"),
        ({"compat": "rlq", "mode": "online"}, "compat=rlq with mode=online.*leave these out"),
        ({"compat": "rlq", "blocks": 2}, "compat=rlq with .*blocks=2.*leave these out"),
        (
            {"objective": "ptql.parts.objectives.DistributionCorrection"},
            "objective=DistributionCorrection: it looks at attention.*take another objective",
        ),
    ],
)
def test_wrong_settings(refused: Callable[..., str], settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        raise InputError(refused(TTA, *(f"--trainer.callbacks.init_args.{k}={v}" for k, v in settings.items())))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((TTA, "--trainer.callbacks.init_args.blocks=3"), "blocks=3: the model has 2; take fewer"),
        (("-c", "tta/online", "-c", "tta/online"), "name='online': two callbacks would write the same result"),
        (("-c", "tta/prefix", "--windows", "16"), "prefix=16: text 'mine' has 16 windows, .*a smaller prefix"),
    ],
)
def test_what_does_not_go_with_the_run(refused: Callable[..., str], options: tuple[str, ...], words: str) -> None:
    with pytest.raises(InputError, match=words):
        raise InputError(refused(*options))


def test_only_a_run_can_be_adapted(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = [option for option in MEASURED if option not in ("--run", "RUN")]
    for directory in ("source", "RUN/model"):
        assert main(["eval", *options, "--model.source", directory, "-c", "tta/online"]) == 2
        assert "tta: only a run has what calibration learned" in capfd.readouterr().err


def damaged(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def other_weights(run: Path) -> None:
    file = run.parent / "source" / SINGLE
    tensors = load_file(file)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, file, {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda run: (run / "config.yaml").unlink(), "config.yaml: the run's recipe can't be read.*restore the file"),
        (lambda run: (run / "config.yaml").write_text("data: {}"), "config.yaml: the run's recipe can't be read"),
        (lambda run: (run / "config.yaml").write_text("model:"), "config.yaml"),
        (lambda run: (run / "config.yaml").write_text("model: 3"), "config.yaml"),
        (
            lambda run: damaged(run / "config.yaml", "bits: 4", "bits: 3"),
            r"bits was 4 in this run and is 3 now; restore",
        ),
        (lambda run: damaged(run / "config.yaml", "bits: 4", "bits: four"), "four"),
        (lambda run: damaged(run / "config.yaml", "transforms.Smooth", "transforms.Rough"), "Rough"),
        (
            lambda run: damaged(run / "config.yaml", "lr: 0.001", "lr: 0.002"),
            "transforms was .*0.001.* in this run and is .*0.002",
        ),
        (other_weights, "source: not the weights that .*RUN was made from; restore them"),
        (lambda run: shutil.rmtree(run.parent / "source"), "no such model directory"),
        (lambda run: shutil.rmtree(run / "ledger"), "manifest.json: missing; .*keep the run's ledger"),
        (lambda run: (run / "ledger/manifest.json").write_text("{"), "manifest.json: damaged"),
        (lambda run: (run / "ledger/manifest.json").write_text("{}"), "manifest.json: damaged"),
        (lambda run: (run / "metrics.json").unlink(), "metrics.json: does not say what the source was"),
    ],
)
def test_a_run_that_is_not_what_it_was(refused: Callable[..., str], run: Path, change: Edit, words: str) -> None:
    change(run)
    with pytest.raises(InputError, match=words):
        raise InputError(refused("-c", "tta/online"))


@pytest.mark.parametrize("block", [0, 1])
def test_a_block_that_is_not_in_the_ledger(run: Path, capfd: pytest.CaptureFixture[str], block: int) -> None:
    """Only what learns is read."""
    (run / f"ledger/block-0000{block}.safetensors").write_bytes(b"")
    before = snapshot(run)
    code = main(["eval", *MEASURED, "-c", "tta/online"])
    error = capfd.readouterr().err.splitlines()[-1]
    assert code == (2 if block == 1 else 0), error
    assert ("ledger: block 1 is missing or damaged" in error) == (block == 1)
    assert (snapshot(run) == before) == (block == 1)
