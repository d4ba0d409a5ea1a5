"""The attention function that rounds queries, keys and values, registered with transformers as "ptql"."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

NAME = "ptql"
QUERY_ROUNDING, CACHE_ROUNDING = "query_rounding", "cache_rounding"
"""The attributes of an attention module that hold what rounds its queries, and its keys and values, after RoPE."""

STATIC = "static_rounding"
"""The attribute of an attention module that holds what rounds on fixed grids (`ptql.nn.static_rounding`)."""

ROUNDED = "rounded_by_cache"
"""The attribute of keys and values that a cache has rounded already (`ptql.nn.packed_cache`)."""

PROBE = "attention_probe"
"""The attribute of an attention module that holds what looks at its probabilities (`ptql.nn.attention_probe`)."""

FLASH = (torch.bfloat16, torch.float16)
"""Dtypes for which torch has flash attention."""

# What transformers hands through to every attention function and this one needs not look at: the mask says it
# already, or it is about outputs and caches. Anything else may change the result, and is refused.
SPOKEN_FOR = frozenset(
    (
        "cache_position",
        "num_items_in_batch",
        "output_attentions",
        "output_hidden_states",
        "position_ids",
        "return_dict",
        "use_cache",
    )
)


def rounded_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention on rounded q, k, v of [batch, heads, tokens, head size].

    Each token of each head is one vector to round, or each channel has a fixed grid; the softmax output is rounded
    with fixed grids only. Keys and values that a cache gives back are as they should be. Without a mask, and with more
    than one query, attention is causal: transformers leaves the mask out exactly then. A sliding window is in the mask.

    Raises:
        NotImplementedError: The model asks for something that would be left out, such as attention sinks.
    """
    _refuse_unheard(others)
    if attention_mask is None and sliding_window is not None and key.shape[2] > sliding_window:
        raise NotImplementedError(f"sliding_window={sliding_window} without a mask on {key.shape[2]} keys")
    if (rounding := getattr(module, QUERY_ROUNDING, None)) is not None:
        query = rounding(query)
    by_cache = getattr(key, ROUNDED, False)
    if not by_cache and (rounding := getattr(module, CACHE_ROUNDING, None)) is not None:
        key, value = rounding(key), rounding(value)
    static = getattr(module, STATIC, None)
    if static is not None:
        query, key, value = static.round(query, key, value, by_cache)
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    causal = attention_mask is None and query.shape[2] > 1 and bool(is_causal)
    if attention_mask is not None:
        attention_mask = attention_mask[..., : key.shape[2]]
    if (probe := getattr(module, PROBE, None)) is not None:
        probe.look(query, key, attention_mask, causal, scaling, softcap)
    if torch.is_autocast_enabled(query.device.type):  # as SDPA's own arguments would be
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    repeats = query.shape[1] // key.shape[1]
    shares_rounding = None if static is None else static.probabilities
    written_out = softcap is not None or shares_rounding is not None
    grouped = query.is_cuda and query.dtype in FLASH and not written_out and attention_mask is None
    if repeats > 1 and not grouped:  # `enable_gqa` falls back to the slow kernel in float32 on CUDA
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    if written_out:
        mixed = written_out_attention(
            query, key, value, attention_mask, dropout, causal, scaling, softcap, shares_rounding
        )
    else:
        mixed = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=attention_mask,
            dropout_p=dropout,
            is_causal=causal,
            scale=scaling,
            enable_gqa=repeats > 1 and grouped,
        )
    return mixed.transpose(1, 2).contiguous(), None


def written_out_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    causal: bool,
    scaling: float | None,
    softcap: float | None = None,
    shares_rounding: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Attention whose scores are squashed into (-softcap, softcap) by tanh before masking (Gemma 2, section 2), and
    whose probabilities are rounded.

    Torch's fused attention can't do either: all scores [batch, heads, queries, keys] are in memory here. The
    softmax is in float32 at least, as in transformers.
    """
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if causal:
        mask = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        # Not -inf: a padding token that sees nothing would become nan, and take others with it.
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    shares = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    shares = shares if shares_rounding is None else shares_rounding(shares)
    return F.dropout(shares.to(query.dtype), dropout) @ value


def _refuse_unheard(others: dict[str, Any]) -> None:
    unheard = sorted(
        name for name, value in others.items() if value is not None and value is not False and name not in SPOKEN_FOR
    )
    if unheard:
        raise NotImplementedError(
            f"attention arguments {', '.join(unheard)}: ptql's attention does not know them, and leaving them out "
            "could give other results"
        )


def register() -> None:
    """Make `attn_implementation="ptql"` known to transformers, masks as for SDPA. Calling it again is harmless."""
    AttentionInterface.register(NAME, rounded_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
