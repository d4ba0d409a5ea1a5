"""The last blocks of a run's model learn on windows without labels: ahead of what is measured, or between."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from ptql.evaluation.pupil import Lesson, Pupil
from ptql.evaluation.recorded_run import RecordedRun
from ptql.evaluation.standing import Standing
from ptql.parts.transforms import Weights

if TYPE_CHECKING:
    from ptql.calibration.trainer import BlockTrainer


@dataclass(frozen=True)
class Learned:
    """Blocks that have learned.

    Args:
        weights: What each block computes with, by its index.
        quantised: What came out of the last one, for all windows.
    """

    weights: dict[int, Weights]
    quantised: Float[Tensor, "samples tokens hidden"]


@dataclass(frozen=True)
class Adaptation:
    """Who teaches which blocks, and where.

    Args:
        run: Whose blocks learn; its files are only read.
        lesson: How.
        trainer: Says how steps are computed.
        device: Where.
        batch_size: Windows at a time where nothing is learned.
    """

    run: RecordedRun
    lesson: Lesson
    trainer: BlockTrainer
    device: torch.device
    batch_size: int

    def ahead(self, standing: Standing, count: int, embeddings: Tensor | None = None) -> Learned:
        """Each block from `standing` on learns, one after the other, on the first `count` windows.

        `embeddings`, if given, is what it learns on instead: as if it were the first block.
        """
        quantised, fp, weights = standing.quantised, standing.fp[:count], {}
        for index in range(standing.block, len(standing.contexts)):
            pupil = self.pupil(standing, index)
            inputs = quantised[:count]
            if embeddings is not None:
                inputs = fp = embeddings
            targets = pupil.targets(fp, inputs, self.batch_size)
            pupil.learn(inputs, targets)
            weights[index] = pupil.weights()
            quantised, fp = pupil.output(quantised, weights[index], self.batch_size), targets["fp"]
        return Learned(weights, quantised)

    def online(self, standing: Standing) -> OnlineBlocks:
        """The blocks from `standing` on, to learn batch after batch."""
        indices = range(standing.block, len(standing.contexts))
        return OnlineBlocks(standing, {index: self.pupil(standing, index, captured=False) for index in indices})

    def pupil(self, standing: Standing, index: int, captured: bool = True) -> Pupil:
        """Block `index`, as calibration left it."""
        return Pupil(self.run, index, standing.contexts[index], self.lesson, self.trainer, self.device, captured)


class OnlineBlocks:
    """Blocks that go on learning, each on what the ones before it make of a batch by then.

    Args:
        standing: Before the first of them.
        pupils: The blocks, by index, in order.
    """

    def __init__(self, standing: Standing, pupils: dict[int, Pupil]) -> None:
        self._standing, self._pupils = standing, pupils
        self._seen: list[dict[str, Tensor]] = []

    def see(self, windows: slice) -> Float[Tensor, "batch tokens hidden"]:
        """What the blocks make of these windows as they are now; `learn` is about them then."""
        device = next(iter(self._pupils.values())).device
        quantised = self._standing.quantised[windows].to(device)
        fp, self._seen = self._standing.fp[windows].to(device), []
        for pupil in self._pupils.values():
            targets = pupil.targets(fp, quantised, len(fp))
            self._seen.append({"input": quantised, **targets})
            quantised, fp = pupil.output(quantised, pupil.weights(), len(fp)), targets["fp"]
        return quantised

    def learn(self) -> None:
        """Learn on the windows that were seen last."""
        for pupil, batch in zip(self._pupils.values(), self._seen, strict=True):
            pupil.repeat(batch)

    def weights(self) -> dict[int, Weights]:
        """What each block computes with now, by its index."""
        return {index: pupil.weights() for index, pupil in self._pupils.items()}
