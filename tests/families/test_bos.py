"""Families whose every window begins with `<bos>`: calibration, perplexity and lm-eval's prompts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from ptql.calibration.data import CalibrationData
from ptql.calibration.tokens import bos_token, cached_windows, consecutive_windows, sample_windows
from ptql.errors import InputError
from ptql.evaluation import tasks
from tests.models import VOCABULARY

TOKENS = torch.arange(3, 60)
BOS = 1


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    names = ["<unk>", "<s>", *(f"w{k}" for k in range(2, VOCABULARY))]
    words = Tokenizer(models.WordLevel({name: k for k, name in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="<s>")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PTQL_CACHE", str(tmp_path / "cache"))


def begins(windows: Tensor) -> bool:
    """Whether each window is `<bos>` and then consecutive tokens of the text."""
    return bool((windows[:, 0] == BOS).all() and (windows[:, 1:].diff(dim=1) == 1).all() and (windows[:, 1] > 2).all())


def test_consecutive_windows_lose_no_token_between_them() -> None:
    windows = consecutive_windows(TOKENS, 8, BOS)
    assert windows.shape == (57 // 7, 8)
    assert begins(windows)
    assert torch.equal(windows[:, 1:].flatten(), TOKENS[:56])
    assert windows.dtype == TOKENS.dtype


def test_sampled_windows_are_those_of_a_shorter_cut() -> None:
    windows = sample_windows(TOKENS, 20, 8, seed=3, bos=BOS)
    assert windows.shape == (20, 8)
    assert begins(windows)
    assert torch.equal(windows[:, 1:], sample_windows(TOKENS, 20, 7, seed=3))


def test_a_text_may_be_a_token_shorter_than_the_window() -> None:
    for windows in (consecutive_windows(TOKENS, 58, BOS), sample_windows(TOKENS, 2, 58, 0, BOS)):
        assert windows.shape[1] == 58
        assert begins(windows)
    for cut in (consecutive_windows, lambda *args: sample_windows(args[0], 2, args[1], 0, args[2])):
        with pytest.raises(InputError, match=r"text of 57 tokens: .* one window of 59; .*--data\.length 58 or less"):
            cut(TOKENS, 59, BOS)


def test_the_cache_keeps_windows_with_and_without_apart(tokenizer: PreTrainedTokenizerFast) -> None:
    text = " ".join(f"w{k}" for k in range(3, 60))
    for _ in range(2):  # made, then read
        assert begins(cached_windows(tokenizer, text, 4, 8, 0, BOS))
        assert (cached_windows(tokenizer, text, 4, 8, 0) != BOS).all()


@pytest.mark.parametrize("bos", [True, False])
def test_calibration_windows(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, bos: bool) -> None:
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "text.txt").write_text(" ".join(f"w{k}" for k in range(3, 60)))
    data = CalibrationData(str(tmp_path / "text.txt"), samples=4, length=8, batch_size=2)
    windows = data.windows(tmp_path, 64, bos)
    assert windows.shape == (4, 8)
    assert begins(windows) == bos


def test_the_id_of_bos(tokenizer: PreTrainedTokenizerFast) -> None:
    assert bos_token(tokenizer, True) == BOS
    assert bos_token(tokenizer, False) is None
    tokenizer.bos_token = None
    assert bos_token(tokenizer, False) is None
    with pytest.raises(InputError, match=r"it has no bos_token, .* must begin; put the model's own"):
        bos_token(tokenizer, True)


@pytest.mark.parametrize("bos", [True, False])
def test_lm_evals_prompts_begin_with_it(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, bos: bool
) -> None:
    """As lm-eval's own `HFLM` encodes them, seen where the model would be asked."""
    import lm_eval.evaluator
    import lm_eval.models.huggingface
    from transformers import AutoModelForCausalLM

    from tests.models import gemma2_config

    seen: list[list[int]] = []

    def evaluate(model: Any, **_: Any) -> dict[str, Any]:
        seen.append(model.tok_encode("w5 w6"))
        seen.append(model.tok_batch_encode(["w5 w6"])[0][0].tolist())
        return {}

    monkeypatch.setattr(tasks, "_index_tasks", lambda *_: SimpleNamespace())
    monkeypatch.setattr(lm_eval.evaluator, "simple_evaluate", evaluate)
    tokenizer.pad_token = "w2"
    model = AutoModelForCausalLM.from_config(gemma2_config()).eval()
    tasks.run_tasks(model, tokenizer, ["any"], bos=bos)
    assert seen == [[BOS, 5, 6] if bos else [5, 6]] * 2


def test_a_tokenizer_that_can_not_be_made_to_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.bos_token = None
    with pytest.raises(InputError, match="it does not put bos_token None before a text, which this model needs"):
        tasks._add_bos(tokenizer)
