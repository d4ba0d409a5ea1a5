"""What a family declares, against the model that transformers builds."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import PretrainedConfig

from ptql.errors import InputError
from ptql.families import FAMILIES, family_of
from tests.models import block_calls, blocks_of, llama_config, opt_config, random_model, some_ids

CONFIGS: dict[str, PretrainedConfig] = {
    "llama": llama_config(),
    "llama_head_dim": llama_config(head_dim=20),  # 4 heads of 20 on a hidden size of 48
    "llama_one_head": llama_config(num_key_value_heads=1),
    "opt": opt_config(),
    "opt_post_norm": opt_config(do_layer_norm_before=False),
}


def test_an_unknown_family_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"model_type='gpt_neox': .*one of: llama, opt$"):
        family_of("gpt_neox")
    with pytest.raises(InputError, match="model_type=''"):
        family_of("")
    assert all(family_of(name) is FAMILIES[name] for name in FAMILIES)


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
    block = blocks_of(random_model(CONFIGS[name]))[0]
    linears = {n for n, m in block.named_modules() if isinstance(m, nn.Linear)}
    layout = family_of(CONFIGS[name].model_type).layout(CONFIGS[name])
    assert set(layout.names) == linears
    assert len(layout.names) == len(linears)


@pytest.mark.parametrize("name", CONFIGS)
def test_attention_sizes_are_those_of_the_projections(name: str) -> None:
    config = CONFIGS[name]
    block, a = blocks_of(random_model(config))[0], family_of(config.model_type).layout(config).attention
    queries, values = a.heads * a.head_dim, a.kv_heads * a.head_dim
    assert block.get_submodule(a.q).weight.shape == (queries, config.hidden_size)
    assert block.get_submodule(a.k).weight.shape == (values, config.hidden_size)
    assert block.get_submodule(a.v).weight.shape == (values, config.hidden_size)
    assert block.get_submodule(a.o).weight.shape == (config.hidden_size, queries)
    assert block.get_submodule(a.module).is_causal
    assert a.rotary == (config.model_type == "llama")


@pytest.mark.parametrize("name", CONFIGS)
def test_groups_share_their_input_and_norms_feed_their_consumers_only(name: str) -> None:
    """Followed through a real forward pass, by the identity of tensors and by perturbing a norm's output."""
    config = CONFIGS[name]
    model = random_model(config)
    block, layout = blocks_of(model)[0], family_of(config.model_type).layout(config)
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


@pytest.mark.parametrize(("name", "last"), [("llama", ["q_proj", "up_proj"]), ("opt", ["q_proj", "fc1"])])
def test_the_last_consumer_is_the_one_of_the_originals(name: str, last: list[str]) -> None:
    layout = family_of(name).layout(CONFIGS[name])
    assert [site.consumers[-1].split(".")[-1] for site in layout.norms] == last
