"""One batch through one block, from reading to loading what was written: what would fail late, fails now."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.optim import Optimizer

from ptql.calibration.activations import Streams
from ptql.calibration.beginnings import begin_on_streams
from ptql.calibration.block_task import BlockTask
from ptql.calibration.finish import finish_block
from ptql.calibration.ledger import BlockRecord, Ledger
from ptql.calibration.quant_lm import QuantLM
from ptql.checkpoint import Checkpoint
from ptql.disk import told_if_full
from ptql.engine.step import Step
from ptql.errors import InputError
from ptql.formats.ptql import PackedFormat
from ptql.formats.write import write_model
from ptql.nn.student import run_block
from ptql.parts.objectives import total

AGREEMENT = 1e-3  # relative error of the output; kernels may sum in another order, nothing else may differ


@dataclass(frozen=True)
class DryRun:
    """What a dry run tried, and what it needs.

    Args:
        run: The run's directory.
        device: Where blocks run.
        step: Context of a training step: autocast, or nothing.
        learns: Whether the run has epochs.
        rehearsal: Makes what computes a step as the engine does; None where Lightning does.
    """

    run: Path
    device: torch.device
    step: AbstractContextManager[None]
    learns: bool
    rehearsal: Callable[[BlockTask, Optimizer], Step | None] = lambda task, optimizer: None

    def __call__(self, model: QuantLM, source: Checkpoint, fmt: PackedFormat, windows: Tensor) -> str:
        """Try it with one batch of windows; returns a line that says how it went, and leaves nothing on the disk.

        Raises:
            InputError: The directory, the disk's room, the device's memory, the source's numbers.
        """
        began = time.monotonic()
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # nothing has woken the GPU yet
            torch.cuda.reset_peak_memory_stats(self.device)
        fresh = [folder for folder in (self.run, *self.run.parents) if not os.path.exists(folder)]
        try:
            self.run.mkdir(parents=True, exist_ok=True)
            for left in self.run.glob(".dry-run-*"):  # by a process that was killed
                shutil.rmtree(left, ignore_errors=True)
            scratch = Path(tempfile.mkdtemp(prefix=".dry-run-", dir=self.run))
        except OSError as error:
            _remove_empty(fresh)
            raise InputError(
                f"{self.run}: can't be written to ({error.strerror}); give another --trainer.default_root_dir"
            ) from error
        try:
            with isolate_rng(), told_if_full(self.run):
                stored = self._one_block(model, source, fmt, windows, scratch)
            self._check_room(source, stored)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
            _remove_empty(fresh)
        line = f"dry run: one batch through one block, written and read again, in {time.monotonic() - began:.1f} s"
        if self.device.type == "cuda":
            line += f", at most {torch.cuda.max_memory_allocated(self.device) / 2**30:.1f} GiB on the GPU"
            torch.cuda.empty_cache()
        return line

    def _one_block(self, model: QuantLM, source: Checkpoint, fmt: PackedFormat, windows: Tensor, scratch: Path) -> int:
        """Bytes that are stored of block 0."""
        streams = Streams(source.shell(), windows, len(windows), self.device)
        block = source.block(0, self.device)
        ranges = streams.teach(block, source.layout, model.objective.targets, model.objective.attention)
        if not streams.finite():
            raise InputError(
                f"{source.directory}: its first block gives numbers that are not finite; its weights are damaged, "
                "or belong to another architecture: fetch the model again"
            )
        sites = streams.watch(block, source.layout) if model.watches else None
        task = model.block_task(0, model.student(block, source), source, ranges, streams.context, sites=sites)
        begin_on_streams(task, streams, source.layout, model)
        if self.learns and task.initial:
            self._one_step(task, streams)
        record, output = finish_block(task, streams, source.layout, ranges)
        ledger = Ledger(scratch, {})
        ledger.start()
        ledger.record(0, record)
        self._check_loading(source, fmt, ledger, streams, output, scratch / "model")
        return _bytes(record)

    def _one_step(self, task: BlockTask, streams: Streams) -> None:
        with _told_of_optimizer():
            optimizer = task.configure_optimizers()
            step = self.rehearsal(task, optimizer)
        batch = {k: v.to(self.device) for k, v in next(iter(streams.batches())).items()}
        if step is not None:
            step.micro_batch(batch)
            step.finish()
        else:
            with self.step:
                loss = total(task.terms(batch))
            loss.backward()
            with _told_of_optimizer():
                optimizer.step()
        task.load_learnables(task.initial)

    def _check_loading(
        self, source: Checkpoint, fmt: PackedFormat, ledger: Ledger, streams: Streams, output: Tensor, out: Path
    ) -> None:
        """The written block, loaded as anyone would load it, computes what was measured."""
        write_model(source, fmt, ledger, out, blocks=1)
        loaded = Checkpoint(out).block(0, self.device)
        again = run_block(loaded, streams.quantised, streams.context, streams.batch_size)
        error = (again - output).norm() / output.norm()
        if not error <= AGREEMENT:
            raise InputError(
                f"the stored block differs from the measured one by {error.item():.1e} of its output: what rounds "
                "activations while learning must do without gradients what the stored model does; use DynamicTokens"
            )

    def _check_room(self, source: Checkpoint, block_bytes: int) -> None:
        """Ledger and model both hold every block, the model the rest of the source too."""
        outside = source.stored_bytes(source.outside_names())
        needed = 2 * block_bytes * source.num_blocks + outside
        free = shutil.disk_usage(self.run).free
        if needed > free:
            raise InputError(
                f"{self.run}: {free / 1e9:.2f} GB are free where about {needed / 1e9:.2f} GB are needed; make room, or "
                "give another --trainer.default_root_dir"
            )


@contextmanager
def _told_of_optimizer() -> Iterator[None]:
    """Optimisers say in many ways that they can't: of shapes, dense gradients, closures, numbers too large."""
    try:
        yield
    except (TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise InputError(
            f"optimizer: it can't learn a block ({' '.join(str(error).split())}); correct --model.optimizer, or leave "
            "it out for AdamW"
        ) from error


def _remove_empty(folders: list[Path]) -> None:
    """Remove the folders, inner ones first, up to the first one that holds something."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _bytes(record: BlockRecord) -> int:
    parts = (record.stored, record.learned, record.ranges)
    return sum(tensor.nbytes for part in parts for tensor in part.values())
