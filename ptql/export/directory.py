"""Formats that are Hugging Face directories: safetensors, and a config.json that says how to read them."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ptql.checkpoint import Checkpoint
from ptql.export.layers import IntLayer, block_parts
from ptql.export.refusals import packed_format
from ptql.export.target import Target
from ptql.formats.write import SHARD_BYTES, write_files
from ptql.recipe import ActivationScheme


class DirectoryTarget(Target):
    """Writes shard by shard; matrices that are not quantised in the dtype, vectors (norms, biases) in float32.

    What serves a model casts vectors to its dtype when it loads them; in float32 they are what was measured.
    """

    def write(self, model: Checkpoint, folder: Path) -> None:
        write_files(folder, model.directory, self._config(model), self._tensors(model), SHARD_BYTES)
        self.add_files(model, folder)

    @abstractmethod
    def block(self, model: Checkpoint, index: int) -> Iterator[tuple[str, Tensor]]:
        """What stands for block `index`, by name in it, as it is written."""

    def quantization(self, model: Checkpoint) -> dict[str, Any] | None:
        """`quantization_config`; None for none."""
        return None

    def add_files(self, model: Checkpoint, folder: Path) -> None:
        """Further files that the format wants."""

    def _config(self, model: Checkpoint) -> dict[str, Any]:
        config = json.loads((model.directory / "config.json").read_text(encoding="utf-8"))
        config.pop("quantization_config", None)
        config.pop("torch_dtype", None)  # its older name
        config["dtype"] = self.dtype_name
        quantization = self.quantization(model)
        return config if quantization is None else {**config, "quantization_config": quantization}

    def _tensors(self, model: Checkpoint) -> Iterator[tuple[str, Tensor]]:
        for index in range(model.num_blocks):
            path = f"{model.family.blocks}.{index}"
            for name, tensor in self.block(model, index):
                yield f"{path}.{name}", tensor
        for name, tensor in model.read(model.outside_names()):
            yield name, self.served(tensor)

    def served(self, tensor: Tensor) -> Tensor:
        """A tensor that is not quantised, as it is written."""
        if not tensor.is_floating_point():
            return tensor
        return tensor.to(self.dtype if tensor.dim() > 1 else torch.float32)


class LayerTarget(DirectoryTarget):
    """Writes tensors of its own in the place of each quantised matrix, and all else as it is."""

    @abstractmethod
    def layer(self, layer: IntLayer, activation: ActivationScheme) -> dict[str, Tensor]:
        """The tensors that stand for a quantised matrix, by their last name; `activation` is what it multiplies."""

    def block(self, model: Checkpoint, index: int) -> Iterator[tuple[str, Tensor]]:
        activation = packed_format(model).activation
        for name, part in block_parts(model, index):
            if isinstance(part, IntLayer):
                for last, tensor in self.layer(part, activation).items():
                    yield f"{name}.{last}", tensor
            else:
                yield name, self.served(part)
