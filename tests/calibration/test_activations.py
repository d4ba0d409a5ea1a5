"""Streams and targets against the Hugging Face blocks of a two-block model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from ptql.calibration import activations
from ptql.calibration.activations import Batches, Streams, move, resting_place
from ptql.calibration.memory_budget import Budget, Place
from ptql.calibration.ranks import Ranks
from ptql.calibration.statistics import observe_inputs
from ptql.checkpoint import Checkpoint
from ptql.nn import transfer
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
    tensors = {"input": torch.arange(10.0).view(5, 2), "fp": torch.arange(5.0, 15).view(5, 2)}
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


@pytest.mark.parametrize("samples", [4, 5])
def test_passes_without_gradients_take_more_samples_at_a_time(
    source: Checkpoint, monkeypatch: pytest.MonkeyPatch, samples: int
) -> None:
    monkeypatch.setattr(activations, "PASS_BYTES", 47 * 4 * source.config.hidden_size)  # 3 samples of 12 tokens
    for batch_size, expected in ((1, [3, samples - 3]), (4, [4, samples - 4])):
        streams = Streams(source.shell(), IDS[:samples], batch_size, CPU)
        sizes: list[int] = []
        block = source.block(0)
        block.register_forward_hook(lambda module, given, output, sizes=sizes: sizes.append(len(given[0])))
        streams.teach(block, source.layout, ("fp",))
        streams.output(block, weights_of(block))
        assert sizes == [size for size in expected if size] * 2
        assert next(len(batch["input"]) for batch in streams.batches()) == batch_size


def test_the_full_precision_stream_moves_on_in_place(source: Checkpoint) -> None:
    streams = Streams(source.shell(), IDS, 2, CPU)
    place = streams.fp.data_ptr()
    for index in range(2):
        streams.teach(source.block(index), source.layout, ("fp", "fp_on_quantised"))
        assert streams.targets["fp"] is streams.fp
        assert streams.fp.data_ptr() == place
        block = source.block(index)
        streams.advance(streams.output(block, weights_of(block)))


def test_whether_a_block_gave_numbers(source: Checkpoint) -> None:
    streams = Streams(source.shell(), IDS, 2, CPU)
    assert streams.finite()
    for index, bad in ((0, None), (1, float("nan")), (1, float("inf")), (0, None)):
        block = source.block(index)
        if bad is not None:
            block.get_submodule(source.layout.names[-1]).weight.data[0, 0] = bad
            streams.fp.fill_(1)
        streams.fp.nan_to_num_(0, 0, 0)
        streams.teach(block, source.layout, ("fp",))
        assert streams.finite() == (bad is None)


# Where they lie, and in what dtype


def budget_for(place: str) -> Budget:
    return Budget(host_memory=1 if place == "disk" else None)


def calibrate(source: Checkpoint, **options: Any) -> list[Tensor]:
    """Everything that a run would see of two blocks: targets, batches, ranges, outputs."""
    streams = Streams(source.shell(), IDS, 2, CPU, **options)
    seen = []
    for index in range(2):
        ranges = streams.teach(source.block(index), source.layout, ("fp", "fp_on_quantised"))
        seen += [value for found in ranges.values() for value in (found.low, found.high, found.middle)]
        seen += [tensor.clone() for batch in streams.batches() for tensor in batch.values()]
        student = make_student(source.block(index), source.layout, AddedBiases(), DynamicTokens(), ActivationScheme(4))
        output = streams.output(student, weights_of(student))
        seen += [tensor.clone() for tensor in (output, streams.fp, *streams.targets.values())]
        streams.advance(output)
    streams.close()
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("far", [False, True], ids=["near", "far"])
@pytest.mark.parametrize("place", ["host", "disk"])
def test_the_place_of_streams_changes_no_bit(
    source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: Place, far: bool, dtype: torch.dtype
) -> None:
    expected = calibrate(source, dtype=dtype)
    if far:  # every batch is copied, through threads, as between host and GPU
        monkeypatch.setattr(transfer, "within_reach", lambda tensor, device: False)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.stream-0-of-a-killed-run").write_bytes(b"left")
    found = calibrate(source, dtype=dtype, budget=budget_for(place), folder=tmp_path / "run")
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert list((tmp_path / "run").iterdir()) == []


def test_streams_are_on_disk_only_where_there_is_a_folder(source: Checkpoint, tmp_path: Path) -> None:
    assert Streams(source.shell(), IDS, 2, CPU).place == "host"
    assert Streams(source.shell(), IDS, 2, CPU, budget=budget_for("disk")).place == "host"
    assert Streams(source.shell(), IDS, 2, CPU, budget=budget_for("disk"), folder=tmp_path).place == "disk"
    bytes_of_four = 4 * IDS.numel() * 48 * 2
    for bytes_granted, place in ((bytes_of_four, "host"), (bytes_of_four - 1, "disk")):
        options = {"budget": Budget(host_memory=bytes_granted), "folder": tmp_path, "dtype": torch.bfloat16}
        assert Streams(source.shell(), IDS, 2, CPU, **options).place == place


def test_streams_in_bfloat16_give_blocks_float32(source: Checkpoint) -> None:
    streams = Streams(source.shell(), IDS, 2, CPU, dtype=torch.bfloat16)
    exact = Streams(source.shell(), IDS, 2, CPU)
    assert torch.equal(streams.fp, exact.fp.bfloat16())
    block, given = source.block(0), set()
    block.register_forward_hook(lambda module, args, output: given.add(args[0].dtype))
    for each in (streams, exact):
        each.teach(block, source.layout, ("fp", "fp_on_quantised"))
    assert given == {torch.float32}
    for name, target in streams.targets.items():
        assert target.dtype == torch.bfloat16
        assert 0 < (target - exact.targets[name]).norm() < 0.01 * exact.targets[name].norm()
    assert {tensor.dtype for batch in streams.batches() for tensor in batch.values()} == {torch.bfloat16}
    assert streams.output(block, weights_of(block)).dtype == torch.bfloat16


def test_batches_from_afar_go_on_in_the_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "within_reach", lambda tensor, device: False)
    tensors = {"input": torch.arange(10.0).view(5, 2), "fp": torch.arange(5.0, 15).view(5, 2)}
    batches = Batches(tensors, 2)
    for given, rest in ((1, [[2, 3], [4]]), (2, [[4]]), (3, [[0, 1], [2, 3], [4]])):
        looked = iter(batches)
        for _ in range(given):
            next(looked)
        state = batches.state_dict()
        assert state == {"given": given}  # the batch on its way does not count
        again = Batches(tensors, 2)
        again.load_state_dict(state)
        for expected in (rest, [[0, 1], [2, 3], [4]]):
            assert [[int(row[0]) // 2 for row in batch["input"]] for batch in again] == expected


def test_an_evaluations_streams_lie_on_the_gpu_while_two_fit_into_its_half(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10000, 16000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    assert resting_place(2250, cuda) == cuda
    assert resting_place(2251, cuda) == CPU
    assert resting_place(10**15, CPU) == CPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("place", ["host", "disk"])
def test_beside_a_gpu_the_place_changes_no_bit(
    source: Checkpoint, tmp_path: Path, place: Place, dtype: torch.dtype
) -> None:
    cuda, seen = torch.device("cuda", 0), []
    budgets = (Budget(), Budget(memory=1, host_memory=1 if place == "disk" else None))
    for wanted, budget in zip(("device", place), budgets, strict=True):
        streams = Streams(source.shell(), IDS, 2, cuda, dtype=dtype, budget=budget, folder=tmp_path)
        assert streams.place == wanted
        streams.teach(source.block(0, cuda), source.layout, ("fp", "fp_on_quantised"))
        block = source.block(1, cuda)
        output = streams.output(block, weights_of(block))
        batches = [tensor for batch in streams.batches() for tensor in batch.values()]
        assert {(tensor.device, tensor.dtype) for tensor in batches} == {(cuda, dtype)}
        seen.append([tensor.cpu() for tensor in (output, streams.fp, *streams.targets.values(), *batches)])
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
