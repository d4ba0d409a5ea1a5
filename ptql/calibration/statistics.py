"""What a pass of the full-precision block shows at the inputs of its linear layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ptql.families import BlockLayout
from ptql.parts.transforms import InputRange

MOMENTUM = 0.99  # of the running mid-range over samples: OmniQuant's activation shift


class _Observer:
    """Collects the range of a layer's input without leaving the device."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.low = self.high = self.middle = None

    @torch.no_grad()
    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        samples = args[0].reshape(-1, self.tokens, args[0].shape[-1])  # OPT hands its MLP flattened tokens
        lows, highs = torch.aminmax(samples.float(), dim=1)
        low, high = lows.amin(0), highs.amax(0)
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)
        for middle in (lows + highs) / 2:
            self.middle = middle if self.middle is None else MOMENTUM * self.middle + (1 - MOMENTUM) * middle

    def range(self) -> InputRange:
        assert self.low is not None
        assert self.high is not None
        assert self.middle is not None
        return InputRange(self.low, self.high, self.middle)


@contextmanager
def observe_inputs(block: nn.Module, layout: BlockLayout, tokens: int) -> Iterator[Callable[[], dict[str, InputRange]]]:
    """While open, every forward of `block` on samples of `tokens` tokens counts; yields what returns the ranges.

    Layers that share an input share one observer.
    """
    observers, handles = {}, []
    for group in layout.linears:
        observer = _Observer(tokens)
        handles.append(block.get_submodule(group[0]).register_forward_pre_hook(observer))
        observers |= dict.fromkeys(group, observer)
    try:
        yield lambda: {name: observer.range() for name, observer in observers.items()}
    finally:
        for handle in handles:
            handle.remove()
