"""GPTQ from end to end: whole runs, alone and behind what other methods learn."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import ptql
from benchmarks.kills import Small, digest, kills
from ptql.calibration.quant_lm import QuantLM
from ptql.cli import main
from ptql.functional.packing import unpack_levels
from ptql.parts.transforms import Smooth
from ptql.parts.weights import Gptq
from ptql.recipe import ActivationScheme, IntScheme
from tests.calibration.test_trainer import IDS, loaded_logits, student_logits
from tests.callbacks.adapted import SMALL
from tests.models import CONFIGS, some_ids
from tests.words import save_source, save_text

pytestmark = pytest.mark.usefixtures("elsewhere")
CLI = str(Path(__file__).parents[1] / "cli.py")
Made = Callable[..., Path]
OURS = "ptql.parts.weights.Gptq"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The directory of a finished run, made once."""
    known: dict[str, Path] = {}

    def run(method: str, scheme: str, family: str = "llama", **settings: Any) -> Path:
        key = f"{method} {scheme} {family} {settings}"
        if key not in known:
            folder = tmp_path_factory.mktemp(method)
            source, text = save_source(folder / "source", CONFIGS[family]), save_text(folder / "words.txt")
            given = {**SMALL, **({"trainer.max_epochs": 0} if method in ("rtn", "gptq") else {})}
            given |= {name.replace("__", "."): value for name, value in settings.items()}
            known[key] = folder / "RUN"
            ptql.quantize(source, data=text, out=known[key], method=method, scheme=scheme, settings=given)
        return known[key]

    return run


def noted(run: Path) -> list[dict[str, Any]]:
    blocks = json.loads((run / "ledger/manifest.json").read_text())["blocks"]
    return [blocks[str(index)] for index in range(len(blocks))]


def stored(run: Path) -> dict[str, Tensor]:
    return load_file(run / "model/model.safetensors")


# Alone


@pytest.mark.shared
@pytest.mark.parametrize("act_order", ["false", "true"])
def test_a_real_model_loses_less_and_computes_what_was_measured(
    stories_dir: Path, shared_dir: Path, tmp_path: Path, act_order: str
) -> None:
    text = shared_dir / "data/text/tinystories-train.jsonl"
    given = ("--model.source", str(stories_dir), "--data.text", str(text), "--trainer.accelerator", "cpu")
    given += ("-c", "schemes/w3a16g64", "--data.samples", "16", "--data.length", "64")
    for method in ("rtn", "gptq"):
        own = ("--model.weight_quantizer.act_order", act_order) if method == "gptq" else ()
        run = ("--trainer.default_root_dir", str(tmp_path / method))
        assert main(["fit", "-c", f"methods/{method}", *given, *own, *run]) == 0
    nearest, found = noted(tmp_path / "rtn"), noted(tmp_path / "gptq")
    assert all(block["mse"] < 0.85 * other["mse"] for block, other in zip(found, nearest, strict=True))
    for block, other in zip(found, nearest, strict=True):  # weights are further off, outputs are nearer
        assert all(block["layers"][name] > error for name, error in other["layers"].items())
    recipe = QuantLM(str(stories_dir), weight=IntScheme(3, 64), weight_quantizer=Gptq(clip=False))
    recipe.open()
    expected = student_logits(tmp_path / "gptq", stories_dir, recipe, IDS)
    torch.testing.assert_close(loaded_logits(tmp_path / "gptq", IDS), expected, rtol=1e-5, atol=1e-5)
    sizes = [json.loads((tmp_path / method / "metrics.json").read_text())["size_bytes"] for method in ("rtn", "gptq")]
    assert sizes[0] == pytest.approx(sizes[1], rel=1e-3)  # a name in config.json


@pytest.mark.parametrize("family", ["llama", "opt", "phi3", "qwen3"])
@pytest.mark.parametrize("scheme", ["w2a16g64", "w2ba16", "w4a4"])
def test_scales_are_those_of_rounding_to_nearest_and_codes_are_not(made: Made, scheme: str, family: str) -> None:
    nearest, found = stored(made("rtn", scheme, family)), stored(made("gptq", scheme, family))
    assert found.keys() == nearest.keys()
    codes = [name for name in found if name.endswith(".codes")]
    assert all(torch.equal(found[name], nearest[name]) for name in found.keys() - set(codes))
    assert all(not torch.equal(found[name], nearest[name]) for name in codes)


def test_steps_by_kernels_begin_and_end_alike(made: Made) -> None:
    plain, eager = (made("lrquant", "w4a4", **quantizer(), model__engine=engine) for engine in ("plain", "eager"))
    for one, other in zip(noted(plain), noted(eager), strict=True):
        assert one["loss_learned"] == pytest.approx(other["loss_learned"], rel=1e-3)
        assert one["mse"] == pytest.approx(other["mse"], rel=0.05)  # a last bit may tip a code, which moves others


# Behind what was learned


def quantizer(**settings: Any) -> dict[str, Any]:
    return {"model__weight_quantizer": {"class_path": OURS, "init_args": {"clip": True, **settings}}}


@pytest.mark.parametrize("method", ["omniquant", "lrquant", "lrquant_plus", "lrquant_tokens", "abq"])
def test_a_loaded_model_computes_what_was_calibrated(made: Made, method: str) -> None:
    rank = int(method == "lrquant_plus")
    run = made(method, "w3a16g64", **quantizer(factor_rank=rank))
    expected = made(method, "w3a16g64")  # with Affine
    codes = [name for name in stored(run) if name.endswith(".codes")]
    assert codes
    assert stored(run).keys() == stored(expected).keys()
    assert all(not torch.equal(stored(run)[name], stored(expected)[name]) for name in codes)
    for block, other in zip(noted(run), noted(expected), strict=True):
        assert block["loss"] <= block["loss_start"]
        assert block["steps"] == other["steps"] == 4
    assert noted(run)[0]["loss_learned"] == noted(expected)[0]["loss_learned"]  # learned alike
    if method != "abq":
        recipe = QuantLM(weight=IntScheme(3, 64), weight_quantizer=Gptq(factor_rank=rank))
        logits = student_logits(run, run.parent / "source", recipe, some_ids())
        torch.testing.assert_close(loaded_logits(run, some_ids()), logits, rtol=1e-4, atol=1e-4)


def test_smoothing_and_rounded_activations_go_before_it(made: Made) -> None:
    run = made("lrquant", "w4a4", **quantizer())
    activation, weight = ActivationScheme(4), IntScheme(4)
    recipe = QuantLM(weight=weight, activation=activation, transforms=[Smooth()], weight_quantizer=Gptq())
    expected = student_logits(run, run.parent / "source", recipe, some_ids())
    # a difference in the last bit may move an activation to the next code
    assert ((loaded_logits(run, some_ids()) - expected).abs() < 1e-4).float().mean() > 0.99


def test_a_budget_of_bits_is_met(tmp_path: Path) -> None:
    source, text = save_source(tmp_path / "source"), save_text(tmp_path / "words.txt")
    given = ("--model.source", str(source), "--data.text", str(text), "--trainer.default_root_dir", str(tmp_path / "r"))
    given += ("--data.samples", "4", "--data.length", "16", "--trainer.accelerator", "cpu", "--bits_budget", "3.9")
    assert main(["fit", "-c", "methods/gptq", "-c", "schemes/w3a16", *given]) == 0
    found = json.loads((tmp_path / "r/metrics.json").read_text())
    assert 3 < found["bits"]["reached"] <= 3.9
    assert len(set(found["bits"]["layers"].values())) > 1
    assert loaded_logits(tmp_path / "r", some_ids()).isfinite().all()


def test_a_matrix_without_inputs_is_rounded_to_nearest_and_that_is_said(tmp_path: Path) -> None:
    source, text = save_source(tmp_path / "source"), save_text(tmp_path / "words.txt")
    weights = load_file(source / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"].zero_()
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    settings = {**SMALL, "trainer.max_epochs": 0}
    found = ptql.quantize(source, data=text, out=tmp_path / "r", method="gptq", scheme="w4a16", settings=settings)
    said = "mlp.down_proj: rounded to nearest: the moments of its inputs hold zeros alone, or no finite numbers"
    assert found["fit"]["warnings"] == [f"block 1: {said}"]
    assert f"Block 1: {said}" in (tmp_path / "r/report.html").read_text()


# Stopped, spread


def test_a_run_broken_off_between_blocks_ends_in_the_same_bytes(made: Made, tmp_path: Path) -> None:
    """As a kill leaves it: the last block is missing, and the model."""
    run = made("lrquant", "w4a4", **quantizer())
    before, model = digest(run / "model"), run / "model"
    manifest = run / "ledger/manifest.json"
    kept = json.loads(manifest.read_text())
    del kept["blocks"]["1"]
    manifest.write_text(json.dumps(kept))
    for file in model.iterdir():
        file.unlink()
    model.rmdir()
    given = {name.replace("__", "."): value for name, value in {**SMALL, **quantizer()}.items()}
    source, text = run.parent / "source", run.parent / "words.txt"
    ptql.quantize(source, data=text, out=run, method="lrquant", scheme="w4a4", settings=given)
    assert digest(run / "model") == before


@pytest.mark.slow
@pytest.mark.shared
@pytest.mark.timeout(600)
def test_a_run_killed_at_random_ends_in_the_same_bytes(stories_dir: Path, tmp_path: Path) -> None:
    """Of two processes, which add up their moments."""
    recipe = ("-c", "methods/omniquant", "-c", "schemes/w3a16", "--model.weight_quantizer", "Gptq")
    small = Small(stories_dir, "pydoc", 2, recipe)
    assert [kill.same for kill in kills(small, tmp_path, count=2, seed=7)] == [True, True]


@pytest.mark.slow
@pytest.mark.shared
def test_two_processes_choose_the_codes_of_one(
    stories_dir: Path, shared_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the same windows; sums are added up in another order, and a code that tips moves those behind it."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    text = shared_dir / "data/text/tinystories-train.jsonl"
    for processes in (1, 2):
        run = ("--trainer.default_root_dir", str(tmp_path / str(processes)))
        given = ("--model.source", str(stories_dir), "--data.text", str(text), "--trainer.accelerator", "cpu", *run)
        given += ("--data.samples", "16", "--data.length", "64", "--data.batch_size", str(4 // processes))
        spread = ("--trainer.devices", "2", "--trainer.strategy", "ddp") if processes == 2 else ()
        command = [sys.executable, CLI, "fit", "-c", "methods/gptq", "-c", "schemes/w3a16g64", *given, *spread]
        subprocess.run(command, check=True, capture_output=True)
    one, two = (stored(tmp_path / str(processes)) for processes in (1, 2))
    first = [name for name in one if ".layers.0." in name and name.endswith(".codes")]
    for name in first:
        mine, theirs = (unpack_levels(found[name], 8, found[name].shape[1] * 8 // 3) for found in (one, two))
        assert (mine == theirs).double().mean() > 0.99, name
    notes = [noted(tmp_path / str(processes)) for processes in (1, 2)]
    for block, other in zip(*notes, strict=True):
        assert other["mse"] == pytest.approx(block["mse"], rel=0.05)


# Refused


def test_blocks_do_not_learn_again_on_what_is_measured(made: Made, capfd: pytest.CaptureFixture[str]) -> None:
    run = made("lrquant", "w4a4", **quantizer())
    save_text(Path("mine.txt"))
    given = ("--run", str(run), "--text.mine", "mine.txt", "--length", "16", "--trainer.accelerator", "cpu")
    assert main(["eval", *given, "-c", "tta/online"]) == 2
    assert "tta with Gptq: codes were chosen by calibration's inputs" in capfd.readouterr().err


def test_other_formats_are_refused(capfd: pytest.CaptureFixture[str]) -> None:
    save_source(Path("source"))
    given = ("--model.source", "source", "--trainer.accelerator", "cpu", "--data.text", str(save_text(Path("w.txt"))))
    assert main(["fit", "-c", "methods/gptq", "-c", "schemes/w1.61a16", *given]) == 2
    assert "salient=0.2 with Gptq" in capfd.readouterr().err
    assert main(["fit", "-c", "methods/gptq", *given, "--model.weight_quantizer.damping", "2"]) == 2
    assert "damping=2.0: a part of the diagonal's mean" in capfd.readouterr().err
