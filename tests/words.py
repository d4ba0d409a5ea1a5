"""A tiny model whose tokenizer knows the words w0 to w63, and a text of such words: runs of half a second."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PretrainedConfig, PreTrainedTokenizerFast

from tests.models import VOCABULARY, llama_config, random_model, save


def save_source(directory: Path, config: PretrainedConfig | None = None) -> Path:
    """The model and its tokenizer as a Hugging Face directory."""
    save(random_model(config or llama_config()), directory)
    words = Tokenizer(models.WordLevel({f"w{k}": k for k in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(directory)
    return directory


def save_text(path: Path, words: int = 600, seed: int = 0) -> Path:
    """A text of so many tokens."""
    ids = torch.randint(1, VOCABULARY, (words,), generator=torch.Generator().manual_seed(seed)).tolist()
    path.write_text(" ".join(f"w{k}" for k in ids))
    return path
