"""What stands before and after the blocks, against the Hugging Face model that has them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ptql.checkpoint import Checkpoint
from ptql.nn.student import call_block
from ptql.shell import Shell
from tests.models import CONFIGS, FAMILIES, WINDOW, block_calls, blocks_of, random_model, save, some_ids


@pytest.fixture(params=[*FAMILIES, "llama_untied", "opt_projected"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return random_model(CONFIGS[request.param])


@pytest.fixture
def shell(model: PreTrainedModel, tmp_path: Path) -> Shell:
    return Checkpoint(save(model, tmp_path / "model")).shell()


def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def test_embed_gives_what_each_block_is_called_with(model: PreTrainedModel, shell: Shell) -> None:
    hidden, contexts = shell.embed(some_ids())
    calls = block_calls(model, some_ids())
    assert torch.equal(hidden, calls[0][0])
    assert len(contexts) == len(calls)
    for context, (_, keywords, _) in zip(contexts, calls, strict=True):
        assert context.keys() == keywords.keys()
        for name, value in keywords.items():
            mine, theirs = context[name], value
            if name == "attention_mask" and model.config._attn_implementation == "eager":
                mine, theirs = [_seen(mine, 20)], [_seen(theirs, 20)]  # numbers there, true and false or None here
            for a, b in zip(_tensors(mine), _tensors(theirs), strict=True):
                assert torch.equal(a, b)


def _tensors(value: object) -> list[Tensor]:
    if isinstance(value, (tuple, list)):
        return [t for item in value for t in _tensors(item)]
    return [value] if isinstance(value, Tensor) else []


def _seen(mask: Tensor | None, tokens: int) -> Tensor:
    """Who sees whom, [tokens, tokens], from any kind of mask; all samples have the same."""
    if mask is None:
        return torch.ones(tokens, tokens, dtype=torch.bool).tril()
    return mask[0, 0] if mask.dtype == torch.bool else mask[0, 0] == 0


@pytest.mark.parametrize(
    ("name", "windows"),
    [
        ("llama", [False, False]),
        ("mistral", [True, True]),
        ("qwen2", [False, True]),
        ("gemma2", [True, False]),
        ("gemma3", [True, False]),
        ("phi3", [True, True]),
    ],
)
def test_each_block_has_its_own_window_and_rope(tmp_path: Path, name: str, windows: list[bool]) -> None:
    _, contexts = Checkpoint(save(random_model(CONFIGS[name]), tmp_path / "model")).shell().embed(some_ids())
    causal = torch.ones(20, 20, dtype=torch.bool).tril()
    for context, window in zip(contexts, windows, strict=True):
        expected = causal.triu(1 - WINDOW) if window else causal
        assert torch.equal(_seen(context["attention_mask"], 20), expected)
    ropes = [context["position_embeddings"][0] for context in contexts]
    assert torch.equal(*ropes) == (name != "gemma3")
    assert (ropes[0] is ropes[1]) == (name != "gemma3")  # one tensor, not one for each block


def test_the_contexts_of_one_window_serve_any_number_of_them(model: PreTrainedModel, shell: Shell) -> None:
    _, contexts = shell.embed(some_ids()[:1])
    for index, (hidden, own, output) in enumerate(block_calls(model, some_ids())):
        assert all(t.shape[0] == 1 for t in _tensors(tuple(contexts[index].values())))
        if model.config._attn_implementation == "eager":  # masks of the other kind
            contexts[index]["attention_mask"] = own["attention_mask"]
        torch.testing.assert_close(call_block(blocks_of(model)[index], hidden, contexts[index]), output)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_walk_through_the_blocks_is_the_model(tmp_path: Path, name: str) -> None:
    """Also beyond the window of attention that slides, and beyond the length from which RoPE is another."""
    model = random_model(CONFIGS[name])
    source = Checkpoint(save(model, tmp_path / "model"))
    shell = source.shell()
    for tokens in (WINDOW - 2, 40):
        ids = some_ids(tokens=tokens)
        hidden, contexts = shell.embed(ids)
        for index, context in enumerate(contexts):
            with torch.no_grad():
                hidden = call_block(source.block(index), hidden, context)
        torch.testing.assert_close(shell.logits(hidden, ids), logits(model, ids), rtol=1e-4, atol=1e-4)


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


def test_a_stand_in_answers_for_its_block(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some versions of some models look at `block.attention_type` before they call a block."""
    asked: list[str] = []

    def ask(stand_ins: list, ids: Tensor) -> None:
        asked.extend(stand_in.attention_type for stand_in in stand_ins)
        with pytest.raises(AttributeError, match="nothing_like_it"):
            _ = stand_ins[0].nothing_like_it
        raise AssertionError("seen")

    for index, block in enumerate(shell._blocks):
        block.attention_type = f"kind {index}"
    monkeypatch.setattr(shell, "_forward", ask)
    with pytest.raises(AssertionError, match="seen"):
        shell.embed(some_ids())
    with pytest.raises(AssertionError, match="seen"):
        shell.logits(torch.zeros(1, 20, 48), some_ids())
    assert asked == ["kind 0", "kind 1"] * 2
