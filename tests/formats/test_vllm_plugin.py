"""vLLM's plug-in, on a stand-in for vLLM: stored tensors become its parameters, and what it can't do is refused."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ptql.errors import InputError
from ptql.export.compressed_tensors import CompressedTensors
from ptql.export.layers import int_layer
from ptql.formats.ptql import PackedFormat
from ptql.formats.vllm import (
    Part,
    check_part,
    register,
    scheme_of,
    served_codes,
    served_format,
    served_scale,
    served_zero,
)
from ptql.nn.packed_linear import PackedLinear, dense_from_packed
from ptql.recipe import ActivationScheme, IntScheme, StaticScheme
from tests.formats import vllm_standin

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
LINEARS = (*QKV, "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
SCHEMES = [
    IntScheme(bits, group, symmetric=symmetric)
    for bits in range(2, 9)
    for group, symmetric in ((32, False), (-1, False), (64, True))
]
NAMES = [f"w{s.bits}g{s.group_size}{'' if s.symmetric else '_asym'}" for s in SCHEMES]


def fmt_of(weight: IntScheme, **others: Any) -> PackedFormat:
    fmt = PackedFormat("rtn", weight, ActivationScheme(16), True, "model.layers", "self_attn", LINEARS)
    return replace(fmt, **others)


def packed(rows: int, columns: int, scheme: IntScheme, seed: int = 0) -> dict[str, Tensor]:
    """Random codes of one matrix, as they are stored."""
    layer = PackedLinear(columns, rows, scheme, bias=False, rounding=None)
    made = torch.Generator().manual_seed(seed)
    stored = {}
    for name, t in layer.state_dict().items():
        bits = torch.randint(0, 256, t.shape, dtype=torch.uint8, generator=made)
        scale = 0.01 + torch.rand(t.shape, generator=made)
        stored[name] = scale.half().view(torch.int16) if t.dtype == torch.int16 else bits
    return stored


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The class that the plug-in registers."""
    vllm_standin.install(monkeypatch)
    register()
    register()
    return vllm_standin.REGISTERED["ptql"]


def made(config: Any, fmt: PackedFormat) -> Any:
    given = config.from_config(json.loads(json.dumps(fmt.to_dict())))
    given.packed_modules_mapping = vllm_standin.FUSED
    return given


def feed(layer: Any, config: Any, stored: dict[str, Tensor], shard: int = 0) -> set[str]:
    """Load a matrix as vLLM does: names mapped, each parameter by its own loader. Which parameters were loaded."""
    names = {config.get_checkpoint_weight_mapper().map_name(f"x.{name}").removeprefix("x."): name for name in stored}
    for name, old in names.items():
        parameter = getattr(layer, name)
        parameter.weight_loader(parameter, stored[old], *([shard] if len(layer.own) > 1 else []))
    return set(names)


def dense(stored: dict[str, Tensor], columns: int, scheme: IntScheme) -> Tensor:
    return dense_from_packed(stored, columns, scheme)


@pytest.mark.parametrize("scheme", SCHEMES, ids=NAMES)
def test_fused_layers_multiply_by_the_stored_weights(config: Any, scheme: IntScheme) -> None:
    given, columns, rows = made(config, fmt_of(scheme)), 128, [64, 32, 32]
    layer = vllm_standin.LinearBase(columns, rows, given, "model.layers.1.self_attn.qkv_proj", torch.float16)
    stored = [packed(n, columns, scheme, seed) for seed, n in enumerate(rows)]
    for shard, tensors in enumerate(stored):
        loaded = feed(layer, given, tensors, shard)
    # vLLM raises where a parameter is not in the files.
    assert loaded == {name for name, _ in layer.named_parameters()}
    expected = torch.cat([dense(tensors, columns, scheme) for tensors in stored])
    assert torch.equal(layer(torch.eye(columns)).T, expected)


@pytest.mark.parametrize("by_row", [True, False], ids=["columns_split", "rows_split"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=NAMES)
def test_each_process_holds_its_part(config: Any, scheme: IntScheme, by_row: bool) -> None:
    if by_row and scheme.group_size == -1 and not scheme.symmetric:
        scheme = replace(scheme, symmetric=True)  # one column of zero points for all processes
    given, columns, rows = made(config, fmt_of(scheme)), 128, 64
    name = "model.layers.0.mlp.down_proj" if by_row else "model.layers.0.self_attn.o_proj"
    stored = packed(rows, columns, scheme)
    parts = []
    for rank in range(2):
        layer = vllm_standin.LinearBase(columns, [rows], given, name, torch.float16, rank, 2, by_row)
        feed(layer, given, stored)
        parts.append(layer(torch.eye(columns // 2 if by_row else columns)).T)
    assert torch.equal(torch.cat(parts, 1 if by_row else 0), dense(stored, columns, scheme))


@pytest.mark.parametrize("scheme", SCHEMES, ids=NAMES)
def test_tensors_are_those_of_the_export(scheme: IntScheme) -> None:
    stored = packed(48, 64, scheme)
    exported = CompressedTensors().layer(int_layer(stored, 64, scheme), ActivationScheme(16))
    assert torch.equal(served_codes(stored["codes"]), exported["weight_packed"])
    assert torch.equal(served_scale(stored["scale"]), exported["weight_scale"])
    assert ("zero" in stored) == ("weight_zero_point" in exported)
    if "zero" in stored:
        served = served_zero(stored["zero"], scheme.bits, scheme.groups(64))
        assert torch.equal(served, exported["weight_zero_point"])


def test_layers_that_are_not_packed_stay_vllms_own(config: Any) -> None:
    fmt = fmt_of(IntScheme(4, 32), layers={"1.mlp.down_proj": IntScheme(16), "0.mlp.down_proj": IntScheme(2, 64)})
    given = made(config, fmt)
    plain = vllm_standin.LinearBase(64, [32], given, "model.layers.1.mlp.down_proj", torch.float16)
    assert isinstance(plain.quant_method, vllm_standin.UnquantizedLinearMethod)
    mixed = vllm_standin.LinearBase(64, [32], given, "model.layers.0.mlp.down_proj", torch.float16)
    assert (mixed.scheme.num_bits, mixed.scheme.group_size) == (2, 64)
    assert type(mixed.quant_method).__name__ == "CompressedTensorsLinearMethod"  # by this name vLLM picks a loader
    head = vllm_standin.LinearBase(64, [32], given, "lm_head", torch.float16)
    assert isinstance(head.quant_method, vllm_standin.UnquantizedLinearMethod)
    assert given.get_quant_method(torch.nn.Embedding(2, 2), "model.embed_tokens") is None
    assert (given.get_name(), given.get_min_capability(), given.get_config_filenames()) == ("ptql", 75, [])
    assert given.get_supported_act_dtypes() == [torch.float16, torch.bfloat16]
    mapper = given.get_checkpoint_weight_mapper()
    assert mapper.map_name("model.layers.0.q_proj.g_idx") is None
    assert mapper.map_name("model.layers.0.q_proj.bias") == "model.layers.0.q_proj.bias"


def test_formats_of_layers_by_vllms_names() -> None:
    two, four = IntScheme(2, 64), IntScheme(4, 32)
    fmt = fmt_of(four, layers=dict.fromkeys((f"1.{name}" for name in QKV), two) | {"2.mlp.up_proj": two})
    assert scheme_of(fmt, "model.layers.0.self_attn.qkv_proj", vllm_standin.FUSED) == four
    assert scheme_of(fmt, "model.layers.1.self_attn.qkv_proj", vllm_standin.FUSED) == two
    assert scheme_of(fmt, "model.layers.1.self_attn.q_proj", {}) == two
    assert scheme_of(fmt, "model.layers.1.self_attn.rotary", {}) is None
    assert scheme_of(fmt, "lm_head", {}) is None
    with pytest.raises(InputError, match=r"gate_proj, mlp\.up_proj are one layer there.*block 2; let --model.layers"):
        scheme_of(fmt, "model.layers.2.mlp.gate_up_proj", vllm_standin.FUSED)


W4 = IntScheme(4, 32, symmetric=False)


@pytest.mark.parametrize(
    ("fmt", "said"),
    [
        (fmt_of(W4, shifted_norms=("input_layernorm",)), "no place for the biases that learned shifts .*biased"),
        (fmt_of(W4, added_biases=("mlp.up_proj",)), "no place for the biases that learned shifts"),
        (fmt_of(W4, activation=ActivationScheme(8, symmetric=True), qkv=False), "rounded to 8 bits.*compressed-tens"),
        (fmt_of(W4, activation=ActivationScheme(16, kv_bits=4)), "queries, keys or values are rounded"),
        (fmt_of(W4, static=StaticScheme({}, 8)), "fixed grids of clusters"),
        (fmt_of(W4, gathered_norms=("input_layernorm",)), "no norms that reorder channels"),
        (fmt_of(W4, factor_rank=1), "no place for factors"),
        (fmt_of(IntScheme(4, clustered=True)), r"scales of clusters.*--model.weight.clustered false"),
        (fmt_of(IntScheme(1, salient=0.2)), r"signs and salient channels \(all layers\); .*--format dense"),
        (fmt_of(W4, layers={"0.mlp.up_proj": IntScheme(2, balanced=True)}), r"5 levels \(0\.mlp\.up_proj\)"),
        (fmt_of(IntScheme(1, 64)), "no kernel reads codes of 1 bit"),
    ],
    ids=[
        "norms",
        "biases",
        "activations",
        "cache",
        "grids",
        "order",
        "factors",
        "clusters",
        "salient",
        "levels",
        "one_bit",
    ],
)
def test_what_vllm_can_not_do_is_refused(config: Any, fmt: PackedFormat, said: str) -> None:
    with pytest.raises(InputError, match=f"vLLM.*{said}"):
        config.from_config(fmt.to_dict())
    with pytest.raises(InputError, match=said):
        served_format(fmt.to_dict())


PART = Part("mlp.down_proj", 128, 128, 64, (64,), torch.float16)


@pytest.mark.parametrize(
    ("scheme", "changed", "said"),
    [
        (W4, {"dtype": torch.bfloat16}, "float16 numbers.*--dtype float16, or fit with .*scale_dtype bfloat16"),
        (IntScheme(4, 48), {}, "128 columns of mlp.down_proj are no multiple of 48"),
        (W4, {"own_columns": 16}, "16 columns for each process .*--tensor-parallel-size"),
        (IntScheme(3, -1), {"own_columns": 16}, "words of 32"),
        (replace(W4, bits=3), {"rows": (16, 48)}, "zero points of 16, 48 rows of 3 bits"),
        (replace(W4, bits=3), {"rows": (16,)}, "zero points of 16 rows of 3 bits"),
    ],
    ids=["scales", "groups", "group_cut", "word_cut", "fused", "rows_split"],
)
def test_parts_that_do_not_fit_are_refused(scheme: IntScheme, changed: dict[str, Any], said: str) -> None:
    check_part(PART, W4)
    with pytest.raises(InputError, match=said):
        check_part(replace(PART, **changed), scheme)
    check_part(replace(PART, dtype=torch.bfloat16), replace(W4, scale_dtype="bfloat16"))


def test_another_vllm_is_left_alone(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    vllm_standin.install(monkeypatch)
    monkeypatch.delattr(sys.modules["vllm.model_executor.layers.quantization.base_config"], "QuantizationConfig")
    register()
    assert vllm_standin.REGISTERED == {}
    assert "cannot import name 'QuantizationConfig'" in caplog.text
    assert "ptql export RUN --format compressed-tensors" in caplog.text


def test_the_entry_point_is_this_function_and_needs_no_vllm_to_be_imported() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["vllm.general_plugins"]["ptql"].partition(":")
    assert getattr(import_module(module), name) is register
    code = f"import sys, {module}; print([n for n in ('vllm', 'lightning', 'peft', 'lm_eval') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
