"""A linear layer that holds signs of its weights, and codes of the input channels that matter most (PTQ1.61)."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from ptql.functional import affine
from ptql.functional.packing import pack, packed_bytes, unpack
from ptql.nn.packed_linear import STORED_HALF, Packed, stored_half
from ptql.nn.quant_linear import Rounding
from ptql.recipe import IntScheme

# axes: out, in = weight rows, columns; s = salient channels, n = all others


def salient_tensors(
    positive: UInt8[Tensor, "out n"],
    gain: Float[Tensor, "out 1"],
    mean: Float[Tensor, "out 1"],
    columns: Float[Tensor, "1 n"],
    salient: Bool[Tensor, " in"] | None = None,
    codes: tuple[UInt8[Tensor, "out s"], Float[Tensor, "out 1"], UInt8[Tensor, "out 1"]] | None = None,
    bits: int = 4,
) -> dict[str, Tensor]:
    """What is stored of one linear layer; keys as in `SalientLinear`.

    Args:
        positive: 1 for the sign plus, 0 for minus.
        gain: Of the signs of a row.
        mean: What is added to them.
        columns: Factors of both.
        salient: Which channels have codes; None for none.
        codes: Of those channels, with scales and zero points, as `affine.encode` gives them.
        bits: Of a code.
    """
    stored = {"signs": pack(positive, 1)}
    stored |= {name: stored_half(t) for name, t in (("gain", gain), ("mean", mean), ("columns", columns))}
    if salient is not None and codes is not None:
        code, scale, zero = codes
        stored |= {"mask": pack(salient.to(torch.uint8)[None], 1), "codes": pack(code, bits)}
        stored |= {"scale": stored_half(scale), "zero": pack(zero.T.contiguous(), bits)}
    return stored


def dense_from_salient(
    tensors: dict[str, Tensor], in_features: int, scheme: IntScheme
) -> Float[Tensor, "out {in_features}"]:
    """The float32 weight that `salient_tensors` stands for.

    Raises:
        ValueError: The tensors are too long or too short for `in_features` and `scheme`.
    """
    few, bits = scheme.salient_columns(in_features), scheme.salient_bits
    gain, mean, columns = (tensors[name].view(torch.float16).float() for name in ("gain", "mean", "columns"))
    signs = unpack(tensors["signs"], 1, in_features - few).float() * 2 - 1
    others = (gain * signs + mean) * columns
    if not few:
        return others
    mask = unpack(tensors["mask"], 1, in_features)[0].bool()
    codes, scale = unpack(tensors["codes"], bits, few), tensors["scale"].view(torch.float16)
    zero = unpack(tensors["zero"], bits, len(codes)).T
    both = torch.cat([others, affine.dequantize(codes, scale, zero, 2**bits, few)], 1)
    place = torch.where(mask, in_features - few - 1 + mask.cumsum(0), mask.logical_not().cumsum(0) - 1)
    return both.index_select(1, place)


class SalientLinear(Packed):
    """A linear layer on signs and codes, which are unpacked at every call: small, not fast.

    Tensors, the float16 ones as int16, their bits: `signs` uint8 [out, ceil(n / 8)], `gain` and `mean` [out, 1],
    `columns` [1, n]: of channels that are not salient, in their order. Of salient channels, None where there are none:
    `mask` uint8 [1, ceil(in / 8)] says which they are, `codes` uint8 [out, ceil(s * bits / 8)], `scale` [out, 1],
    `zero` uint8 [1, ceil(out * bits / 8)]. They are zero until a checkpoint is loaded.

    Args:
        in_features: Columns of the weight.
        out_features: Rows of the weight.
        scheme: Format of the weight, with `salient`.
        bias: Whether there is a bias, a float parameter.
        rounding: Applied to the input, or None.
        device: Of all tensors.
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
        super().__init__(in_features, out_features, scheme, bias, rounding, device, dtype)
        few, bits = scheme.salient_columns(in_features), scheme.salient_bits
        others = in_features - few

        def zeros(rows: int, columns: int, kind: torch.dtype = torch.uint8) -> Tensor:
            return torch.zeros(rows, columns, dtype=kind, device=device)

        self.hold("signs", zeros(out_features, packed_bytes(others, 1)))
        self.hold("gain", zeros(out_features, 1, STORED_HALF))
        self.hold("mean", zeros(out_features, 1, STORED_HALF))
        self.hold("columns", zeros(1, others, STORED_HALF))
        self.hold("mask", zeros(1, packed_bytes(in_features, 1)) if few else None)
        self.hold("codes", zeros(out_features, packed_bytes(few, bits)) if few else None)
        self.hold("scale", zeros(out_features, 1, STORED_HALF) if few else None)
        self.hold("zero", zeros(1, packed_bytes(out_features, bits)) if few else None)

    def dense_weight(self) -> Float[Tensor, "out in"]:
        return dense_from_salient(dict(self.named_parameters()), self.in_features, self.scheme)
