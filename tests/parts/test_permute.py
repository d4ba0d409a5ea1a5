"""Sorting changes no function, exactly; clusters are those of what was seen; a grid knows its channels either way."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ptql.errors import InputError
from ptql.families import BlockLayout, family_of
from ptql.functional.clustering import cluster_labels
from ptql.functional.static import cluster_ranges, static_grid
from ptql.nn import attention
from ptql.nn.quant_linear import ORDER
from ptql.nn.static_rounding import grids_of, site_shapes
from ptql.nn.student import biased_linears, call_block, make_student, weights_of
from ptql.parts.activations import DynamicTokens, StaticClusters
from ptql.parts.inputs import InputRange, SiteRange
from ptql.parts.transforms import BlockFacts, Permute, Smooth, TransformState
from ptql.parts.transforms.permute import SITES, PermuteBlock
from ptql.recipe import ActivationScheme, IntScheme
from tests.models import CONFIGS, block_calls, blocks_of, exact, random_model, some_ids

POST_NORM = ("opt_post_norm", "opt_projected")
NAMES = [name for name in CONFIGS if name not in POST_NORM]
OFF = ActivationScheme()


@cache
def exact_model(name: str) -> Any:
    """In float64, attention by ptql's own function."""
    attention.register()
    model = exact(random_model(CONFIGS[name]))
    model.set_attn_implementation(attention.NAME)
    return model


def layout_of(name: str) -> BlockLayout:
    return family_of(CONFIGS[name].model_type).layout(CONFIGS[name])


@cache
def call_of(name: str) -> tuple[Tensor, dict[str, Any], Tensor]:
    """Input, context and output of block 1."""
    return block_calls(exact_model(name), some_ids())[1]


def student_of(name: str, index: int = 1, permute: Permute | None = None, smooth: Smooth | None = None) -> nn.Module:
    block, layout = copy.deepcopy(blocks_of(exact_model(name))[index]), layout_of(name)
    added = (smooth or Smooth(shift="none")).added_biases(layout, biased_linears(block, layout))
    gathered = (permute or Permute()).gathered_norms(layout)
    return make_student(block, layout, added, DynamicTokens(), OFF, False, gathered)


def random_labels(student: nn.Module, layout: BlockLayout, sites: tuple[str, ...] = SITES) -> dict[str, Tensor]:
    """Clusters by lot: as many as there are channels, so that all of them change places."""
    shapes, heads = site_shapes(student, layout), layout.attention
    found = {}
    for site in sites:
        rows, width = (heads.kv_heads, heads.head_dim) if site in ("qkt", "out") else shapes[site]
        found[site] = torch.stack([torch.randperm(width) for _ in range(rows)])
    return found


def some_sites(student: nn.Module, layout: BlockLayout, samples: int = 3) -> dict[str, SiteRange]:
    """What a block might have shown."""
    found = {}
    for site, shape in site_shapes(student, layout).items():
        middle, width = torch.randn(samples, *shape).double(), torch.rand(samples, *shape).double() + 0.1
        found[site] = SiteRange(middle - width, middle + width)
    return found


def facts_of(student: nn.Module, layout: BlockLayout, sites: Mapping[str, SiteRange] | None = None) -> BlockFacts:
    weights, ranges = weights_of(student), {}
    for group in layout.linears:
        columns = weights[f"{group[0]}.weight"].shape[1]
        middle, width = torch.randn(columns).double(), torch.rand(columns).double() + 0.1
        ranges |= dict.fromkeys(group, InputRange(middle - width, middle + width, middle, width))
    return BlockFacts(layout, weights, ranges, 1, 2, sites)


def error(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


# The same function


@pytest.mark.parametrize("sites", [(site,) for site in SITES] + [SITES], ids="+".join)
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_any_order_leaves_a_block_what_it_is(name: str, sites: tuple[str, ...]) -> None:
    hidden, context, expected = call_of(name)
    student, layout = student_of(name), layout_of(name)
    state = PermuteBlock(layout, weights_of(student), random_labels(student, layout, sites))
    weights = weights_of(student)
    folded = state(weights)
    assert error(call_block(student, hidden, context, folded), expected) < 1e-12
    moved = {key for key in weights if not torch.equal(folded[key], weights[key])}
    sorts = sites != ("qkt",) or name.startswith("opt")
    assert bool(moved) == sorts
    assert error(call_block(student, hidden, context), expected) < 1e-12  # before it is given an order


@pytest.mark.parametrize("name", ["llama", "llama_one_head", "llama_biased", "qwen3", "qwen3_biased", "phi3", "opt"])
@torch.no_grad()
def test_any_orders_leave_the_logits_what_they_are(name: str) -> None:
    model, layout, ids = copy.deepcopy(exact_model(name)), layout_of(name), some_ids()
    expected = exact_model(name)(ids, use_cache=False).logits
    for index in range(2):
        student = student_of(name, index)
        state = PermuteBlock(layout, weights_of(student), random_labels(student, layout))
        for key, tensor in state(weights_of(student)).items():
            path, _, kind = key.rpartition(".")
            stored = getattr(student.get_submodule(path), kind)
            stored.data = tensor
        blocks_of(model)[index] = student
    found = model(ids, use_cache=False).logits
    assert (found - expected).abs().max() < 1e-10


@pytest.mark.parametrize("first", ["permute", "smooth"])
@pytest.mark.parametrize("name", ["llama", "llama_biased", "qwen3", "gemma3", "phi3", "opt"])
@torch.no_grad()
def test_with_smoothing_on_either_side(name: str, first: str) -> None:
    hidden, context, expected = call_of(name)
    smooth = Smooth(when="always", shift="all", sites=["qkv", "out", "qkt", "fc1", "fc2"], initial="ones")
    student, layout = student_of(name, smooth=smooth), layout_of(name)
    permuted: TransformState = PermuteBlock(layout, weights_of(student), random_labels(student, layout))
    facts = facts_of(student, layout)
    smoothed = smooth.for_block(facts).double()
    for parameter_name, p in smoothed.named_parameters():
        p.uniform_(0.2, 5.0) if parameter_name.endswith("scale") else p.normal_()
    weights = weights_of(student)
    for state in (permuted, smoothed) if first == "permute" else (smoothed, permuted):
        weights = state(weights)
    assert error(call_block(student, hidden, context, weights), expected) < 1e-10


@torch.no_grad()
def test_what_comes_later_sees_channels_where_they_are() -> None:
    student, layout = student_of("llama"), layout_of("llama")
    facts = facts_of(student, layout)
    state = PermuteBlock(layout, facts.weights, random_labels(student, layout))
    after, folded = state.after(facts), state(facts.weights)
    assert after.weights.keys() == folded.keys()
    assert all(torch.equal(after.weights[key], folded[key]) for key in folded)
    for linear in layout.names:
        before, weight = facts.ranges[linear], facts.weights[f"{linear}.weight"]
        peaks = weight.abs().amax(0) * before.absmax  # of a channel, whatever its place
        moved = folded[f"{linear}.weight"].abs().amax(0) * after.ranges[linear].absmax
        torch.testing.assert_close(moved.sort().values, peaks.sort().values, rtol=1e-12, atol=0)
        assert not torch.equal(moved, peaks)


# Clusters


def slow_points(site: str, sites: Mapping[str, SiteRange], kv: int, group: int) -> Tensor:
    """Loops over heads and channels."""
    names = {"qkt": ("q", "k")}.get(site, (site,))
    rows = kv if site in ("qkt", "out") else 1
    width = sites[names[0]].low.shape[2]
    points = []
    for row in range(rows):
        for channel in range(width):
            features: dict[str, list[float]] = {"high": [], "low": []}
            for name in names:
                mine = [row] if name not in ("q", "out") else [row * group + i for i in range(group)]
                features["high"].append(max(sites[name].high[:, r, channel].max().item() for r in mine))
                features["low"].append(min(sites[name].low[:, r, channel].min().item() for r in mine))
            points.append([*features["high"], *features["low"]])
    return torch.tensor(points, dtype=torch.float64).view(rows, width, -1)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_clusters_are_those_of_what_was_seen(name: str) -> None:
    student, layout = student_of(name), layout_of(name)
    sites = some_sites(student, layout)
    permute = Permute(clusters={"qkv": 6, "qkt": 3, "out": 3, "fc1": 5, "fc2": 7})
    state = permute.for_block(facts_of(student, layout, sites))
    heads, given = layout.attention, {"qkv": 6, "qkt": 3, "out": 3, "fc1": 5, "fc2": 7}
    group = heads.heads // heads.kv_heads
    for site, count in given.items():
        expected = cluster_labels(slow_points(site, sites, heads.kv_heads, group), count)
        assert torch.equal(state.get_buffer(f"labels/{site}"), expected)
    assert set(state.labels) == {"qkv", "fc1", "fc2", "out", "q", "k", "v"}
    for site, labels in state.labels.items():
        assert labels.shape == site_shapes(student, layout)[site]
        if site not in ("q", "k") or name == "opt":
            assert (labels.diff(dim=1) >= 0).all()  # neighbours
    assert permute.site_clusters() == {"qkv": 6, "out": 3, "fc1": 5, "fc2": 7, "q": 3, "k": 3, "v": 3}


def test_sizes_can_be_multiples() -> None:
    student, layout = student_of("llama"), layout_of("llama")
    facts = facts_of(student, layout, some_sites(student, layout))
    labels = Permute(sites=["qkv", "fc2"], multiple=16).for_block(facts).labels
    for site in ("qkv", "fc2"):
        sizes = labels[site][0].bincount()
        assert len(sizes) > 1
        assert (sizes % 16 == 0).all()


def test_a_finished_block_needs_no_clusters() -> None:
    student, layout = student_of("llama"), layout_of("llama")
    facts = facts_of(student, layout)
    state = Permute().for_block(facts)
    assert state.labels == {}
    assert all(folded is facts.weights[key] for key, folded in state(facts.weights).items())


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3", "opt"])
@torch.no_grad()
def test_sorted_or_not_the_grids_round_alike(name: str) -> None:
    """Every channel is on the grid of its cluster, wherever it lies."""
    hidden, context, exact_output = call_of(name)
    layout, permute = layout_of(name), Permute(clusters={"qkv": 6, "fc1": 6, "fc2": 6})
    outputs = []
    for is_sorted in (True, False):
        block = copy.deepcopy(blocks_of(exact_model(name))[1])
        rounding, scheme = StaticClusters(), ActivationScheme(5)
        static = rounding.static_scheme(block, layout, scheme, permute.site_clusters())
        biases = Smooth(shift="none").added_biases(layout, frozenset())
        gathered = permute.gathered_norms(layout)
        student = make_student(block, layout, biases, rounding, scheme, False, gathered, static)
        torch.manual_seed(0)
        sites = some_sites(student, layout)
        state = permute.for_block(facts_of(student, layout, sites))
        assert isinstance(state, PermuteBlock)
        unsorted = PermuteBlock(layout, weights_of(student), {})
        for site, grid in grids_of(student).items():
            labels = state.labels[site]
            own = state.get_buffer(f"labels/{ {'q': 'qkt', 'k': 'qkt', 'v': 'out'}.get(site, site) }")
            own = own.repeat_interleave(len(labels) // len(own), 0)
            low, high = cluster_ranges(sites[site].low * 3, sites[site].high * 3, own, grid.site.clusters)
            grid.fill(*static_grid(low.amin(0), high.amax(0), 5), labels if is_sorted else own)
        outputs.append(call_block(student, hidden, context, (state if is_sorted else unsorted)(weights_of(student))))
    assert 0.01 < error(outputs[0], exact_output) < 1
    assert ((outputs[0] - outputs[1]).abs() < 1e-9).double().mean() > 0.99  # a last bit may move a code


# Settings


def test_when_it_is_used() -> None:
    assert Permute().applies(IntScheme(4), ActivationScheme(4))
    assert Permute().applies(IntScheme(4), ActivationScheme(16, kv_bits=4))
    assert not Permute().applies(IntScheme(4), ActivationScheme(16))


def test_norms_that_are_read_in_another_order() -> None:
    assert Permute().gathered_norms(layout_of("llama")) == {"input_layernorm", "post_attention_layernorm"}
    assert Permute(sites=["fc1", "out"]).gathered_norms(layout_of("gemma2")) == {"pre_feedforward_layernorm"}
    assert Permute(sites=["qkt", "out", "fc2"]).gathered_norms(layout_of("opt_post_norm")) == frozenset()
    for site in ("qkv", "fc1"):
        with pytest.raises(InputError, match=rf"sites: {site}: the output of this model's norms is the residual"):
            Permute(sites=[site]).gathered_norms(layout_of("opt_post_norm"))


@pytest.mark.parametrize("name", POST_NORM)
@torch.no_grad()
def test_what_can_be_sorted_with_norms_behind_the_residual(name: str) -> None:
    hidden, context, expected = call_of(name)
    permute = Permute(sites=["qkt", "out", "fc2"])
    student, layout = student_of(name, permute=permute), layout_of(name)
    labels = random_labels(student, layout, permute.sites)
    folded = PermuteBlock(layout, weights_of(student), labels)(weights_of(student))
    assert not any(key.endswith(f".{ORDER}") for key in folded)
    assert error(call_block(student, hidden, context, folded), expected) < 1e-12


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clusters": {"q": 4}}, "clusters: q: one of qkv"),
        ({"clusters": {"qkt": 0}}, "clusters: qkt=0: a whole number from 1 to 256 is needed; 4 is usual"),
        ({"clusters": {"fc2": 300}}, "clusters: fc2=300: .*; 32 is usual"),
        ({"multiple": 0}, "multiple=0: .*16 and 32 suit matrix units"),
        ({"restarts": True}, "restarts=True: "),
    ],
)
def test_settings_that_are_none(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Permute(**settings)


def test_facts_keep_what_was_seen() -> None:
    seen = {"qkv": SiteRange(torch.tensor([[[-1.0, -2.0]], [[-3.0, 0.0]]]), torch.tensor([[[1.0, 2.0]], [[0.5, 4.0]]]))}
    high, low = seen["qkv"].ends
    assert (high.tolist(), low.tolist()) == ([[1.0, 4.0]], [[-3.0, -2.0]])
    student, layout = student_of("llama"), layout_of("llama")
    assert replace(facts_of(student, layout), sites=seen).sites is seen
