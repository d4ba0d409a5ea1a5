"""Modules that round activations on fixed grids, and how a block is given them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ptql.families import BlockLayout
from ptql.functional.static import fake_quantize_channels, round_probabilities
from ptql.nn.attention import STATIC
from ptql.nn.quant_linear import Rounding
from ptql.recipe import UNQUANTISED, StaticScheme, StaticSite

GRIDS = "grids"
"""The name in a block of what holds its grids, by site; their tensors are stored under it."""
INPUTS: tuple[str, ...] = ("qkv", "out", "fc1", "fc2")
"""The sites that linear layers read, in the order of `BlockLayout.linears`."""


class StaticRounding(nn.Module):
    """Rounds one site of a block: each channel on the grid of its cluster.

    Buffers, all integers, so that no cast of a model touches them: `scale` int16 [rows, clusters], the bits of a
    float16; `zero` int32 [rows, clusters]; `cluster` uint8 [rows, width], the number of each channel's cluster. They
    are zero until a checkpoint is loaded or they are found.

    Args:
        site: What is rounded: [..., rows * width] where linear layers read it, else [batch, rows, tokens, width].
        device: Of the buffers.
    """

    scale: Tensor
    zero: Tensor
    cluster: Tensor
    on = True
    """Whether it rounds; off while ranges are looked for."""

    def __init__(self, site: StaticSite, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.site = site
        grid = site.rows, site.clusters
        self.register_buffer("scale", torch.zeros(grid, dtype=torch.int16, device=device))
        self.register_buffer("zero", torch.zeros(grid, dtype=torch.int32, device=device))
        self.register_buffer("cluster", torch.zeros(site.rows, site.width, dtype=torch.uint8, device=device))

    def fill(self, scale: Tensor, zero: Tensor, labels: Tensor) -> None:
        """Take what was found: scales that float16 holds, zero points, and the cluster of each channel."""
        self.scale.copy_(scale.half().view(torch.int16))
        self.zero.copy_(zero.to(torch.int32))
        self.cluster.copy_(labels.to(torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        return fake_quantize_channels(x, *self.channels(x.ndim), self.site.bits) if self.on else x

    def channels(self, axes: int) -> tuple[Tensor, Tensor]:
        """Scale and zero point of each channel, float32, of as many axes as what they are for."""
        labels = self.cluster.long()
        scale, zero = self.scale.view(torch.float16).float().gather(1, labels), self.zero.float().gather(1, labels)
        if self.site.linears:
            scale, zero = scale.flatten(), zero.flatten()
        else:
            scale, zero = scale[:, None], zero[:, None]
        shape = (1,) * (axes - scale.ndim) + tuple(scale.shape)
        return scale.view(shape), zero.view(shape)

    def extra_repr(self) -> str:
        return str(self.site)


@dataclass(frozen=True)
class StaticAttention:
    """What an attention module rounds on fixed grids; None leaves a tensor as it is."""

    query: Rounding | None = None
    key: Rounding | None = None
    value: Rounding | None = None
    probabilities: Callable[[Tensor], Tensor] | None = None

    def round(self, query: Tensor, key: Tensor, value: Tensor, by_cache: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """What `rounded_attention` goes on with, each [batch, heads, tokens, head size].

        With `by_cache`, keys and values are rounded already.
        """
        query = query if self.query is None else self.query(query)
        if by_cache:
            return query, key, value
        key = key if self.key is None else self.key(key)
        return query, key, value if self.value is None else self.value(value)


def attach_grids(
    block: nn.Module, attention: str, scheme: StaticScheme, device: torch.device | str | None = None
) -> dict[str, Rounding]:
    """Give `block` its grids, in place, and its attention what rounds there.

    Returns:
        What rounds the input of each linear layer, by name: methods, not modules, as a module's tensors would be
        stored with every layer that holds it.
    """
    grids = nn.ModuleDict({name: StaticRounding(site, device) for name, site in scheme.sites.items()})
    block.add_module(GRIDS, grids)
    rounds = {name: grid.forward for name, grid in grids.items()}
    bits = scheme.softmax_bits
    setattr(
        block.get_submodule(attention),
        STATIC,
        StaticAttention(
            rounds.get("q"),
            rounds.get("k"),
            rounds.get("v"),
            partial(round_probabilities, bits=bits) if bits < UNQUANTISED else None,
        ),
    )
    return {linear: rounds[name] for name, site in scheme.sites.items() for linear in site.linears}


def grids_of(block: nn.Module) -> dict[str, StaticRounding]:
    """The grids of a block by site; none where nothing is rounded on fixed ones."""
    found = getattr(block, GRIDS, None)
    return {} if found is None else dict(found.items())


def grid_tensors(block: nn.Module) -> dict[str, Tensor]:
    """What is stored of a block's grids, by name in the block."""
    return {
        f"{GRIDS}.{site}.{name}": tensor
        for site, grid in grids_of(block).items()
        for name, tensor in grid.named_buffers()
    }


@contextmanager
def unrounded(block: nn.Module) -> Iterator[None]:
    """While open, grids leave activations as they are."""
    for grid in grids_of(block).values():
        grid.on = False
    try:
        yield
    finally:
        for grid in grids_of(block).values():
            grid.on = True


def site_shapes(block: nn.Module, layout: BlockLayout) -> dict[str, tuple[int, int]]:
    """Rows and width of every site of a block. What the output projection reads is divided into heads, too."""
    heads = layout.attention
    inputs = dict(zip(INPUTS, layout.linears, strict=True))
    shapes = {name: (1, int(block.get_submodule(group[0]).in_features)) for name, group in inputs.items()}  # type: ignore[arg-type]
    queries, values = (heads.heads, heads.head_dim), (heads.kv_heads, heads.head_dim)
    return {**shapes, "out": queries, "q": queries, "k": values, "v": values}


@contextmanager
def watched_sites(
    block: nn.Module, layout: BlockLayout, tokens: int, see: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """While open, `see` is shown each site of every forward of `block`, [samples, tokens, rows, width], unrounded.

    Args:
        block: A live block, or the student of one.
        layout: Of the block.
        tokens: Of a sample; some models hand their MLP flattened ones.
        see: Given the site's name and the tensor.
    """
    shapes = site_shapes(block, layout)
    attention = block.get_submodule(layout.attention.module)
    before = getattr(attention, STATIC, None)

    def look(site: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        see(site, args[0].detach().reshape(-1, tokens, *shapes[site]).float())

    def look_inside(site: str, x: Tensor) -> Tensor:
        see(site, x.detach().transpose(1, 2).float())
        return x

    handles = [
        block.get_submodule(group[0]).register_forward_pre_hook(partial(look, site))
        for site, group in zip(INPUTS, layout.linears, strict=True)
    ]
    setattr(attention, STATIC, StaticAttention(*(partial(look_inside, site) for site in ("q", "k", "v"))))
    try:
        with unrounded(block):
            yield
    finally:
        for handle in handles:
            handle.remove()
        setattr(attention, STATIC, before)
