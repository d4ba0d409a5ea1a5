from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ptql.calibration.tokens import load_tokenizer
from ptql.errors import InputError
from ptql.restoration.documents import Documents, check_sources, collate, digest, read_documents
from tests.restoration.lora import named_source

EOS = 63


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return load_tokenizer(named_source(tmp_path_factory.mktemp("model") / "source"))


def words(*numbers: int) -> str:
    return " ".join(f"w{number}" for number in numbers)


def made(documents: list[Any], tokenizer: PreTrainedTokenizerBase, samples: int, **changes: Any) -> list[list[int]]:
    given = {"length": 8, "packing": False, "seed": 3, **changes}
    found = Documents(documents, tokenizer, samples, **given)
    assert len(found) == samples
    return [found[index].tolist() for index in range(samples)]


DOCUMENTS = [words(*range(first, first + 4)) for first in range(3, 31, 4)]  # seven of four words each
TOKENS = [list(range(first, first + 4)) for first in range(3, 31, 4)]


def test_lines_are_documents_and_a_whole_text_is_cut(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    lines, text = tmp_path / "a.jsonl", tmp_path / "b.txt"
    lines.write_text("\n".join(json.dumps({"text": text}) for text in (words(5, 6), "  ", words(7), "w8\nw9")))
    text.write_text(words(*range(10, 31)))
    found = read_documents([str(lines), str(text)], tokenizer, 10)
    assert found[:3] == ["w5 w6", "w7", "w8\nw9"]
    pieces = [piece.tolist() for piece in found[3:] if isinstance(piece, Tensor)]
    assert pieces == [list(range(10, 20)), list(range(20, 30))]  # the last word alone predicts nothing
    other = read_documents([str(text)], tokenizer, 10)
    each = [document.encode() if isinstance(document, str) else document.numpy().tobytes() for document in found]
    assert digest(found) == hashlib.sha256(b"".join(hashlib.sha256(content).digest() for content in each)).hexdigest()
    assert digest(found) != digest(other)
    assert digest(found[:3]) != digest(found[2::-1])


def test_each_pass_has_an_order_of_its_own(tokenizer: PreTrainedTokenizerBase) -> None:
    found = made(DOCUMENTS, tokenizer, 21)
    passes = [found[first : first + 7] for first in (0, 7, 14)]
    assert [sorted(one) for one in passes] == [TOKENS] * 3
    assert passes[0] != passes[1] != passes[2] != passes[0]
    assert found == made(DOCUMENTS, tokenizer, 21)
    assert found[:5] == made(DOCUMENTS, tokenizer, 5)
    assert found != made(DOCUMENTS, tokenizer, 21, seed=4)


def test_a_sample_is_the_same_whenever_it_is_asked_for(tokenizer: PreTrainedTokenizerBase) -> None:
    """A process that goes on asks for later ones first."""
    found = Documents(DOCUMENTS, tokenizer, 30, 8, packing=False, seed=3)
    backwards = [found[index].tolist() for index in reversed(range(30))]
    assert backwards[::-1] == made(DOCUMENTS, tokenizer, 30)


def test_long_documents_are_cut_off(tokenizer: PreTrainedTokenizerBase) -> None:
    assert made([words(*range(3, 40))], tokenizer, 2) == [list(range(3, 11))] * 2


@pytest.mark.parametrize("length", [4, 5, 8, 13])
def test_packed_windows_are_full_and_hold_eos_between_documents(
    tokenizer: PreTrainedTokenizerBase, length: int
) -> None:
    documents = [*DOCUMENTS, torch.tensor([40, 41])]
    found = made(documents, tokenizer, 9, packing=True, length=length)
    assert {len(window) for window in found} == {length}
    stream = [token for window in found for token in window]
    order = [int(first) for first in made(documents, tokenizer, 60, length=1) for first in first]
    known = {tokens[0]: tokens for tokens in (*TOKENS, [40, 41])}
    expected: list[int] = []
    for first in order:
        expected += [*known[first], EOS]
    assert stream == expected[: len(stream)]


def test_documents_of_one_token_are_no_samples(tokenizer: PreTrainedTokenizerBase) -> None:
    found = made(["w3", words(4, 5), "w6", "", words(7, 8, 9)], tokenizer, 20)
    assert sorted({tuple(sample) for sample in found}) == [(4, 5), (7, 8, 9)]
    with pytest.raises(InputError, match="no document has 2 tokens; give a text with longer ones"):
        made(["w3", "w4"], tokenizer, 1)


def test_short_samples_are_filled_up_with_what_is_not_learned() -> None:
    batch = collate([torch.tensor([5, 6, 7]), torch.tensor([8, 9])])
    assert batch["input_ids"][0].tolist() == [5, 6, 7]
    assert batch["input_ids"][1, :2].tolist() == [8, 9]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[5, 6, 7], [8, 9, -100]]
    assert "attention_mask" not in collate([torch.tensor([5, 6]), torch.tensor([8, 9])])


def test_hub_sets(monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerBase) -> None:
    asked: list[dict[str, Any]] = []

    def load_dataset(**options: Any) -> dict[str, list[str]]:
        asked.append(options)
        return {"text": [words(3, 4), "", words(5, 6)]}

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert read_documents(["owner/name"], tokenizer, 8) == ["w3 w4", "w5 w6"]
    assert asked == [{"path": "owner/name", "split": "train"}]
    assert read_documents(["c4"], tokenizer, 8) == ["w3 w4", "w5 w6"]
    assert asked[1]["path"] == "allenai/c4"
    (whole,) = read_documents(["wikitext2"], tokenizer, 8)  # articles are not told apart in it
    assert isinstance(whole, Tensor)
    assert whole.tolist() == [3, 4, 5, 6]


def test_errors(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    missing = str(tmp_path / "none.txt")
    with pytest.raises(InputError, match=r"restoration text '.*none\.txt': no such file; give \.txt or \.jsonl files"):
        check_sources(["pydoc", missing])
    check_sources(["pydoc", "c4", "owner/name"])
    with pytest.raises(InputError, match=r"none\.txt': No such file"):
        read_documents([missing], tokenizer, 8)
    (tmp_path / "a.jsonl").write_text('{"text": " \\n"}\n')
    with pytest.raises(InputError, match=r"a\.jsonl: it has no documents; give a text with words"):
        read_documents([str(tmp_path / "a.jsonl")], tokenizer, 8)
    (tmp_path / "b.txt").write_text("w3")
    with pytest.raises(InputError, match=r"b\.txt: it has no documents"):
        read_documents([str(tmp_path / "b.txt")], tokenizer, 8)
