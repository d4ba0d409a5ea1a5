"""A packed model written as GGUF, read back by the `gguf` package and by transformers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGUFReader
from transformers import AutoTokenizer

from ptql.checkpoint import Checkpoint
from ptql.errors import InputError
from ptql.export.gguf import FILE, Gguf
from ptql.export.loaders import by_gguf
from ptql.export.reload import ours
from ptql.recipe import ActivationScheme, IntScheme
from tests.export.gguf_models import CONFIGS, INT4, TEXT, byte_level, llama, packed_model, sentence_piece, source_model
from tests.models import gemma2_config, some_ids

pytestmark = pytest.mark.usefixtures("one_thread")

LARGE = {"hidden_size": 256, "intermediate_size": 512}


def model_of(name: str, folder: Path, weight: IntScheme = INT4, **more: Any) -> Checkpoint:
    tokenizer = byte_level() if name.startswith("qwen") else sentence_piece()
    return packed_model(source_model(folder / "source", CONFIGS[name], tokenizer), folder, weight, **more)


def written(model: Checkpoint, folder: Path, dtype: torch.dtype = torch.float32, widen: bool = False) -> Path:
    target = Gguf(dtype, widen)
    target.check(model)
    folder.mkdir()
    target.write(model, folder)
    return folder


def off(model: Checkpoint, folder: Path) -> float:
    """The largest difference of a logit, as a share of their spread."""
    ids = some_ids(1, 60)
    _, wanted = ours(model, ids, torch.device("cpu"), torch.float32)
    load, _ = by_gguf.load(str(folder))
    theirs = load(ids[0].numpy())
    return float(np.abs(theirs - wanted.numpy()).max() / wanted.std().item())


def types(folder: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(folder / FILE).tensors}


def field(folder: Path, name: str) -> Any:
    return GGUFReader(folder / FILE).fields[name].contents()


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_computes_the_same(name: str, tmp_path: Path) -> None:
    model = model_of(name, tmp_path)
    folder = written(model, tmp_path / "out")
    assert off(model, folder) < 1e-4
    stored = types(folder)
    assert ("output.weight" in stored) != model.config.tie_word_embeddings
    assert {kind for tensor, kind in stored.items() if "attn_q.weight" in tensor} == {"Q4_0"}
    tokens = AutoTokenizer.from_pretrained(model.directory)(TEXT, verbose=False)["input_ids"]
    assert AutoTokenizer.from_pretrained(folder, gguf_file=FILE)(TEXT, verbose=False)["input_ids"] == tokens


@pytest.mark.parametrize(
    ("weight", "kind"),
    [
        (IntScheme(2, -1), "Q2_K"),
        (IntScheme(3, 256, True), "Q3_K"),
        (IntScheme(4, -1), "Q4_K"),
        (IntScheme(8, 128, True), "Q8_0"),
    ],
)
def test_formats_with_blocks_of_their_own(weight: IntScheme, kind: str, tmp_path: Path) -> None:
    model = packed_model(source_model(tmp_path / "source", llama(**LARGE), sentence_piece()), tmp_path, weight)
    folder = written(model, tmp_path / "out")
    assert off(model, folder) < 1e-4
    assert types(folder)["blk.1.ffn_down.weight"] == kind


def test_a_rounded_minimum_changes_little(tmp_path: Path) -> None:
    model = model_of("llama", tmp_path, IntScheme(4, 32))
    folder = written(model, tmp_path / "out")
    assert types(folder)["blk.0.attn_k.weight"] == "Q4_1"
    assert 0 < off(model, folder) < 0.05


def test_every_matrix_has_its_own_type(tmp_path: Path) -> None:
    layers = {
        "0.mlp.down_proj": IntScheme(16),
        "1.self_attn.q_proj": IntScheme(8, 32, True),
        "1.mlp.up_proj": IntScheme(3),
    }
    model = model_of("llama", tmp_path, layers=layers)
    folder = written(model, tmp_path / "out", torch.float16, widen=True)
    found = types(folder)
    assert [found[f"blk.{name}.weight"] for name in ("0.ffn_down", "1.attn_q", "1.ffn_up", "1.ffn_gate")] == [
        "F16",
        "Q8_0",
        "Q4_0",
        "Q4_0",
    ]
    assert found["token_embd.weight"] == "F16"
    assert found["output_norm.weight"] == found["blk.0.attn_norm.weight"] == "F32"
    assert off(model, folder) < 0.02


def test_bfloat16(tmp_path: Path) -> None:
    model = model_of("llama_untied", tmp_path)
    folder = written(model, tmp_path / "out", torch.bfloat16)
    (embedding,) = model.read(["model.embed_tokens.weight"])
    stored = next(t for t in GGUFReader(folder / FILE).tensors if t.name == "token_embd.weight")
    np.testing.assert_array_equal(
        gguf.quants.dequantize(stored.data, stored.tensor_type), embedding[1].bfloat16().float().numpy()
    )


def test_what_the_file_says(tmp_path: Path) -> None:
    folder = written(model_of("llama3", tmp_path), tmp_path / "out")
    assert field(folder, "general.architecture") == "llama"
    assert field(folder, "general.file_type") == gguf.LlamaFileType.MOSTLY_Q4_0
    assert field(folder, "llama.context_length") == 128
    assert field(folder, "llama.attention.key_length") == 16
    assert field(folder, "llama.rope.freq_base") == 10000.0
    assert field(folder, "llama.attention.layer_norm_rms_epsilon") == pytest.approx(1e-5)
    assert field(folder, "tokenizer.ggml.bos_token_id") == 1
    assert field(folder, "tokenizer.ggml.add_bos_token") is True
    assert "messages" in field(folder, "tokenizer.chat_template")
    assert len(field(folder, "tokenizer.ggml.tokens")) == 416


def test_where_attention_slides_the_context_ends(tmp_path: Path) -> None:
    model = model_of("llama", tmp_path)
    model.config.sliding_window = 32
    assert field(written(model, tmp_path / "out"), "llama.context_length") == 32


def refusal(model: Checkpoint, dtype: torch.dtype = torch.float16) -> str:
    with pytest.raises(InputError) as error:
        Gguf(dtype).check(model)
    return str(error.value)


def test_refusals_of_the_format(tmp_path: Path) -> None:
    model = model_of("llama", tmp_path)
    fmt = model.packed
    assert fmt is not None
    changes: list[tuple[dict[str, Any], str]] = [
        ({"activation": ActivationScheme(8)}, "activations are rounded to 8 bits"),
        ({"activation": ActivationScheme(16, kv_bits=4)}, "queries, keys or values"),
        ({"shifted_norms": ("input_layernorm",)}, "learned shifts give to input_layernorm"),
        ({"factor_rank": 1}, "no place for factors"),
        ({"layers": {"1.mlp.up_proj": IntScheme(3, 32)}}, r"1.mlp.up_proj: 8 levels"),
    ]
    for change, reason in changes:
        model.packed = replace(fmt, **change)
        assert reason in refusal(model)


def test_refusals_of_the_architecture(tmp_path: Path) -> None:
    model = model_of("llama", tmp_path)
    rope = {"rope_type": "dynamic", "rope_theta": 1.0, "factor": 2.0}
    partial = {"rope_type": "default", "rope_theta": 1.0, "partial_rotary_factor": 0.5}
    for name, value, reason in (
        ("hidden_act", "gelu", "silu"),
        ("rope_parameters", rope, "rope_type=dynamic"),
        ("rope_parameters", partial, "partial_rotary_factor=0.5"),
    ):
        before = getattr(model.config, name)
        setattr(model.config, name, value)
        assert reason in refusal(model)
        setattr(model.config, name, before)
    Gguf().check(model)


def test_other_families(tmp_path: Path) -> None:
    source = source_model(tmp_path / "source", gemma2_config(vocab_size=416), sentence_piece())
    assert "model_type=gemma2" in refusal(packed_model(source, tmp_path))


def test_a_minimum_beyond_float16(tmp_path: Path) -> None:
    model = model_of("llama", tmp_path, IntScheme(4, 32))
    read, huge = model.read, torch.full((1, 1), 5000.0).half().view(torch.int16)
    model.read = lambda names: [(n, huge) for n in names] if names[0].endswith(".scale") else read(names)  # type: ignore
    assert "fit with --model.weight.symmetric true" in refusal(model)


def test_embeddings_beyond_float16(tmp_path: Path) -> None:
    source = source_model(tmp_path / "source", llama(), sentence_piece())
    read = source.read
    source.read = lambda names: ((n, t * 1e6 if "embed" in n else t) for n, t in read(names))  # type: ignore
    model = packed_model(source, tmp_path)
    with pytest.raises(InputError, match="use --dtype bfloat16"):
        written(model, tmp_path / "out", torch.float16)


def test_a_biased_head_of_qwen3(tmp_path: Path) -> None:
    settings: dict[str, Any] = CONFIGS["qwen3"].to_dict() | {"attention_bias": True}
    source = source_model(tmp_path / "source", type(CONFIGS["qwen3"])(**settings), byte_level())
    assert "self_attn.o_proj.bias: qwen3" in refusal(packed_model(source, tmp_path))


def test_the_real_one(stories_dir: Path, tmp_path: Path) -> None:
    narrow = {f"{index}.mlp.down_proj": IntScheme(16) for index in range(5)}  # 172 columns
    source = Checkpoint(stories_dir)
    assert "172 columns" in refusal(packed_model(source, tmp_path / "refused"))
    model = packed_model(source, tmp_path, layers=narrow)
    folder = written(model, tmp_path / "out")
    assert off(model, folder) < 1e-4
    tokens = AutoTokenizer.from_pretrained(stories_dir)(TEXT, verbose=False)["input_ids"]
    assert AutoTokenizer.from_pretrained(folder, gguf_file=FILE)(TEXT, verbose=False)["input_ids"] == tokens
    assert json.loads((model.directory / "config.json").read_text())["vocab_size"] == 512
