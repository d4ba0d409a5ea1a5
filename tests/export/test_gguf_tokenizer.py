"""Tokenizers in the words of llama.cpp, and SentencePiece's way of joining against merges."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ptql.errors import InputError
from ptql.export.gguf_tokenizer import LLAMA3, vocabulary
from ptql.export.spm_scores import spm_scores
from tests.export.gguf_models import TEXT, byte_level, sentence_piece


def fast(tokenizer: Tokenizer, **more: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", **more)


def joined(word: str, vocab: dict[str, int], scores: dict[str, float]) -> list[str]:
    """`llm_tokenizer_spm`: of all neighbours that make a token, those that make the best one, the first of equals."""
    parts = list(word)
    while True:
        found = [(-scores[a + b], k) for k, (a, b) in enumerate(pairwise(parts)) if a + b in vocab]
        if not found:
            return parts
        _, k = min(found)
        parts[k : k + 2] = [parts[k] + parts[k + 1]]


def test_scores_join_as_merges_do() -> None:
    tokenizer = sentence_piece()
    model = json.loads(tokenizer.to_str())["model"]
    scores = spm_scores(model["vocab"], [(a, b) for a, b in model["merges"]], {"<unk>", "<s>", "</s>"})
    for line in TEXT.split("\n")[:60]:
        if set(line) <= model["vocab"].keys() | {" "} and line:
            expected = tokenizer.encode(line, add_special_tokens=False).tokens
            assert joined("▁" + line.replace(" ", "▁"), model["vocab"], scores) == expected


def test_a_token_that_merges_do_not_make() -> None:
    vocab = {token: k for k, token in enumerate(["a", "b", "c", "ab", "bc", "abc"])}
    assert spm_scores(vocab, [("a", "b"), ("b", "c"), ("ab", "c")], set()) == {"ab": 0, "bc": -1, "abc": -2}
    with pytest.raises(InputError, match="no merges lead to the token 'abc'"):
        spm_scores(vocab, [("a", "b"), ("b", "c"), ("a", "bc")], set())


@pytest.mark.parametrize(
    ("cut", "ignore", "name"),
    [
        (None, False, "qwen2"),
        (pre_tokenizers.ByteLevel(add_prefix_space=False), False, "gpt-2"),
        (
            pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            ),
            False,
            "smollm",
        ),
        (LLAMA3, True, "llama-bpe"),
        (LLAMA3, False, "smaug-bpe"),
    ],
)
def test_how_texts_are_cut(cut: Any, ignore: bool, name: str) -> None:
    described = json.loads(byte_level(None if isinstance(cut, str) else cut).to_str())
    described["model"]["ignore_merges"] = ignore
    if isinstance(cut, str):
        described["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = cut
    found = vocabulary(fast(Tokenizer.from_str(json.dumps(described))), 416)
    assert (found.model, found.pre) == ("gpt2", name)
    assert found.merges is not None
    assert found.scores is None


@pytest.mark.smollm2
def test_the_real_one_of_smollm2(smollm2_dir: Path) -> None:
    found = vocabulary(AutoTokenizer.from_pretrained(smollm2_dir), 49152)
    assert found.pre == "smollm"
    assert found.special == {"bos": 1, "eos": 2, "unk": 0, "pad": 2}
    assert found.adds == {"bos": False, "eos": False}
    assert "im_start" in str(found.template)
    assert [int(kind) for kind in found.types[:17]] == [3] * 17


def test_kinds_of_tokens() -> None:
    tokenizer = sentence_piece()
    tokenizer.add_tokens(["<think>▁on"])
    found = vocabulary(fast(tokenizer), 416)
    size = tokenizer.get_vocab_size()
    assert (found.model, found.pre, found.space) == ("llama", "default", True)
    assert found.adds == {"bos": True, "eos": False}
    kinds = [kind.name for kind in found.types]
    assert kinds[:4] == ["CONTROL"] * 3 + ["BYTE"]
    assert kinds[size - 2 :] == ["NORMAL", "USER_DEFINED"] + ["UNUSED"] * (416 - size)
    assert found.tokens[size - 1 :] == ["<think> on"] + [f"[PAD{k}]" for k in range(size, 416)]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"normalizer": {"type": "Lowercase"}}, "prepares texts in a way that is not known"),
        ({"pre_tokenizer": {"type": "WhitespaceSplit"}}, "prepares texts in a way that is not known"),
        ({"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}, "of the kind WordLevel"),
    ],
)
def test_what_llama_cpp_does_not_do(change: dict[str, Any], reason: str) -> None:
    described = json.loads(byte_level().to_str()) | change
    with pytest.raises(InputError, match=reason):
        vocabulary(fast(Tokenizer.from_str(json.dumps(described))), 416)


def test_sentence_piece_with_another_normalizer() -> None:
    described = json.loads(sentence_piece().to_str()) | {"normalizer": {"type": "NFKC"}}
    with pytest.raises(InputError, match="no NFKC before the merges"):
        vocabulary(fast(Tokenizer.from_str(json.dumps(described))), 416)


def test_more_tokens_than_rows() -> None:
    with pytest.raises(InputError, match="give the tokenizer that belongs to the model"):
        vocabulary(fast(byte_level()), 300)
