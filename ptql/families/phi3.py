"""Phi-3 and Phi-4-mini: q, k, v in one matrix, gate and up in another, RoPE on the first channels of each head."""

from __future__ import annotations

from transformers import PretrainedConfig

from ptql.families.base import AttentionSites, BlockLayout, Family, MlpSite, NormSite, Rows


def layout(config: PretrainedConfig) -> BlockLayout:
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    queries, values = heads * head_dim, kv_heads * head_dim
    qkv, o = "self_attn.qkv_proj", "self_attn.o_proj"
    gate_up, down = "mlp.gate_up_proj", "mlp.down_proj"
    return BlockLayout(
        linears=((qkv,), (o,), (gate_up,), (down,)),
        norms=(
            NormSite("qkv", "input_layernorm", (qkv,), has_bias=False),
            NormSite("fc1", "post_attention_layernorm", (gate_up,), has_bias=False),
        ),
        attention=AttentionSites(
            module="self_attn",
            q=Rows(qkv, 0, queries),
            k=Rows(qkv, queries, queries + values),
            v=Rows(qkv, queries + values),
            o=o,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            rotary=_rotary(config, head_dim),
        ),
        mlp=MlpSite(Rows(gate_up, config.intermediate_size), down),
    )


def _rotary(config: PretrainedConfig, head_dim: int) -> int:
    """Rotated channels of a head: two for each frequency, of which there is one for every second channel."""
    factor = config.rope_parameters.get("partial_rotary_factor", 1.0)
    return 2 * len(range(0, int(head_dim * factor), 2))


PHI3 = Family("Phi-3", "model.layers", layout)
