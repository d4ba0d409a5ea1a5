"""Attention as a target: what is kept of the full-precision block, where, in how much memory, and what is compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ptql.calibration import activations
from ptql.calibration.activations import Streams
from ptql.calibration.block_task import BlockTask
from ptql.calibration.finish import finish_block
from ptql.calibration.memory_budget import Budget
from ptql.calibration.preparation import probabilities_in_hand, streams_at_a_time
from ptql.calibration.quant_lm import QuantLM
from ptql.checkpoint import Checkpoint
from ptql.nn import transfer
from ptql.nn.attention import PROBE
from ptql.nn.attention_probe import attach_probe, made_by
from ptql.nn.student import run_block
from ptql.parts.objectives import (
    ATTENTION,
    ATTENTION_MADE,
    AttentionView,
    DistributionCorrection,
    Objective,
    Reconstruction,
    all_terms,
    total,
)
from ptql.parts.transforms import Smooth
from ptql.recipe import ActivationScheme, IntScheme
from tests.models import CONFIGS, llama_config, random_model, save, some_ids

CPU = torch.device("cpu")
TOKENS = 12
IDS = some_ids(samples=5, tokens=TOKENS)
EACH, MEAN = AttentionView(5), AttentionView(0, averaged=True)


@pytest.fixture(params=["llama", "gemma2", "opt"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Checkpoint:
    return Checkpoint(save(random_model(CONFIGS[request.param]), tmp_path / "model"))


def streams_of(source: Checkpoint, batch_size: int = 2, **options: Any) -> Streams:
    return Streams(source.shell(), IDS, batch_size, CPU, **options)


@torch.no_grad()
def seen_by_hand(source: Checkpoint, index: int, hidden: Tensor, streams: Streams, view: AttentionView) -> Tensor:
    block = source.block(index)
    return made_by(block, hidden, streams.context, probe=attach_probe(block, source.layout, view))[ATTENTION_MADE]


@pytest.mark.parametrize("view", [EACH, MEAN], ids=["each", "mean"])
@pytest.mark.parametrize("batch_size", [2, 5])
def test_it_is_that_of_the_full_precision_block_on_its_own_stream(
    source: Checkpoint, batch_size: int, view: AttentionView
) -> None:
    streams = streams_of(source, batch_size)
    streams.quantised += 100  # must not show
    for index in range(2):
        before = streams.fp.clone()
        block = source.block(index)
        streams.teach(block, source.layout, ("fp", "fp_on_quantised"), view)
        assert not hasattr(block.get_submodule(source.layout.attention.module), PROBE)
        expected = seen_by_hand(source, index, before, streams, view)
        found = streams.targets[ATTENTION]
        assert found.shape == (5, *view.shape(4, TOKENS))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        batches = list(streams.batches())
        assert batches[0].keys() == {"input", "fp", ATTENTION, "fp_on_quantised"}
        assert torch.equal(torch.cat([batch[ATTENTION] for batch in batches]), found)
        streams.advance(streams.quantised)
        assert streams.targets == {}


def test_what_is_looked_at_changes_nothing_else(source: Checkpoint) -> None:
    plain, other = streams_of(source), streams_of(source)
    ranges = plain.teach(source.block(0), source.layout, ("fp",))
    theirs = other.teach(source.block(0), source.layout, ("fp",), EACH)
    assert ATTENTION not in plain.targets
    assert torch.equal(plain.fp, other.fp)
    assert all(torch.equal(ranges[name].absmax, theirs[name].absmax) for name in ranges)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("far", [False, True], ids=["near", "far"])
@pytest.mark.parametrize("place", ["host", "disk"])
def test_it_lies_with_the_streams_in_their_dtype(
    place: str, far: bool, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Checkpoint(save(random_model(llama_config()), tmp_path / "model"))
    near = streams_of(source, dtype=dtype)
    near.teach(source.block(0), source.layout, ("fp",), EACH)
    if far:  # every batch is copied, through threads, as between host and GPU
        monkeypatch.setattr(transfer, "within_reach", lambda tensor, device: False)
    (tmp_path / "run").mkdir()
    budget = Budget(host_memory=1 if place == "disk" else None)
    streams = streams_of(source, dtype=dtype, budget=budget, folder=tmp_path / "run")
    assert streams.place == place
    streams.teach(source.block(0), source.layout, ("fp",), EACH)
    assert streams.targets[ATTENTION].dtype == dtype
    assert torch.equal(streams.targets[ATTENTION], near.targets[ATTENTION])
    found = torch.cat([batch[ATTENTION] for batch in streams.batches()])
    assert torch.equal(found, near.targets[ATTENTION])


def test_a_pass_takes_fewer_samples_where_attention_is_larger_than_hidden_states(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And so it does where nothing is looked at any more, as in blocks that an earlier process finished."""
    source = Checkpoint(save(random_model(llama_config()), tmp_path / "model"))
    monkeypatch.setattr(activations, "PASS_BYTES", 4 * 48 * TOKENS * 4)  # 4 samples' hidden states
    for probabilities, expected in ((0, [4, 1]), (48, [4, 1]), (96, [2, 2, 1]), (10**6, [1] * 5)):
        streams = streams_of(source, 1, probabilities=probabilities)
        block, sizes = source.block(0), []
        block.register_forward_hook(lambda module, given, output, sizes=sizes: sizes.append(len(given[0])))
        streams.teach(block, source.layout, ("fp",), EACH)
        streams.teach(block, source.layout, ())
        assert sizes == expected * 2


# What it takes


def model_with(objective: Objective) -> QuantLM:
    return QuantLM(objective=objective)


@pytest.mark.parametrize(
    ("objective", "streams", "in_hand"),
    [
        (Reconstruction(), 3, 0),
        (Reconstruction(targets=["fp", "fp_on_quantised"]), 4, 0),
        (DistributionCorrection(akl=0.0), 4, 0),
        (DistributionCorrection(akl_rows=6), 5, 24),  # 4 heads of 6 rows for 48 channels: half of a stream
        (DistributionCorrection(akl_rows=12), 5, 48),
        (DistributionCorrection(akl_rows=13), 6, 52),
        (DistributionCorrection(akl_rows=30), 8, 120),  # two streams and a half: four, pinned
        (DistributionCorrection(akl_rows=0), 4 + 8, 4 * 64),  # 64 rows of 64 tokens
        (DistributionCorrection(akl_mode="faithful", akl_rows=0), 4 + 2, 4 * 64),
    ],
)
def test_streams_that_it_takes_the_place_of(objective: Objective, streams: int, in_hand: int, tmp_path: Path) -> None:
    source = Checkpoint(save(random_model(llama_config()), tmp_path / "model"))
    model = model_with(objective)
    assert streams_at_a_time(model, source, 64) == streams
    assert probabilities_in_hand(model, source, 64) == in_hand


# What a block is compared by


def prepared(source: Checkpoint, objective: Objective, activation: int = 4) -> tuple[BlockTask, Streams, Any]:
    model = QuantLM(
        weight=IntScheme(3, 16), activation=ActivationScheme(activation), transforms=[Smooth()], objective=objective
    )
    streams = streams_of(source)
    block = source.block(0)
    ranges = streams.teach(block, source.layout, objective.targets, objective.attention)
    task = model.block_task(0, model.student(block, source), source, ranges, streams.context)
    return task, streams, ranges


@pytest.mark.parametrize("mode", ["exact", "faithful"])
def test_the_loss_of_a_finished_block_is_the_mean_over_training_batches(source: Checkpoint, mode: Any) -> None:
    """Passes take all samples at once; their attention is divided like everything else."""
    objective = DistributionCorrection(akl=50.0 if mode == "exact" else 1e4, akl_mode=mode, akl_rows=5)
    task, streams, ranges = prepared(source, objective)
    record, _ = finish_block(task, streams, source.layout, ranges)
    weights, losses, attention = task.decode(task.encode()), [], []
    with torch.no_grad():
        for batch in streams.batches():
            made = made_by(task.student, batch["input"], streams.context, weights, task.probe)
            terms = all_terms(objective, {**batch, **made})
            losses.append(total(terms).item())
            attention.append(terms["akl"].item())
    assert record.summary["loss"] == pytest.approx(sum(losses) / 3, rel=1e-4)
    assert sum(attention) > 1e-2 * sum(losses)


def test_a_student_that_is_its_teacher_has_no_divergence_and_a_rounded_one_has(source: Checkpoint) -> None:
    task, streams, _ = prepared(source, DistributionCorrection(akl_rows=5))
    batch = next(iter(streams.batches()))
    assert task.terms(batch)["akl"] > 1e-3
    model = QuantLM(weight=IntScheme(16), activation=ActivationScheme(16), objective=task.objective)
    block = source.block(0)
    same = model.block_task(0, model.student(block, source), source, {}, streams.context)
    terms = same.terms(batch)
    assert terms["akl"].item() == pytest.approx(0, abs=1e-9)
    assert total(terms).item() == pytest.approx(0, abs=1e-5)


def test_learning_is_by_gradients_of_attention_too(source: Checkpoint) -> None:
    task, streams, _ = prepared(source, DistributionCorrection(mse=0.0, dlc=0.0, akl_rows=5), activation=16)
    batch, optimizer, losses = next(iter(streams.batches())), task.configure_optimizers(), []
    for _ in range(40):
        loss, terms = task.plain_loss(batch)
        assert terms.keys() == {"akl"}
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in task.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert min(losses[20:]) < 0.97 * losses[0]
    name = f"quantizers.{source.layout.attention.q.linear.replace('.', '/')}.upper"
    assert not torch.equal(task.learnables()[name], task.initial[name])


class Own(Objective):
    """As in docs/extending.md: it knows nothing of attention."""

    targets = ("fp",)

    def terms(self, output, targets):
        return {"absolute_fp": (output - targets["fp"]).abs().mean()}


class OwnOfAttention(Own):
    attention = AttentionView(rows=3)

    def attention_terms(self, made, wanted):
        return {"first_key": (made[..., 0] - wanted[..., 0]).abs().mean()}


def test_objectives_of_others_look_at_attention_or_do_not(source: Checkpoint) -> None:
    for objective, names in ((Own(), ["absolute_fp"]), (OwnOfAttention(), ["absolute_fp", "first_key"])):
        task, streams, ranges = prepared(source, objective)
        batch = next(iter(streams.batches()))
        assert (ATTENTION in batch) == (task.probe is not None) == (len(names) == 2)
        terms = task.terms(batch)
        assert list(terms) == names
        assert all(term > 0 for term in terms.values())
        record, output = finish_block(task, streams, source.layout, ranges)
        assert record.summary["loss"] > 0
        again = run_block(task.student, streams.quantised, streams.context, 5, task.decode(record.stored))
        torch.testing.assert_close(output, again, rtol=1e-4, atol=1e-4)
