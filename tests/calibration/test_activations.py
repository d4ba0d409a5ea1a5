"""Streams and targets against the Hugging Face blocks of a two-block model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from ptql.calibration.activations import Batches, Streams, move, resting_place
from ptql.calibration.ranks import Ranks
from ptql.calibration.statistics import observe_inputs
from ptql.checkpoint import Checkpoint
from ptql.nn.student import call_block, make_student, run_block, weights_of
from ptql.parts.activations import DynamicTokens
from ptql.parts.transforms import AddedBiases
from ptql.recipe import ActivationScheme
from tests.models import block_calls, blocks_of, llama_config, opt_config, random_model, save, some_ids

CONFIGS: dict[str, PretrainedConfig] = {"llama": llama_config(), "opt": opt_config()}
CPU = torch.device("cpu")
IDS = some_ids(samples=5, tokens=12)


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return random_model(CONFIGS[request.param])


@pytest.fixture
def source(model: PreTrainedModel, tmp_path: Path) -> Checkpoint:
    return Checkpoint(save(model, tmp_path / "model"))


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 8])
def test_streams_start_at_the_embeddings(model: PreTrainedModel, source: Checkpoint, batch_size: int) -> None:
    streams = Streams(source.shell(), IDS, batch_size, CPU)
    expected = block_calls(model, IDS)[0][0]
    assert torch.equal(streams.fp, expected)
    assert torch.equal(streams.quantised, expected)
    assert streams.fp.data_ptr() != streams.quantised.data_ptr()
    assert streams.fp.dtype == torch.float32


@pytest.mark.parametrize("batch_size", [2, 5])
def test_both_blocks_targets_are_what_the_model_computes(
    model: PreTrainedModel, source: Checkpoint, batch_size: int
) -> None:
    blocks, calls = blocks_of(model), block_calls(model, IDS)
    context = calls[0][1]
    streams = Streams(source.shell(), IDS, batch_size, CPU)

    # Block 0: the quantised stream is still the fp stream, so both targets are the same.
    streams.teach(source.block(0), source.layout, ("fp", "fp_on_quantised"))
    close(streams.targets["fp"], calls[0][2])
    assert torch.equal(streams.targets["fp"], streams.targets["fp_on_quantised"])
    batch = next(iter(streams.batches()))
    close(batch["input"], calls[0][0][:batch_size])
    student = make_student(source.block(0), source.layout, AddedBiases(), DynamicTokens(), ActivationScheme(4))
    output = streams.output(student, weights_of(student))
    assert (output - calls[0][2]).abs().max() > 0.05  # it does round
    streams.advance(output)
    assert streams.targets == {}

    # Block 1: T1 is the fp block on the fp stream, T2 the fp block on what the quantised block 0 gave.
    streams.teach(source.block(1), source.layout, ("fp_on_quantised",))
    close(streams.targets["fp"], calls[1][2])
    with torch.no_grad():
        expected = call_block(blocks[1], output, context)
    close(streams.targets["fp_on_quantised"], expected)
    assert (streams.targets["fp_on_quantised"] - streams.targets["fp"]).abs().max() > 0.05
    inputs = torch.cat([batch["input"] for batch in streams.batches()])
    assert torch.equal(inputs, output)
    close(streams.fp, calls[1][2])


def test_only_the_wanted_targets_are_kept(source: Checkpoint) -> None:
    streams = Streams(source.shell(), IDS, 2, CPU)
    streams.teach(source.block(0), source.layout, ("fp",))
    assert set(streams.targets) == {"fp"}
    assert all(set(batch) == {"input", "fp"} for batch in streams.batches())


def test_ranges_are_those_of_the_full_precision_stream(model: PreTrainedModel, source: Checkpoint) -> None:
    streams = Streams(source.shell(), IDS, 2, CPU)
    streams.quantised = streams.quantised + 100  # must not show
    ranges = streams.teach(source.block(0), source.layout, ("fp", "fp_on_quantised"))
    hidden, context, _ = block_calls(model, IDS)[0]
    block = blocks_of(model)[0]
    with observe_inputs(block, source.layout, IDS.shape[1], Ranks()) as expected:
        call_block(block, hidden, context)
    for name, found in expected().items():
        close(ranges[name].low, found.low)
        close(ranges[name].high, found.high)
        close(ranges[name].middle, found.middle)


def test_the_students_output_does_not_depend_on_the_batch(source: Checkpoint) -> None:
    outputs = []
    for batch_size in (1, 3, 5):
        streams = Streams(source.shell(), IDS, batch_size, CPU)
        block = source.block(0)
        outputs.append(streams.output(block, weights_of(block)))
    close(outputs[0], outputs[2])
    close(outputs[1], outputs[2])
    assert not outputs[0].requires_grad


def test_given_weights_take_the_place_of_the_blocks_own(source: Checkpoint) -> None:
    streams = Streams(source.shell(), IDS, 2, CPU)
    block, other = source.block(0), source.block(1)
    before = {name: w.clone() for name, w in weights_of(block).items()}
    output = streams.output(block, weights_of(other))
    assert torch.equal(output, run_block(other, streams.quantised, streams.context, 2))
    assert all(torch.equal(w, before[name]) for name, w in weights_of(block).items())


def test_batches_are_slices_in_order() -> None:
    tensors = {"input": torch.arange(10).view(5, 2), "fp": torch.arange(5, 15).view(5, 2)}
    for size, lengths in ((1, [1] * 5), (2, [2, 2, 1]), (5, [5]), (7, [5])):
        batches = Batches(tensors, size)
        for _ in range(2):  # every epoch sees the same
            found = list(batches)
            assert len(batches) == len(found) == len(lengths)
            assert [len(b["input"]) for b in found] == lengths
            for name, tensor in tensors.items():
                assert torch.equal(torch.cat([b[name] for b in found]), tensor)


def test_tensors_are_moved_inside_containers() -> None:
    value = {"a": (torch.ones(2), [torch.zeros(1), "x"]), "b": None, "c": 3}
    moved = move(value, torch.device("meta"))
    assert moved["a"][0].is_meta
    assert moved["a"][1][0].is_meta
    assert (moved["a"][1][1], moved["b"], moved["c"]) == ("x", None, 3)
    assert isinstance(moved["a"], tuple)
    assert not value["a"][0].is_meta


def test_streams_lie_on_the_gpu_while_four_fit_into_half_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (8000, 16000))
    assert resting_place(999, cuda) == cuda
    assert resting_place(1000, cuda) == CPU
    assert resting_place(10**15, CPU) == CPU
