"""Llama: RMSNorm, RoPE, grouped-query attention, gated MLP. Mistral and Qwen2 have the same modules."""

from __future__ import annotations

from transformers import PretrainedConfig

from ptql.families.base import AttentionSites, BlockLayout, Family, MlpSite, NormSite, Rows


def layout(config: PretrainedConfig) -> BlockLayout:
    heads = config.num_attention_heads
    q, k, v, o = (f"self_attn.{p}_proj" for p in "qkvo")
    gate, up, down = (f"mlp.{p}_proj" for p in ("gate", "up", "down"))
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return BlockLayout(
        linears=((q, k, v), (o,), (gate, up), (down,)),
        norms=(
            NormSite("qkv", "input_layernorm", (k, v, q), has_bias=False),
            NormSite("fc1", "post_attention_layernorm", (gate, up), has_bias=False),
        ),
        attention=AttentionSites(
            module="self_attn",
            q=Rows(q),
            k=Rows(k),
            v=Rows(v),
            o=o,
            heads=heads,
            kv_heads=config.num_key_value_heads,
            head_dim=head_dim,
            rotary=head_dim,
        ),
        mlp=MlpSite(Rows(up), down),
    )


LLAMA = Family("Llama", "model.layers", layout)
MISTRAL = Family("Mistral", "model.layers", layout)
QWEN2 = Family("Qwen2", "model.layers", layout)
