"""What a live block's attention looks at: probabilities of a sample of queries, beside the output."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ptql.families import BlockLayout
from ptql.functional.attention import attention_probabilities
from ptql.nn.attention import PROBE
from ptql.nn.student import call_block
from ptql.parts.objectives import ATTENTION_MADE, AttentionView
from ptql.parts.transforms import Weights


class AttentionProbe:
    """Keeps the probabilities [batch, heads or 1, rows, keys] of one call of an attention module, once it is asked to.

    `rounded_attention` shows it the rounded queries and keys; what attention gives does not change.

    Args:
        view: What is looked at.
    """

    def __init__(self, view: AttentionView) -> None:
        self.view = view
        self._asked = False
        self._seen: Tensor | None = None

    def ask(self) -> None:
        """Look at the next call."""
        self._asked = True

    def look(
        self,
        query: Tensor,
        key: Tensor,
        mask: Tensor | None,
        causal: bool,
        scaling: float | None,
        softcap: float | None,
    ) -> None:
        """What an attention function calls; arguments as those of `attention_probabilities`."""
        if not self._asked:
            return
        rows = self.view.rows_of(query.shape[2])
        with torch.autocast(query.device.type, enabled=False):
            seen = attention_probabilities(query, key, rows, mask, causal, scaling, softcap)
            self._seen = seen.mean(1, keepdim=True) if self.view.averaged else seen

    def take(self) -> Tensor:
        """What was seen, which is not held any longer; nothing more is looked at."""
        seen, self._seen, self._asked = self._seen, None, False
        assert seen is not None
        return seen


def attach_probe(block: nn.Module, layout: BlockLayout, view: AttentionView | None) -> AttentionProbe | None:
    """A probe at the block's attention; None where nothing is looked at."""
    if view is None:
        return None
    probe = AttentionProbe(view)
    setattr(block.get_submodule(layout.attention.module), PROBE, probe)
    return probe


@contextmanager
def watched_attention(
    block: nn.Module, layout: BlockLayout, view: AttentionView, put: Callable[[int, Tensor], None]
) -> Iterator[None]:
    """While open, what each call of the block shows is handed to `put`, with the number of samples before it."""
    probe, samples = attach_probe(block, layout, view), 0
    assert probe is not None

    def hand_on(module: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        nonlocal samples
        seen = probe.take()
        put(samples, seen)
        samples += len(seen)
        probe.ask()

    probe.ask()
    handle = block.register_forward_hook(hand_on)
    try:
        yield
    finally:
        handle.remove()
        delattr(block.get_submodule(layout.attention.module), PROBE)


def made_by(
    block: nn.Module,
    hidden: Tensor,
    context: dict[str, Any],
    weights: Weights | None = None,
    probe: AttentionProbe | None = None,
) -> dict[str, Tensor]:
    """What a block makes of `hidden`, by the names that `all_terms` knows: output, and with a probe attention."""
    if probe is None:
        return {"output": call_block(block, hidden, context, weights)}
    probe.ask()
    return {"output": call_block(block, hidden, context, weights), ATTENTION_MADE: probe.take()}
