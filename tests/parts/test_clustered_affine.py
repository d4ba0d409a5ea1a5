"""Weight quantisers with scales of clusters: which columns share them, what is learned, what is stored."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from ptql.errors import InputError
from ptql.families import BlockLayout, family_of
from ptql.functional import affine, cluster_scales
from ptql.functional.clipping import best_share_of_clusters
from ptql.functional.scaled import Scaled
from ptql.nn.clustered_linear import ClusteredLinear
from ptql.parts.inputs import InputRange
from ptql.parts.transforms import Permute
from ptql.parts.weights import Affine, ColumnClusters, Gptq, LinearQuantizer, SalientBinary, WeightQuantizer
from ptql.parts.weights.clustered_affine import ClusteredAffineLinear
from ptql.parts.weights.column_clusters import cluster_counts, cluster_numbers, column_clusters
from ptql.recipe import IntScheme, LayerSchemes
from tests.models import CONFIGS, blocks_of

SCHEMES = [
    IntScheme(3, clustered=True),
    IntScheme(4, symmetric=True, clustered=True, scale_dtype="bfloat16"),
    IntScheme(2, symmetric=True, balanced=True, clustered=True),
    IntScheme(1, clustered=True),
    IntScheme(8, clustered=True),
]
ROW, COUNT = 40, 6
NUMBERS = torch.tensor([0] * 19 + [3] * 13 + [5, 2, 2, 5, 2, 2, 1, 2])  # of 4 there are none


def some_weights() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(6, ROW) * (torch.rand(6) + 0.2)[NUMBERS]


def some_moments() -> Tensor:
    torch.manual_seed(1)
    x = torch.randn(500, 4) @ torch.randn(4, ROW) + 0.5 * torch.randn(500, ROW)
    return 2 / 500 * x.t() @ x


def made(part: WeightQuantizer, scheme: IntScheme, numbers: Tensor | None = NUMBERS) -> LinearQuantizer:
    return part.for_linear("any", some_weights(), scheme, None, ColumnClusters(COUNT, numbers))


def turned(quantizer: LinearQuantizer) -> LinearQuantizer:
    """As after some learning."""
    torch.manual_seed(2)
    with torch.no_grad():
        for name, p in quantizer.named_parameters():
            p.normal_(1.0 if name in ("left", "right") else 2.0, 0.3)
    return quantizer


# Which columns share a scale


def block_of(name: str) -> tuple[Any, BlockLayout]:
    config = CONFIGS[name]
    return blocks_of(AutoModelForCausalLM.from_config(config))[0], family_of(config.model_type).layout(config)


def test_how_many_clusters_a_matrix_has() -> None:
    """Four query heads of 12, on two of keys and values: the output projection has clusters of each query head."""
    block, layout = block_of("llama")
    made = Permute(sites=["qkv", "out", "fc2"], clusters={"qkv": 6, "out": 3, "fc2": 100}).site_clusters()
    attention = {f"self_attn.{part}_proj": 6 for part in "qkv"}
    assert cluster_counts(block, layout, made) == {
        **attention,
        "self_attn.o_proj": 12,
        "mlp.gate_proj": 1,
        "mlp.up_proj": 1,
        "mlp.down_proj": 80,
    }
    assert set(cluster_counts(block, layout, {}).values()) == {1}
    fused = cluster_counts(*block_of("phi3"), Permute().site_clusters())
    assert fused == {"self_attn.qkv_proj": 32, "self_attn.o_proj": 16, "mlp.gate_up_proj": 32, "mlp.down_proj": 32}


def test_heads_count_on() -> None:
    labels = torch.tensor([[0, 0, 1, 2], [0, 1, 1, 1]])
    assert cluster_numbers(labels, 6).tolist() == [0, 0, 1, 2, 3, 4, 4, 4]
    assert cluster_numbers(labels[:1], 7).tolist() == [0, 0, 1, 2]


def test_what_is_known_of_columns() -> None:
    """Of a site without clusters they are all in one; of a finished block nothing is told."""
    block, layout = block_of("llama")
    made, labels = {"qkv": 6, "out": 3}, {"out": torch.arange(12).expand(4, 12) // 4}
    found = column_clusters(block, layout, made, labels)
    assert found["self_attn.q_proj"] == ColumnClusters(6, None)
    out, fc2 = found["self_attn.o_proj"].numbers, found["mlp.down_proj"]
    assert out is not None
    assert fc2.numbers is not None
    assert out.tolist() == [column // 4 for column in range(48)]
    assert (fc2.count, fc2.numbers.tolist()) == (1, [0] * 80)


# What is learned and what is stored


@pytest.mark.parametrize("part", [Affine(), Gptq()], ids=["affine", "gptq"])
def test_two_logits_for_each_cluster(part: WeightQuantizer) -> None:
    quantizer = made(part, SCHEMES[0])
    assert isinstance(quantizer, ClusteredAffineLinear)
    assert {name: tuple(p.shape) for name, p in quantizer.named_parameters()} == {"lower": (6, 6), "upper": (6, 6)}
    assert quantizer.state_dict().keys() == {"lower", "upper"}  # numbers follow from the source
    assert not list(made(Affine(clip=False), SCHEMES[0]).parameters())


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_what_is_stored_is_what_was_trained(scheme: IntScheme, clip: bool, rank: int) -> None:
    """Up to the scale's digits; decoding needs nothing but what is stored, and a loaded layer agrees."""
    w, part = some_weights(), Affine(clip, factor_rank=rank)
    quantizer = turned(made(part, scheme))
    with torch.no_grad():
        fake, stored = quantizer.fake(w), quantizer.encode(w)
        low, high = quantizer.clipped_range(w)
        step = affine.scale_and_zero(low, high, scheme.levels, scheme.symmetric)[0].squeeze(-1)[:, NUMBERS]
    decoded = made(part, scheme, None).decode(stored)
    gain = (quantizer.left @ quantizer.right).abs().clamp(min=1) if rank else 1.0
    digits = 2.0**-7 if scheme.scale_dtype == "bfloat16" else 2.0**-10
    assert (fake.dtype, decoded.dtype) == (torch.float32, torch.float32)
    assert ((fake - decoded).abs() <= (1 + scheme.levels * digits) * step * gain + 1e-6).all()
    assert ((fake - decoded).abs() <= 4 * scheme.levels * digits * step * gain + 1e-6).double().mean() > 0.95
    given = {"in_features": ROW, "out_features": 6, "scheme": scheme, "bias": False, "rounding": None}
    loaded = ClusteredLinear(**given, factor_rank=rank, clusters=COUNT)
    loaded.load_state_dict(stored)
    assert torch.equal(loaded.dense_weight(), decoded)
    assert stored["scale"].view(torch.float16).to(getattr(torch, scheme.scale_dtype)).isfinite().all()


@pytest.mark.parametrize("rank", [0, 2])
def test_neighbours_in_equal_numbers_are_groups_and_one_cluster_is_a_row(rank: int) -> None:
    w = some_weights()
    for group, numbers in ((10, torch.arange(ROW) // 10), (-1, torch.zeros(ROW, dtype=torch.long))):
        scheme = IntScheme(3, clustered=True)
        clusters = ColumnClusters(int(numbers.max()) + 1, numbers)
        for kind in (Affine, Gptq):
            part = kind(factor_rank=rank)
            mine = turned(part.for_linear("any", w, scheme, None, clusters))
            theirs = turned(part.for_linear("any", w, IntScheme(3, group)))
            with torch.no_grad():
                assert torch.equal(mine.fake(w), theirs.fake(w))
                for one, other in (
                    (mine.encode(w), theirs.encode(w)),
                    (mine.encode_on(w, some_moments()), theirs.encode_on(w, some_moments())),
                ):
                    assert one.keys() - other.keys() == {"group"}
                    assert all(torch.equal(one[name], tensor) for name, tensor in other.items())
                    assert torch.equal(mine.decode(one), theirs.decode(other))


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_gptq_chooses_other_codes_on_the_same_grids(scheme: IntScheme, clip: bool, act_order: bool) -> None:
    w, moments = some_weights(), some_moments()
    mine = turned(made(Gptq(clip, act_order=act_order, factor_rank=1), scheme))
    nearest = turned(made(Affine(clip, factor_rank=1), scheme))
    with torch.no_grad():
        stored, plain = mine.encode_on(w, moments), nearest.encode(w)
    assert stored.keys() == plain.keys()
    assert all(torch.equal(stored[name], plain[name]) for name in stored.keys() - {"codes"})
    errors = [(lost @ moments * lost).sum() for lost in (mine.decode(stored) - w, nearest.decode(plain) - w)]
    assert errors[0] < 0.9 * errors[1]


def test_gradients_reach_weights_logits_and_factors() -> None:
    """Also where the matrix comes scaled, and is written for a step."""
    w, quantizer = some_weights(), turned(made(Affine(factor_rank=1), SCHEMES[0]))
    rows, columns = torch.rand(6) + 0.5, (torch.rand(ROW) + 0.5).requires_grad_()
    named = {"columns": columns, **dict(quantizer.named_parameters())}
    buffer = torch.full((8, ROW), float("nan"))
    out = quantizer.fake_into(Scaled(w, rows, columns), buffer[1:7])
    plain = quantizer.fake(Scaled(w, rows, columns).dense())
    assert out.data_ptr() == buffer[1:7].data_ptr()
    assert torch.equal(out, plain)
    grad = torch.randn(6, ROW)
    found, expected = (torch.autograd.grad(result, list(named.values()), grad) for result in (out, plain))
    for name, one, other in zip(named, found, expected, strict=True):
        assert torch.equal(one, other), name
        assert one.isfinite().all()
        assert one.any(), name
    assert not found[1][:, 4].any()  # a cluster of no column


def test_clipping_can_begin_where_each_cluster_loses_least() -> None:
    w, scheme = some_weights() ** 3, IntScheme(2, clustered=True)
    usual, searched = made(Affine(), scheme), made(Affine(initial="search"), scheme)
    searched.begin_on(w)
    error, least = ((q.decode(q.encode(w)) - w).square().sum().item() for q in (usual, searched))
    assert least < 0.95 * error
    assert torch.equal(searched.lower, best_share_of_clusters(w, NUMBERS, COUNT, 4, False).logit())
    assert torch.equal(searched.lower, searched.upper)


def test_clusters_can_begin_on_their_inputs() -> None:
    w, scheme, magnitude = some_weights() ** 3, IntScheme(2, clustered=True), torch.rand(ROW) ** 2
    begun = made(Affine(initial="search_on_inputs"), scheme)
    begun.begin_on(w, InputRange.of_magnitudes(magnitude, magnitude))
    expected = best_share_of_clusters(w, NUMBERS, COUNT, 4, False, magnitude.square())
    assert torch.equal(begun.lower, expected.logit())
    assert not torch.equal(expected, best_share_of_clusters(w, NUMBERS, COUNT, 4, False))


def test_ranges_are_those_of_clusters() -> None:
    w, quantizer = some_weights(), made(Affine(clip=False), SCHEMES[0])
    with torch.no_grad():
        stored = quantizer.encode(w)
    low, high = cluster_scales.weight_range(w, NUMBERS, COUNT)
    scale, _ = affine.stored_grid(low, high, 8, False)
    assert torch.equal(stored["scale"].view(torch.float16).float(), scale.squeeze(-1))
    assert torch.equal(stored["group"].long(), NUMBERS)


# What is refused


class Own(Affine):
    """As somebody's own, written before there were clusters."""

    takes_clusters = False


def test_quantisers_that_know_no_clusters() -> None:
    schemes = LayerSchemes(IntScheme(4), {"0.mlp.down_proj": IntScheme(4, clustered=True)})
    for part in (Affine(), Gptq()):
        part.check(schemes)
    with pytest.raises(InputError, match=r"clustered=true with Own, .*Affine or Gptq, or clustered: false"):
        Own().check(schemes)
    Own().check(LayerSchemes(IntScheme(16, clustered=True)))
    assert not SalientBinary.takes_clusters
