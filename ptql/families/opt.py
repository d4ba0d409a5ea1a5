"""OPT: LayerNorm, biases, learned positions, plain MLP."""

from __future__ import annotations

from transformers import PretrainedConfig

from ptql.errors import InputError
from ptql.families.base import AttentionSites, BlockLayout, Family, NormSite, Rows


def layout(config: PretrainedConfig) -> BlockLayout:
    if not config.enable_bias or not config.layer_norm_elementwise_affine:
        raise InputError(
            f"enable_bias={config.enable_bias}, layer_norm_elementwise_affine="
            f"{config.layer_norm_elementwise_affine}: OPT is supported with both; give a standard OPT checkpoint"
        )
    q, k, v = (f"self_attn.{p}_proj" for p in "qkv")
    o = "self_attn.out_proj"
    # With the norm after the residual (OPT-350m only), its output is the residual too: nothing can be folded.
    norms = (
        NormSite("qkv", "self_attn_layer_norm", (k, v, q), has_bias=True),
        NormSite("fc1", "final_layer_norm", ("fc1",), has_bias=True),
    )
    return BlockLayout(
        linears=((q, k, v), (o,), ("fc1",), ("fc2",)),
        norms=norms if config.do_layer_norm_before else (),
        attention=AttentionSites(
            module="self_attn",
            q=Rows(q),
            k=Rows(k),
            v=Rows(v),
            o=o,
            heads=config.num_attention_heads,
            kv_heads=config.num_attention_heads,
            head_dim=config.hidden_size // config.num_attention_heads,
            rotary=0,
        ),
    )


OPT = Family("OPT", "model.decoder.layers", layout)
