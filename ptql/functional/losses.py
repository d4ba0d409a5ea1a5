"""Distances between a block's quantised and full-precision outputs."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def mean_squared_error(
    output: Float[Tensor, "batch tokens hidden"], target: Float[Tensor, "batch tokens hidden"]
) -> Float[Tensor, ""]:
    """Mean over all elements of (output - target)^2."""
    return F.mse_loss(output.float(), target.float())


def negative_log_cosine(
    output: Float[Tensor, "batch tokens hidden"], target: Float[Tensor, "batch tokens hidden"]
) -> Float[Tensor, ""]:
    """-log of |mean over batch and tokens of the cosine over hidden|: LRQuant's angular loss (ACL 2024).

    Zero for outputs that are positive multiples of the target; every token weighs the same, however large it is.
    """
    cosine = F.cosine_similarity(output.float(), target.float(), dim=-1, eps=1e-8)
    return -cosine.mean().abs().log()


def relative_squared_error(
    output: Float[Tensor, "batch tokens hidden"], target: Float[Tensor, "batch tokens hidden"]
) -> Float[Tensor, ""]:
    """Mean over tokens of |output - target|^2 / |target|^2.

    A mean squared error in which every token weighs the same: the few tokens with massive activations (the first
    one, above all) otherwise are nearly all of it.
    """
    error = (output.float() - target.float()).square().sum(-1)
    return (error / target.float().square().sum(-1).clamp_min(1e-12)).mean()


def kl_divergence(
    logits: Float[Tensor, "batch tokens vocabulary"], expected: Float[Tensor, "batch tokens vocabulary"]
) -> Float[Tensor, ""]:
    """Mean over tokens of the Kullback-Leibler divergence of `logits` from log-probabilities `expected`, in nats."""
    return (expected.exp() * (expected - logits.float().log_softmax(-1))).sum(-1).mean()
