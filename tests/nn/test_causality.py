"""No token sees a later one, whatever is rounded; and attention against loops over heads and tokens."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ptql.families import family_of
from ptql.functional.affine import fake_quantize_tokens
from ptql.nn import attention
from ptql.nn.attention import CACHE_ROUNDING, QUERY_ROUNDING, rounded_attention
from ptql.nn.student import biased_linears, call_block, make_student
from ptql.parts.activations import DynamicTokens, TokenRounding
from ptql.parts.transforms import Smooth
from ptql.recipe import ActivationScheme
from tests.models import CONFIGS, WINDOW, block_calls, blocks_of, random_model, some_ids

TOKENS = 20
SLIDING = [  # (configuration, block) where a token is seen by the next seven only
    ("mistral", 0),
    ("mistral", 1),
    ("qwen2", 1),
    ("qwen3_biased", 1),
    ("gemma2", 0),
    ("gemma3", 0),
    ("phi3", 0),
    ("phi3", 1),
    ("phi3_longrope", 1),
]


def student_of(name: str, index: int = 1) -> tuple[Any, Tensor, dict[str, Any]]:
    """A block with 4-bit activations and added biases, its input [3, 20, 48] and its context."""
    attention.register()
    config = CONFIGS[name]
    model = random_model(config)
    model.set_attn_implementation(attention.NAME)
    hidden, context, _ = block_calls(model, some_ids(tokens=TOKENS))[index]
    block, layout = blocks_of(model)[index], family_of(config.model_type).layout(config)
    added = Smooth(shift="all").added_biases(layout, biased_linears(block, layout))
    return make_student(block, layout, added, DynamicTokens(), ActivationScheme(4)), hidden, context


@pytest.mark.parametrize("t", [0, 1, 7, TOKENS - 1])
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_a_token_changes_nothing_before_it_and_everything_from_it_on(name: str, t: int) -> None:
    student, hidden, context = student_of(name)
    output = call_block(student, hidden, context)
    changed = hidden.clone()
    changed[1, t] += 3 * torch.randn(48, generator=torch.Generator().manual_seed(t))
    again = call_block(student, changed, context)
    assert torch.equal(again[:, :t], output[:, :t])
    assert torch.equal(again[[0, 2]], output[[0, 2]])  # nor anything of another sample
    differs = (again[1] != output[1]).any(-1)
    seen = WINDOW if (name, 1) in SLIDING else TOKENS
    assert differs[t : t + seen].float().mean() > 0.7  # some codes stay
    assert differs[t]
    assert not differs[t + seen :].any()


@pytest.mark.parametrize(("name", "index"), SLIDING)
@torch.no_grad()
def test_a_token_is_seen_within_the_window_only(name: str, index: int) -> None:
    student, hidden, context = student_of(name, index)
    output = call_block(student, hidden, context)
    changed = hidden.clone()
    changed[1, 3] += 3 * torch.randn(48, generator=torch.Generator().manual_seed(0))
    differs = (call_block(student, changed, context) != output)[1].any(-1)
    assert not differs[:3].any()
    assert differs[3 : 3 + WINDOW].float().mean() > 0.7
    assert not differs[3 + WINDOW :].any()


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_queries_keys_and_values_are_rounded(name: str) -> None:
    student, hidden, context = student_of(name)
    module = student.get_submodule("self_attn")
    rounded = call_block(student, hidden, context)
    for which in (QUERY_ROUNDING, CACHE_ROUNDING):
        assert getattr(module, which) == TokenRounding(4)
        setattr(module, which, None)
        assert (call_block(student, hidden, context) != rounded).any(-1).double().mean() > 0.5
        setattr(module, which, TokenRounding(4))


# The attention function by itself


def loop_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scaling: float,
    causal: bool,
    softcap: float | None = None,
    window: int | None = None,
) -> Tensor:
    """[batch, tokens, heads, size] in float64, one query at a time."""
    batch, heads, tokens, size = q.shape
    share = heads // k.shape[1]
    out = torch.zeros(batch, tokens, heads, size, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            keys, values = k[b, h // share].double(), v[b, h // share].double()
            for t in range(tokens):
                end = k.shape[2] - tokens + t + 1 if causal else k.shape[2]
                seen = range(0 if window is None else max(0, end - window), end)
                scores = [scaling * (q[b, h, t].double() @ keys[j]).item() for j in seen]
                if softcap is not None:
                    scores = [softcap * math.tanh(s / softcap) for s in scores]
                peak = max(scores)
                weights = [math.exp(s - peak) for s in scores]
                for j, weight in zip(seen, weights, strict=True):
                    out[b, t, h] += weight / sum(weights) * values[j]
    return out


def qkv(heads: int, kv_heads: int, queries: int = 9, keys: int = 9, batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(heads + kv_heads)
    return (
        torch.randn(batch, heads, queries, 8),
        torch.randn(batch, kv_heads, keys, 8),
        torch.randn(batch, kv_heads, keys, 8),
    )


def module(bits: int | None = None, causal: bool = True) -> Any:
    """What `rounded_attention` reads of an attention module."""
    settings: dict[str, Any] = {"is_causal": causal}
    return SimpleNamespace(**settings, **dict.fromkeys((QUERY_ROUNDING, CACHE_ROUNDING), bits and TokenRounding(bits)))


def attend(*args: Any, **kwargs: Any) -> Tensor:
    # jaxtyping's check of `nn.Module` is switched off: a namespace stands for the module.
    return getattr(rounded_attention, "__wrapped__", rounded_attention)(*args, **kwargs)[0]


HEADS = [(4, 4), (4, 2), (6, 1), (1, 1)]


@pytest.mark.parametrize("bits", [None, 4, 8])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_attention_is_a_loop(heads: int, kv_heads: int, bits: int | None) -> None:
    q, k, v = qkv(heads, kv_heads)
    out = attend(module(bits), q, k, v, None, scaling=0.3)
    q, k, v = (x if bits is None else fake_quantize_tokens(x, bits) for x in (q, k, v))
    assert out.shape == (3, 9, heads, 8)
    torch.testing.assert_close(out.double(), loop_attention(q, k, v, 0.3, causal=True), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("t", [0, 4, 8])
def test_attention_is_causal(heads: int, kv_heads: int, t: int) -> None:
    q, k, v = qkv(heads, kv_heads)
    before = attend(module(4), q, k, v, None)
    for x in (q, k, v):
        x[1, :, t] = 5 * torch.randn(x.shape[1], 8)
    after = attend(module(4), q, k, v, None)
    assert torch.equal(after[:, :t], before[:, :t])
    assert torch.equal(after[[0, 2]], before[[0, 2]])
    assert (after[1, t:] != before[1, t:]).any(-1).all()


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("spare", [0, 5])
def test_a_mask_takes_the_place_of_causality(kind: str, spare: int) -> None:
    """A static cache's mask may be longer than the keys."""
    q, k, v = qkv(4, 2)
    mask = torch.ones(9, 9 + spare, dtype=torch.bool).tril()[None, None].expand(3, 1, -1, -1).clone()
    expected = attend(module(4), q, k, v, None)
    if kind == "float":
        mask = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
    torch.testing.assert_close(attend(module(4), q, k, v, mask), expected, rtol=0, atol=1e-6)
    everything = torch.ones(3, 1, 9, 9 + spare, dtype=torch.bool)
    loop = loop_attention(*(fake_quantize_tokens(x, 4) for x in (q, k, v)), 8**-0.5, causal=False)
    torch.testing.assert_close(attend(module(4), q, k, v, everything).double(), loop, rtol=0, atol=1e-5)


def test_one_query_with_a_cache_sees_all_keys() -> None:
    q, k, v = qkv(4, 2, queries=1)
    out = attend(module(), q, k, v, None, scaling=0.3)
    torch.testing.assert_close(out.double(), loop_attention(q, k, v, 0.3, causal=True), rtol=0, atol=1e-5)


def test_causality_can_be_switched_off_by_module_and_by_argument() -> None:
    q, k, v = qkv(4, 2)
    loop = loop_attention(q, k, v, 8**-0.5, causal=False)
    for out in (
        attend(module(causal=False), q, k, v, None),
        attend(module(), q, k, v, None, is_causal=False),
    ):
        torch.testing.assert_close(out.double(), loop, rtol=0, atol=1e-5)


def test_each_head_of_each_token_is_rounded_by_itself() -> None:
    q, k, v = qkv(4, 4)
    before = attend(module(2), q, k, v, None)
    for x in (q, k, v):
        x[:, 1] *= 100  # one head's range leaves the others' alone
    after = attend(module(2), q, k, v, None)
    kept = [0, 2, 3]
    assert torch.equal(after[:, :, kept], before[:, :, kept])
    assert not torch.equal(after[:, :, 1], before[:, :, 1])


# Soft-capped scores, windows, and what is not known


def window_mask(queries: int, keys: int, window: int, kind: str) -> Tensor:
    """[1, 1, queries, keys], of true and false or of numbers; the last query sees the last key."""
    age = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
    mask = ((age >= 0) & (age < window))[None, None]
    return mask if kind == "bool" else torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))


@pytest.mark.parametrize("softcap", [None, 0.5, 3.0, 50.0])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_capped_attention_is_a_loop(heads: int, kv_heads: int, softcap: float | None) -> None:
    q, k, v = qkv(heads, kv_heads)
    for scaling in (None, 2.0):
        out = attend(module(4), q, k, v, None, scaling=scaling, softcap=softcap)
        rounded = [fake_quantize_tokens(x, 4) for x in (q, k, v)]
        loop = loop_attention(*rounded, scaling or 8**-0.5, causal=True, softcap=softcap)
        torch.testing.assert_close(out.double(), loop, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("queries", [9, 3, 1])
@pytest.mark.parametrize("window", [1, 4, 9])
def test_a_window_in_the_mask_is_a_loop(window: int, queries: int, softcap: float | None, kind: str) -> None:
    q, k, v = qkv(4, 2, queries=queries)
    mask = window_mask(queries, 9, window, kind)
    out = attend(module(), q, k, v, mask, scaling=2.0, softcap=softcap, sliding_window=window)
    loop = loop_attention(q, k, v, 2.0, causal=True, softcap=softcap, window=window)
    torch.testing.assert_close(out.double(), loop, rtol=0, atol=1e-5)


def test_capped_attention_keeps_float64_and_answers_in_its_inputs_dtype() -> None:
    q, k, v = (x.double() for x in qkv(4, 2))
    out = attend(module(), q, k, v, None, scaling=2.0, softcap=1.5)
    loop = loop_attention(q, k, v, 2.0, causal=True, softcap=1.5)
    torch.testing.assert_close(out, loop, rtol=0, atol=1e-13)
    half = attend(module(), q.bfloat16(), k.bfloat16(), v.bfloat16(), None, scaling=2.0, softcap=1.5)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), loop, rtol=0, atol=0.1)


def test_capped_attention_can_see_everything_and_one_query_all_keys() -> None:
    q, k, v = qkv(4, 2)
    loop = loop_attention(q, k, v, 2.0, causal=False, softcap=1.5)
    for found in (
        attend(module(causal=False), q, k, v, None, scaling=2.0, softcap=1.5),
        attend(module(), q, k, v, None, scaling=2.0, softcap=1.5, is_causal=False),
    ):
        torch.testing.assert_close(found.double(), loop, rtol=0, atol=1e-5)
    last = attend(module(), q[:, :, -1:], k, v, None, scaling=2.0, softcap=1.5)
    torch.testing.assert_close(last[:, 0].double(), loop[:, -1], rtol=0, atol=1e-5)


def test_a_padding_token_that_sees_nothing_spoils_nothing() -> None:
    q, k, v = qkv(4, 2)
    mask = window_mask(9, 9, 9, "bool").clone()
    mask[..., :2] = False  # two padding tokens in front
    out = attend(module(), q, k, v, mask, softcap=2.0)
    assert out.isfinite().all()
    loop = loop_attention(q[:, :, 2:], k[:, :, 2:], v[:, :, 2:], 8**-0.5, causal=True, softcap=2.0)
    torch.testing.assert_close(out[:, 2:].double(), loop, rtol=0, atol=1e-5)


def test_dropout_takes_shares_of_capped_attention() -> None:
    q, k, v = qkv(4, 2)
    torch.manual_seed(0)
    out = attend(module(), q, k, v.abs(), None, softcap=2.0, dropout=0.5)
    plain = attend(module(), q, k, v.abs(), None, softcap=2.0)
    assert (out == 0).any()
    assert (out > plain).any()


@pytest.mark.parametrize("unknown", ["s_aux", "position_bias", "cu_seq_lens_q", "block_table", "something_new"])
def test_arguments_that_would_be_left_out_are_refused(unknown: str) -> None:
    q, k, v = qkv(4, 2)
    for nothing in (None, False):
        attend(module(), q, k, v, None, **{unknown: nothing})
    with pytest.raises(NotImplementedError, match=f"attention arguments {unknown}: .*does not know them"):
        attend(module(), q, k, v, None, **{unknown: torch.zeros(4)})


def test_arguments_that_masks_and_outputs_speak_for_are_let_through() -> None:
    q, k, v = qkv(4, 2)
    expected = attend(module(), q, k, v, None)
    spoken = {"position_ids": torch.arange(9)[None], "cache_position": torch.arange(9), "output_attentions": True}
    assert torch.equal(attend(module(), q, k, v, None, **spoken, use_cache=True), expected)


def test_a_window_without_its_mask_is_refused() -> None:
    q, k, v = qkv(4, 2)
    expected = attend(module(), q, k, v, None)
    assert torch.equal(attend(module(), q, k, v, None, sliding_window=9), expected)
    with pytest.raises(NotImplementedError, match="sliding_window=8 without a mask on 9 keys"):
        attend(module(), q, k, v, None, sliding_window=8)
