"""No token sees a later one, whatever is rounded; and attention against loops over heads and tokens."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PretrainedConfig

from ptql.families import family_of
from ptql.functional.affine import fake_quantize_tokens
from ptql.nn import attention
from ptql.nn.attention import ROUNDING, rounded_attention
from ptql.nn.student import biased_linears, call_block, make_student
from ptql.parts.activations import DynamicTokens, TokenRounding
from ptql.parts.transforms import Smooth
from ptql.recipe import ActivationScheme
from tests.models import block_calls, blocks_of, llama_config, opt_config, random_model, some_ids

CONFIGS: dict[str, PretrainedConfig] = {
    "llama": llama_config(),
    "llama_biased": llama_config(attention_bias=True, mlp_bias=True, num_key_value_heads=1),
    "opt": opt_config(),
    "opt_post_norm": opt_config(do_layer_norm_before=False),
}
TOKENS = 20


def student_of(name: str) -> tuple[Any, Tensor, dict[str, Any]]:
    """Block 1 with 4-bit activations and added biases, its input [3, 20, 48] and its context."""
    attention.register()
    config = copy.deepcopy(CONFIGS[name])
    model = random_model(config)
    model.set_attn_implementation(attention.NAME)
    hidden, context, _ = block_calls(model, some_ids(tokens=TOKENS))[1]
    block, layout = blocks_of(model)[1], family_of(config.model_type).layout(config)
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
    assert (again[1, t:] != output[1, t:]).any(-1).all()


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_queries_keys_and_values_are_rounded(name: str) -> None:
    student, hidden, context = student_of(name)
    module = student.get_submodule("self_attn")
    assert getattr(module, ROUNDING) == TokenRounding(4)
    rounded = call_block(student, hidden, context)
    setattr(module, ROUNDING, None)
    assert (call_block(student, hidden, context) != rounded).any(-1).double().mean() > 0.5


# The attention function by itself


def loop_attention(q: Tensor, k: Tensor, v: Tensor, scaling: float, causal: bool) -> Tensor:
    """[batch, tokens, heads, size] in float64, one query at a time."""
    batch, heads, tokens, size = q.shape
    share = heads // k.shape[1]
    out = torch.zeros(batch, tokens, heads, size, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            keys, values = k[b, h // share].double(), v[b, h // share].double()
            for t in range(tokens):
                seen = k.shape[2] - tokens + t + 1 if causal else k.shape[2]
                scores = [scaling * (q[b, h, t].double() @ keys[j]).item() for j in range(seen)]
                peak = max(scores)
                weights = [math.exp(s - peak) for s in scores]
                for j in range(seen):
                    out[b, t, h] += weights[j] / sum(weights) * values[j]
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
    return SimpleNamespace(**settings, **({} if bits is None else {ROUNDING: TokenRounding(bits)}))


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
