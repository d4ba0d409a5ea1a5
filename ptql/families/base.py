"""What a model family declares: where its blocks, norms and linear layers are, and what can be folded into what."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PretrainedConfig


@dataclass(frozen=True)
class NormSite:
    """A norm and the linear layers that read its output.

    Args:
        name: The originals' name of the pair, also that of the learnables.
        norm: Module name of the norm, relative to the block.
        consumers: Module names of the linear layers; the last one is where the originals take statistics from.
        has_bias: Whether the norm has a bias of its own (LayerNorm) or needs one added to be shifted (RMSNorm).
    """

    name: str
    norm: str
    consumers: tuple[str, ...]
    has_bias: bool


@dataclass(frozen=True)
class AttentionSites:
    """The projections of an attention module: heads * head_dim rows for q, kv_heads * head_dim for k and v.

    Args:
        module: Module name of the attention, relative to the block.
        rotary: q and k pass through RoPE with halves rotated, so channels i and i + head_dim / 2 belong together.
    """

    module: str
    q: str
    k: str
    v: str
    o: str
    heads: int
    kv_heads: int
    head_dim: int
    rotary: bool


@dataclass(frozen=True)
class BlockLayout:
    """One transformer block, all names relative to it.

    Args:
        linears: The matrices that are quantised, grouped by the input that they share, in order of execution.
        norms: Norms whose output only linear layers read.
        attention: The projections around the attention.
    """

    linears: tuple[tuple[str, ...], ...]
    norms: tuple[NormSite, ...]
    attention: AttentionSites

    @property
    def names(self) -> tuple[str, ...]:
        """Every quantised matrix."""
        return tuple(name for group in self.linears for name in group)


@dataclass(frozen=True)
class Family:
    """A model family of transformers.

    Args:
        name: For people.
        blocks: Module name of the list of blocks in the causal language model.
        layout: Where things are in a block of a model with this configuration; refuses what it can't handle.
    """

    name: str
    blocks: str
    layout: Callable[[PretrainedConfig], BlockLayout]
