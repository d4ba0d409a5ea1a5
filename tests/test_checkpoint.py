"""A model read block by block against the same directory loaded by transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from ptql.calibration.ledger import BlockRecord, Ledger
from ptql.calibration.quant_lm import QuantLM
from ptql.checkpoint import INDEX, QUANTISED_FILES, SAMPLES, SINGLE, Checkpoint, resolve
from ptql.errors import InputError
from ptql.formats.write import write_model
from ptql.nn.quant_linear import QuantLinear
from ptql.nn.student import call_block, make_student, weights_of
from ptql.parts.transforms import AddedBiases
from ptql.parts.weights import Affine
from ptql.recipe import ActivationScheme, IntScheme
from tests import models
from tests.models import llama_config, opt_config, random_model, save, some_ids

CONFIGS: dict[str, PretrainedConfig] = {
    **models.CONFIGS,
    "llama_tied": llama_config(),
    "opt_untied": opt_config(tie_word_embeddings=False),
    "opt_350m": opt_config(word_embed_proj_dim=32, do_layer_norm_before=False),
}


def written(name: str, directory: Path, **options: Any) -> Path:
    return save(random_model(CONFIGS[name]), directory, **options)


@torch.no_grad()
def block_by_block(directory: Path, ids: Tensor) -> Tensor:
    source = Checkpoint(directory)
    shell = source.shell()
    hidden, contexts = shell.embed(ids)
    for index, context in enumerate(contexts):
        hidden = call_block(source.block(index), hidden, context)
    return shell.logits(hidden, ids)


@torch.no_grad()
def by_transformers(directory: Path, ids: Tensor) -> Tensor:
    gemma2 = json.loads((directory / "config.json").read_text())["model_type"] == "gemma2"
    model, info = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=torch.float32,
        attn_implementation="eager" if gemma2 else "sdpa",  # SDPA does not cap scores
        output_loading_info=True,
        local_files_only=True,
    )
    assert not info["missing_keys"], info
    return model.eval()(ids, use_cache=False).logits


def check(directory: Path, ids: Tensor | None = None) -> None:
    ids = some_ids() if ids is None else ids
    expected = by_transformers(directory, ids)
    assert expected.std() > 0.1
    torch.testing.assert_close(block_by_block(directory, ids), expected, rtol=1e-5, atol=1e-5)


def rewrite(directory: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    save_file(change(load_file(directory / SINGLE)), directory / SINGLE, {"format": "pt"})


def configure(directory: Path, **changes: Any) -> None:
    settings = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**settings, **changes}))


@pytest.mark.parametrize("name", CONFIGS)
def test_block_by_block_is_the_whole_model(tmp_path: Path, name: str) -> None:
    check(written(name, tmp_path / "model"))


@pytest.mark.shared
def test_block_by_block_is_the_real_model(stories_dir: Path) -> None:
    check(stories_dir, torch.randint(3, 512, (2, 64), generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("name", ["opt", "opt_untied", "opt_350m"])
def test_opt_files_may_leave_the_prefix_out(tmp_path: Path, name: str) -> None:
    directory = written(name, tmp_path / "model")
    expected = block_by_block(directory, some_ids())
    rewrite(directory, lambda tensors: {k.removeprefix("model."): t for k, t in tensors.items()})
    assert not any(k.startswith("model.") for k in load_file(directory / SINGLE))
    assert torch.equal(block_by_block(directory, some_ids()), expected)
    check(directory)


@pytest.mark.parametrize("name", ["llama_tied", "llama_untied", "phi3", "gemma3", "opt"])
def test_shards_are_found_through_the_index(tmp_path: Path, name: str) -> None:
    directory = written(name, tmp_path / "model", max_shard_size="40KB")
    assert len(list(directory.glob("*.safetensors"))) > 2
    assert not (directory / SINGLE).exists()
    check(directory)
    single = written(name, tmp_path / "single")
    assert torch.equal(block_by_block(directory, some_ids()), block_by_block(single, some_ids()))


@pytest.mark.parametrize("name", ["llama_tied", "opt"])
def test_a_tied_head_that_is_stored_as_well(tmp_path: Path, name: str) -> None:
    directory = written(name, tmp_path / "model")
    embeddings = next(k for k in load_file(directory / SINGLE) if k.endswith("embed_tokens.weight"))
    rewrite(directory, lambda tensors: {**tensors, "lm_head.weight": tensors[embeddings].clone()})
    check(directory)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_blocks_and_shell_are_float32_whatever_is_stored(tmp_path: Path, dtype: torch.dtype) -> None:
    directory = save(random_model(CONFIGS["llama_tied"]).to(dtype), tmp_path / "model")
    source = Checkpoint(directory)
    assert source.dtype() == dtype
    for module in (source.block(0), source.shell().model):
        assert {p.dtype for p in module.parameters()} == {torch.float32}
    check(directory)


def test_what_a_checkpoint_knows(tmp_path: Path) -> None:
    source = Checkpoint(written("llama_tied", tmp_path / "model"))
    assert (source.num_blocks, source.context, source.packed) == (2, 64, None)
    assert source.family.name == "Llama"
    assert source.dtype() == torch.float32
    assert sorted(source.outside_names()) == ["model.embed_tokens.weight", "model.norm.weight"]


def test_tensors_outside_of_the_blocks_of_an_opt_without_prefix(tmp_path: Path) -> None:
    directory = written("opt_350m", tmp_path / "model")
    whole = {name.removeprefix("model.") for name in Checkpoint(directory).outside_names()}
    assert {"decoder.project_in.weight", "decoder.embed_positions.weight"} <= whole
    assert not any(".layers." in name for name in whole)
    rewrite(directory, lambda tensors: {k.removeprefix("model."): t for k, t in tensors.items()})
    assert set(Checkpoint(directory).outside_names()) == whole


def test_a_block_is_a_copy_that_the_files_and_later_blocks_do_not_share(tmp_path: Path) -> None:
    source = Checkpoint(written("llama_tied", tmp_path / "model"))
    first = source.block(0)
    before = {name: p.clone() for name, p in first.named_parameters()}
    for p in first.parameters():
        assert not p.requires_grad
        p.zero_()
    again = source.block(0)
    assert not again.training
    assert all(torch.equal(p, before[name]) for name, p in again.named_parameters())
    assert not torch.equal(source.block(1).mlp.up_proj.weight, again.mlp.up_proj.weight)


# Packed by ptql


@pytest.mark.parametrize("name", models.FAMILIES)
def test_a_packed_directory_is_read_like_any_other(tmp_path: Path, name: str) -> None:
    source = Checkpoint(written(name, tmp_path / "model"))
    recipe = QuantLM(weight=IntScheme(3, 32), activation=ActivationScheme(6))
    ledger, blocks = Ledger(tmp_path / "run", {}), []
    ledger.start()
    for index in range(source.num_blocks):
        block = source.block(index)
        weights, packed = weights_of(block), {}
        for linear in source.layout.names:
            w = weights.pop(f"{linear}.weight")
            stored = Affine(clip=False).for_linear(linear, w, recipe.weight).encode(w)
            packed |= {f"{linear}.{part}": t for part, t in stored.items()}
        ledger.record(index, BlockRecord({**weights, **packed}, {}, {}))
        blocks.append(block)
    write_model(source, recipe.packed_format(source, AddedBiases()), ledger, tmp_path / "packed")

    found = Checkpoint(tmp_path / "packed")
    assert found.packed == recipe.packed_format(source, AddedBiases())
    assert isinstance(found.block(0).get_submodule(source.layout.names[0]), QuantLinear)
    ids = some_ids()
    shell = source.shell()
    hidden, contexts = shell.embed(ids)
    # The reference: dense blocks, whose weights are decoded one by one.
    for block, context in zip(blocks, contexts, strict=True):
        make_student(block, source.layout, AddedBiases(), recipe.activation_quantizer, recipe.activation)
        for linear in source.layout.names:
            w = block.get_submodule(linear).weight
            quantizer = Affine(clip=False).for_linear(linear, w, recipe.weight)
            w.copy_(quantizer.decode(quantizer.encode(w)))
        hidden = call_block(block, hidden, context)
    torch.testing.assert_close(block_by_block(tmp_path / "packed", ids), shell.logits(hidden, ids))
    with pytest.raises(InputError, match="quantised by ptql already"):
        QuantLM(source=str(tmp_path / "packed")).open()


# Fingerprints


def test_a_fingerprint_follows_the_content_and_not_the_place(tmp_path: Path) -> None:
    directory = written("llama_tied", tmp_path / "model")
    first = Checkpoint(directory).fingerprint()
    shutil.copytree(directory, tmp_path / "copy" / "elsewhere")
    assert Checkpoint(tmp_path / "copy" / "elsewhere").fingerprint() == first
    assert Checkpoint(directory).fingerprint() == first


@pytest.mark.parametrize("place", [0.3, 0.6, 0.999999])
def test_a_fingerprint_changes_with_a_byte_of_a_weight(tmp_path: Path, place: float) -> None:
    directory = written("llama_tied", tmp_path / "model")
    first = Checkpoint(directory).fingerprint()
    content = bytearray((directory / SINGLE).read_bytes())
    content[int(len(content) * place)] ^= 1
    (directory / SINGLE).write_bytes(content)
    assert Checkpoint(directory).fingerprint() != first


def test_a_fingerprint_changes_with_a_byte_of_the_last_shard_and_with_a_missing_tensor(
    tmp_path: Path,
) -> None:
    directory = written("opt", tmp_path / "model", max_shard_size="40KB")
    first = Checkpoint(directory).fingerprint()
    last = max(directory.glob("*.safetensors"))
    content = last.read_bytes()
    last.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert Checkpoint(directory).fingerprint() != first


def test_a_fingerprint_changes_with_the_configuration(tmp_path: Path) -> None:
    directory = written("llama_tied", tmp_path / "model")
    first = Checkpoint(directory).fingerprint()
    configure(directory, rms_norm_eps=1e-3)
    assert Checkpoint(directory).fingerprint() != first


def test_a_fingerprint_samples_large_files_at_even_places(tmp_path: Path) -> None:
    """By design not every byte counts: 64 places of 64 KiB. A change that spares them all goes unnoticed."""
    config = llama_config(hidden_size=512, intermediate_size=1024, num_hidden_layers=1)
    directory = save(random_model(config), tmp_path / "model")
    file = directory / SINGLE
    size = file.stat().st_size
    assert size > SAMPLES << 16
    first = Checkpoint(directory).fingerprint()
    content = bytearray(file.read_bytes())
    start = size * (SAMPLES // 2) // SAMPLES
    content[start + 1] ^= 1
    file.write_bytes(content)
    assert Checkpoint(directory).fingerprint() != first
    content[start + 1] ^= 1
    file.write_bytes(content)
    assert Checkpoint(directory).fingerprint() == first


# Directories that are refused


def refused(directory: Path, message: str) -> None:
    with pytest.raises(InputError, match=message):
        block_by_block(directory, some_ids())


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    refused(tmp_path / "none", "none: no such model directory; give one that holds")


def test_a_directory_without_a_configuration(tmp_path: Path) -> None:
    directory = written("llama_tied", tmp_path / "model")
    (directory / "config.json").unlink()
    refused(directory, r"config\.json can't be read .*give a Hugging Face directory")


@pytest.mark.parametrize("content", ["{", "", "\x00", "[]", "3"])
def test_a_configuration_that_is_damaged(tmp_path: Path, content: str) -> None:
    directory = written("llama_tied", tmp_path / "model")
    (directory / "config.json").write_text(content)
    refused(directory, r"config\.json can't be read|model_type=''")


def test_a_configuration_of_an_unknown_family_or_of_none(tmp_path: Path) -> None:
    directory = written("llama_tied", tmp_path / "model")
    configure(directory, model_type="bert")
    refused(directory, "model_type='bert'.*llama, mistral, opt")
    settings = json.loads((directory / "config.json").read_text())
    del settings["model_type"]
    (directory / "config.json").write_text(json.dumps(settings))
    refused(directory, "model_type=''")


OTHERS: dict[str, dict[str, Any]] = {  # as their tools write it into config.json
    "gptq": {"quantization_config": {"bits": 4, "group_size": 128, "desc_act": False, "quant_method": "gptq"}},
    "awq": {"quantization_config": {"bits": 4, "quant_method": "awq", "version": "gemm", "zero_point": True}},
    "fp8": {"quantization_config": {"activation_scheme": "dynamic", "quant_method": "fp8", "weight_block_size": [1]}},
    "compressed-tensors": {"quantization_config": {"format": "pack-quantized", "quant_method": "compressed-tensors"}},
    "sparseml": {"compression_config": {"format": "int-quantized", "quant_method": "sparseml"}},
    "bitsandbytes": {"quantization_config": {"load_in_4bit": True, "quant_method": "bitsandbytes"}},
    "mxfp4": {"quantization_config": {"modules_to_not_convert": ["lm_head"], "quant_method": "mxfp4"}},
    "modelopt": {"quantization_config": {"quant_algo": "NVFP4", "quant_method": "modelopt"}},
}


@pytest.mark.parametrize("method", OTHERS)
def test_a_model_that_another_tool_has_quantised(tmp_path: Path, method: str) -> None:
    directory = written("llama_tied", tmp_path / "model")
    configure(directory, **OTHERS[method])
    refused(directory, f"quantised by {method!r} already; give the original model")


@pytest.mark.parametrize(
    ("form", "method"),
    [({"load_in_8bit": True}, "'bitsandbytes'"), ({"bits": 4}, "None"), ({}, "None"), ([], "None"), ("int4", "None")],
)
def test_a_quantised_model_that_does_not_say_by_what(tmp_path: Path, form: Any, method: str) -> None:
    directory = written("llama_tied", tmp_path / "model")
    configure(directory, quantization_config=form)
    refused(directory, f"quantised by {method} already; give the original model")


@pytest.mark.parametrize("file", QUANTISED_FILES)
def test_a_quantised_model_that_says_it_beside_the_configuration(tmp_path: Path, file: str) -> None:
    directory = written("llama_tied", tmp_path / "model")
    assert Checkpoint(directory).packed is None
    (directory / file).write_text("{}")
    refused(directory, f"quantised by '{QUANTISED_FILES[file]}' already, as {file} says; give the original model")


def test_a_configuration_that_contradicts_itself(tmp_path: Path) -> None:
    directory = written("gemma3", tmp_path / "model")
    configure(directory, num_hidden_layers=3)
    refused(directory, r"transformers does not take its config\.json \(.*layer_types.*\); restore it")


def test_pickled_weights_only(tmp_path: Path) -> None:
    directory = written("llama_tied", tmp_path / "model")
    torch.save(load_file(directory / SINGLE), directory / "pytorch_model.bin")
    (directory / SINGLE).unlink()
    refused(directory, r"no model\.safetensors; only safetensors are read \(pickled .bin")


def test_a_missing_shard(tmp_path: Path) -> None:
    directory = written("llama_tied", tmp_path / "model", max_shard_size="40KB")
    min(directory.glob("*.safetensors")).unlink()
    refused(directory, r"model-00001-of-.*named by the index but missing")


DAMAGES = {"cut": lambda b: b[: len(b) // 2], "empty": lambda b: b"", "zeros": lambda b: bytes(len(b))}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file(tmp_path: Path, damage: str) -> None:
    directory = written("llama_tied", tmp_path / "model")
    (directory / SINGLE).write_bytes(DAMAGES[damage]((directory / SINGLE).read_bytes()))
    refused(directory, r"model\.safetensors: damaged .*fetch the model again")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard(tmp_path: Path, damage: str) -> None:
    directory = written("llama_tied", tmp_path / "model", max_shard_size="40KB")
    shard = sorted(directory.glob("*.safetensors"))[1]
    shard.write_bytes(DAMAGES[damage](shard.read_bytes()))
    refused(directory, f"{shard.name}: damaged .*fetch the model again")


def test_a_shard_that_lacks_a_tensor_which_the_index_puts_there(tmp_path: Path) -> None:
    directory = written("llama_tied", tmp_path / "model", max_shard_size="40KB")
    shard = sorted(directory.glob("*.safetensors"))[1]
    tensors = load_file(shard)
    tensors.popitem()
    save_file({**tensors, "other": torch.zeros(1)}, shard, {"format": "pt"})
    refused(directory, f"{shard.name}: damaged")


@pytest.mark.parametrize("content", ["{", "{}", "[]"])
def test_a_damaged_index(tmp_path: Path, content: str) -> None:
    directory = written("llama_tied", tmp_path / "model", max_shard_size="40KB")
    (directory / INDEX).write_text(content)
    refused(directory, r"model\.safetensors\.index\.json")


@pytest.mark.parametrize("tensor", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_a_tensor_that_is_nowhere(tmp_path: Path, tensor: str) -> None:
    directory = written("llama_untied", tmp_path / "model")
    rewrite(directory, lambda tensors: {k: t for k, t in tensors.items() if k != tensor})
    refused(directory, f"tensor {tensor} is missing; the model directory is incomplete")


def test_tensors_of_another_size_than_the_configuration_says(tmp_path: Path) -> None:
    directory = written("llama_untied", tmp_path / "model")
    configure(directory, intermediate_size=96)
    refused(directory, "96")


# Sources


def test_a_directory_is_its_own_source(tmp_path: Path) -> None:
    assert resolve(tmp_path) == tmp_path
    for source in ("name", "./a/b", "../a", "/a/b", "~/a", "a/b/c"):
        assert resolve(source) == Path(source)


def test_a_hub_id_that_can_not_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def snapshot_download(repo: str, **_: Any) -> str:
        raise OSError(f"no way to {repo}\nand more lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(InputError, match=r"^a/b: no such directory, .*\(no way to a/b\); give a model directory$"):
        resolve("a/b")


@pytest.mark.parametrize("name", ["llama_tied", "llama_untied", "opt", "opt_untied"])
def test_a_tied_head_is_counted_once(tmp_path: Path, name: str) -> None:
    model = random_model(CONFIGS[name])
    found = Checkpoint(save(model, tmp_path)).parameters
    assert found == sum(parameter.numel() for parameter in model.parameters())  # which leaves out what is there twice
