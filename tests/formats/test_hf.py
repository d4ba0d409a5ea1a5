"""Packed models through transformers, against a fake-quantised model that runs without ptql."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModel,
    AutoModelForCausalLM,
    LlamaConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import ptql
from ptql.errors import InputError
from ptql.families import family_of
from ptql.formats import hf
from ptql.formats.ptql import PackedFormat, prepare_block, unpack_block
from ptql.functional import affine
from ptql.nn.packed_linear import PackedLinear, dense_from_packed, packed_tensors
from ptql.nn.quant_linear import QuantLinear
from ptql.recipe import ActivationScheme, IntScheme
from tests.formats.loading import load

LLAMA = LlamaConfig(
    vocab_size=64,
    hidden_size=48,  # group 32 does not divide it
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    tie_word_embeddings=True,
    initializer_range=0.2,
    architectures=["LlamaForCausalLM"],
)
OPT = OPTConfig(
    vocab_size=64,
    hidden_size=48,
    word_embed_proj_dim=48,
    ffn_dim=80,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
    init_std=0.2,
    architectures=["OPTForCausalLM"],
)
CONFIGS = {"llama": LLAMA, "opt": OPT}
IDS = torch.arange(3, 63).view(3, 20) * 7 % 61 + 3
W4 = IntScheme(4, 32, symmetric=False)


# The reference: dense weights in transformers' own model, rounding by hooks and by an attention of its own.


def rounded(x: Tensor, bits: int) -> Tensor:
    """Asymmetric min-max rounding of each last-dimension vector."""
    wide = x.float()
    low, high = wide.amin(-1, keepdim=True), wide.amax(-1, keepdim=True)
    step = ((high - low) / (2**bits - 1)).clamp(1e-6, 1e4)
    zero = torch.round(-low / step)
    code = (torch.round(wide / step) + zero).clamp(0, 2**bits - 1)
    return ((code - zero) * step).to(x.dtype)


def attention_4(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args, **kwargs):
    return sdpa_attention_forward(module, rounded(query, 4), rounded(key, 4), rounded(value, 4), *args, **kwargs)


AttentionInterface.register("reference_4", attention_4)
AttentionMaskInterface.register("reference_4", sdpa_mask)


def blocks_of(model: PreTrainedModel) -> nn.Module:
    return model.get_submodule(family_of(model.config.model_type).blocks)


def reference_model(
    config: PretrainedConfig, fmt: PackedFormat, directory: Path, dtype: torch.dtype
) -> PreTrainedModel:
    """transformers' own model on the dense weights of a directory that `write_packed` wrote."""
    attention = "reference_4" if fmt.rounds_attention else "sdpa"
    # Not `.to(dtype)` afterwards: that would round RoPE's frequencies too.
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention).eval()
    stored: dict[str, Tensor] = {}
    for file in directory.glob("*.safetensors"):
        stored |= load_file(file)
    for i, block in enumerate(blocks_of(model)):
        prefix = f"{fmt.blocks}.{i}."
        for name in fmt.linears:
            linear = block.get_submodule(name)
            if fmt.weight.quantised:
                tensors = {k: stored.pop(f"{prefix}{name}.{k}", None) for k in ("codes", "scale", "zero")}
                stored[f"{prefix}{name}.weight"] = dense_from_packed(tensors, linear.in_features, fmt.weight)
            if name in fmt.added_biases:
                linear.bias = nn.Parameter(torch.zeros(linear.out_features, dtype=dtype))
            if fmt.activation.quantised:
                bits = fmt.activation.bits
                linear.register_forward_pre_hook(lambda _, args, bits=bits: (rounded(args[0], bits),))
        for name in fmt.shifted_norms:
            bias = stored.pop(f"{prefix}{name}.bias").to(dtype)
            block.get_submodule(name).register_forward_hook(lambda _, args, out, bias=bias: out + bias)
            stored[f"{prefix}{name}.weight"] = stored.pop(f"{prefix}{name}.norm.weight")
    missing, unexpected = model.load_state_dict(stored, strict=False)
    assert set(missing) <= {"lm_head.weight"}
    assert not unexpected
    return model


def packed_format(
    config: PretrainedConfig, weight: IntScheme = W4, activation: int = 16, shifted: bool = False
) -> PackedFormat:
    family = family_of(config.model_type)
    layout = family.layout(config)
    return PackedFormat(
        method="lrquant",
        weight=weight,
        activation=ActivationScheme(activation),
        qkv=True,
        blocks=family.blocks,
        attention=layout.attention.module,
        linears=layout.names,
        shifted_norms=tuple(site.norm for site in layout.norms) if shifted else (),
        added_biases=layout.names if shifted else (),
    )


def write_packed(directory: Path, config: PretrainedConfig, fmt: PackedFormat, shards: int = 1) -> Path:
    """A packed model of random weights, as `ptql fit` leaves it in RUN/model, by plain min-max."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(p, std=0.1)
    tensors = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    for i in range(config.num_hidden_layers):
        for name in fmt.linears:
            full = f"{fmt.blocks}.{i}.{name}"
            if fmt.weight.quantised:
                w = tensors.pop(f"{full}.weight")
                columns = fmt.weight.columns(w.shape[1])
                low, high = affine.weight_range(affine.grouped(w, columns))
                encoded = affine.encode(w, low, high, fmt.weight.levels, columns, fmt.weight.symmetric)
                tensors |= {f"{full}.{k}": v for k, v in packed_tensors(*encoded, fmt.weight.levels).items()}
            if name in fmt.added_biases:
                tensors[f"{full}.bias"] = torch.randn(model.get_submodule(full).out_features) * 0.1
        for name in fmt.shifted_norms:
            full = f"{fmt.blocks}.{i}.{name}"
            tensors[f"{full}.norm.weight"] = tensors.pop(f"{full}.weight")
            tensors[f"{full}.bias"] = torch.randn(config.hidden_size) * 0.1
    directory.mkdir()
    settings = {**config.to_dict(), "quantization_config": fmt.to_dict()}
    (directory / "config.json").write_text(json.dumps(settings))
    names = sorted(tensors)
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
        return directory
    files = {name: f"model-{k % shards + 1:05}-of-{shards:05}.safetensors" for k, name in enumerate(names)}
    for file in set(files.values()):
        save_file({n: tensors[n] for n in names if files[n] == file}, directory / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": files}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def integers(model: nn.Module) -> dict[str, Tensor]:
    return {k: v for k, v in model.state_dict().items() if not v.is_floating_point()}


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(IDS).logits


# name -> model, weight scheme, activation bits, biases added to norms and linear layers
CASES = {
    "llama_w4g32": ("llama", W4, 16, False),
    "llama_w4g32_a4": ("llama", W4, 4, False),
    "llama_w2g16_a4_shifted": ("llama", IntScheme(2, 16, symmetric=False), 4, True),
    "llama_w3_symmetric_shifted": ("llama", IntScheme(3, -1, symmetric=True), 16, True),
    "llama_w16_a4_shifted": ("llama", IntScheme(16), 4, True),
    "opt_w4g32": ("opt", W4, 16, False),
    "opt_w3g32_a4": ("opt", IntScheme(3, 32, symmetric=False), 4, False),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_a_loaded_model_is_the_fake_quantised_one(tmp_path: Path, case: str, dtype: torch.dtype) -> None:
    family, weight, activation, shifted = CASES[case]
    fmt = packed_format(CONFIGS[family], weight, activation, shifted)
    directory = write_packed(tmp_path / "model", CONFIGS[family], fmt)
    model, reference = load(directory, dtype), reference_model(CONFIGS[family], fmt, directory, dtype)
    assert model.dtype == dtype
    assert not model.training
    assert model.config._attn_implementation == ("ptql" if activation < 16 else "sdpa")
    torch.testing.assert_close(logits(model), logits(reference), atol=1e-5, rtol=0)
    assert logits(reference).std() > 0.1

    prompt = IDS[:1, :6]
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = reference.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    assert torch.equal(model.generate(prompt, attention_mask=torch.ones_like(prompt), **options), expected)
    assert expected.shape == (1, 12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", ["llama_w2g16_a4_shifted", "llama_w16_a4_shifted", "opt_w4g32"])
def test_what_is_saved_loads_as_the_same(tmp_path: Path, case: str, dtype: torch.dtype) -> None:
    family, weight, activation, shifted = CASES[case]
    fmt = packed_format(CONFIGS[family], weight, activation, shifted)
    model = load(write_packed(tmp_path / "model", CONFIGS[family], fmt), dtype)
    model.save_pretrained(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "config.json").read_text())
    assert saved["quantization_config"] == fmt.to_dict()
    assert "lm_head.weight" not in load_file(tmp_path / "again" / "model.safetensors")
    again = load(tmp_path / "again", dtype)
    assert torch.equal(logits(again), logits(model))
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) and before[k].dtype == after[k].dtype for k in before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_cast_touches_packed_tensors(tmp_path: Path, dtype: torch.dtype) -> None:
    directory = write_packed(tmp_path / "model", LLAMA, packed_format(LLAMA))
    stored = load_file(directory / "model.safetensors")
    packed = {k: v for k, v in stored.items() if k.endswith((".codes", ".scale", ".zero"))}
    assert len(packed) == 2 * 7 * 3
    for model in (load(directory, dtype), load(directory, torch.float32).to(dtype)):
        found = integers(model)
        assert found.keys() == packed.keys()
        assert all(torch.equal(found[k], packed[k]) and found[k].dtype == packed[k].dtype for k in packed)
        assert logits(model).isfinite().all()


def test_shards_with_an_index_load_as_one_file(tmp_path: Path) -> None:
    fmt = packed_format(LLAMA, activation=4, shifted=True)
    one = load(write_packed(tmp_path / "one", LLAMA, fmt))
    three = load(write_packed(tmp_path / "three", LLAMA, fmt, shards=3))
    assert torch.equal(logits(one), logits(three))
    three.save_pretrained(tmp_path / "small", max_shard_size="20KB")
    assert len(list((tmp_path / "small").glob("*.safetensors"))) > 2
    assert torch.equal(logits(load(tmp_path / "small")), logits(one))


def test_embeddings_stay_tied(tmp_path: Path) -> None:
    model = load(write_packed(tmp_path / "model", LLAMA, packed_format(LLAMA)))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_an_untied_head_is_loaded_as_stored(tmp_path: Path) -> None:
    config = LlamaConfig.from_dict({**LLAMA.to_dict(), "tie_word_embeddings": False})
    directory = write_packed(tmp_path / "model", config, packed_format(config))
    tensors = load_file(directory / "model.safetensors")
    head = torch.full((64, 48), 0.5)
    save_file({**tensors, "lm_head.weight": head}, directory / "model.safetensors", {"format": "pt"})
    assert torch.equal(load(directory).lm_head.weight, head)


def test_a_model_without_a_head_loads(tmp_path: Path) -> None:
    for config in (LLAMA, OPT):
        directory = write_packed(tmp_path / config.model_type, config, packed_format(config, activation=4))
        bare, whole = AutoModel.from_pretrained(directory, dtype=torch.float32), load(directory)
        with torch.no_grad():
            assert torch.equal(bare(IDS).last_hidden_state, whole.base_model(IDS).last_hidden_state)


def test_two_bits_take_two_bits(tmp_path: Path) -> None:
    fmt = packed_format(LLAMA, IntScheme(2, 16, symmetric=False))
    file = write_packed(tmp_path / "model", LLAMA, fmt) / "model.safetensors"
    stored = load_file(file)
    weights = 2 * (2 * 48 * 48 + 2 * 24 * 48 + 3 * 48 * 80)
    ends = ("codes", "scale", "zero")
    of = {end: sum(t.nbytes for k, t in stored.items() if k.endswith(end)) for end in ends}
    assert of["codes"] * 8 == 2 * weights
    assert of["scale"] * 8 == 16 * weights / 16
    assert of["zero"] * 8 < 4 * weights / 16  # 2 bits, rows of 3 and 5 groups filled up to whole bytes
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert file.stat().st_size == header + sum(t.nbytes for t in stored.values())


def test_unpacked_blocks_compute_the_same(tmp_path: Path) -> None:
    model = load(write_packed(tmp_path / "model", LLAMA, packed_format(LLAMA, activation=4, shifted=True)))
    expected = logits(model)
    for block in blocks_of(model):
        unpack_block(block)
    kinds = [type(m) for m in model.modules()]
    assert (kinds.count(PackedLinear), kinds.count(QuantLinear)) == (0, 14)
    assert torch.equal(logits(model), expected)


def test_what_the_quantizer_says_of_itself(tmp_path: Path) -> None:
    model = load(write_packed(tmp_path / "model", LLAMA, packed_format(LLAMA)))
    assert model.hf_quantizer.is_serializable()
    assert model.hf_quantizer.is_trainable
    assert model.quantization_method == "ptql"
    with pytest.raises(ValueError, match="pre-quantized"):
        hf.PtqlQuantizer(hf.PtqlConfig(**packed_format(LLAMA).to_dict()), pre_quantized=False)


def test_another_attention_does_not_leave_the_rounding_out(tmp_path: Path) -> None:
    directory = write_packed(tmp_path / "model", LLAMA, packed_format(LLAMA, activation=4))
    asked = load(directory, attn_implementation="eager")
    assert torch.equal(logits(asked), logits(load(directory)))


def test_registering_twice_is_harmless() -> None:
    hf.register()
    hf.register()


def test_importing_ptql_is_enough_and_imports_little() -> None:
    code = (
        "import ptql, sys; from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as m; "
        "assert m['ptql'].requires_calibration; "
        "print([n for n in ('lightning', 'transformers.modeling_utils') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_format_survives_json() -> None:
    fmt = packed_format(LLAMA, IntScheme(3, 64, symmetric=True), 4, shifted=True)
    stored = json.loads(json.dumps(fmt.to_dict()))
    assert PackedFormat.from_dict(stored) == fmt
    assert stored["ptql_version"] == ptql.__version__
    assert stored["weight"] == {"bits": 3, "group_size": 64, "symmetric": True}
    assert stored["activation"] == {"bits": 4, "qkv": True}
    assert hf.PtqlConfig(**stored).to_dict() == dict(hf.PtqlConfig(**stored)) == stored


@pytest.mark.parametrize("version", [None, 0, 8, "1"])
def test_another_format_version_is_refused(tmp_path: Path, version: object) -> None:
    directory = write_packed(tmp_path / "model", LLAMA, packed_format(LLAMA))
    settings = json.loads((directory / "config.json").read_text())
    settings["quantization_config"] |= {"format_version": version, "ptql_version": "9.9"}
    (directory / "config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match=rf"format_version={version!r}: .* versions 1, 2, 3, 4, 5, 6, 7; .*\(9\.9\)"):
        load(directory)


def test_a_missing_or_wrong_key_is_named() -> None:
    stored = packed_format(LLAMA).to_dict()
    for key in set(stored) - {"quant_method", "format_version"}:
        with pytest.raises(InputError, match=f"'{key}' is missing.*restore it"):
            PackedFormat.from_dict({k: v for k, v in stored.items() if k != key})
    with pytest.raises(InputError, match="'symmetric' is missing"):
        PackedFormat.from_dict({**stored, "weight": {"bits": 4, "group_size": -1}})
    with pytest.raises(InputError, match="linears='q' is not a list"):
        PackedFormat.from_dict({**stored, "linears": "q"})
    with pytest.raises(InputError, match="more than names"):
        PackedFormat.from_dict({**stored, "shifted_norms": [1]})


def test_factors_make_a_format_of_version_2() -> None:
    plain, fmt = packed_format(LLAMA), replace(packed_format(LLAMA), factor_rank=3)
    assert plain.to_dict()["format_version"] == 1
    assert "factor_rank" not in plain.to_dict()
    stored = json.loads(json.dumps(fmt.to_dict()))
    assert (stored["format_version"], stored["factor_rank"]) == (2, 3)
    assert PackedFormat.from_dict(stored) == fmt
    for rank in (0, -1):
        with pytest.raises(InputError, match=rf"factor_rank={rank} is not above 0; .*restore it"):
            PackedFormat.from_dict({**stored, "factor_rank": rank})
    with pytest.raises(InputError, match=r"factor_rank='3' is not a int"):
        PackedFormat.from_dict({**stored, "factor_rank": "3"})
    with pytest.raises(InputError, match="'factor_rank' is missing"):
        PackedFormat.from_dict({key: value for key, value in stored.items() if key != "factor_rank"})


def test_a_module_that_is_not_there_is_named() -> None:
    fmt = packed_format(LLAMA)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LLAMA)
    block = blocks_of(model)[0]
    with pytest.raises(InputError, match=r"mlp\.fc9: no such module in a LlamaDecoderLayer"):
        prepare_block(block, replace(fmt, linears=("mlp.fc9",)), 0)
    with pytest.raises(InputError, match=r"input_layernorm: a LlamaRMSNorm is not a linear layer"):
        prepare_block(block, replace(fmt, linears=("input_layernorm",)), 0)
    with pytest.raises(InputError, match="attn: no such module"):
        prepare_block(block, replace(fmt, linears=(), attention="attn"), 0)
