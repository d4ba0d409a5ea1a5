"""Tiny random models that several tests share."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig, PretrainedConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from ptql.families import family_of

VOCABULARY, CONTEXT = 64, 64


def llama_config(**changes: Any) -> LlamaConfig:
    """Two blocks, four query heads on two key/value heads, tied embeddings."""
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": True,
        "architectures": ["LlamaForCausalLM"],
    }
    return LlamaConfig(**{**settings, **changes})


def opt_config(**changes: Any) -> OPTConfig:
    """Two blocks, norms before the residual, the usual dropout of 0.1."""
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "word_embed_proj_dim": 48,
        "ffn_dim": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": CONTEXT,
        "architectures": ["OPTForCausalLM"],
    }
    return OPTConfig(**{**settings, **changes})


def random_model(config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """Every parameter random, norms and biases too, so that leaving one out changes the output."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1:
                p.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.2)
            else:
                p.normal_(0.0, 1.5 * p.shape[1] ** -0.5)
    return model.eval().requires_grad_(False)


def save(model: PreTrainedModel, directory: Path, **options: Any) -> Path:
    """A Hugging Face directory."""
    model.save_pretrained(directory, **options)
    return directory


def exact(model: PreTrainedModel) -> PreTrainedModel:
    """A float64 copy; torch's RMSNorm takes the place of Llama's, which always computes in float32."""
    model = copy.deepcopy(model).double()
    for name, module in list(model.named_modules()):
        if isinstance(module, LlamaRMSNorm):
            norm = nn.RMSNorm(len(module.weight), eps=module.variance_epsilon)
            norm.weight = module.weight
            model.set_submodule(name, norm)
    return model


def some_ids(samples: int = 3, tokens: int = 20, seed: int = 0) -> Tensor:
    """Token ids without the special ones."""
    return torch.randint(3, VOCABULARY, (samples, tokens), generator=torch.Generator().manual_seed(seed))


def blocks_of(model: PreTrainedModel) -> nn.ModuleList:
    """The model's list of blocks."""
    blocks = model.get_submodule(family_of(model.config.model_type).blocks)
    assert isinstance(blocks, nn.ModuleList)
    return blocks


@torch.no_grad()
def block_calls(model: PreTrainedModel, ids: Tensor) -> list[tuple[Tensor, dict[str, Any], Tensor]]:
    """Input, keyword arguments and output of every block in one forward pass of the Hugging Face model."""
    calls = []

    def note(_: nn.Module, args: tuple, kwargs: dict, out: Any) -> None:
        kwargs = {k: v for k, v in kwargs.items() if k not in ("past_key_values", "use_cache")}
        calls.append((args[0], kwargs, out[0] if isinstance(out, tuple) else out))

    handles = [b.register_forward_hook(note, with_kwargs=True) for b in blocks_of(model)]
    model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return calls
