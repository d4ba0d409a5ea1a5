"""Fixed grids in a live block: what is rounded, what is seen, what is stored, and attention against loops."""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ptql.families import family_of
from ptql.functional.static import round_probabilities
from ptql.nn import attention
from ptql.nn.attention import STATIC, rounded_attention
from ptql.nn.static_rounding import (
    GRIDS,
    StaticAttention,
    StaticRounding,
    attach_grids,
    grid_tensors,
    grids_of,
    site_shapes,
    unrounded,
    watched_sites,
)
from ptql.nn.student import call_block, make_student
from ptql.parts.activations import StaticClusters
from ptql.parts.transforms import AddedBiases
from ptql.recipe import ActivationScheme, StaticScheme, StaticSite
from tests.models import CONFIGS, block_calls, blocks_of, random_model, some_ids

CLUSTERS = {"qkv": 5, "out": 3, "fc1": 4, "fc2": 6, "q": 3, "k": 3, "v": 2}


def filled(site: StaticSite, seed: int = 0) -> StaticRounding:
    """Random grids and clusters."""
    torch.manual_seed(seed)
    grid, shape = StaticRounding(site), (site.rows, site.clusters)
    labels = torch.randint(0, site.clusters, (site.rows, site.width))
    grid.fill((torch.rand(shape) + 0.1).half().float(), torch.randint(0, 2**site.bits, shape).float(), labels)
    return grid


def slow(grid: StaticRounding, x: Tensor, row: int, channel: int) -> float:
    """One number."""
    label = int(grid.cluster[row, channel])
    scale, zero = grid.scale.view(torch.float16)[row, label].item(), int(grid.zero[row, label])
    code = min(max(round(float(x) / scale) + zero, 0), 2**grid.site.bits - 1)
    return (code - zero) * scale


def test_the_input_of_linear_layers_against_loops() -> None:
    grid, x = filled(StaticSite(4, 3, 5, 4, ("any",))), torch.randn(2, 6, 15) * 3
    rounded = grid(x)
    for b in range(2):
        for t in range(6):
            for c in range(15):
                assert rounded[b, t, c].item() == pytest.approx(slow(grid, x[b, t, c], c // 5, c % 5))
    assert torch.equal(grid(x.flatten(0, 1)), rounded.flatten(0, 1))  # as OPT gives it to its MLP


def test_heads_against_loops() -> None:
    grid, x = filled(StaticSite(3, 3, 5, 4)), torch.randn(2, 3, 6, 5) * 3
    rounded = grid(x)
    for b in range(2):
        for h in range(3):
            for t in range(6):
                for c in range(5):
                    assert rounded[b, h, t, c].item() == pytest.approx(slow(grid, x[b, h, t, c], h, c))


def test_a_cast_leaves_grids_alone() -> None:
    grid, x = filled(StaticSite(4, 1, 8, 4, ("any",))), torch.randn(3, 8)
    expected = grid(x)
    for cast in (nn.Module.half, nn.Module.bfloat16, nn.Module.double):
        assert torch.equal(cast(copy.deepcopy(grid))(x), expected)


def student_of(name: str, bits: int = 4) -> tuple[nn.Module, Any, Tensor, dict[str, Any]]:
    """A block with grids that are filled, its layout, its input [3, 20, 48] and its context."""
    attention.register()
    model = random_model(CONFIGS[name])
    model.set_attn_implementation(attention.NAME)
    hidden, context, _ = block_calls(model, some_ids())[1]
    block, layout = blocks_of(model)[1], family_of(CONFIGS[name].model_type).layout(CONFIGS[name])
    rounding, scheme = StaticClusters(), ActivationScheme(bits)
    static = rounding.static_scheme(block, layout, scheme, CLUSTERS)
    student = make_student(block, layout, AddedBiases(), rounding, scheme, static=static)
    for grid in grids_of(student).values():
        shape = grid.scale.shape
        labels = torch.randint(0, grid.site.clusters, grid.cluster.shape)
        grid.fill(torch.full(shape, 0.3).half(), torch.full(shape, float(2 ** (bits - 1))), labels)
    return student, layout, hidden, context


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_each_site_is_rounded_and_seen_before_that(name: str) -> None:
    student, layout, hidden, context = student_of(name)
    seen: dict[str, Tensor] = {}
    rounded = call_block(student, hidden, context)
    with watched_sites(student, layout, hidden.shape[1], seen.__setitem__):
        free = call_block(student, hidden, context)
    assert torch.equal(call_block(student, hidden, context), rounded)
    with unrounded(student):
        shares = call_block(student, hidden, context)  # probabilities are on no grid that could be off
    assert 0 < (shares - free).abs().max() < 0.5
    shapes = site_shapes(student, layout)
    assert {site: x.shape for site, x in seen.items()} == {site: (3, 20, *shape) for site, shape in shapes.items()}
    for grid in grids_of(student).values():
        grid.on = False
        assert not torch.equal(call_block(student, hidden, context), rounded)  # each of them matters
        grid.on = True


@torch.no_grad()
def test_what_is_seen_is_what_layers_read() -> None:
    student, layout, hidden, context = student_of("llama")
    seen: dict[str, Tensor] = {}
    inputs: dict[str, Tensor] = {}
    handles = [
        student.get_submodule(group[0]).register_forward_pre_hook(
            lambda module, args, name=group[0]: inputs.__setitem__(name, args[0])
        )
        for group in layout.linears
    ]
    with watched_sites(student, layout, 20, seen.__setitem__):
        call_block(student, hidden, context)
    for handle in handles:
        handle.remove()
    for site, group in zip(("qkv", "out", "fc1", "fc2"), layout.linears, strict=True):
        assert torch.equal(seen[site].flatten(2), inputs[group[0]])
    qkv, heads = inputs["self_attn.q_proj"], layout.attention
    values = qkv @ student.get_parameter("self_attn.v_proj.weight").T
    torch.testing.assert_close(seen["v"].flatten(2), values)
    keys = qkv @ student.get_parameter("self_attn.k_proj.weight").T
    keys = keys.view(3, 20, heads.kv_heads, heads.head_dim).transpose(1, 2)
    cos, sin = (part[:, None] for part in context["position_embeddings"])
    halves = torch.cat([-keys[..., heads.head_dim // 2 :], keys[..., : heads.head_dim // 2]], -1)
    torch.testing.assert_close(seen["k"], (keys * cos + halves * sin).transpose(1, 2))  # after RoPE


@torch.no_grad()
def test_names_of_what_is_stored() -> None:
    student, _, hidden, context = student_of("llama")
    tensors = grid_tensors(student)
    sites = ("qkv", "out", "fc1", "fc2", "q", "k", "v")
    assert set(tensors) == {f"{GRIDS}.{site}.{part}" for site in sites for part in ("scale", "zero", "cluster")}
    assert set(tensors) == {name for name in student.state_dict() if "proj.weight" not in name and "norm" not in name}
    expected = call_block(student, hidden, context)
    assert torch.equal(call_block(copy.deepcopy(student), hidden, context), expected)
    other = copy.deepcopy(student)
    for grid in grids_of(other).values():
        grid.scale.zero_()
    assert torch.equal(call_block(other, hidden, context, tensors), expected)  # in the place of its own


def test_nothing_is_on_grids_unless_it_is_said() -> None:
    block = nn.ModuleDict({"attention": nn.Linear(4, 4)})
    assert grids_of(block) == {}
    assert grid_tensors(block) == {}
    rounds = attach_grids(block, "attention", StaticScheme({"fc2": StaticSite(4, 1, 4, 2, ("mlp.down",))}))
    assert set(rounds) == {"mlp.down"}
    assert getattr(block["attention"], STATIC) == StaticAttention()


# Attention


def loops(q: Tensor, k: Tensor, v: Tensor, bits: int | None, causal: bool, softcap: float | None = None) -> Tensor:
    """[batch, tokens, heads, size], one query at a time."""
    out = torch.zeros(q.shape[0], q.shape[2], q.shape[1], q.shape[3], dtype=torch.float64)
    group = q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for t in range(q.shape[2]):
                seen = range(t + 1 if causal else k.shape[2])
                scores = [(q[b, h, t] @ k[b, h // group, j]).item() * q.shape[3] ** -0.5 for j in seen]
                if softcap is not None:
                    scores = [softcap * math.tanh(score / softcap) for score in scores]
                weights = [math.exp(score) for score in scores]
                for j, weight in zip(seen, weights, strict=True):
                    share = weight / sum(weights)
                    share = share if bits is None else round(share * (2**bits - 1)) / (2**bits - 1)
                    out[b, t, h] += share * v[b, h // group, j]
    return out


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("masked", [False, True])
def test_rounded_probabilities_against_loops(bits: int, masked: bool, softcap: float | None) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 7, 8, dtype=torch.float64) for heads in (4, 2, 2))
    module = nn.Identity()
    setattr(module, STATIC, StaticAttention(probabilities=partial(round_probabilities, bits=bits)))
    mask = torch.ones(7, 7, dtype=torch.bool).tril()[None, None] if masked else None
    found, _ = rounded_attention(module, q, k, v, mask, softcap=softcap)
    torch.testing.assert_close(found, loops(q, k, v, bits, True, softcap), rtol=1e-9, atol=1e-9)


def test_queries_keys_and_values_each_by_their_own() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 7, 8, dtype=torch.float64) for heads in (4, 2, 2))
    static = StaticAttention(lambda x: x + 1, lambda x: x * 2, lambda x: x - 3)
    module = nn.Identity()
    setattr(module, STATIC, static)
    found, _ = rounded_attention(module, q, k, v, None)
    torch.testing.assert_close(found, loops(q + 1, k * 2, v - 3, None, True), rtol=1e-9, atol=1e-9)
    setattr(module, STATIC, StaticAttention())
    torch.testing.assert_close(rounded_attention(module, q, k, v, None)[0], loops(q, k, v, None, True))
