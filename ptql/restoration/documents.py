"""The text that LoRA learns on: documents in random order, one a sample, or packed into full windows."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from ptql.calibration.texts import NAMES, read_text, text_rows
from ptql.calibration.tokens import tokenize
from ptql.errors import InputError

IGNORED = -100  # a label that Hugging Face's loss leaves out
FEWEST = 2  # tokens of a document that has anything to predict


def read_documents(
    sources: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int, bos: int | None = None
) -> list[str | Tensor]:
    """All documents of the texts: as text, or, where a text is not divided into any, as pieces of `length` tokens.

    Args:
        sources: As `read_text` takes them; the lines of a `.jsonl` file are documents, and the rows of a hub set
            (`owner/name`, its split `train`, column `text`).
        tokenizer: Of the model.
        length: The most tokens of a piece.
        bos: What each piece begins with; None for nothing.

    Raises:
        InputError: A text can't be had, or has no words.
    """
    found: list[str | Tensor] = []
    for source in sources:
        rows = text_rows(source)
        if rows is None:
            first = torch.tensor([] if bos is None else [bos], dtype=torch.long)
            pieces = tokenize(tokenizer, read_text(source)).split(length - len(first))
            found += [torch.cat([first, piece]) for piece in pieces if len(piece) >= FEWEST]
        else:
            found += [row for row in rows if row.strip()]
    if not found:
        raise InputError(f"restoration text {', '.join(sources)}: it has no documents; give a text with words")
    return found


def check_sources(sources: Sequence[str]) -> None:
    """Refuse what is no text at sight, without reading it."""
    for source in sources:
        if source not in NAMES and not Path(source).is_file() and source.count("/") != 1:
            raise InputError(
                f"restoration text {source!r}: no such file; give .txt or .jsonl files, {', '.join(NAMES)}, or a hub "
                "set (owner/name)"
            )


class Documents(Dataset):
    """Samples of the training text, the same for the same arguments; number k is made when it is asked for.

    Each pass over the documents has an order of its own.

    Args:
        documents: What `read_documents` found.
        tokenizer: Turns them into tokens, with the special tokens that it usually adds.
        samples: How many samples there are; documents come again where these are fewer.
        length: The most tokens of a sample; what is longer is cut off.
        packing: Join documents, each with `<eos>` behind it, and cut windows of `length` tokens out of that.
        seed: Of the orders.
    """

    def __init__(
        self,
        documents: list[str | Tensor],
        tokenizer: PreTrainedTokenizerBase,
        samples: int,
        length: int,
        packing: bool,
        seed: int,
    ) -> None:
        self.documents, self.tokenizer = documents, tokenizer
        self.samples, self.length = samples, length
        self._draw = torch.Generator().manual_seed(seed)
        self._order = torch.empty(0, dtype=torch.int64)
        self._packed = self._pack() if packing else None

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> Int[Tensor, " n"]:
        if self._packed is not None:
            return self._packed[index].long()
        number = self._at(index)
        for step in range(len(self.documents)):  # of a document too short to predict anything, its neighbour
            tokens = self._tokens((number + step) % len(self.documents))
            if len(tokens) >= FEWEST:
                return tokens[: self.length]
        raise InputError(f"restoration text: no document has {FEWEST} tokens; give a text with longer ones")

    def _at(self, place: int) -> int:
        """The number of the document at a place of the endless sequence of shuffled passes."""
        while place >= len(self._order):
            self._order = torch.cat([self._order, torch.randperm(len(self.documents), generator=self._draw)])
        return int(self._order[place])

    def _tokens(self, index: int) -> Tensor:
        document = self.documents[index]
        if isinstance(document, Tensor):
            return document
        ids = self.tokenizer(document, return_attention_mask=False, verbose=False)["input_ids"]
        return torch.tensor(ids, dtype=torch.long)

    def _pack(self) -> Int[Tensor, "samples {self.length}"]:
        eos = self.tokenizer.eos_token_id
        end = torch.tensor([eos] if isinstance(eos, int) else [], dtype=torch.int32)
        parts: list[Tensor] = []
        wanted, have, place = self.samples * self.length, 0, 0
        while have < wanted:
            parts += [self._tokens(self._at(place)).int(), end]
            have, place = have + len(parts[-2]) + len(end), place + 1
        return torch.cat(parts)[:wanted].view(self.samples, self.length)


def collate(samples: list[Tensor]) -> dict[str, Tensor]:
    """A batch: `input_ids` and `labels`, [samples, tokens], short samples filled up at the end; `attention_mask` where
    any was: without one, attention is causal and nothing else, which is faster."""
    longest = max(len(sample) for sample in samples)
    ids = torch.zeros(len(samples), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sample in enumerate(samples):
        ids[row, : len(sample)] = sample
        mask[row, : len(sample)] = 1
    batch = {"input_ids": ids, "labels": ids.masked_fill(mask == 0, IGNORED)}
    return batch if mask.all() else {**batch, "attention_mask": mask}


def digest(documents: list[str | Tensor]) -> str:
    """SHA-256 of all documents: another text is another restoration."""
    found = hashlib.sha256()
    for document in documents:
        content = document.numpy().tobytes() if isinstance(document, Tensor) else document.encode()
        found.update(hashlib.sha256(content).digest())
    return found.hexdigest()
