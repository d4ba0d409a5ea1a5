"""A causal language model without its blocks: what stands before the first and after the last of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class _Caught(Exception):
    """Ends a forward pass once the first block's input is known."""


class _Catcher(nn.Module):
    """Stands where the blocks are, keeps what the first one is given and stops."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        self.hidden, self.kwargs = hidden_states, kwargs
        raise _Caught


class _Given(nn.Module):
    """Stands where the blocks are and returns prepared hidden states."""

    hidden: Tensor

    def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
        return self.hidden


class Shell:
    """Embeddings, final norm and head of a model, run by the model's own forward pass.

    Args:
        model: The causal language model, its list of blocks empty.
        blocks: Module name of that list.
    """

    def __init__(self, model: nn.Module, blocks: str) -> None:
        self.model = model
        self._blocks = blocks

    def to(self, device: torch.device) -> Shell:
        self.model.to(device)
        return self

    def _forward(self, block: nn.Module, ids: Tensor) -> Any:
        self.model.set_submodule(self._blocks, nn.ModuleList([block]))
        return self.model(ids, use_cache=False)

    @torch.no_grad()
    def embed(self, ids: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Hidden states [batch, tokens, hidden] before block 0, and the keyword arguments of every block.

        The keyword arguments (mask, RoPE's cosines and sines) broadcast over the batch if it is 1.
        """
        catcher = _Catcher()
        try:
            self._forward(catcher, ids)
        except _Caught:
            return catcher.hidden, {
                k: v for k, v in catcher.kwargs.items() if k not in ("past_key_values", "use_cache")
            }
        raise AssertionError("the model did not call its blocks")

    @torch.no_grad()
    def logits(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Logits [batch, tokens, vocabulary] of hidden states after the last block; `ids` are the same windows."""
        given = _Given()
        given.hidden = hidden
        return self._forward(given, ids).logits
