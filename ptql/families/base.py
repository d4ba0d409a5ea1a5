"""What a model family declares: where its blocks, norms and linear layers are, and what can be folded into what."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from transformers import PretrainedConfig


@dataclass(frozen=True)
class NormSite:
    """A norm and the linear layers that read its output.

    Args:
        name: The originals' name of the pair, by which a recipe's `sites` choose it.
        norm: Module name of the norm, relative to the block.
        consumers: Module names of the linear layers; the last one is where the originals take statistics from.
        has_bias: Whether the norm has a bias of its own (LayerNorm) or needs one added to be shifted (RMSNorm).
        offset: The norm multiplies by `offset + weight`: 1 for Gemma, whose weights are stored around zero.
    """

    name: Literal["qkv", "fc1"]
    norm: str
    consumers: tuple[str, ...]
    has_bias: bool
    offset: int = 0


@dataclass(frozen=True)
class Rows:
    """Rows `start` to `stop` of a linear layer, to the end if `stop` is None: one projection of a fused matrix."""

    linear: str
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True)
class HeadNorms:
    """Norms of each head's query and key, between the projections and RoPE: one weight [head_dim] for all heads.

    Args:
        q: Module name of the queries' norm, relative to the block.
        k: Of the keys' norm.
        offset: Both multiply by `offset + weight`.
    """

    q: str
    k: str
    offset: int = 0


@dataclass(frozen=True)
class AttentionSites:
    """The projections of an attention module: heads * head_dim rows for q, kv_heads * head_dim for k and v.

    Args:
        module: Module name of the attention, relative to the block.
        q: Rows that make the queries; so k, v.
        o: Module name of the output projection.
        rotary: Leading channels of each head of q and k that RoPE rotates, halves against each other: i and
            i + rotary / 2 belong together. The others are free. 0 without RoPE.
        head_norms: Where q and k are normed after the projections; scales of q against k go there.
    """

    module: str
    q: Rows
    k: Rows
    v: Rows
    o: str
    heads: int
    kv_heads: int
    head_dim: int
    rotary: int
    head_norms: HeadNorms | None = None


@dataclass(frozen=True)
class MlpSite:
    """A gated MLP: `down` reads `up(x) * act(gate(x))`, so that what scales rows of `up` passes straight to `down`.

    Args:
        up: Rows of the projection that is multiplied, one for each column of `down`.
        down: Module name of the projection that reads the product.
    """

    up: Rows
    down: str


@dataclass(frozen=True)
class BlockLayout:
    """One transformer block, all names relative to it.

    Args:
        linears: The matrices that are quantised, grouped by the input that they share, in order of execution.
        norms: Norms whose output only linear layers read.
        attention: The projections around the attention.
        mlp: The gated MLP; None where the MLP is another.
    """

    linears: tuple[tuple[str, ...], ...]
    norms: tuple[NormSite, ...]
    attention: AttentionSites
    mlp: MlpSite | None = None

    @property
    def last(self) -> str:
        """The last matrix of the MLP, whose output goes to the residual."""
        return self.linears[-1][-1]

    @property
    def names(self) -> tuple[str, ...]:
        """Every quantised matrix."""
        return tuple(name for group in self.linears for name in group)

    @property
    def offset_norms(self) -> tuple[str, ...]:
        """Every norm that is folded into and multiplies by an offset plus its weight."""
        head = self.attention.head_norms
        heads = (head.q, head.k) if head is not None and head.offset else ()
        return tuple(site.norm for site in self.norms if site.offset) + heads


@dataclass(frozen=True)
class Family:
    """A model family of transformers.

    Args:
        name: For people.
        blocks: Module name of the list of blocks in the causal language model.
        layout: Where things are in a block of a model with this configuration; refuses what it can't handle.
        bos: Every window must begin with the tokenizer's `<bos>`: models that never saw text without it.
    """

    name: str
    blocks: str
    layout: Callable[[PretrainedConfig], BlockLayout]
    bos: bool = False
