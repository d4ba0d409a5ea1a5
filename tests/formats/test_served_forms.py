"""Activations without a zero point and scales that bfloat16 holds: what is stored, and what a loaded model computes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ptql.calibration.quant_lm import QuantLM
from ptql.cli import main
from ptql.errors import InputError
from ptql.formats.ptql import PackedFormat
from ptql.nn.packed_linear import PackedLinear
from ptql.parts.activations import DynamicTokens
from ptql.parts.transforms import Smooth
from ptql.parts.weights import Affine
from ptql.recipe import ActivationScheme, IntScheme
from tests.calibration.test_trainer import loaded_logits, student_logits
from tests.models import some_ids
from tests.words import save_source, save_text

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """W4A8 as presets/served has it, with learned clipping."""
    folder = tmp_path_factory.mktemp("served")
    recipe = ("-c", "methods/omniquant", "-c", "schemes/w4a8", "-c", "presets/served", "--trainer.accelerator", "cpu")
    places = (
        "--model.source",
        str(save_source(folder / "source")),
        "--data.text",
        str(save_text(folder / "words.txt")),
    )
    small = ("--data.length", "16", "--data.samples", "4", "--data.batch_size", "2", "--trainer.max_epochs", "2")
    assert main(["fit", *recipe, *places, *small, "--trainer.default_root_dir", str(folder / "run")]) == 0
    return folder / "run"


def stored_format(run: Path) -> dict:
    return json.loads((run / "model/config.json").read_text())["quantization_config"]


def test_activations_without_a_zero_point_make_a_format_of_version_6(run: Path) -> None:
    stored = stored_format(run)
    assert stored["format_version"] == 6
    assert stored["activation"] == {"bits": 8, "symmetric": True, "qkv": False}
    assert stored["weight"] == {"bits": 4, "group_size": -1, "symmetric": True, "scale_dtype": "bfloat16"}
    fmt = PackedFormat.from_dict(stored)
    assert fmt.to_dict() == stored
    assert (fmt.activation, fmt.weight) == (
        ActivationScheme(8, symmetric=True),
        IntScheme(4, -1, True, scale_dtype="bfloat16"),
    )
    assert replace(fmt, activation=ActivationScheme(8)).version == 1
    assert replace(fmt, activation=ActivationScheme(16, symmetric=True)).version == 1  # nothing is rounded
    for key, value, message in (
        ("activation", "yes", "symmetric='yes' is not a bool"),
        ("weight", 3, "scale_dtype=3 is"),
    ):
        name = "symmetric" if key == "activation" else "scale_dtype"
        with pytest.raises(InputError, match=message):
            PackedFormat.from_dict({**stored, key: {**stored[key], name: value}})


def test_a_loaded_model_is_the_student_that_was_learned(run: Path) -> None:
    recipe = QuantLM(
        weight=IntScheme(4, symmetric=True, scale_dtype="bfloat16"),
        activation=ActivationScheme(8, symmetric=True),
        transforms=[Smooth(initial="balanced", shift="biased")],
        weight_quantizer=Affine(clip=True),
        activation_quantizer=DynamicTokens(qkv=False),
    )
    expected = student_logits(run, run.parent / "source", recipe, some_ids())
    found = loaded_logits(run, some_ids())  # a difference in the last bit may move an activation to the next code
    assert ((found - expected).abs() < 1e-4).float().mean() > 0.99


def test_inputs_of_layers_lie_on_a_symmetric_grid(run: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32)
    layer = model.get_submodule("model.layers.0.mlp.down_proj")
    assert isinstance(layer, PackedLinear)
    x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(0)) + 0.3
    step = x.abs().amax(-1, keepdim=True) / 127
    rounded = (x / step).round() * step
    torch.testing.assert_close(layer(x), rounded @ layer.to_dense().weight.T, rtol=1e-4, atol=1e-4)


def test_scales_are_bfloat16_numbers(run: Path) -> None:
    scales = {k: t for k, t in load_file(run / "model/model.safetensors").items() if k.endswith(".scale")}
    assert len(scales) == 14
    for name, stored in scales.items():
        scale = stored.view(torch.float16).float()
        assert torch.equal(scale.bfloat16().float(), scale), name
    assert not any("zero" in name for name in load_file(run / "model/model.safetensors"))
