"""Perplexity, block by block, against a plain loop over the whole model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from ptql.calibration.tokens import consecutive_windows, load_tokenizer, tokenize
from ptql.checkpoint import SINGLE, Checkpoint
from ptql.evaluation.evaluate import Evaluation, Measurement
from ptql.evaluation.perplexity import perplexity, token_losses, window_losses
from tests.models import VOCABULARY, exact, llama_config, opt_config, random_model, save, some_ids

CPU = torch.device("cpu")
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": llama_config(),
    "llama_untied": llama_config(tie_word_embeddings=False),
    "opt": opt_config(),
    "opt_projected": opt_config(word_embed_proj_dim=32),
}


@torch.no_grad()
def by_loop(model: PreTrainedModel, windows: Tensor) -> float:
    """exp of the mean over windows and positions of -log p(next token), one token at a time."""
    losses = []
    for window in windows:
        logits = model(window[None], use_cache=False).logits[0].double()
        for position in range(len(window) - 1):
            row = logits[position]
            p = math.exp(row[window[position + 1]] - row.max()) / sum(math.exp(x) for x in row - row.max())
            losses.append(-math.log(p))
    return math.exp(sum(losses) / len(losses))


def measured(model: Checkpoint, windows: Tensor, device: torch.device, batch_size: int = 4) -> float:
    return perplexity(window_losses(model, windows, device, batch_size), windows.shape[1])


@pytest.mark.parametrize("name", CONFIGS)
def test_perplexity_is_that_of_a_plain_loop(tmp_path: Path, name: str) -> None:
    model = random_model(CONFIGS[name])
    source, windows = Checkpoint(save(model, tmp_path / "model")), some_ids(5, 20)
    expected = by_loop(exact(model), windows)
    assert expected > 10
    assert measured(source, windows, CPU, batch_size=2) == pytest.approx(expected, rel=1e-5)


def test_neither_the_batch_size_nor_the_order_matters(tmp_path: Path) -> None:
    source, windows = Checkpoint(save(random_model(llama_config()), tmp_path / "model")), some_ids(7, 20)
    expected = measured(source, windows, CPU, batch_size=7)
    for size in (1, 2, 4, 8):
        assert measured(source, windows, CPU, batch_size=size) == pytest.approx(expected, rel=1e-6)
    assert measured(source, windows.flip(0), CPU, batch_size=3) == pytest.approx(expected, rel=1e-6)


def test_windows_do_not_see_each_other(tmp_path: Path) -> None:
    source, windows = Checkpoint(save(random_model(llama_config()), tmp_path / "model")), some_ids(4, 12)
    alone = [math.log(measured(source, window[None], CPU)) for window in windows]
    assert math.log(measured(source, windows, CPU)) == pytest.approx(sum(alone) / 4, rel=1e-6)


def test_a_model_that_knows_nothing(tmp_path: Path) -> None:
    """Equal logits give the size of the vocabulary."""
    directory = save(random_model(llama_config(tie_word_embeddings=False)), tmp_path / "model")
    tensors = load_file(directory / SINGLE)
    save_file({**tensors, "lm_head.weight": tensors["lm_head.weight"] * 0}, directory / SINGLE, {"format": "pt"})
    assert measured(Checkpoint(directory), some_ids(), CPU) == pytest.approx(VOCABULARY, rel=1e-6)


def test_the_smallest_window_and_the_whole_context(tmp_path: Path) -> None:
    model = random_model(llama_config())
    source = Checkpoint(save(model, tmp_path / "model"))
    for length in (2, source.context):
        windows = some_ids(2, length)
        assert measured(source, windows, CPU) == pytest.approx(by_loop(model, windows), rel=1e-5)


def test_weights_of_half_precision_are_used_in_float32(tmp_path: Path) -> None:
    directory = save(random_model(llama_config()).bfloat16(), tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    expected = by_loop(model, some_ids())
    assert measured(Checkpoint(directory), some_ids(), CPU) == pytest.approx(expected, rel=1e-5)


def test_progress_is_told_of_every_block(tmp_path: Path) -> None:
    source, told = Checkpoint(save(random_model(llama_config()), tmp_path / "model")), []
    window_losses(source, some_ids(), CPU, progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 2), (2, 2)]


def test_losses_are_summed_over_all_tokens_but_the_first() -> None:
    logits, ids = torch.randn(2, 5, 7).half(), torch.randint(0, 7, (2, 5))
    expected = 0.0
    for row, window in zip(logits.double(), ids, strict=True):
        for position in range(4):
            expected -= torch.log_softmax(row[position], 0)[window[position + 1]].item()
    assert token_losses(logits, ids).item() == pytest.approx(expected, rel=1e-6)
    assert token_losses(logits, ids).dtype == torch.float32


@pytest.mark.shared
def test_the_command_measures_windows_of_the_text(stories_dir: Path, shared_dir: Path, tmp_path: Path) -> None:
    text = shared_dir / "data/text/tinystories-test.jsonl"
    options: dict[str, Any] = {"length": 96, "max_windows": 3, "batch_size": 2}
    found = Evaluation(Checkpoint(stories_dir), Measurement(device=CPU, texts={"tiny": str(text)}, **options)).save(
        tmp_path / "m.json"
    )
    story = "\n\n".join(json.loads(line)["text"] for line in text.read_text().splitlines() if line.strip())
    windows = consecutive_windows(tokenize(load_tokenizer(stories_dir), story), 96)[:3]
    model = AutoModelForCausalLM.from_pretrained(stories_dir, dtype=torch.float32).eval()
    assert found["ppl"]["tiny"] == pytest.approx(by_loop(model, windows), rel=1e-5)
    assert 1 < found["ppl"]["tiny"] < 20
    assert found["ppl_details"]["tiny"]["windows"] == 3
    assert json.loads((tmp_path / "m.json").read_text()) == found


@pytest.mark.shared
def test_the_length_is_the_context_where_that_is_shorter(stories_dir: Path) -> None:
    options: dict[str, Any] = {"max_windows": 1, "batch_size": 2}
    found = Evaluation(Checkpoint(stories_dir), Measurement(device=CPU, texts={}, **options)).save(None)
    assert found["ppl_details"]["pydoc"]["length"] == 512
