"""A run whose layers have different formats: what is stored, how large it is, and what a loaded model computes."""

from __future__ import annotations

import json
import re
from dataclasses import replace
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
from ptql.errors import InputError
from ptql.formats.ptql import PackedFormat
from ptql.nn.attention import CACHE_ROUNDING, QUERY_ROUNDING
from ptql.nn.packed_linear import PackedLinear
from ptql.parts.activations.dynamic import TokenRounding
from ptql.parts.transforms import Smooth
from ptql.parts.weights import Affine
from ptql.recipe import ActivationScheme, IntScheme, LayerFormat
from tests.calibration.test_trainer import loaded_logits, student_logits
from tests.models import some_ids
from tests.words import save_source, save_text

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[2]
BALANCED = IntScheme(2, symmetric=True, balanced=True)
TERNARY = IntScheme(1, symmetric=True, balanced=True)
PATTERNS: dict[str, LayerFormat] = {
    "down_proj": 8,
    "layers.0.self_attn": {"bits": 2, "symmetric": True, "balanced": True},
    "layers.*.up_proj": 1,
    "layers.1.mlp.gate_proj": {"bits": 2, "group_size": 20, "balanced": True},
    "o_proj": 16,
}
KINDS = {
    "0.self_attn.q_proj": BALANCED,
    "0.self_attn.k_proj": BALANCED,
    "0.self_attn.v_proj": BALANCED,
    "0.mlp.up_proj": IntScheme(1),
    "0.mlp.down_proj": IntScheme(8),
    "0.self_attn.o_proj": IntScheme(16),
    "1.mlp.gate_proj": IntScheme(2, 20, balanced=True),
    "1.mlp.up_proj": IntScheme(1),
    "1.mlp.down_proj": IntScheme(8),
    "1.self_attn.o_proj": IntScheme(16),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_source(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def run(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixed")
    recipe = ("-c", "methods/omniquant", "-c", "schemes/w3a16", "--trainer.accelerator", "cpu")
    recipe += ("--model.layers", json.dumps(PATTERNS), "--model.activation", "{bits: 8, kv_bits: 4}")
    places = ("--model.source", str(source), "--data.text", str(save_text(folder / "words.txt")))
    small = ("--data.length", "16", "--data.samples", "6", "--data.batch_size", "2", "--trainer.max_epochs", "2")
    assert main(["fit", *recipe, *places, *small, "--trainer.default_root_dir", str(folder / "run")]) == 0
    return folder / "run"


def config(run: Path) -> dict[str, Any]:
    return json.loads((run / "model/config.json").read_text())["quantization_config"]


def test_config_json_says_what_each_layer_is(run: Path) -> None:
    found = config(run)
    assert found["format_version"] == 3
    fmt = PackedFormat.from_dict(found)
    assert dict(fmt.layers) == KINDS
    assert fmt.activation == ActivationScheme(8, kv_bits=4)
    assert PackedFormat.from_dict(fmt.to_dict()) == fmt


def test_true_bits_are_those_of_each_layer(run: Path) -> None:
    attention = {"q_proj": (48, 48), "k_proj": (24, 48), "v_proj": (24, 48), "o_proj": (48, 48)}
    mlp = {"gate_proj": (80, 48), "up_proj": (80, 48), "down_proj": (48, 80)}
    shapes = {f"self_attn.{name}": shape for name, shape in attention.items()}
    shapes |= {f"mlp.{name}": shape for name, shape in mlp.items()}
    code_bytes = {1: lambda n: -(-n // 8), 2: lambda n: -(-(-(-n // 3) * 7) // 8), 3: lambda n: -(-n * 3 // 8)}
    code_bytes |= {8: lambda n: n, 16: lambda n: 4 * n}
    spent = 0
    for block in range(2):
        for name, (rows, columns) in shapes.items():
            scheme = KINDS.get(f"{block}.{name}", IntScheme(3))
            groups = 1 if scheme.group_size == -1 else -(-columns // scheme.group_size)
            row = code_bytes[scheme.bits](columns)
            if scheme.quantised:
                row += 2 * groups + (0 if scheme.symmetric else code_bytes[scheme.bits](groups))
            spent += 8 * rows * row
    weights = 2 * sum(rows * columns for rows, columns in shapes.values())
    found = json.loads((run / "metrics.json").read_text())
    assert found["bits_per_weight"] == pytest.approx(spent / weights)


def test_the_loaded_model_computes_what_was_calibrated(run: Path, source: Path) -> None:
    recipe = QuantLM(
        source=str(source),
        weight=IntScheme(3),
        activation=ActivationScheme(8, kv_bits=4),
        layers=PATTERNS,
        transforms=[Smooth(initial="balanced", shift="biased")],
        weight_quantizer=Affine(),
    )
    recipe.open()
    expected = student_logits(run, source, recipe, some_ids())
    found = loaded_logits(run, some_ids())
    assert ((found - expected).abs() < 1e-4).float().mean() > 0.99  # a last bit may move an activation to another code


def test_each_layer_has_its_codes_and_the_page_of_the_format_reads_them(run: Path) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/format.md").read_text(), re.MULTILINE | re.DOTALL)
    page: dict[str, Any] = {}
    exec(code, page)
    model = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32)
    stored = load_file(run / "model" / SINGLE)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, PackedLinear)}
    assert len(layers) == 12
    assert not any("o_proj" in name for name in layers)
    assert sum(name.endswith("o_proj.weight") for name in stored) == 2
    assert layers["model.layers.0.self_attn.k_proj"].zero is None
    for name, layer in layers.items():
        assert np.array_equal(page["dense"](run / "model", name, layer.in_features), layer.dense_weight().numpy()), name
        groups = layer.dense_weight().split(layer.scheme.columns(layer.in_features), dim=1)
        most = max(len(row.unique()) for group in groups for row in group)
        assert most <= layer.scheme.levels
    balanced = layers["model.layers.0.self_attn.k_proj"].dense_weight()
    assert all(torch.equal(row.unique(), -row.unique().flip(0)) for row in balanced if len(row.unique()) == 5)
    attention = model.get_submodule("model.layers.0.self_attn")
    assert getattr(attention, QUERY_ROUNDING) == TokenRounding(8)
    assert getattr(attention, CACHE_ROUNDING) == TokenRounding(4)


def test_only_what_needs_it_is_version_3_or_5() -> None:
    plain = PackedFormat("rtn", IntScheme(3), ActivationScheme(4), True, "model.layers", "self_attn", ("a",))
    assert plain.to_dict()["format_version"] == 1
    assert "balanced" not in plain.to_dict()["weight"]
    assert not {"layers", "kv_bits"} & (plain.to_dict().keys() | plain.to_dict()["activation"].keys())
    assert replace(plain, factor_rank=1).to_dict()["format_version"] == 2
    for newer in ({"weight": BALANCED}, {"weight": IntScheme(1)}, {"activation": ActivationScheme(4, 8)}):
        fmt = replace(plain, factor_rank=2, **newer)
        assert fmt.to_dict()["format_version"] == 3
        assert PackedFormat.from_dict(fmt.to_dict()) == fmt
    for newest in ({"weight": TERNARY}, {"layers": {"0.a": TERNARY}}):
        fmt = replace(plain, factor_rank=2, **newest)
        assert fmt.to_dict()["format_version"] == 5
        assert PackedFormat.from_dict(fmt.to_dict()) == fmt


@pytest.mark.parametrize(
    ("activation", "queries", "cache"),
    [((16, None), 16, 16), ((4, None), 4, 4), ((16, 4), 16, 4), ((4, 16), 4, 16)],
)
def test_the_caches_bits_are_its_own(activation: tuple[int, int | None], queries: int, cache: int) -> None:
    fmt = PackedFormat("rtn", IntScheme(3), ActivationScheme(*activation), True, "m", "a", ("l",))
    assert (fmt.query_bits, fmt.cache_bits) == (queries, cache)
    assert fmt.rounds_attention == (min(queries, cache) < 16)


@pytest.mark.parametrize("layers", [{"0.a": 4}, {"0.a": {"bits": 4}}, ["0.a"]])
def test_a_damaged_description_is_refused(layers: Any) -> None:
    stored = PackedFormat("rtn", IntScheme(3), ActivationScheme(), True, "m", "a", ("l",)).to_dict()
    with pytest.raises(InputError, match="quantization_config"):
        PackedFormat.from_dict({**stored, "format_version": 3, "layers": layers})
