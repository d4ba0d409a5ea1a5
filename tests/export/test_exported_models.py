"""Exports as transformers loads them, without a class of ptql, beside a plain model with our weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ptql.export import directory
from tests.export.exported import (
    RTN,
    SERVED,
    exported,
    fit,
    loaded,
    logits,
    plain_model,
    save_exact_source,
    settings,
    tensors,
    weights,
)
from tests.models import CONFIGS, llama_config

pytestmark = pytest.mark.usefixtures("one_thread")
PACKED, BYTES = "pack-quantized", "int-quantized"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a source and its text are."""
    folder = tmp_path_factory.mktemp("home")
    save_exact_source(folder)
    return folder


def bits_at(words: list[int], bits: int, n: int) -> list[int]:
    """The first n codes of a little-endian stream."""
    stream = sum((word % 2**32) << 32 * k for k, word in enumerate(words))
    return [stream >> bits * k & 2**bits - 1 for k in range(n)]


def dense(stored: dict[str, Tensor], layer: str, bits: int) -> Tensor:
    """w = (q - z) * scale, both as codes from 0; streams of codes go along rows, of zero points down columns."""
    rows, columns = stored[f"{layer}.weight_shape"].tolist()
    codes = torch.tensor([bits_at(row, bits, columns) for row in stored[f"{layer}.weight_packed"].tolist()])
    scale = stored[f"{layer}.weight_scale"].float()
    zero = torch.full_like(scale, 2 ** (bits - 1))
    if (packed := stored.get(f"{layer}.weight_zero_point")) is not None:
        zero = torch.tensor([bits_at(column, bits, rows) for column in packed.T.tolist()]).T.float()
    each = columns // scale.shape[1]
    return (codes - zero.repeat_interleave(each, 1)) * scale.repeat_interleave(each, 1)


@pytest.mark.parametrize(
    ("bits", "symmetric", "group_size"),
    [
        (2, True, 16),
        (2, False, -1),
        (3, True, -1),
        (3, False, 16),
        (4, True, 32),
        (4, False, -1),
        (8, True, -1),
        (8, False, 32),
    ],
)
def test_weights_alone_are_exactly_ours(home: Path, bits: int, symmetric: bool, group_size: int) -> None:
    name = f"w{bits}{symmetric}{group_size}"
    run = fit(home, name, *RTN, *weights(bits, symmetric, group_size))
    out = exported(run, home / f"{name}-out")
    assert settings(out)["format"] == PACKED
    ours, stored = plain_model(run), tensors(out)
    for name, weight in ours.named_parameters():
        if name.endswith("_proj.weight"):
            assert torch.equal(dense(stored, name.removesuffix(".weight"), bits), weight)
    # With zero points the package multiplies when it loads, in the scales' dtype.
    same = ours if symmetric else plain_model(run, torch.float16)
    assert torch.equal(logits(loaded(out)), logits(same))
    assert stored["model.layers.0.mlp.down_proj.weight_packed"].shape == (64, 96 * bits // 32)


def rounded(x: Tensor, bits: int) -> Tensor:
    """As the package compressed-tensors rounds each token: the step is max|x| / (2^bits - 1) * 2."""
    step = x.abs().amax(-1, keepdim=True) / ((2**bits - 1) / 2)
    return (x / step).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * step


def rounding_inputs(model: PreTrainedModel, bits: int) -> PreTrainedModel:
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.register_forward_pre_hook(lambda _, args: (rounded(args[0], bits),))
    return model


@pytest.mark.parametrize(("bits", "format"), [(4, PACKED), (8, BYTES)])
def test_rounded_activations_are_said(home: Path, bits: int, format: str) -> None:
    run = fit(home, f"w{bits}a8", *RTN, "-c", f"schemes/w{bits}a8", *SERVED)
    out = exported(run, home / f"w{bits}a8-out")
    (group,) = settings(out)["config_groups"].values()
    assert group["format"] == settings(out)["format"] == format
    assert group["input_activations"] == {
        "num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True,
    }  # fmt: skip
    found = logits(loaded(out))
    torch.testing.assert_close(found, logits(rounding_inputs(plain_model(run), 8)), rtol=1e-3, atol=2e-2)
    assert not torch.allclose(found, logits(plain_model(run)), rtol=1e-3, atol=2e-2)


MIXED = {
    "layers.0.self_attn": {"bits": 5, "group_size": 16},
    "layers.0.mlp": {"bits": 3, "symmetric": True},
    "layers.1.self_attn.o_proj": 16,
    "layers.1.mlp.down_proj": {"bits": 8, "group_size": 32},
}


@pytest.mark.parametrize("symmetric", [True, False])
def test_layers_of_other_formats_are_named(home: Path, symmetric: bool) -> None:
    name = f"mixed{symmetric}"
    run = fit(home, name, *RTN, *weights(4, symmetric), "--model.layers", json.dumps(MIXED))
    out = exported(run, home / f"{name}-out")
    said = settings(out)
    assert said["ignore"] == ["lm_head", "model.layers.1.self_attn.o_proj"]
    targets = {name for group in said["config_groups"].values() for name in group["targets"]}
    assert len(targets) == 13
    ours, stored = plain_model(run), tensors(out)
    for name, bits in (("0.self_attn.v_proj", 5), ("0.mlp.up_proj", 3), ("1.mlp.down_proj", 8), ("1.mlp.up_proj", 4)):
        found = dense(stored, f"model.layers.{name}", bits)
        assert torch.equal(found, ours.get_parameter(f"model.layers.{name}.weight"))
    if symmetric:  # of zero points, transformers reads those of one format only
        assert torch.equal(logits(loaded(out)), logits(ours))


@pytest.mark.parametrize(("given", "dtype"), [("auto", torch.bfloat16), ("float32", torch.float32)])
def test_a_dense_model_is_like_any_other(home: Path, given: str, dtype: torch.dtype) -> None:
    run = fit(home, f"dense{given}", *RTN, *weights(3, group_size=16))
    out = exported(run, home / f"dense{given}-out", "dense", given)
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == str(dtype).removeprefix("torch.")
    ours = plain_model(run)
    matrices = {name: t for name, t in ours.named_parameters() if t.dim() > 1}
    stored = tensors(out)
    assert all(torch.equal(stored[name], matrix.to(dtype)) for name, matrix in matrices.items())
    if dtype == torch.float32:
        assert torch.equal(logits(loaded(out)), logits(ours))
    else:
        torch.testing.assert_close(logits(loaded(out)), logits(ours), rtol=0.05, atol=0.1)


@pytest.mark.parametrize("family", ["llama_biased", "qwen3", "gemma2", "phi3", "opt"])
def test_families(tmp_path: Path, family: str) -> None:
    save_exact_source(tmp_path, CONFIGS[family])
    run = fit(tmp_path, "RUN", *RTN, *weights(4, True, 16), "--model.weight.scale_dtype", "bfloat16")
    assert torch.equal(logits(loaded(exported(run, tmp_path / "out"))), logits(plain_model(run)))


def test_small_shards_have_an_index(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = fit(home, "shards", *RTN, *weights(4, group_size=16))
    whole = exported(run, home / "whole")
    monkeypatch.setattr(directory, "SHARD_BYTES", 10_000)
    out = exported(run, home / "shards-out")
    files = sorted(out.glob("model-*.safetensors"))
    assert len(files) > 3
    assert not (out / "model.safetensors").exists()
    largest = max(tensor.numel() * tensor.element_size() for tensor in tensors(out).values())
    assert all(file.stat().st_size < max(10_000, largest) + 4_000 for file in files)  # and a header
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    one, many = tensors(whole), tensors(out)
    assert index.keys() == one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)
    assert torch.equal(logits(loaded(out)), logits(loaded(whole)))


def test_a_bfloat16_model_has_all_digits_of_its_scales(home: Path) -> None:
    run = fit(home, "bf16", *RTN, *weights(4, symmetric=True), "--model.weight.scale_dtype", "bfloat16")
    out = exported(run, home / "bf16-out")  # --dtype auto
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert tensors(out)["model.layers.0.mlp.up_proj.weight_scale"].dtype == torch.bfloat16
    assert torch.equal(logits(loaded(out)), logits(plain_model(run)))


@pytest.mark.parametrize("method", ["lrquant", "omniquant"])
def test_served_presets_yield_what_can_be_exported(home: Path, method: str) -> None:
    options = ("-c", f"methods/{method}", "-c", "schemes/w4a8", *SERVED, "--model.transforms.shift", "biased")
    run = fit(home, method, *options, "--trainer.max_epochs", "1")
    found = logits(loaded(exported(run, home / f"{method}-out")))
    torch.testing.assert_close(found, logits(rounding_inputs(plain_model(run), 8)), rtol=1e-3, atol=5e-2)


@pytest.mark.shared
def test_a_real_model(tmp_path: Path, stories_dir: Path) -> None:
    save_exact_source(tmp_path, llama_config())
    (tmp_path / "source").rename(tmp_path / "random")
    (tmp_path / "source").symlink_to(stories_dir)
    run = fit(tmp_path, "RUN", *RTN, *weights(4))
    found, ours = logits(loaded(exported(run, tmp_path / "out"))), logits(plain_model(run))
    torch.testing.assert_close(found, ours, rtol=0.01, atol=0.01)  # its embeddings are float32 numbers
