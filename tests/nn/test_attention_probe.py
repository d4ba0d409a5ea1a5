"""What a probe sees of a live block's attention, against transformers' eager attention and loops."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ptql.families import BlockLayout, family_of
from ptql.functional.affine import fake_quantize_tokens
from ptql.functional.attention import attention_probabilities
from ptql.nn import attention
from ptql.nn.attention import CACHE_ROUNDING, PROBE, QUERY_ROUNDING, rounded_attention
from ptql.nn.attention_probe import AttentionProbe, attach_probe, made_by, watched_attention
from ptql.nn.student import biased_linears, call_block, make_student
from ptql.parts.activations import DynamicTokens, TokenRounding
from ptql.parts.objectives import ATTENTION_MADE, AttentionView
from ptql.parts.transforms import Smooth
from ptql.recipe import ActivationScheme
from tests.models import CONFIGS, FAMILIES, block_calls, blocks_of, random_model, some_ids

TOKENS = 20
ROWS = (0, 1, 6, TOKENS, 64)


def positions(rows: int, tokens: int = TOKENS) -> list[int]:
    rows = min(rows or tokens, tokens)
    return [(r + 1) * tokens // rows - 1 for r in range(rows)]


def layout_of(name: str) -> BlockLayout:
    return family_of(CONFIGS[name].model_type).layout(CONFIGS[name])


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_a_probe_sees_rows_of_what_eager_attention_computes(name: str) -> None:
    """Masks, windows, capped scores, norms of heads, fused matrices: of both blocks of every family."""
    attention.register()
    model, layout, eager = random_model(CONFIGS[name]), layout_of(name), []

    def note(module: nn.Module, given: Any, output: Any) -> None:
        eager.append(output[1])

    model.set_attn_implementation("eager")
    modules = [block.get_submodule(layout.attention.module) for block in blocks_of(model)]
    handles = [module.register_forward_hook(note) for module in modules]
    model(some_ids(tokens=TOKENS), use_cache=False)
    for handle in handles:
        handle.remove()
    model.set_attn_implementation(attention.NAME)
    for rows in ROWS:
        probes = [attach_probe(block, layout, AttentionView(rows)) for block in blocks_of(model)]
        for probe in probes:
            assert probe is not None
            probe.ask()
        model(some_ids(tokens=TOKENS), use_cache=False)
        for probe, whole in zip(probes, eager, strict=True):
            assert probe is not None
            seen = probe.take()
            assert seen.shape == (3, *AttentionView(rows).shape(layout.attention.heads, TOKENS))
            torch.testing.assert_close(seen, whole[:, :, positions(rows)], rtol=1e-4, atol=1e-5)
            assert (seen[whole[:, :, positions(rows)] == 0] == 0).all()


def student_of(name: str, index: int = 1, bits: int = 4) -> tuple[nn.Module, Tensor, dict[str, Any]]:
    """A block with rounded activations and added biases, its input [3, 20, 48] and its context."""
    attention.register()
    model = random_model(CONFIGS[name])
    model.set_attn_implementation(attention.NAME)
    hidden, context, _ = block_calls(model, some_ids(tokens=TOKENS))[index]
    block, layout = blocks_of(model)[index], layout_of(name)
    added = Smooth(shift="all").added_biases(layout, biased_linears(block, layout))
    return make_student(block, layout, added, DynamicTokens(), ActivationScheme(bits)), hidden, context


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_probe_changes_nothing_of_the_output_and_is_of_rounded_queries_and_keys(name: str) -> None:
    student, hidden, context = student_of(name)
    before = call_block(student, hidden, context)
    probe = attach_probe(student, layout_of(name), AttentionView(6))
    made = made_by(student, hidden, context, probe=probe)
    assert torch.equal(made["output"], before)
    module = student.get_submodule(layout_of(name).attention.module)
    setattr(module, QUERY_ROUNDING, None)
    setattr(module, CACHE_ROUNDING, None)
    other = made_by(student, hidden, context, probe=probe)[ATTENTION_MADE]
    assert (made[ATTENTION_MADE] - other).abs().max() > 1e-3
    torch.testing.assert_close(made[ATTENTION_MADE].sum(-1), torch.ones(3, 4, 6))


def test_without_a_probe_there_is_the_output_alone() -> None:
    student, hidden, context = student_of("llama")
    assert attach_probe(student, layout_of("llama"), None) is None
    assert made_by(student, hidden, context).keys() == {"output"}


@torch.no_grad()
def test_means_of_heads_are_means() -> None:
    student, hidden, context = student_of("llama")
    each, mean = (
        made_by(student, hidden, context, probe=attach_probe(student, layout_of("llama"), view))[ATTENTION_MADE]
        for view in (AttentionView(6), AttentionView(6, averaged=True))
    )
    assert mean.shape == (3, 1, 6, TOKENS)
    torch.testing.assert_close(mean, each.mean(1, keepdim=True))


@torch.no_grad()
def test_only_what_was_asked_for_is_looked_at_and_nothing_is_held() -> None:
    student, hidden, context = student_of("llama")
    probe = attach_probe(student, layout_of("llama"), AttentionView(6))
    assert probe is not None
    call_block(student, hidden, context)
    assert probe._seen is None
    made_by(student, hidden, context, probe=probe)
    assert probe._seen is None
    call_block(student, hidden, context)
    assert probe._seen is None


# What an attention function shows


def shown(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, bits: int | None = None, **options: Any
) -> Tensor:
    probe = AttentionProbe(AttentionView(4))
    rounding = None if bits is None else TokenRounding(bits)
    module = SimpleNamespace(
        **{"is_causal": True, PROBE: probe, QUERY_ROUNDING: rounding, CACHE_ROUNDING: rounding}  # type: ignore[arg-type]
    )
    probe.ask()
    # jaxtyping's check of `nn.Module` is switched off: a namespace stands for the module
    getattr(rounded_attention, "__wrapped__", rounded_attention)(module, query, key, value, mask, **options)
    return probe.take()


def qkv() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)


@pytest.mark.parametrize("bits", [None, 3])
def test_a_probe_is_shown_rounded_queries_and_keys_with_all_that_attention_is_told(bits: int | None) -> None:
    q, k, v = qkv()
    rounded = [x if bits is None else fake_quantize_tokens(x, bits) for x in (q, k)]
    mask = torch.ones(2, 1, 9, 14, dtype=torch.bool).tril()  # a static cache's mask may be longer than the keys
    for given in ({"scaling": 0.3}, {"softcap": 0.5}, {"is_causal": False}):
        plain = {"causal" if name == "is_causal" else name: value for name, value in given.items()}
        expected = attention_probabilities(*rounded, 4, **plain)
        assert torch.equal(shown(q, k, v, bits=bits, **given), expected)
    assert torch.equal(shown(q, k, v, mask, bits), attention_probabilities(*rounded, 4, mask[..., :9]))


def test_probabilities_are_computed_in_float32_under_autocast() -> None:
    q, k, v = qkv()
    with torch.autocast("cpu", torch.bfloat16):
        found = shown(q, k, v)
    assert found.dtype == torch.float32
    assert torch.equal(found, shown(q, k, v))


def test_gradients_reach_queries_and_keys() -> None:
    q, k, v = (x.requires_grad_() for x in qkv())
    shown(q, k, v, bits=4)[..., 0].sum().backward()
    assert q.grad is not None
    assert k.grad is not None
    assert v.grad is None
    looked_at = positions(4, 9)
    others = [t for t in range(9) if t not in looked_at]
    assert (q.grad[:, :, others] == 0).all()
    assert (q.grad[:, :, looked_at[1:]].abs().amax(-1) > 0).all()


# A pass that is watched


@torch.no_grad()
def test_what_each_call_shows_is_handed_on_in_order_and_the_probe_goes() -> None:
    student, hidden, context = student_of("llama")
    layout, found = layout_of("llama"), []
    with watched_attention(student, layout, AttentionView(6), lambda start, seen: found.append((start, seen))):
        for part in hidden.split(2):
            call_block(student, part, context)
    assert [start for start, _ in found] == [0, 2]
    assert not hasattr(student.get_submodule(layout.attention.module), PROBE)
    call_block(student, hidden, context)
    assert len(found) == 2
    whole = made_by(student, hidden, context, probe=attach_probe(student, layout, AttentionView(6)))[ATTENTION_MADE]
    torch.testing.assert_close(torch.cat([seen for _, seen in found]), whole)
