"""`ptql.quantize` and `ptql.evaluate`: what the commands do, from Python."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import ptql
from ptql.calibration.block_task import BlockTask
from ptql.calibration.stopping import Stopped
from ptql.calibration.trainer import BlockTrainer
from ptql.cli import main
from ptql.errors import InputError, one_line
from tests.words import save_source, save_text

SMALL: dict[str, Any] = {"data.length": 16, "data.samples": 3, "data.batch_size": 2}
SMALL |= {"trainer.max_epochs": 2, "trainer.accelerator": "cpu"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_source(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_text(tmp_path_factory.mktemp("text") / "words.txt")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test works in its own directory, with its own cache, on one thread."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PTQL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def quantised(
    source: Path, text: Path, out: str | Path = "RUN", settings: Any = None, **options: Any
) -> dict[str, Any]:
    return ptql.quantize(source, data=text, out=out, settings={**SMALL, **(settings or {})}, **options)


def command(source: Path, text: Path, out: str, *more: str) -> list[str]:
    places = ("--model.source", str(source), "--data.text", str(text), "--trainer.default_root_dir", out)
    options = (f"--{name}={value}" for name, value in SMALL.items())
    return ["fit", "-c", "methods/lrquant", "-c", "schemes/w4a4", *places, *options, *more]


# quantize


def test_the_same_files_as_the_command(source: Path, text: Path) -> None:
    found = quantised(source, text)
    assert main(command(source, text, "CLI")) == 0
    assert sorted(os.listdir("RUN")) == sorted(os.listdir("CLI"))
    assert files(Path("RUN/model")) == files(Path("CLI/model"))
    configs = [yaml.safe_load(Path(run, "config.yaml").read_text()) for run in ("RUN", "CLI")]
    assert [config["trainer"].pop("default_root_dir") for config in configs] == ["RUN", "CLI"]
    assert configs[0] == configs[1]
    assert found == json.loads(Path("RUN/metrics.json").read_text())
    assert found["fit"]["checksum"] == json.loads(Path("CLI/metrics.json").read_text())["fit"]["checksum"]
    _, info = AutoModelForCausalLM.from_pretrained("RUN/model", output_loading_info=True)
    assert not info["missing_keys"]


def test_the_command_finds_a_finished_run(source: Path, text: Path, capfd: pytest.CaptureFixture[str]) -> None:
    found = quantised(source, text)
    capfd.readouterr()
    assert main(command(source, text, "RUN")) == 0
    assert capfd.readouterr().err == "blocks 1-2 of 2: finished earlier\n"
    assert quantised(source, text)["fit"]["checksum"] == found["fit"]["checksum"]


def test_settings_of_every_kind(source: Path, text: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("model: {weight: {bits: 7}, method: mine}")
    settings = {
        "model.weight": {"bits": 5, "group_size": 32},
        "model.weight.symmetric": True,
        "model.objective.targets": ["fp", "fp_on_quantised"],
        "model.objective.nlc": 0,
        "model.weight_quantizer.lr": 1e-05,
        "model.transforms": [],
        "model.activation_quantizer": None,
        "model.method": "3",
        "trainer.logger": False,
        "trainer.default_root_dir": tmp_path / "ELSE",
        "trainer.callbacks": [{"class_path": "ptql.callbacks.BlockCheckpoint", "init_args": {"every_seconds": 1.5}}],
    }
    found = quantised(source, text, settings=settings, method="omniquant", scheme="w3a16", configs=[mine])
    assert found["fit"]["method"] == "3"
    assert sorted(os.listdir()) == ["ELSE", "cache", "mine.yaml"]
    assert not Path("ELSE/tensorboard").exists()
    config = yaml.safe_load(Path("ELSE/config.yaml").read_text())
    weight = {"bits": 5, "group_size": 32, "symmetric": True, "balanced": False, "salient_bits": 4}
    weight |= {"scale_dtype": "float16", "clustered": False}
    assert config["model"]["weight"] == weight
    assert config["model"]["activation"] == {"bits": 16, "symmetric": False}
    assert config["model"]["objective"]["init_args"]["targets"] == ["fp", "fp_on_quantised"]
    assert config["model"]["objective"]["init_args"]["nlc"] == 0
    assert config["model"]["weight_quantizer"]["init_args"]["lr"] == 1e-05
    assert config["model"]["transforms"] == []
    assert config["trainer"]["callbacks"][0]["init_args"] == {"every_seconds": 1.5}


def test_files_instead_of_names(source: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "method.yaml").write_text("model: {method: mine}\ntrainer: {max_epochs: 0}")
    (tmp_path / "scheme.yaml").write_text("model: {weight: {bits: 3}}")
    settings = {key: value for key, value in SMALL.items() if key != "trainer.max_epochs"}
    own = {"method": tmp_path / "method.yaml", "scheme": str(tmp_path / "scheme.yaml")}
    found = ptql.quantize(str(source), data=str(text), out=tmp_path / "RUN", settings=settings, **own)
    assert found["fit"]["method"] == "mine"
    assert 3 < found["bits_per_weight"] < 4


@pytest.mark.parametrize(
    "wrong",
    [
        {"model.weight.bits": 9},
        {"model.weight.bits": "four"},
        {"model.weight.bitz": 4},
        {"model.weight_quantizer.lr": float("inf")},
        {"model.objective.mse": float("nan")},
        {"data.text": "nope.txt"},
        {"data.samples": 0},
        {"trainer.max_epochs": None},
        {"trainer.max_time": "00:00:01:00"},
        {"trainer.default_root_dir": "a\0b"},
    ],
)
def test_errors_have_the_text_of_the_command(
    source: Path, text: Path, capfd: pytest.CaptureFixture[str], wrong: dict[str, Any]
) -> None:
    with pytest.raises(InputError) as found:
        quantised(source, text, settings=wrong)
    assert sorted(os.listdir()) in ([], ["cache"])
    ((name, value),) = wrong.items()
    capfd.readouterr()
    given = value if isinstance(value, str) else json.dumps(value)
    assert main(command(source, text, "RUN", f"--{name}={given}")) == 2
    assert capfd.readouterr().err == f"ptql: error: {one_line(found.value)}\n"


def test_a_method_that_is_not_there(source: Path, text: Path) -> None:
    with pytest.raises(ptql.InputError, match=r"methods/lrquat: no such configuration file; .*methods/lrquant"):
        quantised(source, text, method="lrquat")


def test_another_run_is_refused(source: Path, text: Path) -> None:
    quantised(source, text)
    with pytest.raises(ptql.InputError, match=r"RUN: holds another run, whose recipe.weight.bits was 4 and is 3 now"):
        quantised(source, text, settings={"model.weight.bits": 3})


def test_a_dry_run(source: Path, text: Path) -> None:
    assert quantised(source, text, settings={"trainer.fast_dev_run": True}) == {}
    assert os.listdir() == ["cache"]


@pytest.mark.parametrize(("number", "kind"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Stopped)])
@pytest.mark.parametrize("after", [0, 3])
def test_stopped_inside_a_block_and_going_on(
    source: Path,
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    number: signal.Signals,
    kind: type[BaseException],
    after: int,
) -> None:
    steps, step = [], BlockTask.training_step
    before = signal.getsignal(signal.SIGINT)  # ignored, where a shell has put the tests into the background

    def signalled(self: BlockTask, batch: Any, batch_idx: int) -> Any:
        if len(steps) == after:
            os.kill(os.getpid(), number)
        steps.append(batch_idx)
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patched:
        patched.setattr(BlockTask, "training_step", signalled)
        with pytest.raises(kind):
            quantised(source, text)
    assert len(steps) == after + 1
    assert len(list(Path("RUN/ledger").glob("partial-00000-*.ckpt"))) == 1
    assert signal.getsignal(signal.SIGINT) is before
    assert "Traceback" not in capfd.readouterr().err
    quantised(source, text)
    assert "ptql: block 1/2: goes on from partial-00000-" in capfd.readouterr().err
    quantised(source, text, "WHOLE")
    assert files(Path("RUN/model")) == files(Path("WHOLE/model"))


def test_stopped_between_blocks_and_going_on(source: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(BlockTrainer, "_learn", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            quantised(source, text)
    assert not Path("RUN/model").exists()
    quantised(source, text)
    quantised(source, text, "WHOLE")
    assert files(Path("RUN/model")) == files(Path("WHOLE/model"))


SCRIPT = """
import sys
import ptql

if __name__ == "__main__":
    source, text = sys.argv[1:]
    settings = {small} | {{"trainer.devices": 2}}
    found = ptql.quantize(source, data=text, settings=settings)
    sys.stdout.write(f"processes {{found['fit']['processes']}}\\n")  # in one piece: both write to the same pipe
"""


@pytest.mark.slow
def test_several_processes_of_a_script(source: Path, text: Path) -> None:
    Path("script.py").write_text(SCRIPT.format(small=SMALL))
    done = subprocess.run(
        [sys.executable, "script.py", str(source), str(text)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("processes 2") == 2  # each process gets the result
    assert Path("ptql-run/model/config.json").is_file()


# evaluate


@pytest.fixture(scope="module")
def finished(source: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run; tests work on a copy."""
    directory = tmp_path_factory.mktemp("finished") / "RUN"
    quantised(source, text, directory)
    return directory


@pytest.fixture
def run(finished: Path) -> Path:
    return Path(shutil.copytree(finished, "RUN"))


def test_evaluate_as_the_command(run: Path, text: Path) -> None:
    found = ptql.evaluate(run, text=text, length=16, windows=5, batch_size=2, accelerator="cpu")
    assert found["ppl"].keys() == {"words"}
    assert found["ppl_details"]["words"]["windows"] == 5
    stored = json.loads((run / "metrics.json").read_text())
    assert stored["ppl"] == found["ppl"]
    assert stored["fit"]["blocks"] == 2
    options = ("--length", "16", "--windows", "5", "--batch_size", "2", "--trainer.accelerator", "cpu")
    assert main(["eval", "--run", str(run), "--text.words", str(text), *options, "--json", "cli.json"]) == 0
    assert json.loads(Path("cli.json").read_text())["ppl"] == found["ppl"]


def test_evaluate_several_texts_and_the_source(run: Path, source: Path, text: Path) -> None:
    texts = {"one": text, "two": str(text)}
    found = ptql.evaluate(run, text=texts, length=16, windows=2, compare_source=True, out="out.json", accelerator="cpu")
    assert found["ppl"]["one"] == found["ppl"]["two"]
    alone = ptql.evaluate(source=source, text=texts, length=16, windows=2, accelerator="cpu")
    assert found["source"]["ppl"] == alone["ppl"]
    assert json.loads(Path("out.json").read_text())["source"]["ppl"] == alone["ppl"]
    assert "ppl" not in json.loads((run / "metrics.json").read_text())


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({}, "either --run RUN or --model.source DIR"),
        ({"run": "none"}, "none: no finished model in this run"),
        ({"run": "RUN", "text": "nope.txt"}, "give a readable file"),
        ({"run": "RUN", "length": 65}, "length=65"),
        ({"run": "RUN", "windows": 0}, "windows=0: at least 1 is needed"),
        ({"run": "RUN", "tasks": "nope"}, "tasks=nope: no such task in lm-eval"),
        ({"run": "RUN", "tasks": ["nope", "nope2"]}, "tasks=nope,nope2: no such task"),
        ({"run": "RUN", "accelerator": "warp"}, "accelerator=warp"),
    ],
)
def test_wrong_inputs_of_evaluate(run: Path, wrong: dict[str, Any], words: str) -> None:
    before = files(run / "model"), (run / "metrics.json").read_bytes()
    with pytest.raises(InputError, match=words.replace(".", r"\.")):
        ptql.evaluate(**{"accelerator": "cpu", **wrong})
    assert (files(run / "model"), (run / "metrics.json").read_bytes()) == before
