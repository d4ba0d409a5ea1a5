"""Parameter files that OmniQuant, LRQuant and ABQ-LLM publish: what they learned, by block, as a torch file.

`omni_parameters.pth`, `rlq_parameters.pth` and `abq_parameters.pth` hold a dictionary from the index of a block to
`{qkv,out,qkt,fc1,fc2}_smooth_{scale,shift}` [channels] and `LINEAR.weight_quantizer.{upbound,lowbound}_factor`
[out * groups, 1]. What ABQ-LLM learns as compensation is in none of them: its code leaves it out.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ptql.disk import sha256
from ptql.errors import InputError

SMOOTH = ("scale", "shift")
CLIPPING = {"upper": "upbound_factor", "lower": "lowbound_factor"}


@dataclass(frozen=True)
class Published:
    """A file of published parameters.

    Args:
        path: Of the file.
        blocks: Tensors by name, by index of the block.
    """

    path: Path
    blocks: Mapping[int, Mapping[str, Tensor]]

    @classmethod
    def read(cls, path: Path) -> Published:
        """Read a file; nothing in it is run.

        Raises:
            InputError: It can't be read, or is not such a dictionary.
        """
        try:
            found = torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{path}: no readable torch file ({reason}); give one that holds tensors only") from None
        if not _is_published(found):
            raise InputError(
                f"{path}: not a dictionary of tensors by block, as omni_parameters.pth is; give such a file, or leave "
                "--model.published out"
            )
        return cls(path, found)

    @cached_property
    def sha256(self) -> str:
        return sha256(self.path)

    def check(self, blocks: int) -> None:
        """Raise `InputError` unless there is the same for each block of the model."""
        if sorted(self.blocks) != list(range(blocks)):
            raise InputError(
                f"{self.path}: holds {len(self.blocks)} blocks and the model has {blocks}; give the file of this model"
            )
        shapes = [{name: tuple(tensor.shape) for name, tensor in block.items()} for block in self.blocks.values()]
        for index, own in zip(self.blocks, shapes, strict=True):
            if own != shapes[0]:
                raise InputError(f"{self.path}: block {index} holds other tensors than the first one; it is damaged")

    def into(self, task: nn.Module, index: int) -> None:
        """Give a block's task what was learned for block `index`.

        Raises:
            InputError: The file has what the recipe has no place for, or lacks what it learns.
        """
        left = {name: tensor.float() for name, tensor in self.blocks[index].items()}
        for transform in task.get_submodule("transforms").children():
            if not hasattr(transform, "sites"):
                continue  # of ours alone: begins as it does without a file
            for site in transform.get_submodule("sites").children():
                name = getattr(site, "name", None) or site.site.name  # type: ignore[union-attr]
                for kind in SMOOTH:
                    self._take(left, f"{name}_smooth_{kind}", getattr(site, kind, None))
        for linear, quantizer in task.get_submodule("quantizers").named_children():
            for kind, theirs in CLIPPING.items():
                self._take(left, f"{linear.replace('/', '.')}.weight_quantizer.{theirs}", getattr(quantizer, kind))
        if rest := [name for name, tensor in left.items() if not (name.endswith("shift") and not tensor.any())]:
            raise InputError(
                f"{self.path}: holds {rest[0]}, for which the recipe has no place; choose a method, scheme and sites "
                "as those it was made with"
            )

    def _take(self, left: dict[str, Tensor], name: str, parameter: Any) -> None:
        if parameter is None:
            return
        if name not in left:
            raise InputError(
                f"{self.path}: lacks {name}, which the recipe learns; choose a method, scheme and sites as those it "
                "was made with"
            )
        found = left.pop(name)
        if found.numel() != parameter.numel():
            raise InputError(
                f"{self.path}: {name} holds {found.numel()} numbers and the recipe has {parameter.numel()}; choose the "
                "scheme that it was made with, and --model.transforms.faithful true for scales of q and k by channel"
            )
        with torch.no_grad():
            parameter.copy_(found.view_as(parameter))


def _is_published(found: Any) -> bool:
    return (
        isinstance(found, dict)
        and bool(found)
        and all(isinstance(index, int) and isinstance(block, dict) for index, block in found.items())
        and all(isinstance(n, str) and isinstance(t, Tensor) for block in found.values() for n, t in block.items())
    )
