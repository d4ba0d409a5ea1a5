"""Ranges of layer inputs against loops over samples, tokens and channels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from ptql.calibration.ranks import Ranks
from ptql.calibration.statistics import observe_inputs
from ptql.families import BlockLayout, family_of
from ptql.nn.student import run_block
from ptql.parts.inputs import InputRange
from tests.models import block_calls, blocks_of, llama_config, opt_config, random_model, some_ids

CONFIGS: dict[str, PretrainedConfig] = {"llama": llama_config(), "opt": opt_config()}
SAMPLES, TOKENS = 7, 10


class Seen:
    """A block, its layout and what an ordinary pass of all samples shows at every linear layer."""

    def __init__(self, config: PretrainedConfig) -> None:
        model = random_model(config)
        self.block: nn.Module = blocks_of(model)[1]
        self.layout: BlockLayout = family_of(config.model_type).layout(config)
        self.hidden, context, _ = block_calls(model, some_ids(SAMPLES, TOKENS))[1]
        # One position row for all samples, as `Shell.embed` gives it.
        self.context = {k: v[:1] if isinstance(v, Tensor) else v for k, v in context.items()}
        self.inputs: dict[str, Tensor] = {}

        def keep(name: str) -> Callable[[nn.Module, tuple], None]:
            return lambda _, args: self.inputs.update({name: args[0].reshape(SAMPLES, TOKENS, -1).clone()})

        handles = [self.block.get_submodule(n).register_forward_pre_hook(keep(n)) for n in self.layout.names]
        self.run(SAMPLES)
        for handle in handles:
            handle.remove()

    def run(self, batch_size: int) -> None:
        run_block(self.block, self.hidden, self.context, batch_size)

    def ranges(self, batch_size: int) -> dict[str, InputRange]:
        with observe_inputs(self.block, self.layout, TOKENS, Ranks()) as ranges:
            self.run(batch_size)
        return ranges()


@pytest.fixture(params=CONFIGS)
def seen(request: pytest.FixtureRequest) -> Seen:
    return Seen(CONFIGS[request.param])


def loop_range(samples: Tensor) -> tuple[list[float], list[float], list[float]]:
    """Smallest, largest and the running mid-range, 0.99 old + 0.01 new, of each channel."""
    low, high, middle = [], [], []
    for channel in samples.double().permute(2, 0, 1).tolist():
        low.append(min(min(sample) for sample in channel))
        high.append(max(max(sample) for sample in channel))
        mids = [(min(sample) + max(sample)) / 2 for sample in channel]
        running = mids[0]
        for mid in mids[1:]:
            running = 0.99 * running + 0.01 * mid
        middle.append(running)
    return low, high, middle


def test_ranges_are_loops_over_samples_and_tokens(seen: Seen) -> None:
    ranges = seen.ranges(SAMPLES)
    assert set(ranges) == set(seen.layout.names)
    for name, found in ranges.items():
        low, high, middle = loop_range(seen.inputs[name])
        assert found.low.tolist() == low
        assert found.high.tolist() == high
        assert found.middle.tolist() == pytest.approx(middle, rel=1e-4, abs=1e-5)
        absmax = [max(abs(a), abs(b)) for a, b in zip(low, high, strict=True)]
        assert found.absmax.tolist() == absmax
        mean = seen.inputs[name].double().abs().mean((0, 1)).tolist()
        assert found.mean.tolist() == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_samples_count_one_by_one_whatever_the_batch(seen: Seen, batch_size: int) -> None:
    together, apart = seen.ranges(SAMPLES), seen.ranges(batch_size)
    for name in together:
        torch.testing.assert_close(apart[name].low, together[name].low)
        torch.testing.assert_close(apart[name].high, together[name].high)
        torch.testing.assert_close(apart[name].middle, together[name].middle, rtol=1e-4, atol=1e-5)


def test_layers_that_share_an_input_share_its_range(seen: Seen) -> None:
    ranges = seen.ranges(2)
    for group in seen.layout.linears:
        for name in group:
            assert torch.equal(ranges[name].low, ranges[group[0]].low)
            assert torch.equal(seen.inputs[name], seen.inputs[group[0]])


def test_nothing_is_observed_after_the_end(seen: Seen) -> None:
    with observe_inputs(seen.block, seen.layout, TOKENS, Ranks()) as ranges:
        seen.run(2)
    before = {name: found.high.clone() for name, found in ranges().items()}
    seen.hidden *= 100
    seen.run(2)
    assert all(torch.equal(found.high, before[name]) for name, found in ranges().items())
    assert not any(m._forward_pre_hooks for m in seen.block.modules())


def test_hooks_are_taken_off_when_a_pass_fails(seen: Seen) -> None:
    with pytest.raises(ZeroDivisionError), observe_inputs(seen.block, seen.layout, TOKENS, Ranks()):
        raise ZeroDivisionError
    assert not any(m._forward_pre_hooks for m in seen.block.modules())


def test_a_massive_token_shows(seen: Seen) -> None:
    """One channel of one token; a norm leaves at most sqrt(48) = 6.9 of it."""
    first, channel = seen.layout.linears[0][0], 5
    seen.hidden[3, 0, channel] = 1e4
    assert seen.ranges(2)[first].absmax[channel] > 1.4 * seen.inputs[first][..., channel].abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_ranges_are_float32(seen: Seen, dtype: torch.dtype) -> None:
    seen.block.to(dtype)
    seen.hidden = seen.hidden.to(dtype)
    seen.context = {k: _cast(v, dtype) for k, v in seen.context.items()}
    for found in seen.ranges(2).values():
        assert {found.low.dtype, found.high.dtype, found.middle.dtype} == {torch.float32}


def _cast(value: object, dtype: torch.dtype) -> object:
    if isinstance(value, tuple):
        return tuple(_cast(item, dtype) for item in value)
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
