"""ptql's own format: what config.json says about a packed model, and how a block is made ready for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ptql import __version__
from ptql.errors import InputError
from ptql.nn.attention import CACHE_ROUNDING, QUERY_ROUNDING
from ptql.nn.clustered_linear import MOST_OF_A_MATRIX, ClusteredLinear
from ptql.nn.packed_linear import Packed, PackedLinear
from ptql.nn.quant_linear import QuantLinear, Rounding, ShiftedNorm, gather_inputs
from ptql.nn.salient_linear import SalientLinear
from ptql.nn.static_rounding import attach_grids
from ptql.parts.activations.dynamic import TokenRounding
from ptql.recipe import UNQUANTISED, ActivationScheme, IntScheme, LayerSchemes, StaticScheme, StaticSite

QUANT_METHOD = "ptql"
VERSIONS = (1, 2, 3, 4, 5, 6, 7)
"""Of the format: 2 has factors; 3 has layers of other formats, five levels, one bit, and the cache's bits apart; 4 has
signs beside salient channels; 5 has three levels; 6 has norms that reorder channels, and activations on fixed grids or
without a zero point; 7 has scales of clusters of columns. Each is written only where it is needed, so that older
readers have the others."""


@dataclass(frozen=True)
class PackedFormat:
    """How a packed model is to be read: `quantization_config` in its config.json.

    Module names are relative to a block, except `blocks`.

    Args:
        method: The recipe that made the model, for people.
        weight: Format of the weights in `linears`.
        activation: Format of the inputs of `linears`, rounded dynamically per token, and of keys and values.
        qkv: Round queries like the other activations.
        blocks: Module name of the list of blocks in the causal language model.
        attention: Module name of the attention.
        linears: The linear layers that are packed.
        shifted_norms: Norms that were given a bias.
        added_biases: Linear layers that were given a bias.
        factor_rank: Rank of the factors that multiply the weights in `linears`; 0 for none.
        layers: Formats of the weights of layers that differ from `weight`, by `INDEX.LINEAR`.
        gathered_norms: Norms that read their input's channels in an order of their own.
        static: What is rounded on fixed grids; nothing is then rounded per token.
        clusters: How many clusters of columns share a scale in each row, of the layers whose format is `clustered`.
        ptql_version: The version that wrote the model.
    """

    method: str
    weight: IntScheme
    activation: ActivationScheme
    qkv: bool
    blocks: str
    attention: str
    linears: tuple[str, ...]
    shifted_norms: tuple[str, ...] = ()
    added_biases: tuple[str, ...] = ()
    factor_rank: int = 0
    layers: Mapping[str, IntScheme] = field(default_factory=dict)
    gathered_norms: tuple[str, ...] = ()
    static: StaticScheme | None = None
    clusters: Mapping[str, int] = field(default_factory=dict)
    ptql_version: str = __version__

    @property
    def query_bits(self) -> int:
        """Width of queries."""
        return self.activation.bits if self.qkv else UNQUANTISED

    @property
    def cache_bits(self) -> int:
        """Width of keys and values; where it is said apart it does not hang on `qkv`."""
        return self.activation.cache_bits if self.qkv or self.activation.kv_bits is not None else UNQUANTISED

    @property
    def rounds_attention(self) -> bool:
        """Whether queries, keys and values, or probabilities, are rounded."""
        on_grids = self.static is not None and self.static.in_attention
        return on_grids or min(self.query_bits, self.cache_bits) < UNQUANTISED

    @property
    def version(self) -> int:
        """The lowest that holds all that it says."""
        if self.clusters:
            return 7
        unzeroed = self.activation.symmetric and self.activation.quantised
        if unzeroed or self.gathered_norms or self.static is not None:
            return 6
        kinds = (self.weight, *self.layers.values())
        if any(s.balanced and s.bits == 1 for s in kinds):
            return 5
        if any(s.salient is not None for s in kinds):
            return 4
        if self.layers or self.activation.kv_bits is not None or any(s.balanced or s.bits == 1 for s in kinds):
            return 3
        return 2 if self.factor_rank else 1

    @property
    def schemes(self) -> LayerSchemes:
        """Formats of all weights."""
        return LayerSchemes(self.weight, self.layers)

    def to_dict(self) -> dict[str, Any]:
        """The JSON of `quantization_config`."""
        described: dict[str, Any] = {
            "quant_method": QUANT_METHOD,
            "format_version": self.version,
            "ptql_version": self.ptql_version,
            "method": self.method,
            "weight": self.weight.to_dict(),
            "activation": {**self.activation.to_dict(), "qkv": self.qkv},
            "blocks": self.blocks,
            "attention": self.attention,
            "linears": list(self.linears),
            "shifted_norms": list(self.shifted_norms),
            "added_biases": list(self.added_biases),
        }
        if self.layers:
            described["layers"] = {name: scheme.to_dict() for name, scheme in self.layers.items()}
        if self.factor_rank:
            described["factor_rank"] = self.factor_rank
        if self.gathered_norms:
            described["gathered_norms"] = list(self.gathered_norms)
        if self.static is not None:
            described["static"] = self.static.to_dict()
        if self.clusters:
            described["clusters"] = dict(self.clusters)
        return described

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> PackedFormat:
        """The inverse of `to_dict`. Unknown keys are left aside: a change that matters gets a new version.

        Raises:
            InputError: Another format version, or a key that is missing or of the wrong kind.
        """
        version = stored.get("format_version")
        if version not in VERSIONS:
            writer = stored.get("ptql_version", "unknown")
            raise InputError(
                f"format_version={version!r}: ptql {__version__} reads versions {', '.join(map(str, VERSIONS))}; "
                f"load the model with the ptql that wrote it ({writer}), or quantise it again"
            )
        activation = _take(stored, "activation", dict)
        layers = _take(stored, "layers", dict) if "layers" in stored else {}
        return cls(
            method=_take(stored, "method", str),
            weight=_scheme(stored, "weight"),
            activation=ActivationScheme(
                bits=_take(activation, "bits", int),
                kv_bits=_take(activation, "kv_bits", int) if "kv_bits" in activation else None,
                symmetric="symmetric" in activation and _take(activation, "symmetric", bool),
            ),
            qkv=_take(activation, "qkv", bool),
            blocks=_take(stored, "blocks", str),
            attention=_take(stored, "attention", str),
            linears=_names(stored, "linears"),
            shifted_norms=_names(stored, "shifted_norms"),
            added_biases=_names(stored, "added_biases"),
            factor_rank=_rank(stored) if version == 2 or "factor_rank" in stored else 0,
            layers={name: _scheme(layers, name) for name in layers},
            gathered_norms=_names(stored, "gathered_norms") if "gathered_norms" in stored else (),
            static=_static(_take(stored, "static", dict)) if "static" in stored else None,
            clusters=_clusters(stored) if version == 7 or "clusters" in stored else {},
            ptql_version=_take(stored, "ptql_version", str),
        )


def prepare_block(block: nn.Module, fmt: PackedFormat, index: int) -> None:
    """Swap modules of transformer block `index`, in place, for those whose tensors a packed model stores.

    New modules have the device (meta included) and the float dtype of those they replace; packed tensors are
    zero.

    Raises:
        InputError: The format names a module that this block does not have.
    """
    dynamic = TokenRounding(fmt.activation.bits, fmt.activation.symmetric) if fmt.activation.quantised else None
    attention = _module(block, fmt.attention)
    device = next(block.parameters()).device
    on_grids = {} if fmt.static is None else attach_grids(block, fmt.attention, fmt.static, device)
    for name in fmt.linears:
        linear, rounding = _module(block, name), on_grids.get(name, dynamic)
        if not isinstance(linear, nn.Linear):
            raise InputError(f"{name}: a {type(linear).__name__} is not a linear layer; {_REMEDY}")
        if name in fmt.added_biases and linear.bias is None:
            linear.bias = nn.Parameter(linear.weight.new_zeros(linear.out_features), requires_grad=False)
        scheme = fmt.schemes.of(index, name)
        if scheme.quantised:
            block.set_submodule(name, _packed(name, linear, scheme, rounding, fmt))
        elif rounding is not None:
            block.set_submodule(name, QuantLinear(linear.weight, linear.bias, rounding))
    for name in fmt.shifted_norms:
        block.set_submodule(name, ShiftedNorm(_module(block, name)))
    for name in fmt.gathered_norms:
        gather_inputs(_module(block, name))
    for which, bits in ((QUERY_ROUNDING, fmt.query_bits), (CACHE_ROUNDING, fmt.cache_bits)):
        if bits < UNQUANTISED:
            setattr(attention, which, TokenRounding(bits))


def _packed(name: str, linear: nn.Linear, scheme: IntScheme, rounding: Rounding | None, fmt: PackedFormat) -> Packed:
    """An empty layer of this format in the place of `linear`."""
    given: dict[str, Any] = {
        "in_features": linear.in_features,
        "out_features": linear.out_features,
        "scheme": scheme,
        "bias": linear.bias is not None,
        "rounding": rounding,
        "device": linear.weight.device,
        "dtype": linear.weight.dtype,
    }
    if scheme.salient is not None:
        return SalientLinear(**given)
    if not scheme.clustered:
        return PackedLinear(**given, factor_rank=fmt.factor_rank)
    if name not in fmt.clusters:
        raise InputError(f"quantization_config: clusters: {name} is missing, whose scales are of clusters; {_REMEDY}")
    return ClusteredLinear(**given, factor_rank=fmt.factor_rank, clusters=fmt.clusters[name])


def unpack_block(block: nn.Module) -> None:
    """Swap every packed layer of a block, in place, for its dense float32 twin."""
    packed = [(name, module) for name, module in block.named_modules() if isinstance(module, Packed)]
    for name, module in packed:
        block.set_submodule(name, module.to_dense())


_REMEDY = "config.json was edited or belongs to other weights: restore it, or quantise the model again"


def _module(block: nn.Module, name: str) -> nn.Module:
    try:
        return block.get_submodule(name)
    except AttributeError:
        raise InputError(f"{name}: no such module in a {type(block).__name__}; {_REMEDY}") from None


def _take(stored: Mapping[str, Any], key: str, kind: type) -> Any:
    """The value of `key`, which must be there and a `kind`."""
    if key not in stored:
        raise InputError(f"quantization_config: {key!r} is missing; {_REMEDY}")
    if type(stored[key]) is not kind:
        raise InputError(f"quantization_config: {key}={stored[key]!r} is not a {kind.__name__}; {_REMEDY}")
    return stored[key]


def _scheme(stored: Mapping[str, Any], key: str) -> IntScheme:
    """The format of weights under `key`."""
    found = _take(stored, key, dict)
    return IntScheme(
        bits=_take(found, "bits", int),
        group_size=_take(found, "group_size", int),
        symmetric=_take(found, "symmetric", bool),
        balanced="balanced" in found and _take(found, "balanced", bool),
        salient=_take(found, "salient", float) if "salient" in found else None,
        salient_bits=_take(found, "salient_bits", int) if "salient" in found else 4,
        scale_dtype=_take(found, "scale_dtype", str) if "scale_dtype" in found else "float16",
        clustered="clustered" in found and _take(found, "clustered", bool),
    )


def _static(stored: Mapping[str, Any]) -> StaticScheme:
    """What is rounded on fixed grids."""
    sites = _take(stored, "sites", dict)
    return StaticScheme({name: _site(sites, name) for name in sites}, _take(stored, "softmax_bits", int))


def _site(stored: Mapping[str, Any], key: str) -> StaticSite:
    found = _take(stored, key, dict)
    numbers = {name: _take(found, name, int) for name in ("bits", "rows", "width", "clusters")}
    return StaticSite(**numbers, linears=_names(found, "linears"))


def _clusters(stored: Mapping[str, Any]) -> dict[str, int]:
    counts = _take(stored, "clusters", dict)
    for name in counts:
        if not 1 <= _take(counts, name, int) <= MOST_OF_A_MATRIX:
            raise InputError(
                f"quantization_config: clusters: {name}={counts[name]} is not from 1 to {MOST_OF_A_MATRIX}; {_REMEDY}"
            )
    return counts


def _rank(stored: Mapping[str, Any]) -> int:
    rank = _take(stored, "factor_rank", int)
    if rank < 1:
        raise InputError(f"quantization_config: factor_rank={rank} is not above 0; {_REMEDY}")
    return rank


def _names(stored: Mapping[str, Any], key: str) -> tuple[str, ...]:
    names = _take(stored, key, list)
    if not all(isinstance(name, str) for name in names):
        raise InputError(f"quantization_config: {key}={names!r} holds more than names; {_REMEDY}")
    return tuple(names)
