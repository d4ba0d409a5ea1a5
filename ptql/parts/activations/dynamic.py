"""Dynamic rounding of activations: each token has its own range, found when it passes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ptql.functional.affine import fake_quantize_tokens
from ptql.kernels.tokens import round_tokens
from ptql.nn.quant_linear import Rounding
from ptql.parts.activations.base import ActivationQuantizer
from ptql.recipe import UNQUANTISED, ActivationScheme


@dataclass(frozen=True)
class TokenRounding:
    """Rounds each last-dimension vector to `bits` bits on its own min-max grid, with a zero point or without."""

    bits: int
    symmetric: bool = False
    kernels: bool = field(default=False, compare=False)
    """One kernel forward and one backward; under autocast it returns the dtype that products are computed in."""

    def __call__(self, x: Tensor) -> Tensor:
        if not self.kernels:
            return fake_quantize_tokens(x, self.bits, self.symmetric)
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        return round_tokens(x, self.bits, dtype, self.symmetric)


class DynamicTokens(ActivationQuantizer):
    """Dynamic, per token, asymmetric unless the scheme says otherwise, at the input of every linear layer and at q, k (after RoPE) and v.

    The rule of OmniQuant, LRQuant and ABQ-LLM. One difference: for OPT the originals round q, k and v before
    the heads are split, so over all heads of a token; here every family rounds per token and head.

    Args:
        qkv: Round queries, keys and values as well; keys and values in any case where their bits are given apart.
    """

    def __init__(self, qkv: bool = True) -> None:
        self.qkv = qkv

    def for_linear(self, name: str, scheme: ActivationScheme) -> Rounding | None:
        return TokenRounding(scheme.bits, scheme.symmetric) if scheme.quantised else None

    def for_attention(self, scheme: ActivationScheme) -> Rounding | None:
        return TokenRounding(scheme.bits) if self.qkv and scheme.quantised else None

    def for_cache(self, scheme: ActivationScheme) -> Rounding | None:
        wanted = self.qkv or scheme.kv_bits is not None
        return TokenRounding(scheme.cache_bits) if wanted and scheme.cache_bits < UNQUANTISED else None

    def fused(self, rounding: Rounding) -> Rounding:
        return replace(rounding, kernels=True) if isinstance(rounding, TokenRounding) else rounding
