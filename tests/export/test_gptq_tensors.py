"""GPTQ's tensors against a reader that is written from the format's description, one word and one value at a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ptql.checkpoint import Checkpoint
from ptql.export.gptq import AutoRound, Gptq, GptqV2
from ptql.export.layers import IntLayer
from ptql.recipe import ActivationScheme, IntScheme
from tests.export.exported import RTN, exported, fit, plain_model, save_exact_source, settings, tensors, weights

pytestmark = pytest.mark.usefixtures("one_thread")
IN, OUT, GROUP = 64, 32, 16


def values(column: list[int], bits: int) -> list[int]:
    """The values in a column of words. 2, 4 and 8 bits: 32 / bits in a word, low ones first. 3 bits: 32 in 3 words, of
    which the 11th and the 22nd lie in two words: 2 bits in the first and 1 in the second, 1 and 2."""
    column = [word % 2**32 for word in column]
    if bits != 3:
        return [word >> bits * k & 2**bits - 1 for word in column for k in range(32 // bits)]
    found = []
    for a, b, c in zip(column[::3], column[1::3], column[2::3], strict=True):
        found += [a >> 3 * k & 7 for k in range(10)]
        found += [a >> 30 | (b & 1) << 2]
        found += [b >> 1 + 3 * k & 7 for k in range(10)]
        found += [b >> 31 | (c & 3) << 1]
        found += [c >> 2 + 3 * k & 7 for k in range(10)]
    return found


def unpacked(packed: Tensor, bits: int) -> Tensor:
    """Words that lie below each other, as values that do."""
    return torch.tensor([values(column, bits) for column in packed.T.tolist()]).T


def dense(stored: dict[str, Tensor], bits: int, more: int) -> Tensor:
    """w[i, o] = scales[g, o] * (q[i, o] - z[g, o]) with g = g_idx[i]; the zero points are stored less `more`."""
    codes, zeros = unpacked(stored["qweight"], bits), unpacked(stored["qzeros"].T, bits).T + more
    group = stored["g_idx"].long()
    return (stored["scales"].float()[group] * (codes - zeros[group]).float()).T


def some_layer(bits: int, symmetric: bool = False, lowest: int = 1) -> IntLayer:
    draw = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (OUT, IN), generator=draw, dtype=torch.uint8)
    zero = torch.randint(lowest, 2**bits, (OUT, IN // GROUP), generator=draw, dtype=torch.uint8)
    if symmetric:
        zero = torch.full_like(zero, 2 ** (bits - 1))
    scale = torch.rand(OUT, IN // GROUP, generator=draw).half()
    return IntLayer(codes, scale, zero, IntScheme(bits, GROUP, symmetric))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("target", "more"), [(Gptq, 1), (GptqV2, 0), (AutoRound, 1)])
def test_words_hold_the_codes_and_zero_points(target: type[Gptq], more: int, symmetric: bool, bits: int) -> None:
    layer = some_layer(bits, symmetric, lowest=more)
    stored = target().layer(layer, ActivationScheme())
    assert {name: (tuple(t.shape), t.dtype) for name, t in stored.items()} == {
        "qweight": ((IN * bits // 32, OUT), torch.int32),
        "qzeros": ((IN // GROUP, OUT * bits // 32), torch.int32),
        "scales": ((IN // GROUP, OUT), torch.float16),
        "g_idx": ((IN,), torch.int32),
    }
    assert stored["g_idx"].tolist() == [column // GROUP for column in range(IN)]
    assert torch.equal(unpacked(stored["qweight"], bits), layer.codes.T.long())
    assert torch.equal(unpacked(stored["qzeros"].T, bits), layer.zero.long() - more)
    assert torch.equal(dense(stored, bits, more), layer.dense())


def test_three_bits_lie_across_words_as_described() -> None:
    assert values([0b10 << 30, 0b1 | 0b1 << 31, 0b01], 3)[10] == 0b110
    assert values([0b10 << 30, 0b1 | 0b1 << 31, 0b01], 3)[21] == 0b011


@pytest.mark.parametrize(
    ("target", "more", "scheme"),
    [
        ("gptq", 1, weights(4, symmetric=True, group_size=16)),
        ("gptq_v2", 0, weights(3, group_size=32)),
        ("gptq_v2", 0, weights(2)),
        ("auto-round", 1, weights(8, symmetric=True)),
    ],
)
def test_an_export_multiplied_out_is_our_model(tmp_path: Path, target: str, more: int, scheme: list[str]) -> None:
    save_exact_source(tmp_path)
    run = fit(tmp_path, "RUN", *RTN, *scheme, "--model.layers", '{"layers.1.mlp": 8, "layers.0.mlp.down_proj": 16}')
    out = exported(run, tmp_path / "out", target)
    stored, plain, packed = tensors(out), plain_model(run).state_dict(), Checkpoint(run / "model").packed
    assert packed is not None
    for index in range(2):
        for linear in packed.linears:
            name, format = f"model.layers.{index}.{linear}", packed.schemes.of(index, linear)
            parts = {
                key: stored.pop(f"{name}.{key}") for key in ("qweight", "qzeros", "scales", "g_idx") if format.quantised
            }
            found = dense(parts, format.bits, more) if format.quantised else stored.pop(f"{name}.weight")
            assert torch.equal(found.float(), plain.pop(f"{name}.weight")), name
    plain.pop("lm_head.weight")  # tied
    assert stored.keys() == plain.keys()
    assert all(torch.equal(stored[name].float(), plain[name]) for name in plain)
    said = settings(out)
    assert (said["bits"], said["group_size"], said["sym"]) == tuple(
        getattr(packed.weight, name) for name in ("bits", "group_size", "symmetric")
    )
    if target == "auto-round":
        assert said["extra_config"]["model.layers.0.mlp.down_proj"] == {"bits": 16, "data_type": "float"}
        assert not (out / "quantize_config.json").exists()
    else:
        assert said["checkpoint_format"] == target
        assert said["dynamic"][r"-:^model\.layers\.0\.mlp\.down_proj$"] == {}
        assert json.loads((out / "quantize_config.json").read_text()) == said
