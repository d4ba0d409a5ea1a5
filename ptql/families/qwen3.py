"""Qwen3: Llama with a norm of each head's query and key between the projections and RoPE."""

from __future__ import annotations

from dataclasses import replace

from transformers import PretrainedConfig

from ptql.families import llama
from ptql.families.base import BlockLayout, Family, HeadNorms


def layout(config: PretrainedConfig) -> BlockLayout:
    plain = llama.layout(config)
    head_norms = HeadNorms("self_attn.q_norm", "self_attn.k_norm")
    return replace(plain, attention=replace(plain.attention, head_norms=head_norms))


QWEN3 = Family("Qwen3", "model.layers", layout)
