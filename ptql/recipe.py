"""What a tensor is quantised to: frozen descriptions of number formats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from fnmatch import fnmatchcase
from typing import Any

from ptql.errors import InputError

UNQUANTISED = 16
"""The bit width that means: leave this tensor as it is."""

MOST_CLUSTERS = 256
"""Of a row: the number of a channel's cluster is stored in a byte."""

SCALE_DTYPES = ("float16", "bfloat16")
MOST_SALIENT = 0.9
"""Share of the input channels; with more, bits of all channels say it better."""


def check_bits(bits: object, what: str, fewest: int, remedy: str = "use 16 to leave it unquantised") -> None:
    """Raise `InputError` unless `bits` is a whole number from `fewest` to 8, or 16."""
    if type(bits) is not int or not (fewest <= bits <= 8 or bits == UNQUANTISED):
        raise InputError(f"{what} bits={bits}: a whole number from {fewest} to 8 is supported; {remedy}")


@dataclass(frozen=True)
class IntScheme:
    """Integer format of the weights of a linear layer.

    Args:
        bits: Width of a code, 1 to 8; 16 leaves the weights unquantised.
        group_size: Neighbouring input columns that share a scale; -1 means a whole row (per channel). Where it
            does not divide the row, the last group is shorter.
        symmetric: No zero point: the range is the same on both sides of zero.
        balanced: A level more, so that there are as many below the middle one as above. With 2 bits: five levels, -2
            to 2 (ABQ-LLM's bit balance, its W2*), stored in 2.33 bits a code and called 2b, not 2. With 1 bit: three
            levels, -1 to 1 (ternary weights), stored in 1.6 bits a code and called 1b.
        salient: With 1 bit: the share of input channels, those with the largest inputs, whose weights have
            `salient_bits`; of all others the sign is stored (PTQ1.61, where it is 0.2). None for codes of 1 bit.
        salient_bits: Width of their codes, 2 to 8.
        scale_dtype: float16, or bfloat16: scales have that many digits, and codes are made for them. Runtimes that
            serve a model in bfloat16 have its scales in bfloat16, too, and would round others.
        clustered: One scale for each output channel and each cluster of its input channels, as a transform that makes
            clusters found them (RPTQ). Where none are made of what a layer reads, a row has one scale.
    """

    bits: int = 4
    group_size: int = -1
    symmetric: bool = False
    balanced: bool = False
    salient: float | None = None
    salient_bits: int = 4
    scale_dtype: str = "float16"
    clustered: bool = False

    def __post_init__(self) -> None:
        check_bits(self.bits, "weight", fewest=1)
        for name in ("symmetric", "balanced", "clustered"):
            if type(getattr(self, name)) is not bool:
                raise InputError(f"{name}={getattr(self, name)}: true or false is needed; leave it out for false")
        if type(self.group_size) is not int or (self.group_size != -1 and self.group_size < 1):
            raise InputError(
                f"group_size={self.group_size}: a group holds at least 1 column; use -1 for one scale a row"
            )
        if self.balanced and self.bits not in (1, 2):
            raise InputError(
                f"balanced=true with bits={self.bits}: it is a kind of 1 or 2 bits; use bits: 2 for five levels, bits: "
                "1 for three, or false"
            )
        if self.bits == 1 and self.symmetric and not self.balanced:
            raise InputError(
                "bits=1, symmetric=true: a middle code and one other hold no sign; use symmetric: false, or balanced: "
                "true for three levels"
            )
        if self.scale_dtype not in SCALE_DTYPES:
            raise InputError(f"scale_dtype={self.scale_dtype}: one of {', '.join(SCALE_DTYPES)} is needed")
        if self.clustered and self.group_size != -1:
            raise InputError(
                f"clustered=true with group_size={self.group_size}: a scale is either of a cluster or of neighbouring "
                "columns; use clustered: false (--model.weight.clustered false), or group_size: -1"
            )
        if self.salient is not None:
            self._check_salient(self.salient)

    def _check_salient(self, share: float) -> None:
        if self.clustered:
            raise InputError(
                f"salient={share} with clustered=true: signs have one scale a row; use clustered: false, or salient: "
                "null"
            )
        if self.balanced:
            raise InputError(
                f"salient={share} with balanced=true: a sign has two levels; use balanced: false, or salient: null"
            )
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= MOST_SALIENT:
            raise InputError(
                f"salient={share}: a share of the input channels from 0 to {MOST_SALIENT} is needed; 0.2 is usual, "
                "null is for codes that are all alike"
            )
        if self.scale_dtype != "float16":
            raise InputError(
                f"salient={share} with scale_dtype={self.scale_dtype}: no other runtime holds it, so its scales are "
                "float16; leave scale_dtype out"
            )
        if (self.bits, self.group_size) != (1, -1):
            raise InputError(
                f"salient={share} with bits={self.bits}, group_size={self.group_size}: signs are 1 bit, and a row has "
                "one scale; use bits: 1 and group_size: -1, or salient: null"
            )
        if type(self.salient_bits) is not int or not 2 <= self.salient_bits <= 8:
            raise InputError(f"salient_bits={self.salient_bits}: a whole number from 2 to 8 is supported; 4 is usual")

    @property
    def quantised(self) -> bool:
        return self.bits < UNQUANTISED

    @property
    def by_cluster(self) -> bool:
        """Whether scales of clusters are stored: weights that are not quantised have none."""
        return self.clustered and self.quantised

    @property
    def levels(self) -> int:
        """How many values a code has."""
        return 2**self.bits + 1 if self.balanced else 2**self.bits

    @property
    def name(self) -> str:
        """Of the bits, as schemes are called: `4`, `2b`, `1b`; `1.6` where a fifth of channels has 4, the rest 1."""
        if self.salient is not None:
            return f"{self.salient * self.salient_bits + 1 - self.salient:.3g}"
        return f"{self.bits}b" if self.balanced else str(self.bits)

    def to_dict(self) -> dict[str, Any]:
        """Its settings as JSON; what is off is left out, as older readers do not know all of it."""
        off = {"balanced": not self.balanced, "scale_dtype": self.scale_dtype == "float16"}
        off |= dict.fromkeys(("salient", "salient_bits"), self.salient is None) | {"clustered": not self.clustered}
        share = None if self.salient is None else float(self.salient)  # a 0 of YAML is no float
        return {name: value for name, value in {**asdict(self), "salient": share}.items() if not off.get(name)}

    def salient_columns(self, row: int) -> int:
        """How many of the input channels in a row of `row` columns are salient."""
        return int(row * (self.salient or 0.0))

    def columns(self, row: int) -> int:
        """Columns of a full group in a row of `row` columns; clusters have no size in common."""
        assert not self.clustered
        return row if self.group_size == -1 else min(self.group_size, row)

    def groups(self, row: int) -> int:
        """Groups in a row of `row` columns, the shorter last one included."""
        return -(-row // self.columns(row))


@dataclass(frozen=True)
class LayerSchemes:
    """Integer formats of all matrices of a model.

    Args:
        default: Of those that are no exceptions.
        exceptions: Of layers that were named, by `INDEX.LINEAR`: the block's index, from 0, and the layer's name in it.
    """

    default: IntScheme
    exceptions: Mapping[str, IntScheme] = field(default_factory=dict)

    def of(self, block: int, linear: str) -> IntScheme:
        """The format of a layer's weights."""
        return self.exceptions.get(f"{block}.{linear}", self.default)

    @property
    def any_quantised(self) -> bool:
        return any(scheme.quantised for scheme in (self.default, *self.exceptions.values()))

    @property
    def any_by_cluster(self) -> bool:
        return any(scheme.by_cluster for scheme in (self.default, *self.exceptions.values()))


LayerFormat = int | dict[str, int | float | bool | str | None]
"""What a pattern says of the layers it names: bits, or settings of an `IntScheme`."""


def may_have_clusters(default: IntScheme, patterns: Mapping[str, LayerFormat]) -> bool:
    """Whether some matrix has scales of clusters, as far as can be said before patterns meet the names of layers."""
    formats = [{}, *({"bits": given} if isinstance(given, int) else given for given in patterns.values())]
    return any(
        given.get("clustered", default.clustered) and given.get("bits", default.bits) != UNQUANTISED
        for given in formats
    )


def schemes_by_pattern(
    default: IntScheme, patterns: Mapping[str, LayerFormat], names: Mapping[str, str]
) -> LayerSchemes:
    """The formats that patterns of names say; a later pattern wins over an earlier one.

    A pattern is a name or a part of one, whole words between dots: `down_proj`, `layers.0`, `layers.*.self_attn`; `*`
    stands for anything.

    Args:
        default: Format of a layer that no pattern names, and what a pattern leaves open.
        patterns: What they say.
        names: `INDEX.LINEAR` of each layer by its name in the model.

    Raises:
        InputError: A pattern names no layer, or says something that is no format.
    """
    exceptions: dict[str, IntScheme] = {}
    for pattern, given in patterns.items():
        settings = {"bits": given} if isinstance(given, int) else given
        if unknown := set(settings) - {f.name for f in fields(IntScheme)}:
            raise InputError(f"layers: {pattern}: {sorted(unknown)[0]} is no setting of a format; see --model.weight")
        if "bits" in settings:  # which makes it another kind, unless more is said
            settings = {"balanced": False, "salient": None, **settings}
        try:
            scheme = replace(default, **settings)  # type: ignore[arg-type]
        except InputError as error:
            raise InputError(f"layers: {pattern}: {error}") from None
        found = [key for name, key in names.items() if fnmatchcase(f".{name}.", f"*.{pattern}.*")]
        if not found:
            raise InputError(
                f"layers: {pattern}: names no layer that is quantised, as {next(iter(names))} is; correct it"
            )
        exceptions |= dict.fromkeys(found, scheme)
    return LayerSchemes(default, exceptions)


@dataclass(frozen=True)
class ActivationScheme:
    """Integer format of the activations inside a block.

    Args:
        bits: Width of a rounded activation, 2 to 8; 16 leaves activations unquantised.
        kv_bits: Width of keys and values, what a cache holds: 2 to 8, or 16; as `bits` if it is left out.
        symmetric: Inputs of linear layers have no zero point, which most runtimes ask for; queries, keys and values
            have one in any case.
    """

    bits: int = UNQUANTISED
    kv_bits: int | None = None
    symmetric: bool = False

    def __post_init__(self) -> None:
        check_bits(self.bits, "activation", fewest=2)
        if type(self.symmetric) is not bool:
            raise InputError(f"activation symmetric={self.symmetric}: true or false is needed; leave it out for false")
        if self.kv_bits is not None:
            check_bits(self.kv_bits, "kv_bits: key and value", fewest=2)

    @property
    def quantised(self) -> bool:
        """Whether inputs of linear layers are rounded."""
        return self.bits < UNQUANTISED

    def to_dict(self) -> dict[str, Any]:
        """Its settings as JSON; `kv_bits` and `symmetric` only where they are given: older readers do not know them."""
        return {name: value for name, value in asdict(self).items() if value is not None and value is not False}

    @property
    def cache_bits(self) -> int:
        """Width of keys and values."""
        return self.bits if self.kv_bits is None else self.kv_bits


@dataclass(frozen=True)
class StaticSite:
    """A tensor that is rounded on fixed grids, one for each cluster of its channels.

    Args:
        bits: Width of a code, 2 to 8.
        rows: Heads, each with clusters of its own; 1 where there are none.
        width: Channels of a row.
        clusters: Of a row, at most.
        linears: The linear layers that read it, by name in the block; none for queries, keys and values.
    """

    bits: int
    rows: int
    width: int
    clusters: int
    linears: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_bits(self.bits, "activation", fewest=2)
        for name, most in (("rows", 2**31), ("width", 2**31), ("clusters", MOST_CLUSTERS)):
            if not 1 <= getattr(self, name) <= most:
                raise InputError(f"{name}={getattr(self, name)}: 1 to {most} are supported; correct it")

    def to_dict(self) -> dict[str, Any]:
        """Its settings as JSON."""
        return {**asdict(self), "linears": list(self.linears)}


@dataclass(frozen=True)
class StaticScheme:
    """What is rounded on fixed grids in a block.

    Args:
        sites: By name: `qkv`, `out`, `fc1`, `fc2` for the inputs of linear layers, `q`, `k`, `v` for what attention
            reads, after RoPE.
        softmax_bits: Width of attention's probabilities, which lie between 0 and 1; 16 leaves them as they are.
    """

    sites: Mapping[str, StaticSite]
    softmax_bits: int = UNQUANTISED

    def __post_init__(self) -> None:
        check_bits(self.softmax_bits, "softmax", fewest=2)

    @property
    def in_attention(self) -> bool:
        """Whether anything inside the attention is rounded."""
        return self.softmax_bits < UNQUANTISED or any(not site.linears for site in self.sites.values())

    def to_dict(self) -> dict[str, Any]:
        """Its settings as JSON."""
        return {"sites": {name: site.to_dict() for name, site in self.sites.items()}, "softmax_bits": self.softmax_bits}
