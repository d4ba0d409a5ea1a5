"""A run with ternary weights: what is stored, how large it is, and what a loaded model computes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from ptql.calibration.quant_lm import QuantLM
from ptql.cli import main
from ptql.nn.packed_linear import PackedLinear
from ptql.parts.weights import Affine
from ptql.recipe import IntScheme, LayerFormat
from tests.calibration.test_trainer import loaded_logits, student_logits
from tests.models import some_ids
from tests.words import save_source, save_text

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[2]
TERNARY = IntScheme(1, symmetric=True, balanced=True)
PATTERNS: dict[str, LayerFormat] = {"layers.1.mlp": {"group_size": 20, "symmetric": False}}
GROUPED = IntScheme(1, 20, balanced=True)
ATTENTION = {"q_proj": (48, 48), "k_proj": (24, 48), "v_proj": (24, 48), "o_proj": (48, 48)}
MLP = {"gate_proj": (80, 48), "up_proj": (80, 48), "down_proj": (48, 80)}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_source(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def run(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ternary")
    recipe = ("-c", "methods/omniquant", "-c", "schemes/w1ba16", "-c", "presets/low_bits")
    recipe += ("--model.layers", json.dumps(PATTERNS), "--trainer.accelerator", "cpu")
    places = ("--model.source", str(source), "--data.text", str(save_text(folder / "words.txt")))
    small = ("--data.length", "16", "--data.samples", "6", "--data.batch_size", "2", "--trainer.max_epochs", "2")
    assert main(["fit", *recipe, *places, *small, "--trainer.default_root_dir", str(folder / "run")]) == 0
    return folder / "run"


def test_config_json_says_so_in_a_version_of_its_own(run: Path) -> None:
    found = json.loads((run / "model/config.json").read_text())["quantization_config"]
    assert found["format_version"] == 5
    assert found["weight"] == {"bits": 1, "group_size": -1, "symmetric": True, "balanced": True}
    assert found["layers"] == {f"1.mlp.{name}": GROUPED.to_dict() for name in MLP}


def test_true_bits_are_eight_fifths_and_what_goes_with_them(run: Path) -> None:
    spent = weights = 0
    for block in range(2):
        for name, (rows, columns) in (ATTENTION | MLP).items():
            row = 8 * -(-columns // 5) + 16
            if block == 1 and name in MLP:  # a scale for each group, and a byte for the zero points of up to five
                groups = -(-columns // 20)
                row = 8 * -(-columns // 5) + 16 * groups + 8
            spent += rows * row
            weights += rows * columns
    found = json.loads((run / "metrics.json").read_text())
    assert found["bits_per_weight"] == pytest.approx(spent / weights)


def test_the_loaded_model_computes_what_was_calibrated(run: Path, source: Path) -> None:
    recipe = QuantLM(source=str(source), weight=TERNARY, layers=PATTERNS, weight_quantizer=Affine(initial="search"))
    recipe.open()
    expected = student_logits(run, source, recipe, some_ids())
    torch.testing.assert_close(loaded_logits(run, some_ids()), expected, rtol=1e-5, atol=1e-5)


def test_something_is_learned(run: Path) -> None:
    blocks = json.loads((run / "ledger/manifest.json").read_text())["blocks"].values()
    assert any(block["loss"] < block["loss_start"] and not block["fell_back"] for block in blocks)


def test_weights_have_three_values_and_the_page_of_the_format_reads_them(run: Path) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/format.md").read_text(), re.MULTILINE | re.DOTALL)
    page: dict[str, Any] = {}
    exec(code, page)
    model = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, PackedLinear)}
    assert len(layers) == 14
    for name, layer in layers.items():
        dense = layer.dense_weight()
        assert np.array_equal(page["dense"](run / "model", name, layer.in_features), dense.numpy()), name
        assert (layer.zero is None) == layer.scheme.symmetric
        for group in dense.split(layer.scheme.columns(layer.in_features), dim=1):
            assert all(len(row.unique()) <= 3 for row in group)
        if layer.scheme.symmetric:
            scale = layer.scale.view(torch.float16).float()
            assert torch.equal(dense.abs().amax(1, keepdim=True), scale)
            assert 0.2 < (dense == 0).float().mean() < 0.6  # 0.98 of the range would leave nearly nothing
