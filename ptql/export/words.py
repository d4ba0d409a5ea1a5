"""Streams of codes as 32-bit words, as serving formats have them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Int32, UInt8
from torch import Tensor

from ptql.functional.packing import pack


def words(codes: UInt8[Tensor, "rows n"], bits: int) -> Int32[Tensor, "rows words"]:
    """Each row of codes as a dense little-endian bit stream of ceil(n * bits / 32) words.

    The layout of compressed-tensors from version 0.18 on, and of GPTQ; codes may cross words.
    """
    stream = pack(codes, bits)
    return F.pad(stream, (0, -stream.shape[1] % 4)).contiguous().view(torch.int32)
