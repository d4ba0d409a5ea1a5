from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from ptql.callbacks import BlockPlots
from ptql.callbacks.plots import drawn_blocks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from ptql.calibration.run_logger import RunLogger
from tests.callbacks.runs import record, trainer


class Task(nn.Module):
    """Has one smoothed site, as a block's task has."""

    def __init__(self) -> None:
        super().__init__()
        self.transforms = nn.ModuleList([nn.Module()])
        self.transforms[0].sites = nn.ModuleList([nn.Module()])
        self.transforms[0].sites[0].site = SimpleNamespace(name="qkv")


def process(run: Path, finished: int, until: int, logger=None, **options):
    """What one process of a run of which some blocks were finished earlier does."""
    plots = BlockPlots(**options)
    loggers = [logger or RunLogger(run, name="tensorboard", version="")]
    loop = trainer(loggers=loggers, run_dir=run)
    plots.on_model_start(loop, None)
    (run / "config.yaml").write_text("model: {method: lrquant}\n")
    for loop.block in range(until):
        loggers[0].first_step = 640 * loop.block  # does not move what is over blocks
        if loop.block >= finished:
            plots.on_block_start(loop, Task())
        plots.on_block_end(loop, record(loop.block, resumed=loop.block < finished))
    plots.on_model_end(loop, None)


def events(run: Path) -> EventAccumulator:
    found = EventAccumulator(str(run / "tensorboard"), {"scalars": 0, "images": 0, "histograms": 0, "tensors": 0})
    found.Reload()
    return found


def test_each_block_has_its_figures(tmp_path):
    process(tmp_path, 0, 3)
    found, summary = events(tmp_path), record(1).summary
    points = {tag: found.Scalars(tag) for tag in found.Tags()["scalars"]}
    assert all([point.step for point in series] == [0, 1, 2] for series in points.values())
    for key in ("loss_start", "loss", "mse", "seconds", "skipped_steps"):
        assert points[f"block/{key}"][1].value == pytest.approx(summary[key])
    assert points["block/peak_gpu_gib"][1].value == pytest.approx(summary["peak_gpu_bytes"] / 2**30)
    assert points["block/peak_host_gib"][1].value == pytest.approx(summary["peak_host_bytes"] / 2**30)
    assert points["weight_error/mlp.down_proj"][1].value == pytest.approx(summary["layers"]["mlp.down_proj"])
    assert [image.step for image in found.Images("activations")] == [0, 1, 2]
    assert "method: lrquant" in found.Tensors("configuration/text_summary")[0].tensor_proto.string_val[0].decode()


def test_histograms_hold_shares_of_the_range_and_leave_out_what_is_not_finite(tmp_path):
    process(tmp_path, 0, 1)
    found = events(tmp_path)
    lower = found.Histograms("clipping_lower/self_attn.q_proj")[0].histogram_value
    assert (lower.num, lower.min) == (8, pytest.approx(torch.tensor(4.0).sigmoid().item()))
    assert found.Histograms("clipping_upper/self_attn.q_proj")[0].histogram_value.max == 0.5
    scale = found.Histograms("smoothing_scale/qkv")[0].histogram_value
    assert (scale.num, scale.min, scale.max) == (2, 1.0, 2.0)
    assert "smoothing_shift/qkv" not in found.Tags()["histograms"]


def test_nothing_is_written_twice_when_a_run_goes_on(tmp_path):
    process(tmp_path, 0, 2)
    process(tmp_path, 2, 2)
    process(tmp_path, 2, 4)
    found = events(tmp_path)
    for tag in found.Tags()["scalars"]:
        assert [point.step for point in found.Scalars(tag)] == [0, 1, 2, 3]
    assert [image.step for image in found.Images("activations")] == [0, 1, 2, 3]
    assert len(found.Tensors("configuration/text_summary")) == 1


def test_a_block_whose_plots_were_lost_is_drawn_by_the_next_process(tmp_path):
    process(tmp_path, 0, 1)
    process(tmp_path, 2, 3)  # block 1 is in the ledger, but its process was killed before it was drawn
    assert [point.step for point in events(tmp_path).Scalars("block/loss")] == [0, 1, 2]
    assert drawn_blocks(tmp_path / "tensorboard") == {0, 1, 2}


def test_steps_that_were_taken_back_neither_hide_blocks_nor_are_told_of(tmp_path, caplog):
    process(tmp_path, 0, 2)
    logger = RunLogger(tmp_path, name="tensorboard", version="")
    logger.log_metrics({"loss/total": 1.0}, 1200)
    logger.finalize("interrupted")
    SummaryWriter(logger.log_dir, purge_step=1000).close()  # what the logger does where a block goes on
    caplog.clear()
    assert drawn_blocks(Path(logger.log_dir)) == {0, 1}
    assert caplog.text == ""


def test_parts_can_be_left_out(tmp_path):
    process(tmp_path, 0, 1, histograms=False, images=False)
    tags = events(tmp_path).Tags()
    assert (tags["histograms"], tags["images"]) == ([], [])
    assert "block/loss" in tags["scalars"]


def test_other_loggers_get_the_scalars(tmp_path):
    logger = CSVLogger(tmp_path, name="csv", version="")
    process(tmp_path, 1, 3, logger=logger)
    logger.save()
    rows = (tmp_path / "csv" / "metrics.csv").read_text().splitlines()
    assert "block/loss" in rows[0]
    assert [row.split(",")[rows[0].split(",").index("step")] for row in rows[1:]] == ["1", "2"]


def test_without_a_logger_and_on_other_processes_nothing_happens(tmp_path):
    for loop in (trainer(run_dir=tmp_path), trainer(is_global_zero=False, run_dir=tmp_path, loggers=[None])):
        plots = BlockPlots()
        plots.on_model_start(loop, None)
        plots.on_block_start(loop, Task())
        plots.on_block_end(loop, record(0))
    assert list(tmp_path.iterdir()) == []


def test_summaries_of_older_runs_and_losses_that_are_nan_are_drawn(tmp_path):
    plots = BlockPlots()
    loop = trainer(loggers=[RunLogger(tmp_path, name="tensorboard", version="")], run_dir=tmp_path)
    plots.on_model_start(loop, None)
    old = record(0)
    old.summary, old.ranges = {"loss": math.nan, "loss_start": 1.0}, {}
    plots.on_block_end(loop, old)
    assert sorted(events(tmp_path).Tags()["scalars"]) == ["block/loss", "block/loss_start"]
