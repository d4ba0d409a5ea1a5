"""The command line: exit codes, one line for a wrong input, and nothing half-written behind it."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ptql.calibration.trainer import BlockTrainer
from ptql.cli import main, with_shipped_configs
from ptql.errors import InputError, one_line
from tests.words import save_source, save_text

ROOT = Path(__file__).parents[1]
PTQL = Path(sys.executable).with_name("ptql")
RTN = ("-c", "methods/rtn", "-c", "schemes/w4a16", "--trainer.accelerator", "cpu")
SMALL = ("--data.length", "16", "--data.samples", "3", "--data.batch_size", "2")
LEARNS = "-c methods/lrquant --trainer.max_epochs 1"
RUN_FILES = ["config.yaml", "ledger", "metrics.json", "model", "report.html", "tensorboard"]
Fit = Callable[..., list[str]]


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


@pytest.fixture
def fit(source: Path, text: Path) -> Fit:
    """The arguments of a good `fit` into RUN; what is given comes last, and so wins."""

    def arguments(*more: str) -> list[str]:
        good = ("--model.source", str(source), "--data.text", str(text), "--trainer.default_root_dir", "RUN")
        return ["fit", *RTN, *SMALL, *good, *more]

    return arguments


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[[list[str]], str]:
    """Runs a command that must be refused, and returns its one line."""

    def run(args: list[str]) -> str:
        before = snapshot(tmp_path)
        capfd.readouterr()
        code = main(args)
        out, err = capfd.readouterr()
        assert code == 2, err
        assert out == ""
        return only_line(err, before, snapshot(tmp_path))

    return run


def only_line(err: str, before: dict[str, str], after: dict[str, str]) -> str:
    assert err.startswith("ptql: error: "), err
    assert err.endswith("\n")
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    assert after == before
    return err.removeprefix("ptql: error: ").strip()


def snapshot(directory: Path) -> dict[str, str]:
    """Everything below, by its content; the cache of tokens may grow."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in directory.rglob("*")
        if "cache" not in path.relative_to(directory).parts
    }


def configured(directory: Path, settings: dict[str, Any]) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(settings))
    return directory


def copied(source: Path, directory: Path, pattern: str = "*") -> Path:
    directory.mkdir()
    for file in source.glob(pattern):
        (directory / file.name).write_bytes(file.read_bytes())
    return directory


# Wrong inputs of fit: the value, the rule and the remedy are all in the line


@pytest.mark.parametrize(
    ("wrong", "value", "rule", "remedy"),
    [
        ("--model.source /nope/model", "/nope/model", "no such model directory", "give one that holds config.json"),
        ("--model.source ./nope", "nope", "no such model directory", "give one"),
        ("--model.source null", "--model.source", "is missing", "say which model"),
        ("--model.weight.group_size 0", "group_size=0", "at least 1 column", "use -1"),
        ("--model.weight.group_size=-3", "group_size=-3", "at least 1 column", "use -1"),
        ("--model.weight.bits 5.5", "model.weight.bits=5.5", "a whole number is needed", "--help"),
        ("--model.weight {bits:\\ 5.5}", "model.weight.bits=5.5", "a whole number is needed", "--help"),
        ("--model.weight.bits four", "model.weight.bits=four", "a whole number is needed", "--help"),
        ("--model.weight.bits 0", "bits=0", "from 1 to 8", "use 16"),
        ("--model.weight.bits 9", "bits=9", "from 1 to 8", "use 16"),
        ("--model.activation.bits 1", "activation bits=1", "from 2 to 8", "use 16"),
        ("--model.activation.bits 5.5", "model.activation.bits=5.5", "a whole number is needed", "--help"),
        ("--model.weight.symmetric 3", "model.weight.symmetric=3", "true or false is needed", "--help"),
        ("--model.matmul low", "low", "'highest', 'high'", "--help"),
        ("--data.length 65", "length=65", "context of 64 tokens", "--data.length 64"),
        ("--data.length 1", "length=1", "at least 2", "--data.length"),
        ("--data.samples 0", "samples=0", "at least 1", "--data.samples"),
        ("--data.batch_size 4", "batch_size=4", "1 to 3", "--data.batch_size 3"),
        ("--data.text nope.txt", "nope.txt", "No such file", "give a readable file"),
        ("--data.lenth 16", "--data.lenth 16", "unrecognized", "--help"),
        ("--trainer.devices=2 --trainer.strategy ddp_spawn", "strategy=ddp_spawn", "anew for every block", "=ddp"),
        ("--trainer.devices=2 --trainer.strategy ddp_fork", "ddp_fork", "anew for every block", "or torchrun"),
        ("--trainer.strategy nope", "strategy=nope", "invalid strategy name", "--trainer.*"),
        ("--trainer.devices=4", "samples=3", "each of the 4 processes needs one", "--data.samples 4"),
        ("--trainer.devices=1000000000", "devices=1000000000", "at most 1,024 processes", "as many as there are"),
        ("--trainer.devices x", "devices=x", "CPUAccelerator", "--trainer.*"),
        ("--trainer.num_nodes 2", "num_nodes=2", "nothing starts the processes", "torchrun"),
        ("--trainer.accelerator warp", "accelerator=warp", "invalid accelerator", "--trainer.*"),
        ("--trainer.max_epochs=-1", "max_epochs=-1", "same number of epochs", "--trainer.max_epochs N"),
        ("--trainer.max_epochs 10001", "max_epochs=10001", "from 0 to 10,000", "--trainer.max_epochs N"),
        ("--trainer.max_epochs null", "max_epochs=None", "same number of epochs", "--trainer.max_epochs N"),
        ("--trainer.max_steps 3", "max_steps=3", "same number of epochs", "--trainer.max_epochs N"),
        ("--trainer.min_epochs 1", "min_epochs=1", "same number of epochs", "--trainer.max_epochs N"),
        ("--trainer.max_time 00:01:00:00", "max_time=00:01:00:00", "same number of epochs", "--trainer.max_epochs N"),
        ("--trainer.limit_train_batches 0", "limit_train_batches=0", "every epoch sees all", "--data.samples N"),
        ("--trainer.overfit_batches 1", "overfit_batches=1", "every epoch sees all windows", "--data.samples N"),
        ("--trainer.val_check_interval 5", "val_check_interval=5", "a block has no validation", "leave it out"),
        ("--trainer.barebones true", "barebones=True", "what a run is kept by", "leave it out"),
        ("--trainer.sync_batchnorm true", "sync_batchnorm=True", "no batch norms", "leave it out"),
        ("--trainer.plugins LightningEnvironment", "plugins=", "options of their own", "leave it out"),
        (
            "--trainer.reload_dataloaders_every_n_epochs 1",
            "reload_dataloaders_every_n_epochs=1",
            "stay",
            "leave it out",
        ),
        ("--trainer.use_distributed_sampler true", "use_distributed_sampler=True", "spread over", "leave it out"),
        ("--trainer.model_registry x", "model_registry=x", "not uploaded", "leave it out"),
        ("--trainer.accumulate_grad_batches 0", "accumulate_grad_batches=0", "1 batch or more", "leave it out"),
        ("--trainer.accumulate_grad_batches 3", "accumulate_grad_batches=3", "2 batches", "--data.batch_size"),
        ("--trainer.gradient_clip_val .nan", "gradient_clip_val=nan", "0 or more", "leave it out"),
        ("--trainer.gradient_clip_algorithm x", "gradient_clip_algorithm", "invalid", "--trainer.*"),
        (
            "--trainer.callbacks+=EarlyStopping --trainer.callbacks.monitor x",
            "EarlyStopping",
            "one fit",
            "leave it out",
        ),
        ("--trainer.logger nope", "nope", "Expected", "--help"),
        (
            "--trainer.logger CSVLogger --trainer.logger.save_dir words/x",
            "save_dir=words/x",
            "can't be",
            "give another",
        ),
        ("--trainer.logger WandbLogger", "wandb", "pip install", "correct"),
        ("--trainer.precision bf16-true", "precision=bf16-true", "are float32", "bf16-mixed"),
        (f"{LEARNS} --model.optimizer torch.optim.LBFGS", "optimizer", "can't learn a block", "--model.optimizer"),
        (f"{LEARNS} --model.optimizer torch.optim.SparseAdam", "SparseAdam", "dense gradients", "--model.optimizer"),
        ("--model.optimizer os.system", "model.optimizer", "returns <class 'Optimizer'>", "os.system; correct it"),
        ("--model.optimizer AdamW --model.optimizer.eps=-1", "optimizer", "Invalid epsilon", "--model.optimizer"),
        ("--data.samples 1000000000", "samples=1000000000", "hidden states need", "smaller --data.samples"),
        ("--model 3", "model", "3", "correct"),
        ("--model.weight null", "model.weight", "'null'", "correct it"),
        ("--trainer.precision 7", "trainer.precision=7", "bf16-mixed", "--help"),
        ("-c methods/lrquat", "methods/lrquat", "no such configuration file", "schemes/w4a4"),
        ("--config=methods/lrquat", "methods/lrquat", "no such configuration file", "methods/lrquant"),
        ("--trainer.default_root_dir /proc/nope", "/proc/nope", "can't be written", "--trainer.default_root_dir"),
        ("--trainer.default_root_dir s3://a/b", "s3://a/b", "a local directory", "--trainer.default_root_dir"),
        ("--trainer.default_root_dir=", "default_root_dir=''", "needs a directory", "--trainer.default_root_dir"),
    ],
)
def test_a_wrong_value_is_refused(
    fit: Fit, refused: Callable[[list[str]], str], wrong: str, value: str, rule: str, remedy: str
) -> None:
    Path("words").touch()
    args = [part.replace("\0", " ") for part in wrong.replace("\\ ", "\0").split()]
    line = refused(fit(*args))
    assert value in line
    assert rule in line
    assert remedy in line
    assert not Path("RUN").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(fit: Fit, refused: Callable[[list[str]], str]) -> None:
    line = refused(fit("--trainer.accelerator", "gpu"))
    assert "accelerator=gpu" in line
    assert "--trainer.*" in line


@pytest.mark.parametrize(
    ("yaml", "words"),
    [
        ("model: {wieght: {bits: 4}}", ["model.wieght"]),
        ("model: {weight: {bitz: 4}}", ["model.weight.bitz"]),
        ("trainer: {max_epoch: 4}", ["trainer.max_epoch"]),
        ("modle: {method: rtn}", ["modle"]),
        ("model: {weight: {bits: 5.5}}", ["model.weight.bits=5.5: a whole number is needed"]),
        ("model: {transforms: [{class_path: ptql.parts.transforms.Smoot}]}", ["model.transforms=", "'Smoot'"]),
        (
            "model: {transforms: [{class_path: ptql.parts.transforms.Smooth, init_args: {initail: log}}]}",
            ["model.transforms=", "'initail' is not accepted"],
        ),
        (
            "model: {transforms: [{class_path: ptql.parts.transforms.Smooth, init_args: {initial: lgo}}]}",
            ["model.transforms=", "['log', 'balanced', 'ones']", "lgo"],
        ),
        (
            "model: {weight_quantizer: {class_path: ptql.parts.weights.Affine, init_args: {lr: -1.0}}}",
            ["lr=-1.0: a learning rate is at most 10 and above 0", "clip: false"],
        ),
        (
            "model: {objective: {class_path: ptql.parts.objectives.Reconstruction, init_args: {mse: .nan}}}",
            ["mse=nan, nlc=", "weights of losses are 0 or more, 1e+06 at most", "take mse: 1"],
        ),
        ("model:", ["Unexpected config: model:"]),
        ("model: {weight: null}", ["model.weight=None: a section holds settings by name", "correct or remove it"]),
        ("model: {weight: []}", ["model.weight=[]: a section holds settings by name", "correct or remove it"]),
        ("!!python/object/apply:os.system [touch hacked]", ["tag", "os.system"]),
        ("model: [", ["flow node"]),
    ],
)
def test_a_wrong_file_is_refused(fit: Fit, refused: Callable[[list[str]], str], yaml: str, words: list[str]) -> None:
    Path("mine.yaml").write_text(yaml)
    line = refused(fit("-c", "mine.yaml"))
    assert all(word in line for word in words), line
    assert line.count("--help") <= 1
    assert "Union" not in line


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ["it is empty", "give a text of at least one window"]),
        (" \n \n", ["it is empty", "give a text"]),
        ("w1 w2 w3", ["text of 3 tokens", "shorter than one window of 16", "give a longer text"]),
    ],
)
def test_a_text_that_holds_no_window(
    fit: Fit, refused: Callable[[list[str]], str], content: str, words: list[str]
) -> None:
    Path("mine.txt").write_text(content)
    line = refused(fit("--data.text", "mine.txt"))
    assert all(word in line for word in words), line


# Wrong models


def test_a_family_that_is_not_known(fit: Fit, refused: Callable[[list[str]], str], tmp_path: Path) -> None:
    line = refused(fit("--model.source", str(configured(tmp_path / "gpt2", {"model_type": "gpt2", "n_layer": 2}))))
    assert "model_type='gpt2': this family is not known; give a model of one of: gemma2, gemma3_text, llama, " in line


def test_a_model_without_a_type_or_without_a_configuration(fit: Fit, refused: Callable[[list[str]], str]) -> None:
    assert "model_type=''" in refused(fit("--model.source", str(configured(Path("none"), {}))))
    Path("empty").mkdir()
    assert "empty: config.json can't be read" in refused(fit("--model.source", "./empty"))


def test_pickled_weights_are_not_read(fit: Fit, refused: Callable[[list[str]], str], source: Path) -> None:
    directory = copied(source, Path("pickled"), "*.json")
    (directory / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    line = refused(fit("--model.source", "./pickled"))
    assert all(word in line for word in ("pickled: no model.safetensors", "only safetensors", "convert first")), line


def test_a_model_that_another_tool_has_quantised(fit: Fit, refused: Callable[[list[str]], str], source: Path) -> None:
    directory = copied(source, Path("awq"))
    settings = json.loads((directory / "config.json").read_text())
    configured(directory, {**settings, "quantization_config": {"quant_method": "awq"}})
    assert "quantised by 'awq' already; give the original model" in refused(fit("--model.source", "./awq"))


@pytest.mark.parametrize("missing", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_an_incomplete_model_is_refused_before_the_run_begins(
    fit: Fit, refused: Callable[[list[str]], str], source: Path, missing: str
) -> None:
    directory = copied(source, Path("incomplete"))
    tensors = load_file(directory / "model.safetensors")
    del tensors[missing]
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    line = refused(fit("--model.source", "./incomplete"))
    assert f"tensor {missing} is missing; the model directory is incomplete" in line


def test_a_weight_file_that_is_cut_off(fit: Fit, refused: Callable[[list[str]], str], source: Path) -> None:
    directory = copied(source, Path("cut"))
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    assert "model.safetensors: damaged" in refused(fit("--model.source", "./cut"))


def test_a_model_without_a_tokenizer(fit: Fit, refused: Callable[[list[str]], str], source: Path) -> None:
    copied(source, Path("mute"), "[cm]*")  # config.json, model.safetensors
    assert "put the model's tokenizer.json" in refused(fit("--model.source", "./mute"))


# Directories of another run


@pytest.fixture
def finished(fit: Fit) -> Path:
    assert main(fit()) == 0
    return Path("RUN")


def test_the_directory_of_another_run_is_left_alone(
    fit: Fit, refused: Callable[[list[str]], str], finished: Path, source: Path, text: Path
) -> None:
    Path("other.txt").write_text(text.read_text() + " w1")
    other = copied(source, Path("other"))
    tensors = load_file(other / "model.safetensors")
    save_file({name: t + 1 for name, t in tensors.items()}, other / "model.safetensors", {"format": "pt"})
    for args, what in (
        (("--data.text", "other.txt"), "data.text_sha256 was '"),
        (("--data.samples", "4"), "data.samples was 3 and is 4 now"),
        (("--data.seed", "5"), "data.seed was 2 and is 5 now"),
        (("--model.source", "./other"), "source was '"),
        (("--model.weight.bits", "3"), "recipe.weight.bits was 4 and is 3 now"),
        (("--model.activation.bits", "8"), "recipe.activation.bits was 16 and is 8 now"),
        (("--trainer.max_epochs", "1"), "max_epochs was 0 and is 1 now"),
        (("--trainer.gradient_clip_val", "1.0"), "gradient_clip was [None, None] and is [1.0, None] now"),
        (("--trainer.precision", "bf16-mixed"), "precision was '32-true, matmul high'"),
    ):
        line = refused(fit(*args))
        assert line.startswith("RUN: holds another run, whose "), line
        assert what in line
        assert "give another --trainer.default_root_dir, or remove it" in line


def test_a_model_that_ptql_has_quantised(fit: Fit, refused: Callable[[list[str]], str], finished: Path) -> None:
    args = fit("--model.source", str(finished / "model"), "--trainer.default_root_dir", "AGAIN")
    assert "RUN/model: quantised by ptql already; give the original model" in refused(args)


@pytest.mark.parametrize("name", ["model", "tensorboard", "metrics.json", "config.yaml", "ledger"])
def test_a_directory_with_files_of_something_else(fit: Fit, refused: Callable[[list[str]], str], name: str) -> None:
    taken = Path("RUN", name)
    taken.mkdir(parents=True)
    (taken / "block-00000.safetensors").write_text("mine")
    line = refused(fit())
    assert f"RUN: holds {name} but no ledger of this run" in line
    assert "give another --trainer.default_root_dir, or remove it" in line


def test_a_file_where_the_run_should_be(fit: Fit, refused: Callable[[list[str]], str]) -> None:
    Path("RUN").write_text("mine")
    assert "RUN: not a directory, so it can't be written to" in refused(fit())
    assert "RUN/deeper: can't be written to (Not a directory)" in refused(
        fit("--trainer.default_root_dir", "RUN/deeper")
    )


def test_files_of_another_name_do_no_harm(fit: Fit) -> None:
    Path("RUN").mkdir()
    Path("RUN/notes.txt").write_text("mine")
    assert main(fit()) == 0
    assert Path("RUN/notes.txt").read_text() == "mine"


# Wrong inputs of eval


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("", ["--run RUN or --model.source DIR"]),
        ("--run RUN --model.source RUN/model", ["either --run RUN or --model.source DIR"]),
        ("--run RUN --data.text other.txt", ["data: these are the windows to calibrate on", "--text.NAME FILE"]),
        ("--run RUN --model.weight.bits 2", ["model: eval measures a model as it is stored", "--run RUN alone"]),
        ("--run none", ["none: no finished model in this run", "let `ptql fit` end first"]),
        ("--run RUN --tasks nope", ["tasks=nope: no such task in lm-eval", "correct the name, or give --include_path"]),
        ("--run RUN --tasks piqa --include_path none", ["include_path=none: not a folder"]),
        ("--run RUN --text.mine none.txt", ["none.txt", "give a readable file"]),
        ("--run RUN --text.mine empty.txt", ["it is empty"]),
        ("--run RUN --length 65", ["length=65", "context, 64"]),
        ("--run RUN --length 1", ["length=1", "2 tokens"]),
        ("--run RUN --windows 0", ["windows=0: at least 1 is needed; leave --windows out"]),
        ("--run RUN --limit=-1", ["limit=-1: at least 1 is needed"]),
        ("--run RUN --batch_size 0", ["batch_size=0: at least 1 is needed"]),
        ("--run RUN --bach_size 2", ["--bach_size 2"]),
        ("--run RUN --text.mine RUN/words.txt --length 16 --json bad.json", ["bad.json", "move it away"]),
    ],
)
def test_wrong_inputs_of_eval(
    refused: Callable[[list[str]], str], finished: Path, text: Path, wrong: str, words: list[str]
) -> None:
    Path("empty.txt").touch()
    Path("bad.json").write_text("[1]")
    (finished / "words.txt").write_text(text.read_text())
    line = refused(["eval", "--trainer.accelerator", "cpu", *wrong.split()])
    assert all(word in line for word in words), line


def test_eval_of_a_run_that_is_not_finished(refused: Callable[[list[str]], str], finished: Path) -> None:
    (finished / "model").rename(finished / ".model.tmp")  # as it is called while it is written
    assert "RUN: no finished model in this run; let `ptql fit` end first" in refused(["eval", "--run", "RUN"])


# What works


def test_fit_and_eval(fit: Fit, text: Path, source: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(fit()) == 0
    assert "RUN/model: 4." in capfd.readouterr().out
    texts = ("--text.one", str(text), "--text.two", str(text), "--length", "16", "--trainer.accelerator", "cpu")
    assert main(["eval", "--run", "RUN", *texts]) == 0
    metrics = json.loads(Path("RUN/metrics.json").read_text())
    assert metrics["ppl"]["one"] == metrics["ppl"]["two"] > 1
    assert metrics["ppl_details"]["one"]["windows"] == 600 // 16
    assert metrics["fit"]["method"] == "rtn"
    assert main(["eval", "--run", "RUN", "--json", "out/mine.json", *texts, "--windows", "2"]) == 0
    own = json.loads(Path("out/mine.json").read_text())
    assert own["ppl_details"]["two"]["windows"] == 2
    assert json.loads(Path("RUN/metrics.json").read_text()) == metrics
    assert main(["eval", "--model.source", str(source), *texts]) == 0
    assert "perplexity" in capfd.readouterr().out
    assert sorted(os.listdir()) == ["RUN", "cache", "out"]  # without --json it is only printed


def test_tasks_are_given_with_commas_or_as_a_list(monkeypatch: pytest.MonkeyPatch, finished: Path) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(
        "ptql.calibration.finished_run_trainer.evaluate_run", lambda *given: asked.append(given[-2].tasks) or {}
    )
    for tasks in ("piqa", "piqa,arc_easy", "[piqa, arc_easy]"):
        assert main(["eval", "--run", "RUN", "--tasks", tasks]) == 0
    assert main(["eval", "--run", "RUN"]) == 0
    assert asked == [["piqa"], ["piqa", "arc_easy"], ["piqa", "arc_easy"], []]


@pytest.mark.parametrize("command", [[], ["fit"], ["eval"]])
def test_help(command: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert stop.value.code == 0
    out = capfd.readouterr().out
    wanted = {
        "": ["fit", "eval", "Quantise a model block by block"],
        "fit": ["--model.source", "--data.text", "--model.weight.bits", "--trainer.max_epochs", "Hugging Face"],
        "eval": ["--run", "--text", "--tasks", "--include_path", "--limit", "A finished run, whose model is measured"],
    }
    assert all(word in out for word in wanted["".join(command)])


def test_no_command_and_an_unknown_one(refused: Callable[[list[str]], str]) -> None:
    assert "fit,eval" in refused([])
    assert "'fti'" in refused(["fti"])


# Configuration files by name


def printed(args: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        main([*args, "--print_config"])
    assert stop.value.code == 0
    return capfd.readouterr().out


@pytest.mark.parametrize("name", ["methods/lrquant", "configs/methods/lrquant.yaml", "methods/lrquant.yaml"])
def test_shipped_files_are_found_from_any_directory(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert "method: lrquant" in printed(["fit", "-c", name], capfd)
    assert "method: lrquant" in printed(["fit", f"--config={name}"], capfd)


def test_the_files_of_a_checkout_are_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    args = ["fit", "-c", "configs/methods/lrquant.yaml", "-c", "methods/lrquant"]
    assert with_shipped_configs(args)[2] == "configs/methods/lrquant.yaml"
    assert Path(with_shipped_configs(args)[4]).read_text() == (ROOT / "configs/methods/lrquant.yaml").read_text()


def test_a_file_that_lies_here_wins_and_later_ones_win(capfd: pytest.CaptureFixture[str]) -> None:
    Path("methods").mkdir()
    Path("methods/lrquant").write_text("model: {method: mine, weight: {bits: 7}}")
    out = printed(["fit", "-c", "methods/lrquant", "-c", "schemes/w4a4", "--model.activation.bits", "6"], capfd)
    assert "method: mine" in out
    assert "bits: 4" in out
    assert "bits: 6" in out
    assert "bits: 7" not in out


def test_an_unknown_name_lists_what_is_shipped(refused: Callable[[list[str]], str]) -> None:
    line = refused(["fit", "-c", "methods/none"])
    folders = [path for path in (ROOT / "configs").iterdir() if path.is_dir() and path.name != "__pycache__"]
    names = [f"{folder.name}/{file.stem}" for folder in folders for file in folder.glob("*.yaml")]
    assert len(names) > 15
    assert all(name in line for name in names)


# Real processes


def process(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=120)


def test_the_installed_command(fit: Fit, tmp_path: Path) -> None:
    before = snapshot(tmp_path)
    done = process(PTQL, *fit("--model.weight.group_size", "0"))
    assert done.returncode == 2
    assert done.stdout == ""
    line = only_line(done.stderr, before, snapshot(tmp_path))
    assert line == "group_size=0: a group holds at least 1 column; use -1 for one scale a row"


def test_the_command_of_a_checkout(fit: Fit, tmp_path: Path) -> None:
    done = process(sys.executable, ROOT / "cli.py", *fit())
    assert done.returncode == 0, done.stderr
    assert [line.partition(": ")[0] for line in done.stdout.splitlines()] == ["ptql", "RUN/model"]
    assert "dry run: one batch through one block, written and read again" in done.stdout
    lines = done.stderr.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["block 1/2", "block 2/2"], lines
    assert sorted(os.listdir("RUN")) == RUN_FILES


def test_a_dry_run_ends_well_and_leaves_nothing(fit: Fit, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = snapshot(tmp_path)
    for given in ("true", "1"):
        for directory in ("RUN", "some/where/RUN"):
            args = fit("--trainer.fast_dev_run", given, "--trainer.default_root_dir", directory)
            assert main([*args, "-c", "methods/lrquant"]) == 0
            out, err = capfd.readouterr()
            assert out.startswith("ptql: dry run: one batch through one block, written and read again, in ")
            assert (out.count("\n"), err) == (1, "")
            assert snapshot(tmp_path) == before


def test_a_dry_run_in_a_finished_run_changes_nothing(fit: Fit, finished: Path, tmp_path: Path) -> None:
    before = snapshot(tmp_path)
    assert main(fit("--trainer.fast_dev_run", "true")) == 0
    assert snapshot(tmp_path) == before


def test_two_processes(fit: Fit) -> None:
    done = process(PTQL, *fit("-c", "methods/lrquant", "--trainer.max_epochs", "1", "--trainer.devices", "2"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("dry run") == 1
    assert done.stdout.count("3 samples do not divide by 2 processes: the last 1 are left out") == 1
    assert sorted(os.listdir("RUN")) == RUN_FILES
    assert json.loads(Path("RUN/metrics.json").read_text())["fit"]["processes"] == 2


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_while_a_block_learns(fit: Fit, name: str, code: int) -> None:
    args = fit("-c", "methods/lrquant", "--trainer.max_epochs", "3000")
    with subprocess.Popen([str(PTQL), *args], stderr=subprocess.PIPE, text=True) as running:
        deadline = time.monotonic() + 60
        while not list(Path("RUN/tensorboard").glob("events*")):  # the first block learns
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.3)
        running.send_signal(getattr(signal, name))
        _, err = running.communicate(timeout=60)
    assert running.returncode == code
    assert err.splitlines()[-1] == "ptql: stopped; the same command goes on from here"
    assert "Traceback" not in err
    assert not Path("RUN/model").exists()
    manifest = json.loads(Path("RUN/ledger/manifest.json").read_text())
    assert manifest["blocks"] == {}
    (partial,) = Path("RUN/ledger").glob("partial*")
    assert partial.name.startswith("partial-00000-")


def test_a_signal_outside_of_learning_is_told_apart_from_other_exits(
    fit: Fit, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def signalled(number: signal.Signals) -> Callable[..., None]:
        return lambda *_, **__: os.kill(os.getpid(), number)

    def ended(*_: Any, **__: Any) -> None:
        raise SystemExit(7)

    with monkeypatch.context() as patched:
        for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
            patched.setattr(BlockTrainer, "_streams", signalled(number))
            assert main(fit()) == code
            assert capfd.readouterr().err == "ptql: stopped; the same command goes on from here\n"
        patched.setattr(BlockTrainer, "_streams", ended)
        with pytest.raises(SystemExit) as stop:
            main(fit())
    assert stop.value.code == 7
    assert main(fit()) == 0
    assert sorted(os.listdir("RUN")) == RUN_FILES


def test_a_bug_shows(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ValueError("ours")

    monkeypatch.setattr(BlockTrainer, "_streams", broken)
    with pytest.raises(ValueError, match="ours") as found:
        main(fit())
    assert not isinstance(found.value, InputError)


def test_a_line_is_one_line_whatever_a_value_holds() -> None:
    assert one_line("a\nb \t c") == "a b c"
    assert one_line("a\0b\x1b[1m\u202e\udcff") == r"a\x00b\x1b[1m\u202e\udcff"
    assert len(one_line("x" * 10**6)) < 1100
