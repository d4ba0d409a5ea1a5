"""True size: the bits that are stored, against arithmetic."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PretrainedConfig

from ptql.calibration.ledger import BlockRecord, Ledger
from ptql.calibration.quant_lm import QuantLM
from ptql.checkpoint import SINGLE, Checkpoint
from ptql.evaluation.size import layer_sizes, model_size
from ptql.formats.write import write_model
from ptql.nn.student import weights_of
from ptql.parts.transforms import AddedBiases
from ptql.parts.weights import Affine
from ptql.recipe import IntScheme
from tests.models import llama_config, opt_config, random_model, save

HIDDEN, MIDDLE, VOCABULARY, CONTEXT, BLOCKS = 48, 80, 64, 64, 2
KV = 24
LLAMA = [(HIDDEN, HIDDEN), (KV, HIDDEN), (KV, HIDDEN), (HIDDEN, HIDDEN)]
LLAMA += [(MIDDLE, HIDDEN), (MIDDLE, HIDDEN), (HIDDEN, MIDDLE)]
OPT = [(HIDDEN, HIDDEN)] * 4 + [(MIDDLE, HIDDEN), (HIDDEN, MIDDLE)]


def packed(tmp_path: Path, config: PretrainedConfig, scheme: IntScheme, **options: int) -> tuple[Path, Checkpoint]:
    source = Checkpoint(save(random_model(config), tmp_path / "source"))
    ledger = Ledger(tmp_path / "run", {})
    ledger.start()
    for index in range(source.num_blocks):
        weights = weights_of(source.block(index))
        for name in source.layout.names:
            w = weights.pop(f"{name}.weight")
            stored = Affine(clip=False).for_linear(name, w, scheme).encode(w)
            weights |= {f"{name}.{part}": tensor for part, tensor in stored.items()}
            if f"{name}.bias" in weights:
                weights[f"{name}.bias"] = weights[f"{name}.bias"].half()
        ledger.record(index, BlockRecord(weights, {}, {}))
    model = tmp_path / "run" / "model"
    recipe = QuantLM(weight=scheme)
    write_model(source, recipe.packed_format(source, AddedBiases()), ledger, model, **options)
    return model, source


def bits_of_matrix(rows: int, columns: int, scheme: IntScheme) -> int:
    """Codes in whole bytes a row, a float16 scale and a code of a zero point for each group."""
    groups = -(-columns // (columns if scheme.group_size == -1 else scheme.group_size))
    bits = rows * 8 * -(-columns * scheme.bits // 8) + rows * groups * 16
    return bits if scheme.symmetric else bits + rows * 8 * -(-groups * scheme.bits // 8)


@pytest.mark.parametrize(
    "scheme",
    [IntScheme(2, 16), IntScheme(2, 32), IntScheme(3, -1), IntScheme(3, 7, True), IntScheme(4, 48), IntScheme(8, 1)],
    ids=str,
)
def test_bits_against_arithmetic(tmp_path: Path, scheme: IntScheme) -> None:
    model, source = packed(tmp_path, llama_config(), scheme)
    found = model_size(model, source)
    linear = BLOCKS * sum(bits_of_matrix(*shape, scheme) for shape in LLAMA)
    weights = BLOCKS * sum(rows * columns for rows, columns in LLAMA)
    outside = VOCABULARY * HIDDEN + HIDDEN  # the tied embedding once, and the last norm
    norms = BLOCKS * 2 * HIDDEN
    assert found["weights"] == weights
    assert found["parameters"] == weights + outside + norms
    assert found["bits_per_weight"] == linear / weights
    assert found["bits_per_weight_with_embeddings"] == (linear + 32 * (outside + norms)) / (weights + outside + norms)
    assert found["size_bytes"] == (model / SINGLE).stat().st_size
    assert (
        (linear + 32 * (outside + norms)) // 8 <= found["size_bytes"] < (linear + 32 * (outside + norms)) // 8 + 10_000
    )


def test_biases_of_linear_layers_count_as_bits_but_not_as_weights(tmp_path: Path) -> None:
    scheme = IntScheme(4, -1)
    found = model_size(*packed(tmp_path, opt_config(), scheme))
    weights = BLOCKS * sum(rows * columns for rows, columns in OPT)
    biases = BLOCKS * sum(rows for rows, _ in OPT)
    linear = BLOCKS * sum(bits_of_matrix(*shape, scheme) for shape in OPT) + 16 * biases
    norms = BLOCKS * 4 * HIDDEN + 2 * HIDDEN
    positions = (CONTEXT + 2) * HIDDEN
    assert found["weights"] == weights
    assert found["bits_per_weight"] == linear / weights
    assert found["parameters"] == weights + biases + norms + positions + VOCABULARY * HIDDEN


def test_shards_count_like_one_file(tmp_path: Path) -> None:
    one = model_size(*packed(tmp_path / "one", llama_config(), IntScheme(2, 16)))
    model, source = packed(tmp_path / "many", llama_config(), IntScheme(2, 16), shard_bytes=5_000)
    many = model_size(model, source)
    assert len(list(model.glob("*.safetensors"))) > 2
    assert many.pop("size_bytes") == sum(path.stat().st_size for path in model.glob("*.safetensors"))
    assert many.items() <= one.items()


def test_a_sharded_source_in_half_precision_has_the_same_weights(tmp_path: Path) -> None:
    model, source = packed(tmp_path, llama_config(), IntScheme(2, 16))
    other = save(random_model(llama_config()).bfloat16(), tmp_path / "half", max_shard_size="30KB")
    assert len(set(Checkpoint(other).files.values())) > 2
    assert model_size(model, Checkpoint(other)) == model_size(model, source)


def test_two_bits_are_a_sixteenth_of_float32(tmp_path: Path) -> None:
    """Codes alone: 2 bits in 32."""
    model, source = packed(tmp_path, llama_config(), IntScheme(2, -1))
    codes = sum(t.numel() for name, t in load_file(model / SINGLE).items() if name.endswith(".codes"))
    assert codes * 8 / model_size(model, source)["weights"] == 2.0


def test_a_tensor_more_is_a_tensor_more(tmp_path: Path) -> None:
    """The bits are counted in the files and not derived from the scheme."""
    model, source = packed(tmp_path, llama_config(), IntScheme(2, 16))
    before = model_size(model, source)
    extra = {
        "model.layers.1.mlp.up_proj.extra": torch.zeros(10, dtype=torch.float64),
        "model.layers.1.mlp.other": torch.zeros(3, dtype=torch.bool),
    }
    save_file({**load_file(model / SINGLE), **extra}, model / SINGLE)
    after = model_size(model, source)
    assert after["bits_per_weight"] * after["weights"] == pytest.approx(
        before["bits_per_weight"] * before["weights"] + 640
    )
    more = (after["bits_per_weight_with_embeddings"] - before["bits_per_weight_with_embeddings"]) * after["parameters"]
    assert more == pytest.approx(640 + 24)


@pytest.mark.parametrize("config", [llama_config(), opt_config()], ids=["llama", "opt"])
@pytest.mark.parametrize(
    "scheme",
    [IntScheme(2, 16), IntScheme(3, 7, True), IntScheme(2, 20, balanced=True), IntScheme(1, 20, balanced=True)],
    ids=str,
)
def test_sizes_of_layers_are_known_before_they_are_stored(
    tmp_path: Path, config: PretrainedConfig, scheme: IntScheme
) -> None:
    """Runs with added biases, factors and layers of other formats are in tests/calibration/test_bit_budget.py."""
    model, source = packed(tmp_path, config, scheme)
    found, planned = model_size(model, source), layer_sizes(source, Checkpoint(model).packed).values()
    assert sum(layer.weights for layer in planned) == found["weights"]
    assert sum(layer.bits for layer in planned) / found["weights"] == found["bits_per_weight"]
