"""Llama: RMSNorm, RoPE, grouped-query attention, gated MLP."""

from __future__ import annotations

from transformers import PretrainedConfig

from ptql.families.base import AttentionSites, BlockLayout, Family, NormSite


def layout(config: PretrainedConfig) -> BlockLayout:
    heads = config.num_attention_heads
    q, k, v, o = (f"self_attn.{p}_proj" for p in "qkvo")
    gate, up, down = (f"mlp.{p}_proj" for p in ("gate", "up", "down"))
    return BlockLayout(
        linears=((q, k, v), (o,), (gate, up), (down,)),
        norms=(
            NormSite("qkv", "input_layernorm", (k, v, q), has_bias=False),
            NormSite("fc1", "post_attention_layernorm", (gate, up), has_bias=False),
        ),
        attention=AttentionSites(
            module="self_attn",
            q=q,
            k=k,
            v=v,
            o=o,
            heads=heads,
            kv_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            rotary=True,
        ),
    )


LLAMA = Family("Llama", "model.layers", layout)
