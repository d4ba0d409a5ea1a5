"""What a pass of the full-precision block shows at the inputs of its linear layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ptql.calibration.ranks import Ranks
from ptql.families import BlockLayout
from ptql.parts.inputs import InputRange, SiteRange

MOMENTUM = 0.99  # of the running mid-range over samples: OmniQuant's activation shift


class _Observer:
    """Collects the range of a layer's input without leaving the device."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.low = self.high = None
        self.middles: list[Tensor] = []
        self.means: list[Tensor] = []

    @torch.no_grad()
    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        samples = args[0].reshape(-1, self.tokens, args[0].shape[-1])  # OPT hands its MLP flattened tokens
        samples = samples.float()
        lows, highs = torch.aminmax(samples, dim=1)
        low, high = lows.amin(0), highs.amax(0)
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)
        self.middles.append((lows + highs) / 2)
        self.means.append(torch.linalg.vector_norm(samples, 1, dim=1) / self.tokens)  # no copy, as `abs` makes one

    def range(self, ranks: Ranks) -> InputRange:
        assert self.low is not None
        assert self.high is not None
        middle = None
        for sample in ranks.interleaved(torch.cat(self.middles)):  # in the order in which one process sees them
            middle = sample if middle is None else MOMENTUM * middle + (1 - MOMENTUM) * sample
        assert middle is not None
        mean = ranks.interleaved(torch.cat(self.means)).mean(0)
        return InputRange(ranks.smallest(self.low), ranks.largest(self.high), middle, mean)


class SiteObserver:
    """Collects the range of each sample at the sites of a block (`ptql.nn.static_rounding.watched_sites`)."""

    def __init__(self) -> None:
        self._seen: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def see(self, site: str, x: Tensor) -> None:
        """[samples, tokens, rows, width]."""
        self._seen.setdefault(site, []).append((x.amin(1), x.amax(1)))

    def ranges(self, ranks: Ranks) -> dict[str, SiteRange]:
        """By site, over the samples of all processes in the order in which one would see them."""
        both = {site: [torch.cat(ends) for ends in zip(*seen, strict=True)] for site, seen in self._seen.items()}
        return {site: SiteRange(*(ranks.interleaved(ends) for ends in found)) for site, found in both.items()}


@contextmanager
def observe_inputs(
    block: nn.Module, layout: BlockLayout, tokens: int, ranks: Ranks
) -> Iterator[Callable[[], dict[str, InputRange]]]:
    """While open, every forward of `block` on samples of `tokens` tokens counts; yields what returns the ranges.

    Layers that share an input share one observer. The ranges are over the samples of all processes.
    """
    observers, handles = {}, []
    for group in layout.linears:
        observer = _Observer(tokens)
        handles.append(block.get_submodule(group[0]).register_forward_pre_hook(observer))
        observers |= dict.fromkeys(group, observer)
    try:
        yield lambda: _ranges(observers, ranks)
    finally:
        for handle in handles:
            handle.remove()


def _ranges(observers: dict[str, _Observer], ranks: Ranks) -> dict[str, InputRange]:
    found = {observer: observer.range(ranks) for observer in dict.fromkeys(observers.values())}
    return {name: found[observer] for name, observer in observers.items()}
