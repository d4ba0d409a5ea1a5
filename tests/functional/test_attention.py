"""Attention probabilities and their divergences against loops in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ptql.functional.attention import attention_probabilities, softmaxed_divergence, symmetric_divergence

QUERIES = 9
HEADS = [(4, 4), (4, 2), (6, 1), (1, 1)]


def queries_and_keys(heads: int, kv: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    torch.manual_seed(heads + kv)
    return torch.randn(2, heads, QUERIES, 8, dtype=dtype), torch.randn(2, kv, QUERIES, 8, dtype=dtype)


def loop(query: Tensor, key: Tensor, at: list[int], seen: Tensor, scaling: float, softcap: float | None) -> Tensor:
    """[batch, heads, rows, keys], one score at a time; `seen` is [batch, queries, keys] of true and false."""
    batch, heads, _, _ = query.shape
    out = torch.zeros(batch, heads, len(at), key.shape[2], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for row, t in enumerate(at):
                scores = {}
                for k in range(key.shape[2]):
                    if seen[b, t, k]:
                        score = scaling * (query[b, h, t].double() @ key[b, h // (heads // key.shape[1]), k].double())
                        scores[k] = score.item() if softcap is None else softcap * math.tanh(score / softcap)
                whole = sum(math.exp(score) for score in scores.values())
                for k, score in scores.items():
                    out[b, h, row, k] = math.exp(score) / whole
    return out


def window(width: int) -> Tensor:
    """[2, queries, keys]: a sliding window; the second sample has two padding tokens in front."""
    age = torch.arange(QUERIES)[:, None] - torch.arange(QUERIES)
    seen = ((age >= 0) & (age < width)).expand(2, -1, -1).clone()
    seen[1, 2:, :2] = False
    return seen


def as_numbers(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))


@pytest.mark.parametrize("rows", [1, 2, 4, 5, QUERIES])
@pytest.mark.parametrize(("heads", "kv"), HEADS)
def test_probabilities_are_a_loop(heads: int, kv: int, rows: int) -> None:
    query, key = queries_and_keys(heads, kv)
    at = [(r + 1) * QUERIES // rows - 1 for r in range(rows)]
    assert at[-1] == QUERIES - 1
    found = attention_probabilities(query, key, rows)
    expected = loop(query, key, at, window(QUERIES)[:1].expand(2, -1, -1), 8**-0.5, None)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    assert ((found == 0) == (expected == 0)).all()  # exactly 0 where nothing is seen, only there


@pytest.mark.parametrize("kind", ["bool", "numbers"])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("width", [3, QUERIES])
@pytest.mark.parametrize("rows", [4, QUERIES])
def test_masks_caps_and_scaling_are_a_loop(rows: int, width: int, softcap: float | None, kind: str) -> None:
    query, key = queries_and_keys(4, 2)
    seen = window(width)
    mask = seen[:, None] if kind == "bool" else as_numbers(seen)[:, None]
    at = [(r + 1) * QUERIES // rows - 1 for r in range(rows)]
    found = attention_probabilities(query, key, rows, mask, scaling=2.0, softcap=softcap)
    expected = loop(query, key, at, seen, 2.0, softcap)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    assert ((found == 0) == (expected == 0)).all()


def test_without_causality_every_key_is_seen() -> None:
    query, key = queries_and_keys(4, 2)
    found = attention_probabilities(query, key, QUERIES, causal=False)
    everything = torch.ones(2, QUERIES, QUERIES, dtype=torch.bool)
    expected = loop(query, key, list(range(QUERIES)), everything, 8**-0.5, None)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 3, 4, 8])
@pytest.mark.parametrize("options", [{}, {"softcap": 2.0, "scaling": 0.7}, {"mask": window(4)[:, None]}], ids=str)
def test_sampled_rows_are_rows_of_the_whole_map(rows: int, options: dict[str, Any]) -> None:
    query, key = queries_and_keys(4, 2)
    at = [(r + 1) * QUERIES // rows - 1 for r in range(rows)]
    whole = attention_probabilities(query, key, QUERIES, **options)
    torch.testing.assert_close(attention_probabilities(query, key, rows, **options), whole[:, :, at])


@pytest.mark.parametrize("kind", ["bool", "numbers"])
def test_a_query_that_sees_nothing_gives_numbers(kind: str) -> None:
    query, key = queries_and_keys(4, 2)
    seen = window(QUERIES)
    seen[0, 0] = False
    found = attention_probabilities(query, key, QUERIES, seen[:, None] if kind == "bool" else as_numbers(seen)[:, None])
    torch.testing.assert_close(found[0, :, 0], torch.full((4, QUERIES), 1 / QUERIES))
    assert found.isfinite().all()


def test_probabilities_are_in_float32_at_least() -> None:
    query, key = queries_and_keys(4, 2, torch.bfloat16)
    found = attention_probabilities(query, key, 4)
    assert found.dtype == torch.float32
    assert torch.equal(found, attention_probabilities(query.float(), key.float(), 4))
    assert attention_probabilities(query.double(), key.double(), 4).dtype == torch.float64


# Divergences


def maps(noise: float = 1.0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Scores of two causal maps [2, 3, 5, 7], and the mask."""
    torch.manual_seed(0)
    scores = 3 * torch.randn(2, 3, 5, 7, dtype=dtype)
    hidden = torch.arange(7) > torch.tensor([0, 2, 3, 5, 6])[:, None]
    return scores + noise * torch.randn_like(scores), scores, hidden


def shares(scores: Tensor, hidden: Tensor) -> Tensor:
    return scores.masked_fill(hidden, float("-inf")).softmax(-1)


def loop_symmetric(p: Tensor, q: Tensor) -> float:
    rows = []
    for a, b in zip(p.double().flatten(0, -2).tolist(), q.double().flatten(0, -2).tolist(), strict=True):
        pairs = [(x, y) for x, y in zip(a, b, strict=True) if x or y]
        rows.append(sum(x * math.log(x / y) + y * math.log(y / x) for x, y in pairs))
    return sum(rows) / len(rows)


def loop_softmaxed(p: Tensor, q: Tensor) -> float:
    """As torch's `kl_div(log_softmax(...), softmax(...), reduction="mean")`, both ways, with absolute values."""
    there, back = [], []
    for a, b in zip(p.double().flatten(0, -2).tolist(), q.double().flatten(0, -2).tolist(), strict=True):
        x, y = ([math.exp(v) / sum(math.exp(w) for w in row) for v in row] for row in (a, b))
        there += [s * (math.log(s) - math.log(t)) for s, t in zip(x, y, strict=True)]
        back += [t * (math.log(t) - math.log(s)) for s, t in zip(x, y, strict=True)]
    return abs(sum(there) / len(there)) + abs(sum(back) / len(back))


@pytest.mark.parametrize("noise", [0.01, 0.3, 3.0])
def test_the_symmetric_divergence_is_a_loop(noise: float) -> None:
    made, wanted, hidden = maps(noise)
    p, q = shares(made, hidden), shares(wanted, hidden)
    assert symmetric_divergence(p, q).item() == pytest.approx(loop_symmetric(p, q), rel=1e-3)
    assert symmetric_divergence(p, q).item() == pytest.approx(symmetric_divergence(q, p).item())


@pytest.mark.parametrize("noise", [0.3, 3.0])
def test_the_softmaxed_divergence_is_a_loop(noise: float) -> None:
    made, wanted, hidden = maps(noise)
    p, q = (shares(scores, hidden).mean(1, keepdim=True) for scores in (made, wanted))
    assert softmaxed_divergence(p, q).item() == pytest.approx(loop_softmaxed(p, q), rel=1e-3)


@pytest.mark.parametrize("divergence", [symmetric_divergence, softmaxed_divergence])
def test_equal_maps_do_not_diverge_and_others_do(divergence: Any) -> None:
    made, wanted, hidden = maps()
    p, q = shares(made, hidden), shares(wanted, hidden)
    assert divergence(q, q.clone()).item() == pytest.approx(0, abs=1e-8)  # logarithms are rounded in two ways
    assert divergence(p, q).item() > 0
    assert divergence(p.bfloat16(), q.bfloat16()).dtype == torch.float32


def test_an_exact_zero() -> None:
    _, wanted, hidden = maps()
    assert symmetric_divergence(shares(wanted, hidden), shares(wanted, hidden)).item() == 0


def test_keys_that_neither_sees_add_nothing() -> None:
    made, wanted, hidden = maps()
    p, q = shares(made, hidden), shares(wanted, hidden)
    longer = [torch.cat([x, torch.zeros(2, 3, 5, 4)], -1) for x in (p, q)]
    torch.testing.assert_close(symmetric_divergence(*longer), symmetric_divergence(p, q))
    assert softmaxed_divergence(*longer) < 0.8 * softmaxed_divergence(p, q)  # there they do


def test_gradients_are_those_of_the_definition_and_finite() -> None:
    made, wanted, hidden = maps(dtype=torch.float64)
    made[0, 0, 4] *= 60  # shares that are 0 in float32
    narrow = made.float().requires_grad_()
    (grad,) = torch.autograd.grad(symmetric_divergence(shares(narrow, hidden), shares(wanted, hidden).float()), narrow)
    assert grad.isfinite().all()
    assert (grad[..., hidden] == 0).all()
    wide = made.requires_grad_()
    p, q = (shares(x, hidden).masked_fill(hidden, 1.0) for x in (wide, wanted))
    value = (p * (p / q).log() + q * (q / p).log()).sum(-1).mean()
    (expected,) = torch.autograd.grad(value, wide)
    usual = torch.ones(2, 3, 5, dtype=torch.bool)
    usual[0, 0, 4] = False
    torch.testing.assert_close(grad.double()[usual], expected[usual], rtol=1e-3, atol=1e-6)


def test_opposite_maps_are_far_apart_and_no_further() -> None:
    p, q = (torch.zeros(1, 1, 1, 4) for _ in range(2))
    p[..., 0], q[..., 3] = 1, 1
    p.requires_grad_()
    apart = symmetric_divergence(p, q)
    assert apart.item() == pytest.approx(2 * math.log(1e10), rel=1e-3)
    apart.backward()
    assert p.grad is not None
    assert p.grad.isfinite().all()


def test_what_the_code_of_abq_llm_leaves_of_a_clear_shift() -> None:
    """A first token that 0.6 of 2048 keys' attention goes to, and 0.4 of it after rounding: ten million times less."""
    maps = []
    for share in (0.6, 0.4):
        row = torch.full((1, 1, 1, 2048), (1 - share) / 2047)
        row[..., 0] = share
        maps.append(row)
    exact, coded = symmetric_divergence(*maps).item(), softmaxed_divergence(*maps).item()
    assert exact == pytest.approx(0.162, abs=1e-3)
    assert coded == pytest.approx(2e-8, rel=0.5)
