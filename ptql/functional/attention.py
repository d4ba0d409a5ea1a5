"""Attention probabilities of a sample of queries, and how far two such maps are apart (ABQ-LLM's AKL)."""

# axes: heads = of queries, or 1 for their mean; kv = heads of keys; rows = queries that are looked at; size = of a head

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor

TINY = 1e-10
"""Probabilities below this count as this where their logarithm is taken."""


def attention_probabilities(
    query: Float[Tensor, "batch heads queries size"],
    key: Float[Tensor, "batch kv keys size"],
    rows: int,
    mask: Shaped[Tensor, "#batch #heads queries keys"] | None = None,
    causal: bool = True,
    scaling: float | None = None,
    softcap: float | None = None,
) -> Float[Tensor, "batch heads rows keys"]:
    """Each key's share in what `rows` of the queries see, after the softmax; float32 at least.

    The queries are evenly spaced, and the last one is among them: the r-th of R, from 0, is number
    ((r + 1) * queries) // R - 1. Only their scores are ever in memory. A key that is not seen has exactly 0; where none
    is, all have the same.

    Args:
        query: After RoPE.
        key: After RoPE; a head of keys serves neighbouring heads of queries.
        rows: At most as many as there are queries.
        mask: True where a key is seen, or what is added to scores.
        causal: Without a mask, no query sees a later key.
        scaling: Of scores; one over the root of a head's size by default.
        softcap: Scores are squashed into (-softcap, softcap) by tanh, before masking.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    batch, heads, queries, size = query.shape
    kv, keys = key.shape[1:3]
    # computed on the device: a copy from the host could not be captured
    at = torch.arange(1, rows + 1, device=query.device) * queries // rows - 1
    if rows < queries:
        query = query.index_select(2, at)
        mask = None if mask is None else mask.index_select(2, at)
    query = query.to(dtype) * (size**-0.5 if scaling is None else scaling)
    by_key_head = query.reshape(batch, kv, heads // kv * rows, size) @ key.to(dtype).transpose(2, 3)
    scores = by_key_head.view(batch, heads, rows, keys)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    lowest = torch.finfo(dtype).min  # not -inf, as a query that sees nothing would give nan
    if mask is None and causal:
        mask = torch.arange(keys, device=query.device) <= at[:, None]
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, lowest)
    elif mask is not None:
        scores = (scores + mask).clamp_min(lowest)
    return scores.softmax(-1)


def symmetric_divergence(
    made: Float[Tensor, "batch heads rows keys"], wanted: Float[Tensor, "batch heads rows keys"]
) -> Float[Tensor, ""]:
    """KL(P || Q) + KL(Q || P) of each row's probabilities, sum over keys of (P - Q)(log P - log Q), mean over the rest.

    Keys that neither sees are 0 in both and add nothing.
    """
    p, q = made.float(), wanted.float()
    return ((p - q) * (p.clamp_min(TINY).log() - q.clamp_min(TINY).log())).sum(-1).mean()


def softmaxed_divergence(
    made: Float[Tensor, "batch heads rows keys"], wanted: Float[Tensor, "batch heads rows keys"]
) -> Float[Tensor, ""]:
    """The same as ABQ-LLM's code has it: probabilities are taken for scores and go through a softmax once more, and the
    mean is over keys too, also those that are not seen. Of 2048 keys, some 1e-7 of the divergence remains."""
    p, q = made.float(), wanted.float()
    # torch is about to give its own `mean` another meaning
    there = F.kl_div(q.log_softmax(-1), p.softmax(-1), reduction="none").mean()
    back = F.kl_div(p.log_softmax(-1), q.softmax(-1), reduction="none").mean()
    return there.abs() + back.abs()
