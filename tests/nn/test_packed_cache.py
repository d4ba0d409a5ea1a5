"""The packed cache in transformers' hands: what attention sees, what is stored, and what generation does to it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, MambaConfig, MambaForCausalLM, PreTrainedModel

from ptql import PackedCache
from ptql.errors import InputError
from ptql.families import family_of
from ptql.nn import attention
from ptql.nn.attention import CACHE_ROUNDING, QUERY_ROUNDING
from ptql.nn.cache_formats import ChannelFormat, TokenFormat
from ptql.nn.packed_tokens import PackedTokens
from ptql.nn.static_rounding import attach_grids, grids_of
from ptql.parts.activations.dynamic import TokenRounding
from ptql.recipe import StaticScheme, StaticSite
from tests.models import CONFIGS, FAMILIES, WINDOW, blocks_of, random_model, some_ids

IDS = some_ids(2, 24)
GROWN = [5, 1, 1, 9, 1, 7]  # tokens of one call after the other; together those of IDS


def rounding(name: str, bits: int) -> PreTrainedModel:
    """A model that rounds queries, keys and values, each token of each head on its own range."""
    model = random_model(CONFIGS[name])
    layout = family_of(model.config.model_type).layout(model.config)
    for block in blocks_of(model):
        for which in (QUERY_ROUNDING, CACHE_ROUNDING):
            setattr(block.get_submodule(layout.attention.module), which, TokenRounding(bits))
    attention.register()
    model.set_attn_implementation(attention.NAME)
    return model


def on_grids(name: str, bits: int) -> PreTrainedModel:
    """A model that rounds keys and values on fixed grids."""
    model = random_model(CONFIGS[name])
    layout = family_of(model.config.model_type).layout(model.config)
    heads = layout.attention
    site = StaticSite(bits, heads.kv_heads, heads.head_dim, 3)
    for block in blocks_of(model):
        attach_grids(block, heads.module, StaticScheme({"k": site, "v": site}))
        for grid in grids_of(block).values():
            shape, labels = (site.rows, site.clusters), torch.randint(0, site.clusters, (site.rows, site.width))
            grid.fill(torch.rand(shape) * 0.2 + 0.2, torch.full(shape, 2.0 ** (bits - 1)), labels)
    attention.register()
    model.set_attn_implementation(attention.NAME)
    return model


@torch.no_grad()
def grown(model: PreTrainedModel, cache: Any, ids: Tensor = IDS) -> Tensor:
    """Logits of all tokens, given a few at a time."""
    found, start = [], 0
    for count in GROWN:
        found.append(model(ids[:, start : start + count], past_key_values=cache, use_cache=True).logits)
        start += count
    assert start == ids.shape[1]
    return torch.cat(found, dim=1)


@torch.no_grad()
def at_once(model: PreTrainedModel, ids: Tensor = IDS) -> Tensor:
    return model(ids, use_cache=False).logits


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("name", FAMILIES)
def test_fixed_grids_give_the_logits_of_the_model_without_a_cache(name: str, bits: int) -> None:
    model = on_grids(name, bits)
    assert not torch.allclose(at_once(model), at_once(random_model(CONFIGS[name])), atol=1e-2)
    torch.testing.assert_close(grown(model, PackedCache(model, window=0)), at_once(model), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_own_ranges_give_almost_the_logits_of_the_model_without_a_cache(name: str) -> None:
    """Steps are float16 in the cache: the difference is small beside that of rounding itself."""
    model, plain = rounding(name, 6), random_model(CONFIGS[name])
    for block, other in zip(blocks_of(model), blocks_of(plain), strict=True):
        assert type(block) is type(other)
    rounded, through = at_once(model), grown(model, PackedCache(model, window=0))
    by_rounding = (rounded - at_once(plain)).abs().mean()
    assert (through - rounded).abs().mean() < 0.3 * by_rounding


@pytest.mark.parametrize("name", FAMILIES)
def test_a_window_over_everything_rounds_nothing(name: str) -> None:
    """Any model can have one; this one rounds nothing by itself."""
    model = random_model(CONFIGS[name])
    cache = PackedCache(model, bits=2, window=1000)
    torch.testing.assert_close(grown(model, cache), at_once(model), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "opt"])
def test_channels_are_rounded_in_whole_units(name: str, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wide channels cost others nothing then; what is left of a unit stays as it came."""
    monkeypatch.setattr(ChannelFormat, "unit", 4)
    model = random_model(CONFIGS[name])
    assert grown(model, PackedCache(model, 8, window, "channel")).sub(at_once(model)).abs().mean() < 0.05
    cache = PackedCache(model, 2, window, "channel")
    grown(model, cache)
    keys, values = cache.layers[0].stores
    assert keys.tokens == values.tokens
    recent = list(keys.tensors())[-1].shape[2]
    assert window <= recent < window + 4
    if name != "mistral":  # where some of a unit may be forgotten
        assert (keys.tokens - recent) % 4 == 0


def test_channels_against_the_definition() -> None:
    x = torch.randn(2, 3, 130, 8, dtype=torch.float64).float()
    x[..., 5] *= 100
    store = PackedTokens(ChannelFormat(3), 1)
    for part in x.split(7, dim=2):
        seen = store.append(part)
    assert torch.equal(seen[:, :, 128:], x[:, :, 128:])
    for start in (0, 64):
        part, found = x[:, :, start : start + 64].double(), seen[:, :, start : start + 64].double()
        low, high = part.amin(2, keepdim=True), part.amax(2, keepdim=True)
        step = ((high - low) / 7).half().double()
        zero = (-low / step).round()
        expected = (((part / step).round() + zero).clamp(0, 7) - zero) * step
        off = (expected - found).abs() > 1e-4 * step
        assert off.float().mean() < 0.01  # numbers where codes meet


def test_forgetting_parts_of_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ChannelFormat, "unit", 4)
    x, nothing = torch.randn(1, 2, 30, 6), torch.zeros(1, 2, 0, 6)
    for first, last in [(0, 0), (1, 0), (3, 5), (4, 9), (9, 1), (0, 25), (26, 2), (7, 20), (30, 0)]:
        store = PackedTokens(ChannelFormat(8), 2)
        whole = store.append(x)
        store.drop_first(first)
        store.drop_last(last)
        assert store.tokens == 30 - first - last
        assert torch.equal(store.append(nothing), whole[:, :, first : 30 - last])
        more = store.append(x[:, :, :11])
        assert more.shape[2] == store.tokens == 41 - first - last
        torch.testing.assert_close(more[:, :, -2:], x[:, :, 9:11])
        torch.testing.assert_close(more[:, :, : 30 - first - last], whole[:, :, first : 30 - last], atol=0.05, rtol=0)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "opt"])
def test_more_bits_or_a_wider_window_lose_less(name: str) -> None:
    model = random_model(CONFIGS[name])
    exact = at_once(model)
    lost = [
        (grown(model, PackedCache(model, bits=bits, window=window)) - exact).square().mean().item()
        for bits, window in [(2, 0), (3, 0), (4, 0), (8, 0)]
    ]
    assert lost == sorted(lost, reverse=True)
    assert lost[-1] < 1e-3 * lost[0]
    windowed = (grown(model, PackedCache(model, bits=2, window=16)) - exact).square().mean().item()
    assert windowed < lost[0]


def test_the_window_is_as_it_came_and_the_rest_is_rounded() -> None:
    store, x = PackedTokens(TokenFormat(3), 4), torch.randn(2, 3, 11, 8)
    store.append(x[:, :, :6])
    seen = store.append(x[:, :, 6:])
    assert torch.equal(seen[:, :, 7:], x[:, :, 7:])
    older = x[:, :, :7]
    step = (older.amax(-1, keepdim=True) - older.amin(-1, keepdim=True)) / 7
    assert ((seen[:, :, :7] - older).abs() <= 0.51 * step).all()
    assert not torch.equal(seen[:, :, :7], older)


def test_keys_of_the_window_are_not_rounded_by_attention() -> None:
    """The model would round all; a cache with a window says that it has seen to it."""
    model, plain = rounding("llama", 2), random_model(CONFIGS["llama"])
    for block in blocks_of(model):
        setattr(block.self_attn, QUERY_ROUNDING, None)
    torch.testing.assert_close(grown(model, PackedCache(model, window=99)), at_once(plain), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_bytes_are_those_of_codes_steps_and_zero_points(bits: int) -> None:
    model = random_model(CONFIGS["llama"]).bfloat16()
    for window in (0, 7):
        cache = PackedCache(model, bits=bits, window=window)
        grown(model, cache)
        vectors, width, tokens = 2 * 2 * 2 * 2, 12, IDS.shape[1]  # blocks, keys and values, samples, heads
        packed = (tokens - window) * (-(-width * bits // 8) + 2 + 2)
        assert cache.stored_bytes() == vectors * (packed + window * width * 2)
        assert cache.bytes_unpacked() == vectors * tokens * width * 2
        assert cache.get_seq_length() == tokens
    model = on_grids("llama", bits).bfloat16()
    cache = PackedCache(model, window=0)
    grown(model, cache)
    assert cache.stored_bytes() == vectors * tokens * -(-width * bits // 8)


def test_sliding_layers_forget_what_they_no_longer_see() -> None:
    model = random_model(CONFIGS["qwen2"])  # slides in the second block only
    cache = PackedCache(model, bits=4, window=2)
    grown(model, cache)
    assert [layer.stores[0].tokens for layer in cache.layers] == [IDS.shape[1], WINDOW - 1]
    assert [layer.get_seq_length() for layer in cache.layers] == [IDS.shape[1]] * 2
    cache.reset()
    assert cache.get_seq_length() == cache.stored_bytes() == 0
    torch.testing.assert_close(grown(model, cache), grown(model, PackedCache(model, bits=4, window=2)))


def generated(model: PreTrainedModel, cache: Any, **options: Any) -> list[list[int]]:
    ids = IDS[:, :9].clone()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0  # padding on the left
    how: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    return model.generate(ids, past_key_values=cache, eos_token_id=None, **{**how, **options}).tolist()  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize("name", ["llama", "qwen3", "opt", "gemma3"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_generation_on_grids_writes_what_it_writes_without_packing(name: str, options: dict[str, Any]) -> None:
    model = on_grids(name, 4)
    expected = generated(model, DynamicCache(config=model.config), **options)
    assert generated(model, PackedCache(model, window=0), **options) == expected


def test_generation_reads_the_cache() -> None:
    model = random_model(CONFIGS["llama"])
    plain = generated(model, DynamicCache(config=model.config))
    assert generated(model, PackedCache(model, bits=8, window=4)) == plain
    assert generated(model, PackedCache(model, bits=2, window=0)) != plain


def test_what_a_batch_is_turned_into() -> None:
    model = random_model(CONFIGS["llama"])
    cache = PackedCache(model, bits=4, window=3)
    grown(model, cache)

    def read(row: int, batch: int) -> Tensor:
        """What attention would be given of the first tokens: reading so rounds one of the window."""
        keys, values = torch.zeros(2, batch, 2, 1, 12)
        seen = [torch.cat(layer.update(keys, values), -1)[row] for layer in cache.layers]
        cache.crop(-1)
        return torch.stack(seen)[:, :, :-8]

    first, second = read(0, batch=2), read(1, batch=2)
    assert not torch.equal(first, second)
    cache.reorder_cache(torch.tensor([1, 0]))  # pyright: ignore[reportArgumentType]
    assert torch.equal(read(0, batch=2), second)
    cache.batch_repeat_interleave(2)
    assert torch.equal(read(2, batch=4), first)
    cache.batch_select_indices(torch.tensor([3]))
    assert torch.equal(read(0, batch=1), first)


def test_cropping_forgets_the_latest_tokens() -> None:
    model = random_model(CONFIGS["llama"])
    for removed in (1, 3, 9):  # less than the window, all of it, more
        cache, expected = PackedCache(model, bits=8, window=3), PackedCache(model, bits=8, window=3)
        with torch.no_grad():
            model(IDS, past_key_values=cache, use_cache=True)
            cache.crop(-removed)
            assert cache.get_seq_length() == IDS.shape[1] - removed
            model(IDS[:, :-removed], past_key_values=expected, use_cache=True)
            logits = [model(IDS[:, -removed:], past_key_values=c, use_cache=True).logits for c in (cache, expected)]
        torch.testing.assert_close(*logits, atol=0.1, rtol=0.02)
    cache.crop(2)  # all but two, as earlier versions of transformers say it
    assert cache.get_seq_length() == 2
    for window in (3, 99):  # more than there is
        cache = PackedCache(model, bits=8, window=window)
        grown(model, cache)
        cache.crop(-99)
        assert cache.get_seq_length() == 0
        grown(model, cache)
        assert cache.get_seq_length() == IDS.shape[1]


def test_cropping_what_slides() -> None:
    model = random_model(CONFIGS["mistral"])
    cache, untouched = PackedCache(model, bits=4), PackedCache(model, bits=4)
    for each in (cache, untouched):
        grown(model, each)
    with pytest.raises(RuntimeError, match="slides over 8 tokens"):
        cache.crop(-1)
    cache.crop(0)
    assert cache.get_seq_length() == IDS.shape[1]
    torch.testing.assert_close(grown(model, cache), grown(model, untouched))


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_an_assistant_model_changes_nothing(name: str) -> None:
    """With no window: a token that was rejected leaves no trace then."""
    model, ids = on_grids(name, 4), IDS[:1, :9]
    how: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = model.generate(ids, **how)  # pyright: ignore[reportCallIssue]
    assistant = random_model(CONFIGS[name], seed=1)
    for block, other in zip(blocks_of(assistant), blocks_of(model), strict=True):
        block.load_state_dict(other.state_dict(), strict=False)  # which guesses right now and then
    assistant.set_input_embeddings(model.get_input_embeddings())
    found = model.generate(  # pyright: ignore[reportCallIssue]
        ids, assistant_model=assistant, past_key_values=PackedCache(model, window=0), **how
    )
    assert found.tolist() == expected.tolist()


def test_the_models_dtype_and_a_layer_elsewhere() -> None:
    model = random_model(CONFIGS["llama"]).bfloat16()
    cache = PackedCache(model, bits=4, window=2)
    assert grown(model, cache).dtype == torch.bfloat16
    held = [t.clone() for store in cache.layers[0].stores for t in store.tensors()]
    cache.layers[0].offload()
    cache.layers[0].prefetch()
    assert all(torch.equal(a, b) for a, b in zip(held, list(_tensors(cache)), strict=True))


def _tensors(cache: PackedCache) -> list[Tensor]:
    return [t for store in cache.layers[0].stores for t in store.tensors()]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "PackedCache: this model rounds no keys and values; say how many bits: bits=4"),
        ({"bits": 1}, "cache bits=1: .* leave PackedCache out for 16"),
        ({"bits": 16}, "cache bits=16: 2 to 8 can be packed; leave PackedCache out"),
        ({"bits": True}, "cache bits=True: "),
        ({"bits": 4, "keys": "head"}, "keys='head': one of token, channel is needed"),
        ({"bits": 4, "window": -1}, "window=-1: a number of tokens from 0 is needed; 32 is usual"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        PackedCache(random_model(CONFIGS["llama"]), **settings)


def test_a_model_that_rounds_keys_by_itself_has_no_other_way() -> None:
    with pytest.raises(InputError, match="keys='channel': this model rounds keys in its own way; say bits"):
        PackedCache(rounding("llama", 4), keys="channel")


def test_a_model_without_keys_is_refused() -> None:
    config = MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, state_size=4)
    with pytest.raises(InputError, match=r"layer 0 of this model keeps its past in a .*; leave PackedCache out"):
        PackedCache(MambaForCausalLM(config), bits=4)
