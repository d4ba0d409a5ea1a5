"""A cache of keys and values that holds packed codes, for generation with transformers."""

# axes of keys and values: [batch, heads, tokens, head size]

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from ptql.errors import InputError
from ptql.nn.attention import CACHE_ROUNDING, ROUNDED
from ptql.nn.cache_formats import CacheFormat, ChannelFormat, GridFormat, TokenFormat
from ptql.nn.packed_tokens import PackedTokens
from ptql.nn.static_rounding import grids_of
from ptql.recipe import check_bits

KEYS: dict[str, Callable[[int], CacheFormat]] = {"token": TokenFormat, "channel": ChannelFormat}
"""How keys are stored, by what has a range of its own."""


class PackedLayer(DynamicLayer):
    """One layer of a cache: attention is given what the packed codes stand for, and the window as it came.

    Args:
        keys: How keys are stored.
        values: How values are stored.
        window: How many of the latest tokens stay as they came.
        others: Of the layer of transformers that it takes the place of.
    """

    def __init__(self, keys: CacheFormat | None, values: CacheFormat | None, window: int, **others: Any) -> None:
        super().__init__(**others)
        self._formats, self._window = (keys, values), window
        self.stores = self._empty()
        self.is_croppable = window == 0 and all(fmt is None or fmt.unit == 1 for fmt in self._formats)
        """Whether `crop` leaves what there would have been without the tokens: what left a window stays rounded."""

    def _empty(self) -> tuple[PackedTokens, PackedTokens]:
        keys, values = self._formats
        return PackedTokens(keys, self._window), PackedTokens(values, self._window)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = (store.append(x) for store, x in zip(self.stores, (key_states, value_states), strict=True))
        setattr(keys, ROUNDED, True)
        return keys, values

    def get_seq_length(self) -> int:
        return self.stores[0].tokens

    def reset(self) -> None:
        self.stores = self._empty()
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Forget that many of the latest tokens, given as a negative number; or all but so many, as transformers up to
        5.12 says it."""
        held = self.stores[0].tokens
        removed = held - tokens_to_remove if tokens_to_remove > 0 else -tokens_to_remove
        for store in self.stores:
            if removed > 0 and held:
                store.drop_last(removed)

    def _change(self, apply: Callable[[Tensor], Tensor]) -> None:
        for store in self.stores:
            store.change(apply)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._change(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._change(lambda x: x[indices])

    def offload(self) -> None:
        self._change(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self._change(lambda x: x.to(self.device, non_blocking=True))


class PackedSlidingLayer(PackedLayer, DynamicSlidingWindowLayer):
    """The same of attention that sees `sliding_window` tokens: older ones are forgotten."""

    def __init__(self, keys: CacheFormat | None, values: CacheFormat | None, window: int, sliding_window: int) -> None:
        super().__init__(keys, values, window, sliding_window=sliding_window)
        self.is_croppable = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        DynamicSlidingWindowLayer.lazy_initialization(self, key_states, value_states)
        PackedLayer.lazy_initialization(self, key_states, value_states)
        self.keys = self.values = None  # they are in `stores`

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.cumulative_length += key_states.shape[2]
        found = super().update(key_states, value_states)
        for store in self.stores:
            store.drop_first(max(store.tokens - self.sliding_window + 1, 0))
        return found

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def reset(self) -> None:
        super().reset()
        self.cumulative_length = 0

    def crop(self, tokens_to_remove: int) -> None:
        if not tokens_to_remove:
            return
        if self.cumulative_length >= self.sliding_window:
            raise RuntimeError(
                f"crop({tokens_to_remove}): attention slides over {self.sliding_window} tokens, and what left them is "
                "forgotten; generate without an assistant model"
            )
        super().crop(tokens_to_remove)
        self.cumulative_length = self.stores[0].tokens


class PackedCache(Cache):
    """Keys and values in 2 to 8 bits: `model.generate(**inputs, past_key_values=PackedCache(model))`.

    Without `bits` they are stored as the model was quantised to round them: on its fixed grids, or each token of each
    head on its own range. With `window=0` logits are then those of the model without a cache, the ones that perplexity
    was measured with (but for steps, which are stored in float16). With `bits`, any causal language model of
    transformers can have one; each token of each head has its own range, or each channel of keys.

    All tokens that have left the window are rounded before attention sees them, those of a long prompt, too.

    Args:
        model: Whose keys and values are stored.
        bits: 2 to 8, or None for those of a model that ptql made.
        window: How many of the latest tokens stay as they came, in the model's dtype.
        keys: With `bits`: `token`, or `channel`, where each channel of each head has its own range over 64 tokens; up
            to 63 more than `window` stay as they came then (KIVI). It loses less, at 3 bits and fewer far less.

    Raises:
        InputError: No bits are said, or the model keeps its past in a form that this cache does not know.
    """

    layers: list[PackedLayer]  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, model: PreTrainedModel, bits: int | None = None, window: int = 32, keys: str = "token") -> None:
        if type(window) is not int or window < 0:
            raise InputError(f"window={window}: a number of tokens from 0 is needed; 32 is usual, 0 rounds all")
        if bits is not None:
            check_bits(bits, "cache", fewest=2, remedy="leave PackedCache out for 16")
            if bits > 8:
                raise InputError(f"cache bits={bits}: 2 to 8 can be packed; leave PackedCache out for 16")
        if keys not in KEYS:
            raise InputError(f"keys={keys!r}: one of {', '.join(KEYS)} is needed; token is usual")
        own = _own_formats(model)
        if bits is None and not own:
            raise InputError("PackedCache: this model rounds no keys and values; say how many bits: bits=4")
        if bits is None and keys != "token":
            raise InputError(f"keys={keys!r}: this model rounds keys in its own way; say bits, or leave keys out")
        layers: list[Any] = []
        for index, layer in enumerate(DynamicCache(config=model.config).layers):
            formats = own.get(index, (None, None)) if bits is None else (KEYS[keys](bits), TokenFormat(bits))
            if type(layer) is DynamicSlidingWindowLayer:
                layers.append(PackedSlidingLayer(*formats, window, layer.sliding_window))
            elif type(layer) is DynamicLayer:
                layers.append(PackedLayer(*formats, window))
            else:
                raise InputError(
                    f"PackedCache: layer {index} of this model keeps its past in a {type(layer).__name__}; keys and "
                    "values of usual and of sliding attention can be packed; leave PackedCache out"
                )
        super().__init__(layers=layers)

    def stored_bytes(self) -> int:
        """Of memory that the cache takes now."""
        return sum(t.untyped_storage().nbytes() for store in self._stores() for t in store.tensors())

    def bytes_unpacked(self) -> int:
        """What the same tokens would take in the model's dtype."""
        return sum(store.bytes_unpacked() for store in self._stores())

    def _stores(self) -> Iterator[PackedTokens]:
        for layer in self.layers:
            yield from layer.stores


def _own_formats(model: nn.Module) -> dict[int, tuple[CacheFormat | None, CacheFormat | None]]:
    """How a model made by ptql rounds keys and values, by the index of the layer; empty if it rounds none."""
    found: dict[int, tuple[CacheFormat | None, CacheFormat | None]] = {}
    for module in model.modules():
        if (rounding := getattr(module, CACHE_ROUNDING, None)) is not None:
            found[module.layer_idx] = TokenFormat(rounding.bits), TokenFormat(rounding.bits)  # type: ignore[index]
        if grids := {site: GridFormat(grid) for site, grid in grids_of(module).items() if site in ("k", "v")}:
            index = next(part.layer_idx for part in module.modules() if hasattr(part, "layer_idx"))
            found[index] = grids.get("k"), grids.get("v")  # type: ignore[index]
    return found
