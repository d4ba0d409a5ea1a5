"""Grids of a block against a slow reference: one sample after the other, one cluster after the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ptql.calibration.activations import Streams
from ptql.calibration.block_task import BlockTask
from ptql.calibration.quant_lm import QuantLM
from ptql.calibration.static_ranges import find_grids
from ptql.checkpoint import Checkpoint
from ptql.functional.static import SHARES
from ptql.nn.static_rounding import grids_of, watched_sites
from ptql.nn.student import call_block
from ptql.parts.activations import StaticClusters
from ptql.parts.transforms import Permute, Smooth, Transform
from ptql.recipe import ActivationScheme, IntScheme
from tests.models import CONFIGS, random_model, save, some_ids

CPU = torch.device("cpu")
SAMPLES, BITS = 5, 4


@pytest.fixture(scope="module", params=["llama", "qwen3", "opt"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(save(random_model(CONFIGS[request.param]), tmp_path_factory.mktemp("source") / "model"))


def found_grids(source: Checkpoint, transforms: list[Transform], **settings: Any) -> tuple[BlockTask, Streams]:
    """Block 1, on a quantised stream that is not the full-precision one."""
    model = QuantLM(
        weight=IntScheme(4),
        activation=ActivationScheme(BITS),
        transforms=transforms,
        activation_quantizer=StaticClusters(**settings),
    )
    streams = Streams(source.shell(), some_ids(SAMPLES), 2, CPU)
    streams.quantised += torch.randn(streams.quantised.shape, generator=torch.Generator().manual_seed(1)) * 0.1
    block = source.block(1)
    ranges = streams.teach(block, source.layout, ("fp",))
    sites = streams.watch(block, source.layout) if model.watches else None
    task = model.block_task(1, model.student(block, source), source, ranges, streams.context, sites=sites)
    find_grids(task, streams, source.layout, model.activation_quantizer)
    return task, streams


def shown(task: BlockTask, streams: Streams, source: Checkpoint) -> dict[str, list[Tensor]]:
    """Each sample by itself, [tokens, rows, width], by site."""
    seen: dict[str, list[Tensor]] = {}
    weights = task.folded_weights()
    for sample in streams.quantised:
        with watched_sites(task.student, source.layout, 20, lambda site, x: seen.setdefault(site, []).append(x[0])):
            call_block(task.student, sample[None], streams.context, weights)
    return seen


def slow_range(samples: list[Tensor], members: list[int], row: int, ranges: str) -> tuple[float, float]:
    low = high = None
    for sample in samples:
        values = [sample[t, row, c].item() for t in range(len(sample)) for c in members]
        if low is None or high is None:
            low, high = min(values), max(values)
        elif ranges == "ema":
            low, high = 0.99 * low + 0.01 * min(values), 0.99 * high + 0.01 * max(values)
        else:
            low, high = min(low, *values), max(high, *values)
    assert low is not None
    assert high is not None
    return low, high


def rounded(values: Tensor, low: float, high: float) -> tuple[Tensor, float, float]:
    scale = torch.tensor((high - low) / (2**BITS - 1)).half().item()
    zero = round(-low / scale)
    return ((values / scale).round() + zero).clamp(0, 2**BITS - 1).sub(zero) * scale, scale, zero


@pytest.mark.parametrize("ranges", ["minmax", "ema", "mse"])
@torch.no_grad()
def test_grids_of_clusters(source: Checkpoint, ranges: str) -> None:
    permute = Permute(clusters={"qkv": 5, "qkt": 3, "out": 3, "fc1": 5, "fc2": 6})
    task, streams = found_grids(source, [permute], ranges=ranges)
    seen, labels = shown(task, streams, source), task.transforms[0].labels
    for site, grid in grids_of(task.student).items():
        assert torch.equal(grid.cluster.long(), labels[site])  # type: ignore[index]
        for row in range(grid.site.rows):
            for k in range(grid.site.clusters):
                members = (grid.cluster[row] == k).nonzero().flatten().tolist()
                low, high = slow_range(seen[site], members, row, ranges)
                if ranges == "mse":
                    values = torch.stack(seen[site])[:, :, row, members]
                    errors = [(rounded(values, low * s, high * s)[0] - values).double().square().sum() for s in SHARES]
                    share = SHARES[torch.stack(errors).argmin()]
                    low, high = low * share, high * share
                scale = grid.scale.view(torch.float16)[row, k].item()
                assert scale == pytest.approx((high - low) / (2**BITS - 1), rel=1e-3)
                assert grid.zero[row, k].item() == pytest.approx(-low / scale, abs=0.51)


@torch.no_grad()
def test_one_grid_a_tensor_without_clusters(source: Checkpoint) -> None:
    task, streams = found_grids(source, [], ranges="minmax")
    seen = shown(task, streams, source)
    for site, grid in grids_of(task.student).items():
        assert grid.scale.shape == (grid.site.rows, 1)
        values = torch.stack(seen[site])
        spread = values.amax((0, 1, 3)) - values.amin((0, 1, 3))
        torch.testing.assert_close(grid.scale.view(torch.float16).float()[:, 0], spread / 15, rtol=1e-3, atol=0)


@torch.no_grad()
def test_grids_are_those_of_what_smoothing_begins_with(source: Checkpoint) -> None:
    """Sorted first, then smoothed: scales meet the channels that they are of."""
    task, streams = found_grids(source, [Permute(), Smooth(shift="none")], ranges="minmax")
    plain, _ = found_grids(source, [Permute()], ranges="minmax")
    seen = shown(task, streams, source)
    assert task.folded_weights().keys() == plain.folded_weights().keys()
    for site in ("qkv", "out", "fc1"):
        grid, values = grids_of(task.student)[site], torch.stack(seen[site])
        assert torch.equal(grid.cluster, grids_of(plain.student)[site].cluster)
        scale = grid.scale.view(torch.float16).float().gather(1, grid.cluster.long())
        top = scale * (15 - grid.zero.gather(1, grid.cluster.long()))
        assert (values.amax((0, 1)) <= top + scale).all()  # nothing is far beyond its grid
        assert not torch.equal(grid.scale, grids_of(plain.student)[site].scale)
