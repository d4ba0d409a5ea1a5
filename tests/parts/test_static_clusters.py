"""Which tensors of a block are rounded on fixed grids, and to how many bits; what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from ptql.errors import InputError
from ptql.families import family_of
from ptql.parts.activations import StaticClusters
from ptql.parts.transforms import Permute
from ptql.recipe import ActivationScheme, StaticScheme, StaticSite
from tests.models import CONFIGS, blocks_of

EVERY = ("qkv", "out", "fc1", "fc2", "q", "k", "v")


def scheme_of(
    name: str, activation: ActivationScheme, clusters: dict[str, int], **settings: Any
) -> StaticScheme | None:
    config = CONFIGS[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    layout = family_of(config.model_type).layout(config)
    return StaticClusters(**settings).static_scheme(blocks_of(model)[0], layout, activation, clusters)


def bits_of(activation: ActivationScheme, **settings: Any) -> tuple[dict[str, int], int] | None:
    found = scheme_of("llama", activation, {}, **settings)
    return None if found is None else ({name: site.bits for name, site in found.sites.items()}, found.softmax_bits)


def test_sites_of_a_block_with_grouped_heads() -> None:
    """Four query heads of 12 on two of keys and values."""
    found = scheme_of("llama", ActivationScheme(4), Permute().site_clusters())
    assert found is not None
    qkv, gate_up = (f"self_attn.{p}_proj" for p in "qkv"), ("mlp.gate_proj", "mlp.up_proj")
    assert found.sites == {
        "qkv": StaticSite(4, 1, 48, 32, tuple(qkv)),
        "out": StaticSite(4, 4, 12, 4, ("self_attn.o_proj",)),
        "fc1": StaticSite(4, 1, 48, 32, gate_up),
        "fc2": StaticSite(4, 1, 80, 32, ("mlp.down_proj",)),
        "q": StaticSite(4, 4, 12, 4),
        "k": StaticSite(4, 2, 12, 4),
        "v": StaticSite(4, 2, 12, 4),
    }
    assert found.in_attention


def test_one_grid_without_clusters_and_no_more_than_channels() -> None:
    one = scheme_of("opt", ActivationScheme(4), {})
    most = scheme_of("opt", ActivationScheme(4), dict.fromkeys(EVERY, 256))
    assert one is not None
    assert most is not None
    assert {site.clusters for site in one.sites.values()} == {1}
    assert {name: site.clusters for name, site in most.sites.items()} == {
        **{"qkv": 48, "fc1": 48, "fc2": 80},
        **dict.fromkeys(("out", "q", "k", "v"), 12),
    }


def test_bits_of_each_site() -> None:
    assert bits_of(ActivationScheme(4)) == (dict.fromkeys(EVERY, 4), 8)
    assert bits_of(ActivationScheme(4, kv_bits=3), bits={}) == ({**dict.fromkeys(EVERY, 4), "k": 3, "v": 3}, 4)
    papers = {"qkv": 8, "fc1": 8, "softmax": 8}
    assert bits_of(ActivationScheme(4), bits=papers) == ({**dict.fromkeys(EVERY, 4), "qkv": 8, "fc1": 8}, 8)
    without = bits_of(ActivationScheme(4), bits={"fc2": 16, "q": 16, "softmax": 16})
    assert without == ({name: 4 for name in EVERY if name not in ("fc2", "q")}, 16)


def test_keys_and_values_alone() -> None:
    assert bits_of(ActivationScheme(16, kv_bits=4), bits={"qkv": 8, "softmax": 8}) == ({"k": 4, "v": 4}, 16)
    assert bits_of(ActivationScheme(16)) is None


@pytest.mark.parametrize(
    ("bits", "message"),
    [
        ({"k": 4}, "bits: k: one of qkv, out, fc1, fc2, q, softmax .*--model.activation.kv_bits"),
        ({"norms": 8}, "bits: norms: "),
        ({"fc2": 9}, "fc2 bits=9: a whole number from 2 to 8"),
        ({"softmax": 1}, "softmax bits=1"),
    ],
)
def test_bits_that_are_none(bits: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        StaticClusters(bits=bits)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [((1, 1, 4, 1), "bits=1"), ((4, 0, 4, 1), "rows=0"), ((4, 1, 4, 300), "clusters=300: 1 to 256")],
)
def test_sites_that_are_none(numbers: tuple[int, int, int, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        StaticSite(*numbers)
