"""A linear layer that holds its weight as it is stored: packed codes, scales, zero points, factors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from ptql.errors import InputError
from ptql.functional import affine
from ptql.functional.factored import factor
from ptql.functional.packing import pack_levels, stored_bytes, unpack_levels
from ptql.nn.quant_linear import QuantLinear, Rounding
from ptql.recipe import IntScheme

# axes: out, in = weight rows, columns; g = groups of columns that share a scale; k = rank of the factor

# Scales and factors are float16 numbers kept as int16, their bit pattern: `from_pretrained(dtype=...)`, `.to(dtype)`
# and `.half()` cast every floating tensor they meet, and bfloat16 keeps seven of a scale's ten mantissa bits.
STORED_HALF = torch.int16
LARGEST_HALF = 65504.0


def packed_tensors(
    codes: UInt8[Tensor, "out in"],
    scale: Float[Tensor, "out g"],
    zero: UInt8[Tensor, "out g"] | None,
    levels: int,
    factors: tuple[Float[Tensor, "out k"], Float[Tensor, "k in"]] | None = None,
) -> dict[str, Tensor]:
    """What is stored of one linear layer, from the result of `affine.encode` and the factors that multiply it, if
    there are any; keys as in `PackedLinear`."""
    stored = {"codes": pack_levels(codes, levels), "scale": stored_half(scale)}
    if zero is not None:
        stored["zero"] = pack_levels(zero, levels)
    if factors is not None:
        stored |= {name: stored_half(tensor) for name, tensor in zip(("left", "right"), factors, strict=True)}
    return stored


def stored_half(tensor: Tensor) -> Tensor:
    """Rounded to float16, as its bits."""
    return tensor.detach().clamp(-LARGEST_HALF, LARGEST_HALF).to(torch.float16).contiguous().view(STORED_HALF)


def dense_from_packed(
    tensors: dict[str, Tensor], in_features: int, scheme: IntScheme
) -> Float[Tensor, "out {in_features}"]:
    """The float32 weight that `packed_tensors` stands for.

    Raises:
        ValueError: The tensors are too long or too short for `in_features` and `scheme`.
    """
    groups = scheme.groups(in_features)
    zero = None if scheme.symmetric else unpack_levels(tensors["zero"], scheme.levels, groups)
    rounded = affine.dequantize(
        unpack_levels(tensors["codes"], scheme.levels, in_features),
        tensors["scale"].view(torch.float16),
        zero,
        scheme.levels,
        scheme.columns(in_features),
    )
    return times_factors(rounded, tensors)


def times_factors(rounded: Float[Tensor, "out in"], tensors: dict[str, Tensor]) -> Float[Tensor, "out in"]:
    """Decoded weights times the factors that are stored beside them, if there are any."""
    if tensors.get("left") is None:
        return rounded
    return rounded * factor(*(tensors[name].view(torch.float16).float() for name in ("left", "right")))


class CodedWeight(Tensor):
    """Shape, dtype and device of a packed layer's weight, with no numbers behind them.

    What places modules beside a linear layer, as peft does with LoRA, asks for no more. What would compute with them
    or write to them is refused: it would work on a copy of the weight, and be lost without a word.
    """

    @staticmethod
    def __new__(cls, shape: tuple[int, int], device: torch.device) -> CodedWeight:
        weight = Tensor._make_wrapper_subclass(cls, shape, dtype=torch.float32, device=device)
        weight._is_hf_initialized = True  # so that transformers has no wish to fill it with random numbers
        return weight

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        raise InputError(
            "weight: a packed layer holds codes, so nothing can be added to its weight or computed from it; leave "
            "LoRA beside it (not merged, no DoRA, no start from the weights), or unpack first: `model.dequantize()`"
        )

    def __repr__(self, **_: Any) -> str:
        return f"CodedWeight({tuple(self.shape)}, device={self.device})"


class _Product(torch.autograd.Function):
    """x @ weight.T, which unpacks the weight again for the gradient of x: autograd would keep each layer's in float."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Packed) -> Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        return F.linear(x, layer.dense_weight().to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        return (grad @ ctx.layer.dense_weight().to(grad.dtype)).to(ctx.dtype), None


class Packed(nn.Linear, ABC):
    """A linear layer that holds its weight in some packed form, with a float bias if there is one.

    It is an `nn.Linear` to those who look for layers to put something beside, and has no parameter `weight`.

    Args:
        in_features: Columns of the weight.
        out_features: Rows of the weight.
        scheme: Format of the weight.
        bias: Whether there is a bias, a float parameter.
        rounding: Applied to the input, or None.
        device: Of the bias.
        dtype: Of the bias.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scheme: IntScheme,
        bias: bool,
        rounding: Rounding | None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # not of nn.Linear, which makes a weight
        self.in_features = in_features
        self.out_features = out_features
        self.scheme = scheme
        self.rounding = rounding
        start = torch.zeros(out_features, device=device, dtype=dtype) if bias else None
        self.register_parameter("bias", None if start is None else nn.Parameter(start, requires_grad=False))

    def hold(self, name: str, tensor: Tensor | None) -> None:
        """Store a packed tensor: a parameter that learns nothing, as what splits a model over devices, or leaves a part
        on the disk, places parameters, and by default has the buffers of all layers on one device."""
        self.register_parameter(name, None if tensor is None else nn.Parameter(tensor, requires_grad=False))

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """A stand-in; the weight is `dense_weight()`."""
        return CodedWeight((self.out_features, self.in_features), next(self.parameters()).device)

    @abstractmethod
    def dense_weight(self) -> Float[Tensor, "out in"]:
        """The weight in float32."""

    def to_dense(self) -> QuantLinear:
        """The same layer unpacked once, weight and bias in float32: large, fast."""
        return QuantLinear(
            self.dense_weight(), None if self.bias is None else self.bias.detach().float(), self.rounding
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.rounding is None else self.rounding(x)
        if not (torch.is_grad_enabled() and x.requires_grad):
            return F.linear(x, self.dense_weight().to(x.dtype), self.bias)
        product = _Product.apply(x, self)
        return product if self.bias is None else product + self.bias

    def extra_repr(self) -> str:
        size = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{size}, scheme={self.scheme}, rounding={self.rounding}"


class PackedLinear(Packed):
    """A linear layer on packed weights, which are unpacked at every call: small, not fast.

    Tensors: `codes` uint8 [out, ceil(in * bits / 8)], or as three and five levels are packed; `scale` int16 [out, g],
    the bits of a float16; `zero` uint8 [out, ceil(g * bits / 8)], likewise, None if symmetric; `left` int16 [out, k]
    and `right` int16 [k, in], the bits of float16 factors, None without. They are zero until a checkpoint is loaded.

    Args:
        in_features: Columns of the weight.
        out_features: Rows of the weight.
        scheme: Format of the weight, 1 to 8 bits.
        bias: Whether there is a bias, a float parameter.
        rounding: Applied to the input, or None.
        device: Of all tensors.
        dtype: Of the bias.
        factor_rank: k; 0 for no factors.
        groups: g; None for as many as the scheme makes of `in_features`.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    left: Tensor | None
    right: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scheme: IntScheme,
        bias: bool,
        rounding: Rounding | None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        factor_rank: int = 0,
        groups: int | None = None,
    ) -> None:
        super().__init__(in_features, out_features, scheme, bias, rounding, device, dtype)
        groups = scheme.groups(in_features) if groups is None else groups

        def zeros(columns: int, kind: torch.dtype, rows: int = out_features) -> Tensor:
            return torch.zeros(rows, columns, dtype=kind, device=device)

        self.hold("codes", zeros(stored_bytes(in_features, scheme.levels), torch.uint8))
        self.hold("scale", zeros(groups, STORED_HALF))
        points = None if scheme.symmetric else zeros(stored_bytes(groups, scheme.levels), torch.uint8)
        self.hold("zero", points)
        self.hold("left", zeros(factor_rank, STORED_HALF) if factor_rank else None)
        self.hold("right", zeros(in_features, STORED_HALF, factor_rank) if factor_rank else None)

    def dense_weight(self) -> Float[Tensor, "out in"]:
        return dense_from_packed(dict(self.named_parameters()), self.in_features, self.scheme)
