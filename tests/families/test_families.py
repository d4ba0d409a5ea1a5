"""What a family declares, against the model that transformers builds."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ptql.errors import InputError
from ptql.families import FAMILIES, BlockLayout, family_of
from tests import models
from tests.models import CONFIGS, block_calls, blocks_of, opt_config, random_model, some_ids


def layout_of(name: str) -> BlockLayout:
    return family_of(CONFIGS[name].model_type).layout(CONFIGS[name])


def test_an_unknown_family_is_refused_with_the_known_ones() -> None:
    known = "gemma2, gemma3_text, llama, mistral, opt, phi3, qwen2, qwen3"
    with pytest.raises(InputError, match=rf"model_type='gpt_neox': .*one of: {known}$"):
        family_of("gpt_neox")
    with pytest.raises(InputError, match="model_type=''"):
        family_of("")
    assert all(family_of(name) is FAMILIES[name] for name in FAMILIES)


def test_every_family_has_a_model_in_the_tests() -> None:
    assert {config.model_type for config in models.FAMILIES.values()} == set(FAMILIES)


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_a_gemma_that_looks_ahead_is_refused(name: str) -> None:
    config = copy.deepcopy(CONFIGS[name])
    config.use_bidirectional_attention = True
    with pytest.raises(InputError, match=r"use_bidirectional_attention=True: .*give a Gemma that generates"):
        family_of(config.model_type).layout(config)


@pytest.mark.parametrize("name", CONFIGS)
def test_norms_are_named_as_recipes_choose_them(name: str) -> None:
    """A name of its own would leave a norm unsmoothed without a word."""
    config = CONFIGS[name]
    assert [site.name for site in family_of(config.model_type).layout(config).norms] in ([], ["qkv", "fc1"])


def test_only_gemmas_need_a_first_token() -> None:
    assert {name for name, family in FAMILIES.items() if family.bos} == {"gemma2", "gemma3_text"}


@pytest.mark.parametrize("setting", ["enable_bias", "layer_norm_elementwise_affine"])
def test_unusual_opts_are_refused(setting: str) -> None:
    config = opt_config(**{setting: False})
    with pytest.raises(InputError, match=rf"{setting}=False.*give a standard OPT"):
        family_of("opt").layout(config)


def test_opt_with_the_norm_after_the_residual_has_no_norm_to_fold() -> None:
    assert family_of("opt").layout(opt_config(do_layer_norm_before=False)).norms == ()
    assert [site.name for site in family_of("opt").layout(opt_config()).norms] == ["qkv", "fc1"]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_linear_layer_of_a_block_is_quantised(name: str) -> None:
    block, layout = blocks_of(random_model(CONFIGS[name]))[0], layout_of(name)
    linears = {n for n, m in block.named_modules() if isinstance(m, nn.Linear)}
    assert set(layout.names) == linears
    assert len(layout.names) == len(linears)


@pytest.mark.parametrize("name", CONFIGS)
def test_attention_sizes_are_those_of_the_projections(name: str) -> None:
    config = CONFIGS[name]
    block, a = blocks_of(random_model(config))[0], layout_of(name).attention
    queries, values = a.heads * a.head_dim, a.kv_heads * a.head_dim
    for rows, count in ((a.q, queries), (a.k, values), (a.v, values)):
        assert block.get_submodule(rows.linear).weight[rows.start : rows.stop].shape == (count, config.hidden_size)
    assert block.get_submodule(a.o).weight.shape == (config.hidden_size, queries)
    assert block.get_submodule(a.module).is_causal
    rotated = {"opt": 0, "phi3": 6, "phi3_longrope": 6, "phi3_tied": 12, "opt_post_norm": 0, "opt_projected": 0}
    assert a.rotary == rotated.get(name, a.head_dim)


@pytest.mark.parametrize("name", CONFIGS)
def test_rotary_channels_are_those_that_the_model_rotates(name: str) -> None:
    _, context, _ = block_calls(random_model(CONFIGS[name]), some_ids())[0]
    rope = context.get("position_embeddings")
    assert (0 if rope is None else rope[0].shape[-1]) == layout_of(name).attention.rotary


@pytest.mark.parametrize("name", ["phi3", "phi3_tied"])
def test_queries_keys_and_values_are_the_rows_that_the_attention_takes(name: str) -> None:
    """Seen through the attention function, which is given them without RoPE where that turns nothing."""
    model, a = random_model(CONFIGS[name]), layout_of(name).attention
    hidden, context, _ = block_calls(model, some_ids())[0]
    seen: list[Tensor] = []

    def look(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.extend((query, key, value))
        return sdpa_attention_forward(module, query, key, value, *args, **kwargs)

    AttentionInterface.register("look", look)
    block = blocks_of(model)[0]
    block.get_submodule(a.module).config._attn_implementation = "look"
    cos, sin = context["position_embeddings"]
    block(hidden, **{**context, "position_embeddings": (torch.ones_like(cos), torch.zeros_like(sin))})
    normed = block.get_submodule(layout_of(name).norms[0].norm)(hidden)
    for rows, heads, found in zip((a.q, a.k, a.v), (a.heads, a.kv_heads, a.kv_heads), seen, strict=True):
        made = normed @ block.get_submodule(rows.linear).weight[rows.start : rows.stop].T
        torch.testing.assert_close(found, made.unflatten(-1, (heads, a.head_dim)).transpose(1, 2))


@pytest.mark.parametrize("name", CONFIGS)
def test_norms_are_where_and_as_they_are_declared(name: str) -> None:
    """Followed by hooks: a norm's output is its input, normed, times offset + weight."""
    model, layout = random_model(CONFIGS[name]), layout_of(name)
    block, head = blocks_of(model)[0], layout.attention.head_norms
    hidden, context, _ = block_calls(model, some_ids())[0]
    sites = {site.norm: site.offset for site in layout.norms}
    sites |= {} if head is None else {head.q: head.offset, head.k: head.offset}
    outputs: dict[str, tuple[Tensor, Tensor]] = {}
    for norm in sites:
        block.get_submodule(norm).register_forward_hook(
            lambda _, args, out, norm=norm: outputs.update({norm: (args[0], out)})
        )
    block(hidden, **context)
    assert outputs.keys() == sites.keys()
    for norm, (x, out) in outputs.items():
        module = block.get_submodule(norm)
        if isinstance(module, nn.LayerNorm):
            assert sites[norm] == 0
            continue
        expected = (
            x * (x.pow(2).mean(-1, keepdim=True) + CONFIGS[name].rms_norm_eps).rsqrt() * (sites[norm] + module.weight)
        )
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    assert set(layout.offset_norms) == {norm for norm, offset in sites.items() if offset}
    assert (head is not None) == (CONFIGS[name].model_type in ("qwen3", "gemma3_text"))


@pytest.mark.parametrize("name", CONFIGS)
def test_groups_share_their_input_and_norms_feed_their_consumers_only(name: str) -> None:
    """Followed through a real forward pass, by the identity of tensors and by perturbing a norm's output."""
    model = random_model(CONFIGS[name])
    block, layout = blocks_of(model)[0], layout_of(name)
    order: list[str] = []
    inputs: dict[str, torch.Tensor] = {}

    def note(linear: str):
        def hook(_: nn.Module, args: tuple) -> None:
            order.append(linear)
            inputs[linear] = args[0]

        return hook

    for linear in layout.names:
        block.get_submodule(linear).register_forward_pre_hook(note(linear))
    hidden, context, output = block_calls(model, some_ids())[0]
    assert [set(group) for group in layout.linears] == _in_order(order, [len(g) for g in layout.linears])
    for group in layout.linears:
        assert all(inputs[linear] is inputs[group[0]] for linear in group)

    plain = dict(inputs)
    for site in layout.norms:
        fed = block.get_submodule(site.norm).register_forward_hook(lambda _, args, out: out + 1)
        # The consumers take the change back, so nothing else of the block may notice.
        undone = [
            block.get_submodule(c).register_forward_pre_hook(lambda _, args: (args[0] - 1,)) for c in site.consumers
        ]
        changed = block(hidden, **context)
        changed = changed[0] if isinstance(changed, tuple) else changed
        for handle in (fed, *undone):
            handle.remove()
        torch.testing.assert_close(changed, output, rtol=1e-4, atol=1e-4)
        assert all(not torch.equal(inputs[c], plain[c]) for c in site.consumers)
        assert (getattr(block.get_submodule(site.norm), "bias", None) is not None) == site.has_bias


def _in_order(names: list[str], counts: list[int]) -> list[set[str]]:
    rest = iter(names)
    return [{next(rest) for _ in range(count)} for count in counts]


@pytest.mark.parametrize(
    ("name", "last"),
    [
        ("llama", ["q_proj", "up_proj"]),
        ("gemma2", ["q_proj", "up_proj"]),
        ("phi3", ["qkv_proj", "gate_up_proj"]),
        ("opt", ["q_proj", "fc1"]),
    ],
)
def test_the_last_consumer_is_the_one_of_the_originals(name: str, last: list[str]) -> None:
    layout = layout_of(name)
    assert [site.consumers[-1].split(".")[-1] for site in layout.norms] == last
