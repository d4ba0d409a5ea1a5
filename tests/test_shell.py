"""What stands before and after the blocks, against the Hugging Face model that has them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from ptql.checkpoint import Checkpoint
from ptql.nn.student import call_block
from ptql.shell import Shell
from tests.models import block_calls, blocks_of, llama_config, opt_config, random_model, save, some_ids

CONFIGS: dict[str, PretrainedConfig] = {
    "llama": llama_config(),
    "llama_untied": llama_config(tie_word_embeddings=False),
    "opt": opt_config(),
    "opt_350m": opt_config(word_embed_proj_dim=32, do_layer_norm_before=False),
}


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return random_model(CONFIGS[request.param])


@pytest.fixture
def shell(model: PreTrainedModel, tmp_path: Path) -> Shell:
    return Checkpoint(save(model, tmp_path / "model")).shell()


def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def test_embed_gives_what_the_first_block_is_called_with(model: PreTrainedModel, shell: Shell) -> None:
    hidden, context = shell.embed(some_ids())
    expected, keywords, _ = block_calls(model, some_ids())[0]
    assert torch.equal(hidden, expected)
    assert context.keys() == keywords.keys()
    for name, value in keywords.items():
        for mine, theirs in zip(_tensors(context[name]), _tensors(value), strict=True):
            assert torch.equal(mine, theirs)


def _tensors(value: object) -> list[Tensor]:
    if isinstance(value, tuple):
        return [t for item in value for t in _tensors(item)]
    return [value] if isinstance(value, Tensor) else []


def test_the_context_of_one_window_serves_any_number_of_them(model: PreTrainedModel, shell: Shell) -> None:
    _, context = shell.embed(some_ids()[:1])
    block, (hidden, _, output) = blocks_of(model)[0], block_calls(model, some_ids())[0]
    assert all(t.shape[0] == 1 for t in _tensors(tuple(context.values())))
    torch.testing.assert_close(call_block(block, hidden, context), output)


def test_logits_of_the_models_own_states_are_the_models(model: PreTrainedModel, shell: Shell) -> None:
    states = block_calls(model, some_ids())[-1][2]
    torch.testing.assert_close(shell.logits(states, some_ids()), logits(model, some_ids()), rtol=1e-5, atol=1e-5)


def test_logits_follow_the_injected_states_and_not_the_ids(model: PreTrainedModel, shell: Shell) -> None:
    states = block_calls(model, some_ids(seed=1))[-1][2]
    expected = logits(model, some_ids(seed=1))
    torch.testing.assert_close(shell.logits(states, some_ids(seed=2)), expected, rtol=1e-5, atol=1e-5)
    halves = [shell.logits(states[k : k + 1], some_ids()[k : k + 1]) for k in range(3)]
    torch.testing.assert_close(torch.cat(halves), expected, rtol=1e-5, atol=1e-5)


def test_embedding_and_logits_may_take_turns(model: PreTrainedModel, shell: Shell) -> None:
    first, _ = shell.embed(some_ids())
    states = block_calls(model, some_ids())[-1][2]
    once = shell.logits(states, some_ids())
    shell.embed(some_ids(samples=1, tokens=7, seed=5))
    assert torch.equal(shell.logits(states, some_ids()), once)
    assert torch.equal(shell.embed(some_ids())[0], first)


def test_a_shell_has_no_blocks_and_no_gradients(model: PreTrainedModel, shell: Shell) -> None:
    shell.embed(some_ids())
    names = {name for name, _ in shell.model.named_parameters()}
    assert names
    assert not any(".layers." in name for name in names)
    assert {n for n, _ in model.named_parameters() if ".layers." not in n} == names
    assert not any(p.requires_grad or p.is_meta for p in shell.model.parameters())
    assert not any(b.is_meta for b in shell.model.buffers())
    assert not shell.model.training


def test_a_tied_head_is_one_tensor(model: PreTrainedModel, shell: Shell) -> None:
    tied = model.config.tie_word_embeddings
    same = shell.model.get_input_embeddings().weight is shell.model.get_output_embeddings().weight
    assert same == tied
    assert shell.to(torch.device("cpu")) is shell
