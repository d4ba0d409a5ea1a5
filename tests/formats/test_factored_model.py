"""Whole runs that learn factors: what is stored, how large it is, and that a loaded model computes what was learned."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ptql.calibration.quant_lm import QuantLM
from ptql.checkpoint import SINGLE
from ptql.cli import main
from ptql.nn.packed_linear import PackedLinear
from ptql.parts.objectives import Reconstruction
from ptql.parts.transforms import Smooth
from ptql.parts.weights import Affine
from ptql.recipe import ActivationScheme, IntScheme
from tests.calibration.test_trainer import loaded_logits, student_logits
from tests.models import some_ids
from tests.words import save_source, save_text

pytestmark = pytest.mark.usefixtures("one_thread")

HIDDEN, MIDDLE, KV, BLOCKS = 48, 80, 24, 2
SHAPES = [(HIDDEN, HIDDEN), (KV, HIDDEN), (KV, HIDDEN), (HIDDEN, HIDDEN)]
SHAPES += [(MIDDLE, HIDDEN), (MIDDLE, HIDDEN), (HIDDEN, MIDDLE)]
ROOT = Path(__file__).parents[2]


def fit(run: Path, source: Path, text: Path, scheme: str, length: int, *more: str) -> Path:
    recipe = ("-c", "methods/lrquant_plus", "-c", f"schemes/{scheme}", "--trainer.accelerator", "cpu")
    places = ("--model.source", str(source), "--data.text", str(text), "--trainer.default_root_dir", str(run))
    small = ("--data.length", str(length), "--data.samples", "6", "--data.batch_size", "2", "--trainer.logger", "false")
    assert main(["fit", *recipe, *places, *small, "--trainer.max_epochs", "4", *more]) == 0
    return run


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_source(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def run(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights alone: nothing is smoothed, so that no layer gets a bias."""
    folder = tmp_path_factory.mktemp("w3a16")
    return fit(folder / "run", source, save_text(folder / "words.txt"), "w3a16", 16)


def recipe(weight: IntScheme, activation: int) -> QuantLM:
    return QuantLM(
        weight=weight,
        activation=ActivationScheme(activation),
        transforms=[Smooth()],
        weight_quantizer=Affine(factor_rank=1),
        objective=Reconstruction(targets=["fp", "fp_on_quantised"], balance="ema"),
    )


def blocks_noted(run: Path) -> list[dict[str, Any]]:
    return list(json.loads((run / "ledger/manifest.json").read_text())["blocks"].values())


def test_factors_are_learned_and_stored(run: Path) -> None:
    assert any(block["loss"] < block["loss_start"] and not block["fell_back"] for block in blocks_noted(run))
    found = json.loads((run / "model/config.json").read_text())["quantization_config"]
    assert (found["format_version"], found["factor_rank"]) == (2, 1)
    stored = load_file(run / "model" / SINGLE)
    factors = {name: tensor for name, tensor in stored.items() if name.endswith((".left", ".right"))}
    assert len(factors) == 2 * len(SHAPES) * BLOCKS
    assert all(tensor.dtype == torch.int16 for tensor in factors.values())
    assert any((tensor.view(torch.float16) != 1).any() for tensor in factors.values())


def test_true_bits_have_the_factors_in_them(run: Path) -> None:
    """3-bit codes in whole bytes, a scale, a zero point in a byte, and sixteen bits for each row and each column."""
    bits = sum(rows * (8 * -(-columns * 3 // 8) + 16 + 8) + 16 * (rows + columns) for rows, columns in SHAPES)
    found = json.loads((run / "metrics.json").read_text())
    assert found["bits_per_weight"] == bits / sum(rows * columns for rows, columns in SHAPES)


def test_the_loaded_model_computes_what_was_calibrated(run: Path, source: Path) -> None:
    expected = student_logits(run, source, recipe(IntScheme(3, -1), 16), some_ids())
    torch.testing.assert_close(loaded_logits(run, some_ids()), expected, rtol=1e-5, atol=1e-5)


def test_what_is_saved_again_is_the_same(run: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "again")
    before, after = load_file(run / "model" / SINGLE), load_file(tmp_path / "again" / SINGLE)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items() if tensor.dtype == torch.int16)
    stored = json.loads((tmp_path / "again/config.json").read_text())["quantization_config"]
    assert (stored["format_version"], stored["factor_rank"]) == (2, 1)


@pytest.mark.parametrize("rank", ["1", "3"])
def test_the_page_of_the_format_reads_it(rank: str, run: Path, source: Path, tmp_path: Path) -> None:
    """Its few lines of numpy give the numbers of `PackedLinear`, bit by bit."""
    if rank != "1":
        more = ("--model.weight_quantizer.factor_rank", rank, "--model.weight.group_size", "32")
        run = fit(tmp_path / "run", source, save_text(tmp_path / "words.txt"), "w2a16", 16, *more)
    (code,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/format.md").read_text(), re.MULTILINE | re.DOTALL)
    page: dict[str, Any] = {}
    exec(code, page)
    model = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32)
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, PackedLinear)]
    assert len(layers) == len(SHAPES) * BLOCKS
    for name, layer in layers:
        assert np.array_equal(page["dense"](run / "model", name, layer.in_features), layer.dense_weight().numpy()), name


def test_sixteen_bits_have_no_factors(source: Path, tmp_path: Path) -> None:
    bits = ("--model.weight.bits", "16", "--model.activation.bits", "8")
    run = fit(tmp_path / "run", source, save_text(tmp_path / "words.txt"), "w4a4", 16, *bits)
    found = json.loads((run / "model/config.json").read_text())["quantization_config"]
    assert found["format_version"] == 1
    assert "factor_rank" not in found
    assert not any(name.endswith((".left", ".right")) for name in load_file(run / "model" / SINGLE))


@pytest.mark.shared
@pytest.mark.parametrize("scheme", ["w4a4", "w2a16g64"])
def test_a_real_model(scheme: str, stories_dir: Path, shared_dir: Path, tmp_path: Path) -> None:
    text = shared_dir / "data/text/tinystories-train.jsonl"
    run = fit(tmp_path / "run", stories_dir, text, scheme, 48)
    noted = blocks_noted(run)
    assert sum(block["loss"] < block["loss_start"] for block in noted) >= 4
    assert all(block["loss"] <= block["loss_start"] and block["skipped_steps"] == 0 for block in noted)
    parts = recipe(IntScheme(4, -1), 4) if scheme == "w4a4" else recipe(IntScheme(2, 64), 16)
    ids = torch.randint(3, 512, (3, 40), generator=torch.Generator().manual_seed(1))
    found, expected = loaded_logits(run, ids), student_logits(run, stories_dir, parts, ids)
    assert ((found - expected).abs() < 1e-4).float().mean() > 0.99  # a last bit may move an activation to another code
