"""Tiny random models that several tests share: one configuration for each family, and for each of its variants."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from ptql.families import family_of
from ptql.nn import attention

VOCABULARY, CONTEXT = 64, 64
WINDOW = 8  # of attention that slides: shorter than the tests' sequences
GROUPED: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Two blocks, four query heads on two key/value heads, tied embeddings."""


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


def mistral_config(**changes: Any) -> MistralConfig:
    """A window in every block."""
    return MistralConfig(**{**GROUPED, "sliding_window": WINDOW, **changes})


def qwen2_config(**changes: Any) -> Qwen2Config:
    """Biases of q, k and v; a window in the second block only."""
    window = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
    return Qwen2Config(**{**GROUPED, **window, **changes})


def qwen3_config(**changes: Any) -> Qwen3Config:
    """Heads of 16 on a hidden size of 48, normed queries and keys; no window."""
    return Qwen3Config(**{**GROUPED, "head_dim": 16, **changes})


def gemma2_config(**changes: Any) -> Gemma2Config:
    """A window in the first block only; scores and logits capped where they often are."""
    own = {"head_dim": 16, "sliding_window": WINDOW, "query_pre_attn_scalar": 20}
    caps = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0}
    return Gemma2Config(**{**GROUPED, **own, **caps, **changes})


def gemma3_config(**changes: Any) -> Gemma3TextConfig:
    """A window and another RoPE in the first block than in the second."""
    own = {"head_dim": 16, "sliding_window": WINDOW, "query_pre_attn_scalar": 20}
    kinds = {"layer_types": ["sliding_attention", "full_attention"]}
    rope = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 10000.0},
    }
    return Gemma3TextConfig(**{**GROUPED, **own, **kinds, "rope_parameters": rope, **changes})


def phi3_config(**changes: Any) -> Phi3Config:
    """A window in every block, its own head; RoPE on the first 6 of a head's 12 channels."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    own = {"tie_word_embeddings": False, "sliding_window": WINDOW, "rope_parameters": rope}
    return Phi3Config(**{**GROUPED, **own, **changes})


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "short_factor": [1.0, 1.1, 1.2],
    "long_factor": [2.0, 4.0, 8.0],
    "original_max_position_embeddings": 16,
}
FAMILIES: dict[str, PretrainedConfig] = {
    "llama": llama_config(),
    "mistral": mistral_config(),
    "qwen2": qwen2_config(),
    "qwen3": qwen3_config(),
    "gemma2": gemma2_config(),
    "gemma3": gemma3_config(),
    "phi3": phi3_config(),
    "opt": opt_config(),
}
"""One configuration of each family."""
CONFIGS: dict[str, PretrainedConfig] = {
    **FAMILIES,
    "llama_untied": llama_config(tie_word_embeddings=False),
    "llama_biased": llama_config(attention_bias=True, mlp_bias=True),
    "llama_head_dim": llama_config(head_dim=20),  # 4 heads of 20 on a hidden size of 48
    "llama_one_head": llama_config(num_key_value_heads=1),
    "mistral_full": mistral_config(sliding_window=None, head_dim=20, tie_word_embeddings=False),
    "qwen2_full": qwen2_config(use_sliding_window=False, tie_word_embeddings=False),
    "qwen3_biased": qwen3_config(
        attention_bias=True, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
    ),
    "gemma2_uncapped": gemma2_config(attn_logit_softcapping=None, final_logit_softcapping=None, attention_bias=True),
    "gemma3_capped": gemma3_config(final_logit_softcapping=5.0, num_key_value_heads=1, attention_bias=True),
    "phi3_tied": phi3_config(tie_word_embeddings=True, sliding_window=None, rope_parameters=None),
    "phi3_longrope": phi3_config(rope_parameters=LONGROPE, original_max_position_embeddings=16),
    "opt_post_norm": opt_config(do_layer_norm_before=False),
    "opt_projected": opt_config(word_embed_proj_dim=32, do_layer_norm_before=False),
}
"""The families and their variants."""


class ExactRMSNorm(nn.Module):
    """RMSNorm in the dtype of its input; those of transformers always compute in float32."""

    def __init__(self, weight: nn.Parameter, eps: float, offset: int) -> None:
        super().__init__()
        self.weight, self.eps, self.offset = weight, eps, offset

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt() * (self.offset + self.weight)


def random_model(config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """Every parameter random, norms and biases too, so that leaving one out changes the output.

    Attention is transformers' own: SDPA, or its eager one where scores are capped.
    """
    torch.manual_seed(seed)
    own = "eager" if config.model_type == "gemma2" else "sdpa"
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32, attn_implementation=own)
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
    """A float64 copy that nowhere falls back to float32, as transformers' RMSNorms and eager attention do."""
    model = copy.deepcopy(model).double()
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            gemma = "Gemma" in type(module).__name__
            eps = module.eps if gemma else module.variance_epsilon
            model.set_submodule(name, ExactRMSNorm(module.weight, eps, offset=int(gemma)))
    if model.config._attn_implementation == "eager":
        attention.register()
        model.set_attn_implementation(attention.NAME)
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
