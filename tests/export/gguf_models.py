"""Small models whose sizes fit the blocks of GGML, with tokenizers of both kinds, packed without a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, PretrainedConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen3Config

from ptql.calibration.ledger import BlockRecord, Ledger
from ptql.calibration.quant_lm import QuantLM
from ptql.checkpoint import Checkpoint
from ptql.export.gguf_tokenizer import QWEN2
from ptql.formats.write import write_model
from ptql.nn.student import weights_of
from ptql.parts.transforms import AddedBiases
from ptql.parts.weights import Affine
from ptql.recipe import IntScheme
from tests.models import random_model, save

TEXT = (Path(__file__).parents[2] / "docs" / "design.md").read_text(encoding="utf-8")
VOCABULARY = 400
INT4 = IntScheme(4, 32, symmetric=True)
SPECIAL = ["<unk>", "<s>", "</s>"]
SIZES: dict[str, Any] = {
    "vocab_size": 416,  # more than the tokenizer has
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def llama(**changes: Any) -> LlamaConfig:
    return LlamaConfig(**{**SIZES, **changes})


CONFIGS: dict[str, PretrainedConfig] = {
    "llama": llama(tie_word_embeddings=True),
    "llama_untied": llama(tie_word_embeddings=False),
    "llama_biased": llama(attention_bias=True, mlp_bias=True),
    "llama_head_dim": llama(head_dim=32),
    "llama_linear": llama(rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}),
    "llama3": llama(rope_parameters=LLAMA3, rms_norm_eps=1e-5),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=32),
}


def byte_level(pre_tokenizer: pre_tokenizers.PreTokenizer | None = None) -> Tokenizer:
    """Pairs of bytes, cut as Qwen2 does unless told otherwise."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(QWEN2), "isolated")
    joined = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.pre_tokenizer = joined if pre_tokenizer is None else pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


def sentence_piece() -> Tokenizer:
    """Pairs of characters with a byte for those it does not know; a text begins with <s>."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bytes_ = [f"<0x{k:02X}>" for k in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[*SPECIAL, *bytes_], show_progress=False)
    words = [word for line in TEXT.split("\n") for word in line.replace(" ", " ▁").split(" ")]
    tokenizer.train_from_iterator(words, trainer)
    described = json.loads(tokenizer.to_str())
    described["added_tokens"] = described["added_tokens"][: len(SPECIAL)]  # the others are of the model alone
    tokenizer = Tokenizer.from_str(json.dumps(described))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 1)])
    return tokenizer


def source_model(directory: Path, config: PretrainedConfig, tokenizer: Tokenizer) -> Checkpoint:
    """A random model in full precision."""
    save(random_model(config), directory)
    roles = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)
    fast.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    fast.save_pretrained(directory)
    return Checkpoint(directory)


def packed_model(
    source: Checkpoint, run: Path, weight: IntScheme = INT4, layers: Mapping[str, IntScheme] | None = None, **more: Any
) -> Checkpoint:
    """It, rounded to nearest; `layers` of other formats by INDEX.LINEAR, `more` of the packed format."""
    fmt = QuantLM(method="rtn", weight=weight).packed_format(source, AddedBiases())
    fmt = replace(fmt, layers=layers or {}, **more)
    ledger = Ledger(run, {"seed": 0})
    ledger.start()
    for index in range(source.num_blocks):
        weights = weights_of(source.block(index))
        for name in source.layout.names:
            scheme = fmt.schemes.of(index, name)
            if scheme.quantised:
                w = weights.pop(f"{name}.weight")
                stored = Affine(clip=False).for_linear(name, w, scheme).encode(w)
                weights |= {f"{name}.{part}": tensor for part, tensor in stored.items()}
        ledger.record(index, BlockRecord(weights, {}, {}))
    write_model(source, fmt, ledger, run / "model")
    return Checkpoint(run / "model")
