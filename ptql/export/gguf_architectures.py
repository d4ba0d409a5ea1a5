"""The architectures of llama.cpp that models of our families are written as.

Names and meanings as in llama.cpp's converter, `conversion/llama.py` and `qwen.py`; what each architecture reads is in
`src/models/`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import gguf
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PretrainedConfig

from ptql.checkpoint import Checkpoint
from ptql.errors import InputError
from ptql.export.layers import IntLayer

# axes: half = rotated pairs of a head

ATTENTION_INPUTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


@dataclass(frozen=True)
class Architecture:
    """An architecture of llama.cpp.

    Args:
        arch: Its number in the `gguf` package.
        interleaved: RoPE rotates neighbouring channels of a head, where transformers has them half a head apart: rows
            of q and k change places.
        biased: The linear layers whose biases are read.
    """

    arch: gguf.MODEL_ARCH
    interleaved: bool
    biased: tuple[str, ...]

    @property
    def name(self) -> str:
        return gguf.MODEL_ARCH_NAMES[self.arch]


LLAMA = Architecture(
    gguf.MODEL_ARCH.LLAMA,
    interleaved=True,
    biased=(*ATTENTION_INPUTS, "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)
ARCHITECTURES: dict[str, Architecture] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": Architecture(gguf.MODEL_ARCH.QWEN2, interleaved=False, biased=ATTENTION_INPUTS),
    "qwen3": Architecture(gguf.MODEL_ARCH.QWEN3, interleaved=False, biased=ATTENTION_INPUTS),
}
"""By `model_type`."""


def architecture_of(model: Checkpoint) -> Architecture:
    """The architecture that computes what the model does; `InputError` if there is none."""
    config = model.config
    if config.model_type not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise InputError(
            f"model_type={config.model_type}: GGUF files are written of {known}; use --format dense, and llama.cpp's "
            "own converter"
        )
    found = ARCHITECTURES[config.model_type]
    site = model.layout.attention
    if found.arch == gguf.MODEL_ARCH.QWEN2 and site.heads * site.head_dim != config.hidden_size:
        raise InputError(
            f"head_dim={site.head_dim}: {site.heads} heads of a {found.name} in llama.cpp are as wide as hidden_size="
            f"{config.hidden_size} together; use --format dense"
        )
    if config.hidden_act != "silu":
        raise InputError(f"hidden_act={config.hidden_act}: {found.name} in llama.cpp has silu; use --format dense")
    unknown = [
        name
        for name in model.empty_block(0).state_dict()
        if name.endswith(".bias") and name.removesuffix(".bias") not in found.biased
    ]
    if unknown:
        raise InputError(
            f"{', '.join(unknown)}: {found.name} in llama.cpp has no place for these biases; fit without learned "
            "shifts (--model.transforms.shift biased), or use --format dense"
        )
    return found


def interleaving(rows: int, head_dim: int) -> Int[Tensor, " rows"]:
    """The order of rows of q or k in which channels i and i + head_dim / 2 of a head are neighbours."""
    return torch.arange(rows).view(-1, 2, head_dim // 2).transpose(1, 2).flatten()


def reorder(part: IntLayer | Tensor, rows: Int[Tensor, " rows"]) -> IntLayer | Tensor:
    """A layer, a weight or a bias with its rows in another order."""
    if isinstance(part, IntLayer):
        return IntLayer(part.codes[rows], part.scale[rows], part.zero[rows], part.scheme)
    return part[rows]


def rope_parameters(config: PretrainedConfig) -> dict:
    """How positions are turned into angles; `InputError` for kinds that are not written."""
    rope = dict(config.rope_parameters or {})
    kind = rope.setdefault("rope_type", "default")
    if kind not in ("default", "linear", "llama3"):
        raise InputError(
            f"rope_type={kind}: GGUF files are written with default, linear and llama3; use --format dense, and "
            "llama.cpp's own converter"
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise InputError(
            f"partial_rotary_factor={rope['partial_rotary_factor']}: GGUF files are written of models that rotate "
            "whole heads; use --format dense, and llama.cpp's own converter"
        )
    return rope


def rope_divisors(model: Checkpoint) -> Float[Tensor, " half"] | None:
    """By what Llama 3 divides its frequencies, pair by pair: llama.cpp reads it as a tensor. None for other kinds.

    Long waves are slowed by `factor`, short ones are not, those between by a mixture; as transformers computes it.
    """
    rope = rope_parameters(model.config)
    if rope["rope_type"] != "llama3":
        return None
    dim = model.layout.attention.head_dim
    frequencies = 1.0 / rope["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - kept) / rope["factor"] + kept)
