"""The calibration data of a run: which text, and which windows of it."""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path

from jaxtyping import Int
from lightning import LightningDataModule
from torch import Tensor

from ptql.calibration.memory_budget import Budget, parse_bytes
from ptql.calibration.texts import Rows, read_text
from ptql.calibration.tokens import bos_token, cached_windows, load_tokenizer
from ptql.errors import InputError


class CalibrationData(LightningDataModule):
    """Windows of token ids from a text, drawn at random places.

    Args:
        text: A `.txt` or `.jsonl` file (field `text`); `pydoc`, Python's own documentation, always at hand;
            or `wikitext2`, `c4`, `ptb` from the Hugging Face hub (needs `ptql[hub]`).
        samples: Number of windows.
        length: Tokens in a window; at most the model's context.
        batch_size: Windows in a batch; the last batch may hold fewer.
        seed: Seed of the places where windows start.
        rows: How the lines of a `.txt` file are read. `wikitext` joins them as is usual for WikiText-2,
            `plain` changes nothing, `auto` is `wikitext` where the file begins with a WikiText heading.
        memory: The most that a run should take of a GPU's memory, all in, as `16GiB`; by default what is free there.
        host_memory: The most host memory that hidden states may take, as `100GiB`; by default most of it. What fits
            into neither is kept in files.

    Raises:
        InputError: If a number is out of its range.
    """

    def __init__(
        self,
        text: str = "pydoc",
        samples: int = 128,
        length: int = 2048,
        batch_size: int = 4,
        seed: int = 2,
        rows: Rows = "auto",
        memory: str | None = None,
        host_memory: str | None = None,
    ) -> None:
        super().__init__()
        if samples < 1:
            raise InputError(f"samples={samples}: at least 1 window is needed; use --data.samples 128")
        if length < 2:
            raise InputError(f"length={length}: a window holds at least 2 tokens; use --data.length 2048")
        if not 1 <= batch_size <= samples:
            rule = f"a batch holds 1 to {samples} windows (samples={samples})"
            raise InputError(f"batch_size={batch_size}: {rule}; use --data.batch_size {min(4, samples)}")
        self.text = text
        self.samples = samples
        self.length = length
        self.batch_size = batch_size
        self.seed = seed
        self.rows: Rows = rows
        self.memory = memory
        self.host_memory = host_memory
        self.budget()

    def budget(self, processes: int = 1) -> Budget:
        """The memory that each of a machine's `processes` may take; it changes the place of things, not the result."""
        return Budget(
            None if self.memory is None else parse_bytes("memory", self.memory),
            None if self.host_memory is None else parse_bytes("host_memory", self.host_memory),
            processes,
        )

    def windows(
        self, tokenizer_directory: str | Path, context: int | None, bos: bool = False
    ) -> Int[Tensor, "samples length"]:
        """The token ids to calibrate on, the same for the same `identity` and tokenizer.

        Args:
            tokenizer_directory: The model's directory.
            context: The most tokens the model takes; None if it has no limit.
            bos: The first token of each window is the tokenizer's `<bos>`.

        Raises:
            InputError: If a window is longer than the context or the text, or one of these can't be read.
        """
        self.check_length(context)
        tokenizer = load_tokenizer(tokenizer_directory)
        first = bos_token(tokenizer, bos)
        return cached_windows(tokenizer, self._content, self.samples, self.length, self.seed, first)

    def check_length(self, context: int | None) -> None:
        """Raise `InputError` if a window is longer than the model's context."""
        if context is not None and self.length > context:
            rule = f"a window is at most the model's context of {context} tokens"
            raise InputError(f"length={self.length}: {rule}; use --data.length {context}")

    def settings(self) -> tuple[str | int | None, ...]:
        """What was given, in the order of the arguments."""
        numbers = (self.samples, self.length, self.batch_size, self.seed)
        return self.text, *numbers, self.rows, self.memory, self.host_memory

    def identity(self) -> dict[str, str | int]:
        """Everything but the tokenizer that decides the batches, for a run's fingerprint; reads the text."""
        return {
            "text_sha256": hashlib.sha256(self._content.encode("utf-8")).hexdigest(),
            "samples": self.samples,
            "length": self.length,
            "seed": self.seed,
            "batch_size": self.batch_size,
        }

    @cached_property
    def _content(self) -> str:
        return read_text(self.text, "calibration", self.rows)
