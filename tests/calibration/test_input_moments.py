"""Second moments of inputs: what a loop over tokens finds, folded, rounded, and behind encoded matrices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ptql.calibration.activations import Streams
from ptql.calibration.block_task import BlockTask
from ptql.calibration.finish import finish_block
from ptql.calibration.input_moments import InputMoments
from ptql.calibration.quant_lm import QuantLM
from ptql.calibration.ranks import Ranks
from ptql.checkpoint import Checkpoint
from ptql.functional import affine
from ptql.nn.quant_linear import QuantLinear, SharedRounding
from ptql.nn.student import run_block
from ptql.parts.transforms import Smooth, Weights
from ptql.parts.weights import Affine, Gptq
from ptql.recipe import ActivationScheme, IntScheme
from tests.models import CONFIGS, random_model, save, some_ids

SAMPLES, TOKENS = 5, 12


@dataclass
class Prepared:
    """A task with what it was made of."""

    task: BlockTask
    streams: Streams
    source: Checkpoint
    ranges: dict[str, Any]

    def moments(self) -> InputMoments:
        return InputMoments(self.task.student, self.source.layout, self.streams)

    def inputs(self, weights: Weights) -> dict[str, Tensor]:
        """What comes in at every linear layer, [samples * tokens, in], not rounded."""
        seen: dict[str, Tensor] = {}

        def keep(name: str) -> Callable[[nn.Module, tuple], None]:
            return lambda _, args: seen.update({name: args[0].flatten(0, -2).clone()})

        student = self.task.student
        handles = [student.get_submodule(n).register_forward_pre_hook(keep(n)) for n in self.source.layout.names]
        run_block(student, self.streams.quantised, self.streams.context, SAMPLES, weights)
        for handle in handles:
            handle.remove()
        return seen


@pytest.fixture
def prepare(tmp_path: Path) -> Callable[..., Prepared]:
    def made(name: str = "llama", ranks: Ranks | None = None, **recipe: Any) -> Prepared:
        source = Checkpoint(save(random_model(CONFIGS[name]), tmp_path / name))
        model = QuantLM(**{"weight": IntScheme(3, 16), "weight_quantizer": Gptq(), **recipe})
        streams = Streams(source.shell(), some_ids(SAMPLES, TOKENS), 2, torch.device("cpu"), ranks)
        streams._at_once = 2  # several batches, of which the last is short
        streams.quantised += 0.1 * torch.randn(streams.quantised.shape, generator=torch.Generator().manual_seed(3))
        block = source.block(0)
        ranges = streams.teach(block, source.layout, model.objective.targets)
        task = model.block_task(0, model.student(block, source), source, ranges, streams.context)
        return Prepared(task, streams, source, ranges)

    return made


@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("name", ["llama", "opt", "phi3", "qwen3"])
def test_they_are_of_what_the_matrix_multiplies(prepare: Callable[..., Prepared], name: str, bits: int) -> None:
    made = prepare(name, transforms=[Smooth(when="always")], activation=ActivationScheme(bits))
    weights, moments = made.task.folded_weights(), made.moments()
    for linear, x in made.inputs(weights).items():
        expected = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
        for token in affine.fake_quantize_tokens(x, bits).double():
            expected += torch.outer(token, token)
        expected *= 2 / (SAMPLES * TOKENS)
        torch.testing.assert_close(moments(linear, weights).double(), expected, rtol=1e-4, atol=1e-5, msg=linear)


def test_smoothing_scales_them_by_both_sides(prepare: Callable[..., Prepared]) -> None:
    """Nobody told them of the scales."""
    made = prepare(transforms=[Smooth(shift="none", sites=["qkv"], when="always")], activation=ActivationScheme(16))
    folded = made.moments()("self_attn.q_proj", made.task.folded_weights())
    (scale,) = (value for name, value in made.task.learnables().items() if name.endswith("scale"))
    original = made.moments()("self_attn.q_proj", prepare(transforms=[]).task.folded_weights())
    assert (scale - 1).abs().max() > 0.01
    torch.testing.assert_close(folded, original / torch.outer(scale, scale), rtol=1e-4, atol=1e-5)


def test_an_input_is_observed_once_for_all_that_share_it(
    prepare: Callable[..., Prepared], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, passes = prepare(activation=ActivationScheme(4)), []
    show = made.streams.show
    monkeypatch.setattr(made.streams, "show", lambda *given: passes.append(show(*given)))
    made.task.encode(made.moments())
    assert len(passes) == len(made.source.layout.linears) == 4
    for module in made.task.student.modules():
        if isinstance(module, QuantLinear):
            assert not module._forward_pre_hooks
            assert isinstance(module.rounding, SharedRounding)
            assert module.rounding._input is None  # who looked on took nobody's turn


def test_matrices_are_encoded_behind_those_that_were(prepare: Callable[..., Prepared]) -> None:
    made = prepare(activation=ActivationScheme(16))
    moments, asked = made.moments(), {}

    def noted(linear: str, weights: Weights) -> Tensor:
        asked[linear] = {name: tensor.clone() for name, tensor in weights.items()}
        return moments(linear, weights)

    stored = made.task.encode(noted)
    decoded, folded = made.task.decode(stored), made.task.folded_weights()
    names = list(made.source.layout.names)
    assert list(asked) == names
    for place, linear in enumerate(names):
        for other, name in enumerate(names):
            expected = decoded if other < place else folded
            assert torch.equal(asked[linear][f"{name}.weight"], expected[f"{name}.weight"]), (linear, name)
    for linear in names:
        inputs = made.inputs(asked[linear])[linear]
        quantizer = made.task.quantizer(linear)
        assert quantizer is not None
        by_hand = quantizer.encode_on(folded[f"{linear}.weight"], 2 / len(inputs) * inputs.t() @ inputs)
        same = quantizer.decode(by_hand) == decoded[f"{linear}.weight"]
        assert same.double().mean() > 0.99, linear  # sums in another order may tip a code


def test_layers_that_are_not_quantised_are_left_out(prepare: Callable[..., Prepared]) -> None:
    made = prepare(weight=IntScheme(16))
    moments = made.moments()
    stored = made.task.encode(lambda *given: pytest.fail("nothing is encoded"))
    assert not any(name.endswith("codes") for name in stored)
    assert moments("mlp.down_proj", made.task.folded_weights()).shape == (80, 80)


def test_a_finished_block_is_the_same_again_and_loses_less(prepare: Callable[..., Prepared]) -> None:
    made, nearest = prepare(), prepare(weight_quantizer=Affine())
    assert made.task.wants_moments
    assert not nearest.task.wants_moments
    (first, out), (again, _) = (
        finish_block(made.task, made.streams, made.source.layout, made.ranges) for _ in range(2)
    )
    assert all(torch.equal(again.stored[name], tensor) for name, tensor in first.stored.items())
    torch.testing.assert_close(made.streams.output(made.task.student, made.task.decode(first.stored)), out)
    plain, _ = finish_block(nearest.task, nearest.streams, nearest.source.layout, nearest.ranges)
    assert first.stored.keys() == plain.stored.keys()
    assert first.summary["mse"] < plain.summary["mse"]


def test_they_are_of_all_processes_and_the_first_ones_count(prepare: Callable[..., Prepared]) -> None:
    told: list[str] = []

    class Told(Ranks):
        def mean(self, values: Tensor) -> Tensor:
            told.append("mean")
            return 3 * values

        def copy_from_first(self, tensors: Any) -> None:
            told.append("copy")
            for tensor in tensors:
                tensor.mul_(2)

    made = prepare()
    weights = made.task.folded_weights()
    alone = made.moments()("mlp.down_proj", weights)
    made.streams.ranks = Told()
    assert torch.equal(made.moments()("mlp.down_proj", weights), 6 * alone)
    assert told == ["mean", "copy"]
