"""Static rounding of activations: grids found before anything is learned, the same for all tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

from torch import nn

from ptql.errors import InputError
from ptql.families import BlockLayout
from ptql.nn.quant_linear import Rounding
from ptql.nn.static_rounding import INPUTS, site_shapes
from ptql.parts.activations.base import ActivationQuantizer
from ptql.recipe import UNQUANTISED, ActivationScheme, StaticScheme, StaticSite, check_bits

Ranges = Literal["minmax", "ema", "mse"]
APART = (*INPUTS, "q", "softmax")
"""What can have bits of its own here; keys and values have `kv_bits`."""


class StaticClusters(ActivationQuantizer):
    """One fixed grid for each cluster of channels, as a transform that makes clusters found them (RPTQ); without one,
    a grid for each tensor, and each head of queries, keys, values and what the output projection reads.

    Ranges are those of the full-precision block on the quantised stream, folded as transforms begin.

    Args:
        ranges: `minmax` over all samples; `ema`, a running mean of each sample's (0.99 old + 0.01 new, RPTQ); `mse`,
            the share of `minmax` that rounds with the smallest squared error.
        bits: Bits of what differs: `qkv` and `fc1` (what norms give), `out` and `fc2` (what the attention's and the
            MLP's last layer read), `q`, `softmax`. By default as activations, and 8 for the softmax (RPTQ).
            Where activations are not quantised, keys and values alone are, by `kv_bits`.
        faithful: As the original divides ranges: by 2^bits, so that the largest value is clamped.
    """

    def __init__(self, ranges: Ranges = "ema", bits: dict[str, int] | None = None, faithful: bool = False) -> None:
        if ranges not in get_args(Ranges):
            raise InputError(f"ranges={ranges!r}: one of {', '.join(get_args(Ranges))} is needed; leave out for ema")
        bits = {"softmax": 8} if bits is None else dict(bits)
        for name, width in bits.items():
            if name not in APART:
                raise InputError(
                    f"bits: {name}: one of {', '.join(APART)} can have bits of its own; keys and values have "
                    "--model.activation.kv_bits"
                )
            check_bits(width, name, fewest=2)
        self.ranges: Ranges = ranges
        self.bits = bits
        self.faithful = faithful

    def for_linear(self, name: str, scheme: ActivationScheme) -> Rounding | None:
        return None

    def for_attention(self, scheme: ActivationScheme) -> Rounding | None:
        return None

    def static_scheme(
        self, block: nn.Module, layout: BlockLayout, scheme: ActivationScheme, clusters: Mapping[str, int]
    ) -> StaticScheme | None:
        readers = dict(zip(INPUTS, layout.linears, strict=True))
        sites = {}
        for name, (rows, width) in site_shapes(block, layout).items():
            bits = self._bits(name, scheme)
            if bits < UNQUANTISED:
                most = min(clusters.get(name, 1), width)
                sites[name] = StaticSite(bits, rows, width, most, readers.get(name, ()))
        softmax = self._bits("softmax", scheme)
        return StaticScheme(sites, softmax) if sites or softmax < UNQUANTISED else None

    def _bits(self, site: str, scheme: ActivationScheme) -> int:
        if site in ("k", "v"):
            return scheme.cache_bits
        return self.bits.get(site, scheme.bits) if scheme.quantised else UNQUANTISED
