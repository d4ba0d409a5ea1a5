"""Keys, or values, of one layer: packed but for the latest."""

# axes of keys and values: [batch, heads, tokens, head size]

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ptql.nn.cache_formats import CacheFormat, Stored


class PackedTokens:
    """The keys, or the values, of one layer: tokens in their packed form, and the latest as they came.

    Args:
        fmt: Of the packed ones; None packs nothing.
        window: How many of the latest tokens stay as they came.
    """

    def __init__(self, fmt: CacheFormat | None, window: int) -> None:
        self._fmt, self._window = fmt, window
        self._packed: Stored = ()
        self._recent: Tensor | None = None

    def append(self, x: Tensor) -> Tensor:
        """Store what is new; returns all that is stored, as it can be read back."""
        recent = torch.cat([x] if self._recent is None else [self._recent, x], dim=2)
        older = 0 if self._fmt is None else max(recent.shape[2] - self._window, 0)
        if older:
            assert self._fmt is not None
            new = self._fmt.encode(recent[:, :, :older])
            self._packed = (
                tuple(torch.cat(pair, dim=2) for pair in zip(self._packed, new, strict=True)) if self._packed else new
            )
            recent = recent[:, :, older:].clone()  # not a view, which would keep the packed ones in memory
        self._recent = recent
        if not self._packed:
            return recent
        assert self._fmt is not None
        return torch.cat([self._fmt.decode(self._packed, x.shape[-1]).to(x.dtype), recent], dim=2)

    def drop_first(self, tokens: int) -> None:
        """Forget the oldest."""
        from_packed = min(tokens, self._packed_tokens)
        if from_packed:
            self._packed = tuple(part[:, :, from_packed:].clone() for part in self._packed)
        if tokens > from_packed and self._recent is not None:
            self._recent = self._recent[:, :, tokens - from_packed :].clone()

    def drop_last(self, tokens: int) -> None:
        """Forget the latest. Those that are packed already stay packed."""
        assert self._recent is not None
        held = self._recent.shape[2]
        self._recent = self._recent[:, :, : max(held - tokens, 0)].clone()
        if tokens > held:
            self._packed = tuple(part[:, :, : held - tokens].clone() for part in self._packed)

    def change(self, apply: Callable[[Tensor], Tensor]) -> None:
        """Replace each stored tensor: another order of the batch, another device."""
        self._packed = tuple(map(apply, self._packed))
        self._recent = None if self._recent is None else apply(self._recent)

    @property
    def _packed_tokens(self) -> int:
        return self._packed[0].shape[2] if self._packed else 0

    @property
    def tokens(self) -> int:
        return self._packed_tokens + (0 if self._recent is None else self._recent.shape[2])

    def tensors(self) -> Iterator[Tensor]:
        """All that is stored."""
        yield from self._packed
        if self._recent is not None:
            yield self._recent

    def bytes_unpacked(self) -> int:
        """What the same tokens would take as they came."""
        if self._recent is None:
            return 0
        batch, heads, _, width = self._recent.shape
        return batch * heads * self.tokens * width * self._recent.element_size()
