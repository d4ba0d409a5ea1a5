"""Gemma 2 and the text models of Gemma 3: four norms a block that multiply by 1 + weight, and a needed `<bos>`.

The norms after the attention and after the MLP feed the residual, so nothing can be folded into them. What is
special in the attention (soft-capped scores, windows that slide in some blocks, RoPE per kind of block) is in what
the model gives to its blocks and in `ptql.nn.attention`: it leaves the folds alone, as they don't change q·k.
"""

from __future__ import annotations

from dataclasses import replace

from transformers import PretrainedConfig

from ptql.errors import InputError
from ptql.families import llama
from ptql.families.base import BlockLayout, Family, HeadNorms

MLP_NORM = "pre_feedforward_layernorm"


def gemma2_layout(config: PretrainedConfig) -> BlockLayout:
    if getattr(config, "use_bidirectional_attention", None):
        raise InputError(
            f"use_bidirectional_attention={config.use_bidirectional_attention}: tokens that see later ones make no "
            "causal language model; give a Gemma that generates text"
        )
    plain = llama.layout(config)
    before_attention, before_mlp = plain.norms
    norms = (replace(before_attention, offset=1), replace(before_mlp, norm=MLP_NORM, offset=1))
    return replace(plain, norms=norms)


def gemma3_layout(config: PretrainedConfig) -> BlockLayout:
    without = gemma2_layout(config)
    head_norms = HeadNorms("self_attn.q_norm", "self_attn.k_norm", offset=1)
    return replace(without, attention=replace(without.attention, head_norms=head_norms))


GEMMA2 = Family("Gemma 2", "model.layers", gemma2_layout, bos=True)
GEMMA3_TEXT = Family("Gemma 3", "model.layers", gemma3_layout, bos=True)
