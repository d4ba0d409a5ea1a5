"""What the largest |input| of each channel says about outliers. `channels`: inputs of a linear layer."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

Peaks = Float[Tensor, " channels"]


def outlier_ratio(peaks: Peaks) -> float:
    """Largest over median channel, among those that are finite and not zero; nan if there is none."""
    alive = peaks[peaks.isfinite() & (peaks > 0)].double()
    return (alive.max() / alive.median()).item() if len(alive) else math.nan


def largest_of_bins(peaks: Peaks, most: int) -> list[float]:
    """The largest value of each of at most `most` runs of neighbouring channels: no outlier is lost."""
    size = max(1, math.ceil(len(peaks) / most))
    return [part.max().item() for part in peaks.float().split(size)] if len(peaks) else []


def log_limits(*profiles: list[float]) -> list[float]:
    """The values that a logarithmic axis should span: all, but no less than a ten-thousandth of the largest."""
    finite = [v for values in profiles for v in values if 0 < v < math.inf]
    return [max(v, max(finite) * 1e-4) for v in finite]


def not_finite(peaks: Peaks) -> int:
    """How many channels held inf or nan."""
    return int(torch.count_nonzero(~peaks.isfinite()))
