"""Whole runs whose steps are computed in pieces: what is learned, counted and logged; stopped runs; two processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LambdaCallback
from ptql.callbacks import BlockCheckpoint
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from ptql.calibration.data import CalibrationData
from ptql.calibration.quant_lm import QuantLM
from ptql.calibration.stopping import Stopped
from ptql.calibration.trainer import BlockTrainer
from ptql.checkpoint import SINGLE
from ptql.cli import main
from ptql.engine.step import Step
from ptql.errors import InputError
from ptql.parts.objectives import DistributionCorrection, Reconstruction, Targets
from ptql.parts.transforms import Compensate, Smooth
from ptql.parts.weights import Affine
from ptql.recipe import ActivationScheme, IntScheme
from tests.models import llama_config, random_model, save
from tests.words import save_source, save_text

ROOT = Path(__file__).parents[2]
BLOCKS, EPOCHS, BATCHES = 2, 3, 3
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
Fit = Callable[..., BlockTrainer]
Made = Callable[..., Path]


def gentle(params: Any) -> torch.optim.Optimizer:
    """With an epsilon as large as gradients are here, a gradient of twice the size is a larger step."""
    return torch.optim.AdamW(params, eps=1e-4, weight_decay=0.0)


# Smoothing has learnables whose gradients are nearly zero. AdamW makes whole steps of what is left of them, so that
# runs which add in another order end further from each other.
RECIPES: dict[str, dict[str, Any]] = {
    "w3a16": {"weight": IntScheme(3, -1), "weight_quantizer": Affine(lr=1e-2)},
    "w3a16, smoothed": {"weight": IntScheme(3, -1), "transforms": [Smooth(when="always", lr=1e-3)]},
    "w4a4": {"weight": IntScheme(4, -1), "activation": ActivationScheme(4), "transforms": [Smooth(lr=1e-3)]},
    "w3a16, balanced": {
        "weight": IntScheme(3, -1),
        "weight_quantizer": Affine(lr=1e-2, factor_rank=2),
        "objective": Reconstruction(targets=["fp", "fp_on_quantised"], balance="ema"),
    },
    "w3a16, attention": {
        "weight": IntScheme(3, -1),
        "weight_quantizer": Affine(lr=1e-2),
        "transforms": [Compensate(first=1, last=0)],
        "objective": DistributionCorrection(akl_rows=5),
    },
}
SIZES_COUNT = {
    "weight": IntScheme(3, -1),
    "weight_quantizer": Affine(lr=0.05),
    "optimizer": gentle,
}
"""Not only the direction of a gradient is learned from."""
CLOSE = {"w3a16": 1e-4, "w3a16, smoothed": 3e-2, "w4a4": 3e-2, "w3a16, balanced": 3e-2, "w3a16, attention": 3e-2}


@pytest.fixture(scope="module", autouse=True)
def one_thread(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PTQL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_source(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_text(tmp_path_factory.mktemp("text") / "words.txt")


@pytest.fixture(scope="module")
def made(fit: Fit, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The directory of a finished run, made once."""
    known: dict[str, Path] = {}

    def run(engine: str = "eager", name: str = "w3a16", **options: Any) -> Path:
        key = f"{engine} {name} {options}"
        if key not in known:
            known[key] = tmp_path_factory.mktemp("made") / "run"
            model = {**RECIPES, "sizes count": SIZES_COUNT}[name]
            trainer = fit(known[key], engine=engine, model=model, logger=True, **options)
            steps = -(-BATCHES // options.get("accumulate_grad_batches", 1))
            assert trainer.global_step == BLOCKS * EPOCHS * steps
        return known[key]

    return run


@pytest.fixture(scope="module")
def fit(source: Path, words: Path) -> Fit:
    """Runs of two blocks, three epochs, three batches."""

    def run(
        directory: Path,
        *callbacks: Callback,
        engine: str = "eager",
        model: dict[str, Any] = RECIPES["w3a16"],
        samples: int = 6,
        batch_size: int = 2,
        **options: Any,
    ) -> BlockTrainer:
        usual: dict[str, Any] = {
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": EPOCHS,
            "log_every_n_steps": 1,
            "default_root_dir": directory,
            "callbacks": list(callbacks),
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        }
        trainer = BlockTrainer(**{**usual, **options})
        data = CalibrationData(str(words), samples=samples, length=16, batch_size=batch_size)
        trainer.fit(QuantLM(**{"source": str(source), "engine": engine, **model}), data)
        return trainer

    return run


def noted(run: Path) -> list[dict[str, Any]]:
    blocks = json.loads((run / "ledger/manifest.json").read_text())["blocks"]
    return [blocks[str(index)] for index in range(len(blocks))]


def learned(run: Path) -> dict[str, Tensor]:
    """What was learned, by block and name."""
    return {
        f"{path.stem}.{name}": tensor
        for path in sorted((run / "ledger").glob("block-*.safetensors"))
        for name, tensor in load_file(path).items()
        if name.startswith("learned.")
    }


def fit_metrics(run: Path) -> dict[str, Any]:
    return json.loads((run / "metrics.json").read_text())["fit"]


def logged(run: Path) -> dict[str, list[int]]:
    """Steps of every curve, file by file in the order in which they were written."""
    steps: dict[str, list[int]] = {}
    for path in sorted((run / "tensorboard").glob("events*"), key=lambda path: int(path.name.split(".")[-1])):
        found = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
        for tag in found.Tags()["scalars"]:
            steps.setdefault(tag, []).extend(event.step for event in found.Scalars(tag))
    return steps


def assert_same_bytes(run: Path, clean: Path) -> None:
    assert fit_metrics(run)["checksum"] == fit_metrics(clean)["checksum"]
    for path in (clean / "model").iterdir():
        assert (run / "model" / path.name).read_bytes() == path.read_bytes(), path.name


def assert_close_runs(run: Path, other: Path, rel: float) -> None:
    """Losses of every block, and what was learned on the whole: a last bit moves what rounds to another code."""
    for block, expected in zip(noted(run), noted(other), strict=True):
        assert block.keys() == expected.keys()
        for key in ("loss", "loss_start", "loss_learned", "mse"):
            assert block[key] == pytest.approx(expected[key], rel=rel), key
        for key in ("steps", "skipped_steps"):
            assert block[key] == expected[key], key
    mine, theirs = learned(run), learned(other)
    assert mine.keys() == theirs.keys()
    if rel < 1e-2:
        for name, value in mine.items():
            torch.testing.assert_close(value, theirs[name], rtol=rel, atol=rel, msg=name)


def assert_moved_alike(run: Path, other: Path) -> None:
    """The clipping logits of all blocks, which start at 4, have gone the same way, as far."""
    mine, theirs = (
        torch.cat([value.flatten() - 4 for name, value in learned(path).items() if "quantizers" in name])
        for path in (run, other)
    )
    assert theirs.norm() > 0.1
    assert (mine - theirs).norm() < 0.01 * theirs.norm()


# What a run leaves


@pytest.mark.parametrize("name", RECIPES)
def test_a_run_in_pieces_leaves_what_a_plain_one_leaves(made: Made, name: str) -> None:
    run, plain = made("eager", name), made("plain", name)
    assert_close_runs(run, plain, CLOSE[name])
    assert any(block["loss"] < block["loss_start"] for block in noted(run))
    assert sorted(os.listdir(run)) == sorted(os.listdir(plain))
    assert (run / "report.html").stat().st_size > 0.9 * (plain / "report.html").stat().st_size
    found, expected = fit_metrics(run), fit_metrics(plain)
    assert found.keys() == expected.keys()
    assert found["skipped_steps"] == 0
    assert found["last_block_mse"] == pytest.approx(expected["last_block_mse"], rel=CLOSE[name])
    assert [block["steps"] for block in noted(run)] == [EPOCHS * BATCHES] * BLOCKS
    steps = logged(run)
    assert {"loss/total", "loss/mse_fp", "loss/nlc_fp"} <= steps.keys()
    assert steps == logged(plain)
    assert steps["loss/total"] == list(range(BLOCKS * EPOCHS * BATCHES))
    stored, as_plain = load_file(run / "model" / SINGLE), load_file(plain / "model" / SINGLE)
    assert {key: (t.shape, t.dtype) for key, t in stored.items()} == {
        key: (t.shape, t.dtype) for key, t in as_plain.items()
    }


OPTIONS: dict[str, tuple[int, dict[str, Any]]] = {
    "two batches a step": (2, {"accumulate_grad_batches": 2}),
    "clipped by norm": (BATCHES, {"gradient_clip_val": 2e-3}),
    "clipped by value": (BATCHES, {"gradient_clip_val": 1e-4, "gradient_clip_algorithm": "value"}),
    "both": (2, {"accumulate_grad_batches": 2, "gradient_clip_val": 2e-3}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_a_step_mean_what_they_mean_to_a_plain_one(made: Made, name: str) -> None:
    """Three batches an epoch: the second step of two batches has one."""
    steps, options = OPTIONS[name]
    run, plain = made("eager", "sizes count", **options), made("plain", "sizes count", **options)
    assert [block["steps"] for block in noted(run)] == [EPOCHS * steps] * BLOCKS
    assert_close_runs(run, plain, 1e-2)
    assert_moved_alike(run, plain)
    assert logged(run) == logged(plain)
    with pytest.raises(AssertionError):  # the option is felt
        assert_moved_alike(run, made("eager", "sizes count"))


def test_a_source_in_bfloat16_learns_what_it_learns_plainly(fit: Fit, source: Path, tmp_path: Path) -> None:
    """Its matrices stay in bfloat16 while they are folded; plain steps have them in float32."""
    narrow = save_source(tmp_path / "model")
    save(random_model(llama_config()).bfloat16(), narrow)
    for engine in ("plain", "eager"):
        fit(tmp_path / engine, engine=engine, model={**RECIPES["w3a16"], "source": str(narrow)})
    assert_close_runs(tmp_path / "eager", tmp_path / "plain", CLOSE["w3a16"])


def test_the_values_of_every_second_step_are_logged(made: Made) -> None:
    for engine in ("plain", "eager"):
        found = logged(made(engine, log_every_n_steps=2))
        assert found["loss/total"] == found["loss/mse_fp"] == list(range(1, BLOCKS * EPOCHS * BATCHES, 2))


# Stopped, and gone on with


class StopAt(Callback):
    """SIGTERM during one step of a block."""

    def __init__(self, block: int, epoch: int, batch: int) -> None:
        self.at = block, epoch, batch

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if (trainer.block, trainer.current_epoch, batch_idx) == self.at:
            os.kill(os.getpid(), signal.SIGTERM)


class Flags(Callback):
    """What the optimiser in use is told, at each batch, and what computes its steps."""

    def __init__(self) -> None:
        self.fused: set[bool] = set()
        self.steps: set[type] = set()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.fused |= {group["fused"] for group in trainer.optimizers[0].param_groups}
        self.steps.add(type(pl_module._step))


STOPS: list[tuple[tuple[int, int, int], int]] = [
    *(((0, 0, 0), 1), ((1, 1, 1), 1), ((0, 1, 2), 1), ((1, 2, 2), 1)),
    *(((0, 1, 0), 2), ((1, 1, 1), 2), ((1, 0, 2), 2)),
]
"""Block, epoch and batch, and batches in a step: the middle of an epoch, its end, and the last step of a block."""


@pytest.mark.parametrize(("at", "accumulate"), STOPS, ids=str)
def test_a_run_that_was_stopped_ends_in_the_same_bytes(
    fit: Fit, made: Made, at: tuple[int, int, int], accumulate: int, tmp_path: Path
) -> None:
    options = {"log_every_n_steps": 2, "accumulate_grad_batches": accumulate}
    clean, run, flags = made("eager", "w4a4", **options), tmp_path / "run", Flags()
    with pytest.raises(Stopped):
        fit(run, StopAt(*at), model=RECIPES["w4a4"], logger=True, **options)
    (partial,) = (run / "ledger").glob(f"partial-{at[0]:05d}-*.ckpt")
    for group in torch.load(partial, weights_only=True)["optimizer_states"][0]["param_groups"]:
        assert (group["fused"], group["foreach"], group["capturable"]) == (None, None, False)
    fit(run, flags, model=RECIPES["w4a4"], logger=True, **options)
    if at != (BLOCKS - 1, EPOCHS - 1, BATCHES - 1):  # nothing is left to be learned there
        assert flags.fused == {True}
        assert flags.steps == {Step}
    assert_same_bytes(run, clean)
    timeless = [
        [{key: value for key, value in block.items() if "seconds" not in key and "peak" not in key} for block in blocks]
        for blocks in (noted(run), noted(clean))
    ]
    assert timeless[0] == timeless[1]
    assert logged(run)["loss/total"] == logged(clean)["loss/total"]


@pytest.mark.parametrize("engine", ["plain", "eager"])
@pytest.mark.parametrize(("at", "accumulate"), [((0, 0, 0), 1), ((1, 1, 1), 1), ((0, 1, 1), 2)], ids=str)
def test_running_averages_go_on_where_they_were(
    fit: Fit, made: Made, engine: str, at: tuple[int, int, int], accumulate: int, tmp_path: Path
) -> None:
    options, name = {"accumulate_grad_batches": accumulate}, "w3a16, balanced"
    with pytest.raises(Stopped):
        fit(tmp_path / "run", StopAt(*at), engine=engine, model=RECIPES[name], logger=True, **options)
    (partial,) = (tmp_path / "run/ledger").glob("partial-*.ckpt")
    state = torch.load(partial, weights_only=True)["state_dict"]
    assert (state["balance.averages"] > 0).all()
    fit(tmp_path / "run", engine=engine, model=RECIPES[name], logger=True, **options)
    assert_same_bytes(tmp_path / "run", made(engine, name, **options))


@pytest.mark.parametrize("engine", ["plain", "eager"])
def test_a_run_that_looks_at_attention_goes_on_where_it_was(fit: Fit, made: Made, engine: str, tmp_path: Path) -> None:
    """In its second block: nothing is looked at in the first one then."""
    name, run = "w3a16, attention", tmp_path / "run"
    assert {"loss/akl"} <= logged(made(engine, name)).keys()
    with pytest.raises(Stopped):
        fit(run, StopAt(1, 1, 1), engine=engine, model=RECIPES[name], logger=True)
    fit(run, engine=engine, model=RECIPES[name], logger=True)
    assert_same_bytes(run, made(engine, name))


def test_saving_between_epochs_changes_nothing_of_the_run(fit: Fit, made: Made, tmp_path: Path) -> None:
    """The groups that are saved are made neutral; those in use stay as the step needs them."""
    flags = Flags()
    fit(tmp_path / "saved", BlockCheckpoint(every_seconds=0.0), flags, model=RECIPES["w4a4"])
    assert flags.fused == {True}
    assert_same_bytes(tmp_path / "saved", made("eager", "w4a4"))


def test_what_is_saved_is_a_plain_optimisers_state(fit: Fit, tmp_path: Path) -> None:
    """AdamW takes it as it is, and moves on from it without fused kernels."""
    with pytest.raises(Stopped):
        fit(tmp_path / "run", StopAt(0, 1, 1))
    (partial,) = (tmp_path / "run/ledger").glob("partial-*.ckpt")
    state = torch.load(partial, weights_only=True)["optimizer_states"][0]
    assert {float(values["step"]) for values in state["state"].values()} == {BATCHES + 2}
    groups = [
        {"params": [torch.zeros_like(state["state"][index]["exp_avg"]).requires_grad_() for index in group["params"]]}
        for group in state["param_groups"]
    ]
    optimizer = torch.optim.AdamW(groups)
    optimizer.load_state_dict(state)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert all(parameter.isfinite().all() and parameter.any() for parameter in parameters)


@pytest.mark.parametrize("other", ["plain", "auto"])
def test_the_engine_is_part_of_what_a_run_is(fit: Fit, other: str, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        fit(tmp_path / "run", StopAt(0, 1, 1))
    with pytest.raises(InputError, match=f"recipe.engine was 'eager' and is '{other}' now") as refused:
        fit(tmp_path / "run", engine=other)
    assert "\n" not in str(refused.value)


# What looks inside a step, and what goes wrong in it


class Looks(Callback):
    """Sees the gradients of every step."""

    def __init__(self) -> None:
        self.seen = 0

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
        self.seen += all(grad is not None for grad in grads)


def test_a_callback_that_looks_inside_steps_makes_them_plain_and_that_is_said_once(
    fit: Fit, made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    looks = Looks()
    fit(tmp_path / "run", looks)
    assert looks.seen == BLOCKS * EPOCHS * BATCHES
    said = [line for line in capsys.readouterr().err.splitlines() if "engine:" in line]
    assert said == ["ptql: engine: plain, as Looks.on_before_optimizer_step looks inside a step"]
    assert_close_runs(tmp_path / "run", made("plain"), CLOSE["w3a16"])


def test_a_callback_made_of_functions_is_seen_too(fit: Fit, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[int] = []
    fit(tmp_path / "run", LambdaCallback(on_before_optimizer_step=lambda *_: seen.append(1)))
    assert len(seen) == BLOCKS * EPOCHS * BATCHES
    assert capsys.readouterr().err.count("engine: plain, as LambdaCallback.on_before_optimizer_step") == 1


def test_other_callbacks_leave_a_step_in_pieces(fit: Fit, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags, ends = Flags(), []
    fit(tmp_path / "run", flags, LambdaCallback(on_train_batch_end=lambda *args: ends.append(args[2]["loss"])))
    assert flags.steps == {Step}
    assert len(ends) == BLOCKS * EPOCHS * BATCHES
    assert all(float(loss) > 0 for loss in ends)
    assert "engine:" not in capsys.readouterr().err


class Once(Reconstruction):
    """Infinite on one batch that is learned from. The first call with gradients is the dry run's."""

    left: list[int]

    def terms(self, output: Tensor, targets: Targets) -> dict[str, Tensor]:
        terms = super().terms(output, targets)
        if output.requires_grad and self.left.pop(0) == 0:
            terms = {name: term * float("inf") for name, term in terms.items()}
        return terms


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_that_is_not_finite_is_skipped_and_counted(fit: Fit, accumulate: int, tmp_path: Path) -> None:
    """In the second epoch of the second block; the steps go on being counted."""
    bad = 1 + EPOCHS * BATCHES + BATCHES + 1
    for engine in ("plain", "eager"):
        Once.left = list(range(bad, bad - 1 - BLOCKS * EPOCHS * BATCHES, -1))
        trainer = fit(
            tmp_path / engine,
            engine=engine,
            model={**RECIPES["w3a16"], "objective": Once()},
            accumulate_grad_batches=accumulate,
        )
        assert Once.left == []
        assert trainer.global_step == BLOCKS * EPOCHS * -(-BATCHES // accumulate)
        assert [block["skipped_steps"] for block in noted(tmp_path / engine)] == [0, 1]
        found = fit_metrics(tmp_path / engine)
        assert found["skipped_steps"] == 1
        assert "block 1: 1 steps had gradients that are not finite and were skipped" in found["warnings"]
    assert all(value.isfinite().all() for value in learned(tmp_path / "eager").values())
    assert_close_runs(tmp_path / "eager", tmp_path / "plain", 1e-3)
    assert noted(tmp_path / "eager")[1]["best_epoch"] != 1  # its mean loss is not finite


def test_skipped_steps_of_a_stopped_epoch_are_counted_once(fit: Fit, tmp_path: Path) -> None:
    bad = 1  # the first batch of the first block
    model = {**RECIPES["w3a16"], "objective": Once()}
    Once.left = list(range(bad, bad - 10, -1))
    with pytest.raises(Stopped):
        fit(tmp_path / "run", StopAt(0, 0, 1), model=model)
    Once.left = list(range(-1, -100, -1))
    fit(tmp_path / "run", model=model)
    assert [block["skipped_steps"] for block in noted(tmp_path / "run")] == [1, 0]


def test_an_engine_that_is_not_there_is_refused_in_one_line(
    source: Path, words: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    places = (
        "--model.source",
        str(source),
        "--data.text",
        str(words),
        "--trainer.default_root_dir",
        str(tmp_path / "r"),
    )
    small = ("--data.length", "16", "--data.samples", "3", "--data.batch_size", "2", "--trainer.accelerator", "cpu")
    capfd.readouterr()
    assert (
        main(["fit", "-c", "methods/omniquant", "-c", "schemes/w3a16", *places, *small, "--model.engine", "quick"]) == 2
    )
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "quick" in err
    assert all(name in err for name in ("auto", "eager", "plain"))
    assert not (tmp_path / "r").exists()


def test_a_command_line_run_in_pieces(source: Path, words: Path, tmp_path: Path) -> None:
    """And the configuration that it keeps makes the same run again."""
    places = ("--model.source", str(source), "--data.text", str(words))
    small = ("--data.length", "16", "--data.samples", "3", "--data.batch_size", "2", "--trainer.accelerator", "cpu")
    short = ("--trainer.max_epochs", "2", "--trainer.enable_progress_bar", "false", "--model.engine", "eager")
    where = "--trainer.default_root_dir"
    args = ["fit", "-c", "methods/lrquant", "-c", "schemes/w4a4", *places, *small, *short]
    assert main([*args, where, str(tmp_path / "run")]) == 0
    assert main(["fit", "-c", str(tmp_path / "run/config.yaml"), where, str(tmp_path / "again")]) == 0
    assert "engine: eager" in (tmp_path / "run/config.yaml").read_text()
    assert_same_bytes(tmp_path / "again", tmp_path / "run")


# Two processes


SPREAD = """
import sys
from pathlib import Path

import torch
from lightning.pytorch import Callback
from ptql.calibration.data import CalibrationData
from ptql.calibration.quant_lm import QuantLM
from ptql.calibration.trainer import BlockTrainer
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel
from tests.engine.test_engine_runs import SIZES_COUNT

torch.set_num_threads(1)
run, source, words, accumulate = sys.argv[1:]


class Watch(Callback):
    def on_train_batch_end(self, trainer, task, *rest):
        wrapped = trainer.strategy.model
        assert isinstance(wrapped, DistributedDataParallel)
        assert not wrapped.require_backward_grad_sync
        assert all(p.grad is None for p in task.parameters())

    def on_train_end(self, trainer, task):
        save_file(task.learnables(), Path(run).parent / f"rank-{trainer.global_rank}-{trainer.block}.safetensors")


trainer = BlockTrainer(
    accelerator="cpu", devices=2, strategy="ddp", max_epochs=3, accumulate_grad_batches=int(accumulate),
    default_root_dir=run, callbacks=[Watch()], logger=False, enable_progress_bar=False, enable_model_summary=False,
)
data = CalibrationData(words, samples=18, length=16, batch_size=2)
trainer.fit(QuantLM(source=source, engine="eager", **SIZES_COUNT), data)
assert trainer.global_step == 2 * 3 * -(-5 // int(accumulate))
"""


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_learn_what_one_learns_on_the_same_global_batch(
    fit: Fit, source: Path, words: Path, accumulate: int, tmp_path: Path
) -> None:
    """18 samples: the last batch of each process holds one."""
    script, two = tmp_path / "spread.py", tmp_path / "two"
    script.write_text(SPREAD)
    done = subprocess.run(
        [sys.executable, str(script), str(two), str(source), str(words), str(accumulate)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "engine:" not in done.stderr
    fit(tmp_path / "one", model=SIZES_COUNT, samples=18, batch_size=4, accumulate_grad_batches=accumulate)
    assert_close_runs(two, tmp_path / "one", 1e-2)
    assert_moved_alike(two, tmp_path / "one")
    assert fit_metrics(two)["processes"] == 2
    for block in range(BLOCKS):
        mine, theirs = (load_file(tmp_path / f"rank-{rank}-{block}.safetensors") for rank in range(2))
        assert mine
        assert all(torch.equal(value, theirs[name]) for name, value in mine.items())


AVERAGED = """
import os
import signal
import sys

import torch
from lightning.pytorch import Callback
from ptql.calibration.data import CalibrationData
from ptql.calibration.quant_lm import QuantLM
from ptql.calibration.trainer import BlockTrainer
from tests.engine.test_engine_runs import RECIPES

torch.set_num_threads(1)
run, source, words, engine, stop = sys.argv[1:]


class Stop(Callback):
    def on_train_batch_start(self, trainer, task, batch, index):
        if stop == "stop" and trainer.is_global_zero and (trainer.block, trainer.current_epoch, index) == (1, 1, 1):
            os.kill(os.getpid(), signal.SIGTERM)


trainer = BlockTrainer(
    accelerator="cpu", devices=2, strategy="ddp", max_epochs=3, default_root_dir=run, callbacks=[Stop()], logger=False,
    enable_progress_bar=False, enable_model_summary=False,
)
data = CalibrationData(words, samples=18, length=16, batch_size=2)
trainer.fit(QuantLM(source=source, engine=engine, **RECIPES["w3a16, balanced"]), data)
"""


@pytest.mark.slow
def test_running_averages_of_two_processes_go_on_where_they_were(source: Path, words: Path, tmp_path: Path) -> None:
    """A checkpoint is the first process's; plain steps and those in pieces divide by the same averages."""
    script = tmp_path / "averaged.py"
    script.write_text(AVERAGED)

    def spread(run: Path, engine: str, stop: str = "") -> int:
        args = [sys.executable, str(script), str(run), str(source), str(words), engine, stop]
        done = subprocess.run(args, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
        assert "Traceback" not in done.stderr, done.stderr
        return done.returncode

    for engine in ("plain", "eager"):
        stopped, whole = tmp_path / f"{engine}-stopped", tmp_path / f"{engine}-whole"
        assert spread(stopped, engine, "stop") == 128 + signal.SIGTERM
        assert spread(stopped, engine) == spread(whole, engine) == 0
        assert_same_bytes(stopped, whole)
    assert_close_runs(tmp_path / "eager-whole", tmp_path / "plain-whole", CLOSE["w3a16, balanced"])
