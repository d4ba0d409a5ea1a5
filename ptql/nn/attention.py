"""The attention function that rounds queries, keys and values, registered with transformers as "ptql"."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

NAME = "ptql"
ROUNDING = "qkv_rounding"
"""The attribute of an attention module that holds what rounds its queries (after RoPE), keys and values."""


def rounded_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention on rounded q, k, v of [batch, heads, tokens, head size].

    Each token of each head is one vector to round; the softmax output is not rounded. Without a mask, and with
    more than one query, attention is causal: transformers leaves the mask out exactly then.
    """
    rounding = getattr(module, ROUNDING, None)
    if rounding is not None:
        query, key, value = rounding(query), rounding(key), rounding(value)
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:  # `enable_gqa` falls back to the slow kernel in float32 on CUDA
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    causal = attention_mask is None and query.shape[2] > 1 and bool(is_causal)
    if attention_mask is not None:
        attention_mask = attention_mask[..., : key.shape[2]]
    mixed = F.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, dropout_p=dropout, is_causal=causal, scale=scaling
    )
    return mixed.transpose(1, 2).contiguous(), None


def register() -> None:
    """Make `attn_implementation="ptql"` known to transformers, masks as for SDPA. Calling it again is harmless."""
    AttentionInterface.register(NAME, rounded_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
