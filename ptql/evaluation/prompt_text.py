"""The prompts of a task as one text without labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ptql.calibration.tokens import bos_token, consecutive_windows, tokenize
from ptql.errors import InputError

BETWEEN = "\n\n"


@dataclass(frozen=True)
class PromptText:
    """A task's documents, in order, as windows of their prompts.

    Args:
        windows: Consecutive; what is left at the end is dropped.
        starts: How many tokens of text come before each document.
        stride: Tokens of text in a window: all of its tokens but `<bos>`.
    """

    windows: Int[Tensor, "samples tokens"]
    starts: list[int]
    stride: int

    @classmethod
    def of(
        cls,
        task: str,
        documents: Sequence[Sequence[str]],
        tokenizer: PreTrainedTokenizerBase,
        length: int,
        bos: bool,
    ) -> PromptText:
        """The text of a task.

        Each prompt is tokenised on its own, together with the empty line after it: no token knows of a later document.

        Args:
            task: Its name.
            documents: The prompts of each document.
            tokenizer: Of the model.
            length: Tokens of a window; if the text is shorter, it is one shorter window.
            bos: Whether windows begin with `<bos>`.

        Raises:
            InputError: All prompts are empty.
        """
        starts, parts, total = [], [], 0
        for prompts in documents:
            starts.append(total)
            for prompt in prompts:
                parts.append(tokenize(tokenizer, prompt + BETWEEN))
                total += len(parts[-1])
        if not total:
            raise InputError(f"tta tasks={task}: its prompts are empty, and there is nothing to learn on; leave it out")
        added = int(bos)
        windows = consecutive_windows(torch.cat(parts), min(length, total + added), bos_token(tokenizer, bos))
        return cls(windows, starts, windows.shape[1] - added)

    def after(self, windows: int) -> list[int]:
        """The documents that have no token in the first so many windows."""
        return [document for document, start in enumerate(self.starts) if start >= windows * self.stride]
