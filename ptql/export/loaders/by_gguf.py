"""Loads `model.gguf` with transformers, every matrix in float32."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader
from transformers import AutoConfig, AutoModelForCausalLM

FILE = "model.gguf"


def load(folder: str) -> tuple[Callable[[np.ndarray], np.ndarray], dict[str, Any]]:
    """A function from token ids [tokens] to logits [tokens, vocabulary], in float32, and what loaded it."""
    reader = GGUFReader(f"{folder}/{FILE}")
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    config = AutoConfig.from_pretrained(folder, gguf_file=FILE)
    _read_the_rest(config, reader, tensors)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, config=config, dtype=torch.float32).eval()
    if "rope_freqs.weight" in tensors:
        model.model.rotary_emb.inv_freq /= torch.from_numpy(tensors["rope_freqs.weight"].copy())

    @torch.no_grad()
    def logits(ids: np.ndarray) -> np.ndarray:
        return model(torch.from_numpy(ids)[None]).logits[0].float().numpy()

    return logits, {"loader": f"transformers {version('transformers')}, gguf {version('gguf')}"}


def _read_the_rest(config: Any, reader: GGUFReader, tensors: dict[str, np.ndarray]) -> None:
    """What transformers does not look for in the file: optional biases, scaled positions, heads of other sizes."""
    config.attention_bias = "blk.0.attn_output.bias" in tensors
    config.mlp_bias = "blk.0.ffn_up.bias" in tensors
    arch = config.model_type
    config.head_dim = int(reader.fields[f"{arch}.attention.key_length"].contents())
    if (factor := reader.fields.get(f"{arch}.rope.scaling.factor")) is not None:
        config.rope_parameters = {**config.rope_parameters, "rope_type": "linear", "factor": float(factor.contents())}
