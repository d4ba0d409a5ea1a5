"""A text that was measured as usual, for callbacks that measure it in another way as well."""

from __future__ import annotations

from functools import cached_property

import torch
from jaxtyping import Float64, Int
from torch import Tensor

from ptql.evaluation.recorded_run import RecordedRun
from ptql.evaluation.standing import Standing
from ptql.shell import Shell


class TextUnderTest:
    """A text's windows, and their way through a run's model.

    Args:
        name: Of the text.
        windows: Token ids [samples, tokens].
        losses: Of each window [samples], as measured: sums over predicted tokens, in nats.
        run: Whose model was measured.
        device: Where blocks run.
        batch_size: Windows at a time where nothing is learned.
    """

    def __init__(
        self,
        name: str,
        windows: Int[Tensor, "samples tokens"],
        losses: Float64[Tensor, " samples"],
        run: RecordedRun,
        device: torch.device,
        batch_size: int,
    ) -> None:
        self.name, self.windows, self.losses, self.run = name, windows, losses, run
        self.device, self.batch_size = device, batch_size
        self._standing: Standing | None = None

    @cached_property
    def shell(self) -> Shell:
        """Embeddings, final norm and head, which quantising leaves alone."""
        return self.run.packed.shell().to(self.device)

    def start(self) -> Standing:
        """Hidden states before block 0."""
        return Standing.at_start(self.shell, self.windows, self.device, self.batch_size)

    def before_last(self, blocks: int) -> Standing:
        """Hidden states before the last `blocks` blocks; kept, as the next callback will mostly ask for the same."""
        target = self.run.source.num_blocks - blocks
        if self._standing is None or self._standing.block > target:
            self._standing = self.start()
        self._standing = self._standing.moved_to(target, self.run, self.device, self.batch_size)
        return self._standing
