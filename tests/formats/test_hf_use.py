"""A packed model in transformers' hands: saved, spread over devices, generating, and beneath LoRA."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    pipeline,
)
from transformers.integrations.accelerate import compute_module_sizes, infer_auto_device_map

from ptql.errors import InputError
from ptql.families import family_of
from ptql.formats.ptql import PackedFormat, prepare_block
from ptql.nn.packed_linear import CodedWeight, Packed, PackedLinear
from ptql.nn.salient_linear import SalientLinear
from ptql.recipe import ActivationScheme, IntScheme, StaticScheme, StaticSite
from tests.formats.loading import load

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    tie_word_embeddings=True,
    initializer_range=0.2,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
    architectures=["LlamaForCausalLM"],
)
IDS = torch.arange(3, 43).view(2, 20) * 7 % 61 + 3
LAYOUT = family_of("llama").layout(CONFIG)
NORMS = tuple(site.norm for site in LAYOUT.norms)


def fmt_of(
    weight: IntScheme,
    activation: int = 16,
    rank: int = 0,
    layers: dict[str, IntScheme] | None = None,
    shifted: bool = False,
    symmetric: bool = False,
    **others: Any,
) -> PackedFormat:
    return PackedFormat(
        method="rtn",
        weight=weight,
        activation=ActivationScheme(activation, symmetric=symmetric),
        qkv=activation < 16 and not symmetric,
        blocks="model.layers",
        attention=LAYOUT.attention.module,
        linears=LAYOUT.names,
        shifted_norms=NORMS if shifted else (),
        added_biases=LAYOUT.names if shifted else (),
        factor_rank=rank,
        layers=layers or {},
        **others,
    )


W4 = IntScheme(4, 16, symmetric=False)
CLUSTERS = 6
GRIDS = StaticScheme(
    {
        "qkv": StaticSite(4, 1, 48, 2, LAYOUT.linears[0]),
        "fc2": StaticSite(4, 1, 80, 2, LAYOUT.linears[3]),
        "k": StaticSite(4, 2, 12, 2),
    },
    8,
)
FORMATS = {  # each version of the format, and each kind of layer
    "1_symmetric_rows": (1, fmt_of(IntScheme(4, -1, symmetric=True))),
    "1_asymmetric_groups": (1, fmt_of(IntScheme(3, 16, symmetric=False))),
    "1_rounded_and_shifted": (1, fmt_of(IntScheme(2, 16, symmetric=False), activation=4, shifted=True)),
    "2_factors": (2, fmt_of(IntScheme(4, 32, symmetric=False), rank=2)),
    "3_five_levels": (3, fmt_of(IntScheme(2, 16, symmetric=False, balanced=True))),
    "3_several_formats": (3, fmt_of(W4, layers={"0.mlp.down_proj": IntScheme(8, -1), "1.mlp.up_proj": IntScheme(16)})),
    "4_salient": (4, fmt_of(IntScheme(1, -1, salient=0.2))),
    "5_three_levels": (5, fmt_of(IntScheme(1, 16, symmetric=True, balanced=True))),
    "6_fixed_grids": (6, fmt_of(W4, static=GRIDS)),
    "6_reordered_norms": (6, fmt_of(W4, gathered_norms=NORMS)),
    "6_symmetric_activations": (6, fmt_of(IntScheme(8, -1), activation=8, symmetric=True)),
    "7_clustered": (
        7,
        fmt_of(
            IntScheme(4, clustered=True),
            rank=1,
            layers={"0.mlp.down_proj": W4},
            clusters={**dict.fromkeys(LAYOUT.names, CLUSTERS), "self_attn.o_proj": 300},
        ),
    ),
}


def random_bits(name: str, like: Tensor) -> Tensor:
    """Numbers for a packed tensor, any of which are allowed."""
    end = name.rpartition(".")[2]
    if end == "order":
        return torch.randperm(len(like)).to(torch.int32)
    if ".grids." in name and like.dtype != torch.int16:
        return torch.randint(0, {"zero": 16, "cluster": 2}[end], like.shape).to(like.dtype)
    if end == "group":
        return torch.randint(0, CLUSTERS, like.shape).to(like.dtype)
    if like.dtype == torch.int16:
        size = 1.0 if end in ("left", "right", "columns") or ".grids." in name else 0.05
        return (size * (0.5 + torch.rand(like.shape))).half().view(torch.int16)
    if end == "mask":  # a fifth of the channels is salient, whatever bits there are
        columns = 80 if like.shape[1] == 10 else 48
        chosen = torch.zeros(columns, dtype=torch.uint8)
        chosen[torch.randperm(columns)[: int(0.2 * columns)]] = 1
        return (chosen.view(-1, 8) << torch.arange(8)).sum(1, dtype=torch.uint8)[None]
    return torch.randint(0, 256, like.shape, dtype=torch.uint8)


def write(directory: Path, fmt: PackedFormat) -> Path:
    """A packed model of random codes."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG, dtype=torch.float32)
    for index, block in enumerate(model.model.layers):
        prepare_block(block, fmt, index)
    tensors = {name: t.detach().clone() for name, t in model.state_dict().items() if name != "lm_head.weight"}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            tensors[name] = random_bits(name, tensor)
        elif name.endswith(".bias"):
            tensors[name] = torch.randn(tensor.shape) * 0.1
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    config = {**CONFIG.to_dict(), "quantization_config": fmt.to_dict()}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(IDS).logits


def stored(directory: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in directory.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def checksum(tensors: dict[str, Tensor]) -> str:
    joined = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        joined.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        joined.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return joined.hexdigest()


# Saving


@pytest.mark.parametrize("shard", [None, "12KB"], ids=["one_file", "shards"])
@pytest.mark.parametrize("case", FORMATS)
def test_saving_a_loaded_model_gives_the_same_bytes_and_logits(tmp_path: Path, case: str, shard: str | None) -> None:
    version, fmt = FORMATS[case]
    directory = write(tmp_path / "model", fmt)
    model = load(directory)
    model.save_pretrained(tmp_path / "again", **({} if shard is None else {"max_shard_size": shard}))
    assert (len(list((tmp_path / "again").glob("*.safetensors"))) > 1) == (shard is not None)
    assert checksum(stored(tmp_path / "again")) == checksum(stored(directory))
    saved = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert saved == fmt.to_dict()
    assert saved["format_version"] == version
    again = load(tmp_path / "again")
    assert torch.equal(logits(again), logits(model))
    assert logits(model).std() > 0.1


# Devices


def test_sizes_are_those_of_packed_tensors(tmp_path: Path) -> None:
    directory = write(tmp_path / "model", fmt_of(IntScheme(2, 16, symmetric=False)))
    model = load(directory)
    nbytes = {name: t.nbytes for name, t in stored(directory).items()}
    sizes, _ = compute_module_sizes(model, model.hf_quantizer)
    for block in ("model.layers.0", "model.layers.1"):
        assert sizes[block] == sum(size for name, size in nbytes.items() if name.startswith(f"{block}."))
    frequencies = sum(buffer.nbytes for buffer in model.buffers())
    assert model.get_memory_footprint() == sum(nbytes.values()) + frequencies


def test_a_split_between_two_devices_counts_packed_bytes(tmp_path: Path) -> None:
    model = load(write(tmp_path / "model", fmt_of(IntScheme(2, 16, symmetric=False))))
    sizes, _ = compute_module_sizes(model, model.hf_quantizer)
    room = sizes["model.embed_tokens"] + 2 * sizes["model.layers.0"] + 64  # the larger block is kept free
    found = infer_auto_device_map(
        model,
        {0: room, "cpu": 10**6},
        no_split_module_classes=model._no_split_modules,
        hf_quantizer=model.hf_quantizer,
    )
    assert (found["model.embed_tokens"], found["model.layers.0"], found["model.layers.1"]) == (0, 0, "cpu")


@pytest.mark.parametrize("device_map", ["cpu", "auto"])
def test_a_device_map_gives_the_same_logits(tmp_path: Path, device_map: str) -> None:
    directory = write(tmp_path / "model", fmt_of(W4, activation=4))
    assert torch.equal(logits(load(directory, device_map=device_map)), logits(load(directory)))


def split(directory: Path, offload: Path) -> PreTrainedModel:
    """The second block left on the disk."""
    near = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    return load(directory, device_map={**near, "model.layers.1": "disk"}, offload_folder=str(offload))


@pytest.mark.parametrize("case", ["1_rounded_and_shifted", "2_factors", "4_salient", "6_fixed_grids", "7_clustered"])
def test_blocks_on_the_disk_give_the_same_logits(tmp_path: Path, case: str) -> None:
    directory = write(tmp_path / "model", FORMATS[case][1])
    model = split(directory, tmp_path / "offload")
    here, there = model.model.layers
    assert {p.device.type for p in here.parameters()} == {"cpu"}
    assert {p.device.type for p in there.parameters()} == {"meta"}
    assert torch.equal(logits(model), logits(load(directory)))
    assert {p.device.type for p in there.parameters()} == {"meta"}
    prompt = IDS[:1, :6]
    options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    assert torch.equal(model.generate(prompt, **options), load(directory).generate(prompt, **options))


def test_max_memory_leaves_the_rest_on_the_disk(tmp_path: Path) -> None:
    directory = write(tmp_path / "model", fmt_of(W4))
    whole = load(directory)
    sizes, _ = compute_module_sizes(whole, whole.hf_quantizer)
    room = sizes["model.embed_tokens"] + 2 * sizes["model.layers.0"] + 64
    model = load(directory, device_map="sequential", max_memory={"cpu": room}, offload_folder=str(tmp_path / "off"))
    assert set(model.hf_device_map.values()) == {"cpu", "disk"}
    assert torch.equal(logits(model), logits(whole))


# Generating


@pytest.mark.parametrize("case", ["1_asymmetric_groups", "1_rounded_and_shifted", "4_salient"])
def test_generating_with_and_without_a_cache(tmp_path: Path, case: str) -> None:
    model = load(write(tmp_path / "model", FORMATS[case][1]))
    prompt = IDS[:, :8]
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    cached, plain = (model.generate(prompt, use_cache=use_cache, **options) for use_cache in (True, False))
    assert cached.shape == (2, 16)
    assert torch.equal(cached, plain)
    greedy = prompt
    for _ in range(8):
        with torch.no_grad():
            scores = model(greedy, use_cache=False).logits[:, -1]
        scores[:, CONFIG.eos_token_id] = -torch.inf
        greedy = torch.cat([greedy, scores.argmax(-1, keepdim=True)], 1)
    assert torch.equal(plain, greedy)


def word_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="w0", pad_token="w0", eos_token="w2")


def test_a_pipeline_generates_text(tmp_path: Path) -> None:
    directory = write(tmp_path / "model", fmt_of(W4, activation=4))
    word_tokenizer().save_pretrained(directory)
    generator = pipeline("text-generation", model=str(directory), dtype=torch.float32, device="cpu")
    assert isinstance(generator.model.model.layers[0].mlp.up_proj, PackedLinear)
    said = generator("w5 w6 w7", max_new_tokens=5, min_new_tokens=5, do_sample=False, return_full_text=False)
    prompt = torch.tensor([[5, 6, 7]])
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    expected = load(directory).generate(prompt, attention_mask=torch.ones_like(prompt), **options)[0, 3:]
    assert said[0]["generated_text"].split() == [f"w{i}" for i in expected.tolist()]


# LoRA


def with_lora(model: PreTrainedModel, targets: str | list[str] = "all-linear", **kwargs) -> PeftModel:
    torch.manual_seed(1)
    made = get_peft_model(model, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", **kwargs))
    assert isinstance(made, PeftModel)
    return made


def learn(model: nn.Module, steps: int = 6) -> list[float]:
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=2e-2)
    losses = []
    model.train()
    for _ in range(steps):
        loss = model(IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


@pytest.mark.parametrize(
    "case", ["1_asymmetric_groups", "1_rounded_and_shifted", "2_factors", "4_salient", "6_fixed_grids", "7_clustered"]
)
def test_lora_learns_on_a_packed_model(tmp_path: Path, case: str) -> None:
    directory = write(tmp_path / "model", FORMATS[case][1])
    base = load(directory)
    plain = logits(base)
    model = with_lora(base)
    assert sum(isinstance(m, Packed) for m in model.modules()) == 14
    learned = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(learned) == 2 * 14
    assert all("lora_" in name and p.dtype == torch.float32 for name, p in learned.items())
    assert torch.equal(logits(model), plain)  # LoRA begins at nothing

    losses = learn(model)
    assert losses[-1] < 0.9 * losses[0]
    assert all(p.grad is not None and p.grad.any() for p in learned.values())
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    own = {name.replace(".base_layer", ""): t for name, t in model.state_dict().items() if "lora_" not in name}
    for name, tensor in stored(directory).items():
        assert torch.equal(own[f"base_model.model.{name}"], tensor), name

    model.save_pretrained(tmp_path / "adapter")
    assert sorted(f.name for f in (tmp_path / "adapter").glob("*.safetensors")) == ["adapter_model.safetensors"]
    again = PeftModel.from_pretrained(load(directory), tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))
    assert not torch.equal(logits(again), plain)
    with again.disable_adapter():
        assert torch.equal(logits(again), plain)


def test_gradients_are_those_of_dense_layers(tmp_path: Path) -> None:
    directory = write(tmp_path / "model", FORMATS["1_asymmetric_groups"][1])
    packed, dense = with_lora(load(directory)), with_lora(load(directory).dequantize())
    assert not any(isinstance(m, Packed) for m in dense.modules())
    found = []
    for model in (packed, dense):
        for name, p in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(p.numel()))
        model(IDS, labels=IDS).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert found[0].keys() == found[1].keys()
    for name, grad in found[0].items():
        torch.testing.assert_close(grad, found[1][name], atol=1e-6, rtol=1e-5, msg=name)


def test_no_unpacked_weight_is_kept_for_the_backward_pass() -> None:
    kept: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    layer = PackedLinear(32, 24, IntScheme(4, 16, symmetric=False), bias=True, rounding=None)
    x = torch.randn(2, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        layer(x).sum().backward()
    assert not any(t.shape == (24, 32) for t in kept)
    assert x.grad is not None


def test_a_bias_learns() -> None:
    layer = SalientLinear(16, 8, IntScheme(1, salient=0.25), bias=True, rounding=None)
    layer.bias.requires_grad_(True)
    layer(torch.randn(3, 16, requires_grad=True)).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((8,), 3.0))


def test_lora_in_bfloat16_and_under_gradient_checkpointing(tmp_path: Path) -> None:
    base = load(write(tmp_path / "model", fmt_of(W4)), torch.bfloat16)
    base.gradient_checkpointing_enable()
    base.enable_input_require_grads()
    model = with_lora(base, ["q_proj", "down_proj"])
    losses = learn(model)
    assert losses[-1] < losses[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert learn(model, 2)[-1] < losses[0]


def test_transformers_trainer_takes_lora_and_no_bare_packed_model(tmp_path: Path) -> None:
    model = load(write(tmp_path / "model", fmt_of(W4)))
    arguments = TrainingArguments(
        str(tmp_path / "run"), max_steps=3, learning_rate=2e-2, report_to=[], use_cpu=True, save_strategy="no"
    )
    rows = [{"input_ids": ids, "labels": ids} for ids in IDS]
    with pytest.raises(ValueError, match="attach trainable adapters"):
        Trainer(model, arguments, train_dataset=rows)
    plain = logits(model)
    lora = with_lora(model, ["q_proj", "v_proj"])
    Trainer(lora, arguments, train_dataset=rows).train()
    assert not torch.equal(logits(lora.eval()), plain)


@pytest.mark.parametrize("safe", [True, False], ids=["safe", "in_place"])
def test_merging_into_codes_is_refused(tmp_path: Path, safe: bool) -> None:
    model = with_lora(load(write(tmp_path / "model", fmt_of(W4))), ["q_proj"])
    learn(model, 2)
    expected = logits(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(InputError, match=r"a packed layer holds codes, so nothing can be added .*`model\.dequant"):
            merge(safe_merge=safe)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("asked", [{"use_dora": True}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}])
def test_lora_that_reads_weights_is_refused(tmp_path: Path, asked: dict) -> None:
    model = load(write(tmp_path / "model", fmt_of(W4)))
    with pytest.raises(InputError, match="no DoRA, no start from the weights"):
        with_lora(model, ["q_proj"], **asked)


def test_layers_of_16_bits_learn_where_nothing_is_rounded(tmp_path: Path) -> None:
    sixteen = {"0.self_attn.q_proj": IntScheme(16)}
    plain = load(write(tmp_path / "plain", fmt_of(W4, layers=sixteen)))
    assert type(plain.model.layers[0].self_attn.q_proj) is nn.Linear
    losses = learn(with_lora(plain, ["q_proj"]))
    assert losses[-1] < losses[0]
    rounded = load(write(tmp_path / "rounded", fmt_of(W4, activation=8, layers=sixteen)))
    with pytest.raises(ValueError, match=r"QuantLinear.* is not supported"):
        with_lora(rounded, ["q_proj"])
    assert sum("lora_A" in name for name, _ in with_lora(rounded).named_parameters()) == 13


def test_lora_is_merged_into_the_unpacked_model(tmp_path: Path) -> None:
    directory = write(tmp_path / "model", fmt_of(W4))
    model = with_lora(load(directory), ["q_proj", "down_proj"])
    learn(model)
    model.save_pretrained(tmp_path / "adapter")
    dense = load(directory).dequantize()
    merged = PeftModel.from_pretrained(dense, tmp_path / "adapter").merge_and_unload()
    torch.testing.assert_close(logits(merged), logits(model), atol=1e-4, rtol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    assert torch.equal(logits(load(tmp_path / "merged")), logits(merged))


# Unpacking


@pytest.mark.parametrize(
    "case", ["1_symmetric_rows", "2_factors", "3_several_formats", "3_five_levels", "4_salient", "7_clustered"]
)
def test_a_dequantised_model_is_the_architectures_own(tmp_path: Path, case: str) -> None:
    model = load(write(tmp_path / "model", FORMATS[case][1]))
    expected = logits(model)
    model.dequantize()
    assert {type(m) for m in model.modules() if isinstance(m, nn.Linear)} == {nn.Linear}
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize(
    "case", ["1_rounded_and_shifted", "6_fixed_grids", "6_reordered_norms", "6_symmetric_activations"]
)
def test_what_the_architecture_has_no_place_for_stays_packed(tmp_path: Path, case: str) -> None:
    model = load(write(tmp_path / "model", FORMATS[case][1]))
    expected = logits(model)
    with pytest.raises(InputError, match=r"no place in the model's own architecture; .*unpack_block\(model\)"):
        model.dequantize()
    assert torch.equal(logits(model), expected)


def test_a_stand_in_says_shape_and_place_and_holds_nothing() -> None:
    layer = PackedLinear(32, 24, W4, bias=False, rounding=None)
    assert isinstance(layer, nn.Linear)
    assert isinstance(layer.weight, CodedWeight)
    assert (layer.weight.shape, layer.weight.dtype, layer.weight.device.type) == ((24, 32), torch.float32, "cpu")
    assert "CodedWeight((24, 32)" in repr(layer.weight)
    assert not any(name == "weight" for name, _ in layer.named_parameters())
    for use in (lambda w: w + 1, lambda w: w.data.add_(1), lambda w: w.sum(), nn.init.zeros_):
        with pytest.raises(InputError, match="holds codes"):
            use(layer.weight)
