"""An ordinary model with the rounded weights multiplied out: as large as the source, for any tool."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ptql.checkpoint import Checkpoint
from ptql.export.directory import DirectoryTarget
from ptql.export.refusals import packed_format, refuse_activations, refuse_additions
from ptql.export.target import Loader
from ptql.restoration.dense import block_tensors


class Dense(DirectoryTarget):
    """Weights are rounded once more, to the dtype; in float32 they are exactly those that were measured."""

    name = "dense"
    exact = False  # but in float32
    loaders = (Loader("by_transformers.py", "transformers", "pip install transformers"),)

    @classmethod
    def usual_dtype(cls, model: Checkpoint) -> torch.dtype:
        return torch.bfloat16

    def check(self, model: Checkpoint) -> None:
        packed_format(model)
        refuse_additions(model, self.name)
        refuse_activations(model, self.name)

    def block(self, model: Checkpoint, index: int) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in block_tensors(model, index).items():
            yield name, self.served(tensor)
