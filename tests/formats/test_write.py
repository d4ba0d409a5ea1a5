"""The model directory: whole or not at all, in shards where it is large, and with nothing lost of the source."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig

from ptql.calibration.ledger import FOLDER, BlockRecord, Ledger
from ptql.calibration.quant_lm import QuantLM
from ptql.checkpoint import INDEX, SINGLE, Checkpoint
from ptql.formats import write
from ptql.formats.write import write_model
from ptql.nn.student import weights_of
from ptql.parts.transforms import AddedBiases
from ptql.parts.weights import Affine
from ptql.recipe import IntScheme
from tests.models import llama_config, opt_config, random_model, save, some_ids

RECIPE = QuantLM(method="mine", weight=IntScheme(3, 32))


def encoded(source: Checkpoint, run: Path) -> Ledger:
    """A ledger of all blocks, rounded to nearest."""
    ledger = Ledger(run, {"seed": 0})
    ledger.start()
    for index in range(source.num_blocks):
        weights, packed = weights_of(source.block(index)), {}
        for name in source.layout.names:
            w = weights.pop(f"{name}.weight")
            stored = Affine(clip=False).for_linear(name, w, RECIPE.weight).encode(w)
            packed |= {f"{name}.{part}": tensor for part, tensor in stored.items()}
        ledger.record(index, BlockRecord({**weights, **packed}, {"unused": torch.ones(3)}, {}))
    return ledger


@pytest.fixture
def source(tmp_path: Path) -> Checkpoint:
    directory = save(random_model(llama_config(tie_word_embeddings=False)), tmp_path / "source")
    for name in ("tokenizer.json", "tokenizer_config.json", "merges.txt", "tokenizer.model", "chat_template.jinja"):
        (directory / name).write_text(f'"{name}"')
    GenerationConfig(max_new_tokens=7).save_pretrained(directory)
    (directory / "pytorch_model.bin").write_text("pickled")
    (directory / "README.md").write_text("not part of a model")
    return Checkpoint(directory)


@pytest.fixture
def ledger(source: Checkpoint, tmp_path: Path) -> Ledger:
    return encoded(source, tmp_path / "run")


def written(source: Checkpoint, ledger: Ledger, **options: Any) -> Path:
    write_model(source, RECIPE.packed_format(source, AddedBiases()), ledger, ledger.run / "model", **options)
    return ledger.run / "model"


def content(directory: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in directory.glob("*.safetensors"):
        tensors = load_file(file)
        assert not found.keys() & tensors.keys()
        found |= tensors
    return found


def test_every_tensor_is_there_and_no_other(source: Checkpoint, ledger: Ledger) -> None:
    model = written(source, ledger)
    found, expected = content(model), {}
    for index in range(source.num_blocks):
        block = ledger.read(index)
        assert block is not None
        expected |= {f"model.layers.{index}.{name}": tensor for name, tensor in block.stored.items()}
    whole = load_file(source.directory / SINGLE)
    expected |= {name: whole[name] for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    with safe_open(model / SINGLE, "pt") as tensors:
        assert tensors.metadata() == {"format": "pt"}


def test_the_files_beside_the_weights(source: Checkpoint, ledger: Ledger) -> None:
    model = written(source, ledger)
    copied = {"tokenizer.json", "tokenizer_config.json", "merges.txt", "tokenizer.model", "chat_template.jinja"}
    assert {path.name for path in model.iterdir()} == copied | {SINGLE, "config.json", "generation_config.json"}
    for name in copied | {"generation_config.json"}:
        assert (model / name).read_bytes() == (source.directory / name).read_bytes()
    config = json.loads((model / "config.json").read_text())
    assert config.pop("quantization_config") == RECIPE.packed_format(source, AddedBiases()).to_dict()
    assert config == json.loads((source.directory / "config.json").read_text())


def test_shards_and_their_index(source: Checkpoint, ledger: Ledger) -> None:
    model = written(source, ledger, shard_bytes=10_000)
    shards = sorted(path.name for path in model.glob("*.safetensors"))
    assert len(shards) > 3
    assert shards == [f"model-{k + 1:05d}-of-{len(shards):05d}.safetensors" for k in range(len(shards))]
    index = json.loads((model / INDEX).read_text())
    assert index["weight_map"] == {name: shard for shard in shards for name in load_file(model / shard)}
    tensors = content(model)
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors.values())
    for shard in shards:
        sizes = [t.numel() * t.element_size() for t in load_file(model / shard).values()]
        assert sum(sizes) <= 10_000 or len(sizes) == 1
    single = written(source, encoded(source, ledger.run.with_name("single")))
    assert not (single / INDEX).exists()
    whole = load_file(single / SINGLE)
    assert whole.keys() == tensors.keys()
    assert all(torch.equal(whole[name], tensors[name]) for name in whole)
    logits = [AutoModelForCausalLM.from_pretrained(path)(some_ids()).logits for path in (model, single)]
    assert torch.equal(*logits)


def test_a_model_that_just_fits_into_one_file(source: Checkpoint, ledger: Ledger) -> None:
    total = sum(t.numel() * t.element_size() for t in content(written(source, ledger)).values())
    assert [p.name for p in written(source, ledger, shard_bytes=total).glob("*.safetensors*")] == [SINGLE]
    assert (written(source, ledger, shard_bytes=total - 1) / INDEX).is_file()


def test_the_index_of_a_sharded_source_is_not_copied(tmp_path: Path) -> None:
    directory = save(random_model(llama_config()), tmp_path / "source", max_shard_size="40KB")
    source = Checkpoint(directory)
    assert (directory / INDEX).is_file()
    model = written(source, encoded(source, tmp_path / "run"))
    assert not (model / INDEX).exists()
    assert AutoModelForCausalLM.from_pretrained(model)(some_ids()).logits.isfinite().all()


def test_an_opt_that_leaves_the_prefix_out(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    directory = save(random_model(opt_config()), tmp_path / "source")
    tensors = {name.removeprefix("model."): t for name, t in load_file(directory / SINGLE).items()}
    save_file(tensors, directory / SINGLE, {"format": "pt"})
    source = Checkpoint(directory)
    model = written(source, encoded(source, tmp_path / "run"))
    packed, info = AutoModelForCausalLM.from_pretrained(model, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert packed(some_ids()).logits.isfinite().all()


def test_an_older_model_is_replaced(source: Checkpoint, ledger: Ledger) -> None:
    model = written(source, ledger, shard_bytes=10_000)
    (model / "old.txt").write_text("old")
    for leftover in (".model.tmp", ".model.old"):
        (ledger.run / leftover).mkdir()
        (ledger.run / leftover / "half").write_text("half")
    written(source, ledger)
    assert not (model / "old.txt").exists()
    assert [path.name for path in model.glob("*.safetensors*")] == [SINGLE]
    assert sorted(path.name for path in ledger.run.iterdir()) == [FOLDER, "model"]


def test_a_block_that_is_missing_leaves_the_older_model_alone(source: Checkpoint, ledger: Ledger) -> None:
    model = written(source, ledger)
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    (ledger.folder / "block-00001.safetensors").unlink()
    with pytest.raises(RuntimeError, match=r"block 1 is missing or damaged in .*; run the same command again"):
        written(source, ledger)
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before


def test_a_kill_at_any_renaming(source: Checkpoint, ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no model, the older one, or the new one; and the next attempt ends in the same bytes."""
    model, replace, calls = ledger.run / "model", write.os.replace, []

    def state() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in model.iterdir()}

    def killed_after(step: int) -> None:
        def renamed(old: Path, new: Path) -> None:
            if len(calls) == step:
                raise KeyboardInterrupt
            calls.append(new)
            replace(old, new)

        calls.clear()
        monkeypatch.setattr(write.os, "replace", renamed)

    written(source, ledger, shard_bytes=25_000)
    expected = state()
    killed_after(-1)  # never
    written(source, ledger, shard_bytes=25_000)
    count = len(calls)
    monkeypatch.undo()
    # Every part, under its number and then its name; config.json; an older model aside, ours in its place.
    assert count == 2 * len(list(model.glob("*.safetensors"))) + 3
    for step in range(count):
        killed_after(step)
        with pytest.raises(KeyboardInterrupt):
            written(source, ledger, shard_bytes=25_000)
        assert not model.exists() or state() == expected
        monkeypatch.undo()
        written(source, ledger, shard_bytes=25_000)
        assert state() == expected
        assert sorted(path.name for path in ledger.run.iterdir()) == [FOLDER, "model"]
    killed_after(count)
    written(source, ledger, shard_bytes=25_000)  # that was all of them
