"""A causal language model without its blocks: what stands before the first and after the last of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

NOT_FOR_BLOCKS = ("past_key_values", "use_cache")  # there is no cache: windows go through a block whole


class _Caught(Exception):
    """Ends a forward pass once the last block's arguments are known."""


class _StandIn(nn.Module):
    """Stands where a block is. What a model's forward asks of its blocks (`attention_type`), the block answers.

    Args:
        block: The block, whose tensors stay its own.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.__dict__["block"] = block  # not a submodule: its parameters are on the meta device

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["block"], name)


class _Recorder(_StandIn):
    """Keeps what its block would be given, and hands it on; the last one stops."""

    def __init__(self, block: nn.Module, last: bool) -> None:
        super().__init__(block)
        self.last = last

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        self.hidden = hidden_states
        self.given = {key: value for key, value in kwargs.items() if key not in NOT_FOR_BLOCKS}
        if self.last:
            raise _Caught
        return hidden_states


class _Passer(_StandIn):
    """Hands on what it is given."""

    def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
        return hidden_states


class _Giver(_StandIn):
    """Returns prepared hidden states, whatever it is given."""

    hidden: Tensor

    def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
        return self.hidden


class Shell:
    """Embeddings, final norm and head of a model, run by the model's own forward pass.

    Args:
        model: The causal language model, its list of blocks empty.
        path: Module name of that list.
        blocks: The blocks that belong there, on the meta device: the model looks at their attributes.
    """

    def __init__(self, model: nn.Module, path: str, blocks: Sequence[nn.Module]) -> None:
        self.model = model
        self._path = path
        self._blocks = tuple(blocks)

    def to(self, device: torch.device) -> Shell:
        self.model.to(device)
        return self

    def _forward(self, stand_ins: Sequence[nn.Module], ids: Tensor) -> Any:
        self.model.set_submodule(self._path, nn.ModuleList(stand_ins))
        try:
            return self.model(ids, use_cache=False)
        finally:
            self.model.set_submodule(self._path, nn.ModuleList())

    @torch.no_grad()
    def embed(self, ids: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
        """Hidden states [batch, tokens, hidden] before block 0, and the keyword arguments of each block.

        The keyword arguments (mask, RoPE's cosines and sines) broadcast over the batch if it is 1. A tensor that
        several blocks are given is the same object for all of them.
        """
        last = len(self._blocks) - 1
        recorders = [_Recorder(block, last=index == last) for index, block in enumerate(self._blocks)]
        try:
            self._forward(recorders, ids)
        except _Caught:
            return recorders[0].hidden, [recorder.given for recorder in recorders]
        raise AssertionError("the model did not call its last block")

    @torch.no_grad()
    def logits(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Logits [batch, tokens, vocabulary] of hidden states after the last block; `ids` are the same windows."""
        giver = _Giver(self._blocks[-1])
        giver.hidden = hidden
        return self._forward([*map(_Passer, self._blocks[:-1]), giver], ids).logits
