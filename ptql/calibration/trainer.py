"""The loop over blocks: one launch, one `Trainer.fit` a block, one block in memory."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from lightning.pytorch.plugins import MixedPrecision

from ptql.calibration.activations import Streams
from ptql.calibration.beginnings import begin_on_streams
from ptql.calibration.bit_budget import BitBudget
from ptql.calibration.bit_choice import with_chosen_bits
from ptql.calibration.block_reader import BlockReader
from ptql.calibration.block_task import BlockTask
from ptql.calibration.data import CalibrationData
from ptql.calibration.finish import finish_block
from ptql.calibration.finished_run_trainer import FinishedRunTrainer
from ptql.calibration.ledger import BlockRecord, Ledger, shared_ledger
from ptql.calibration.memory import give_back_memory, peak_host_bytes
from ptql.calibration.outcome import write_results
from ptql.calibration.partial import Partial
from ptql.calibration.preparation import (
    Plan,
    check_strategy,
    prepare,
    probabilities_in_hand,
    streams_at_a_time,
)
from ptql.calibration.quant_lm import QuantLM
from ptql.callbacks import LoRARestoration
from ptql.errors import InputError, RunError
from ptql.evaluation.recorded_run import MODEL
from ptql.formats.write import write_model
from ptql.restoration.command import check_restore_options, recorded_stage
from ptql.restoration.restore import FIRST, Stage
from ptql.restoration.stages import check_passes, first_stage


class BlockTrainer(FinishedRunTrainer):
    """A Trainer whose `fit` calibrates a model one transformer block at a time.

    Its directory, `default_root_dir`, is the run: ledger, model, metrics, report, TensorBoard. With `LoRARestoration`
    among the callbacks there are three stages, the first two in folders of their own in it.
    """

    block: int = 0
    """The block in hand, from 0."""
    num_blocks: int = 0
    ledger: Ledger
    partial: Partial

    def fit(
        self,
        model: QuantLM,
        datamodule: CalibrationData | None = None,
        bits_budget: float | None = None,
        bits_choices: list[int] | None = None,
    ) -> None:
        """Quantise a model block by block.

        Args:
            bits_budget: Bits per weight, all that is stored counted: layers get widths that meet it and lose least.
            bits_choices: Widths that they can get; 2, 3, 4, 5, 6 and 8 by default.
        """
        assert datamodule is not None
        check_strategy(self.strategy)
        budget = BitBudget.given(bits_budget, bits_choices, model.weight)
        self._precision_of_products(model)
        restoration = self._restoration()
        with self._together(datamodule):
            check_passes(self.run_dir, restoration, budget)
            stage = None
            if restoration is not None:
                stage = first_stage(self, restoration, model, datamodule)
                self._enter(self.run_dir / FIRST)
            plan = prepare(self, model, datamodule, budget)
            if not self.dry_run_only:
                self._launch(self._fit_passes, model, datamodule, plan, stage)

    def restore(
        self,
        model: QuantLM,
        datamodule: CalibrationData | None = None,
        run: str | None = None,
        out: str | None = None,
    ) -> None:
        """Learn LoRA on a finished run's model and merge it into its quantised weights: the middle stage of a `fit`
        with `LoRARestoration`, alone.

        How it learns is what `LoRARestoration` among the callbacks says, or in the run's configuration.

        Args:
            run: A finished run; or one that `fit` began and whose first pass is done: the same `fit` goes on then.
            out: Directory for the restored model, in its folder `model`; of the second kind it is RUN/restored.
        """
        check_restore_options(self, model, datamodule)
        self._precision_of_products(model)
        self._run_dir = Path(out or run or self.run_dir)
        with self._together(datamodule):
            stage, first = recorded_stage(self, self._restoration(), run, out)
            if not self.dry_run_only:
                self._launch(self._restore, stage, first)

    def _restoration(self) -> LoRARestoration | None:
        found = [callback for callback in self.callbacks if isinstance(callback, LoRARestoration)]  # type: ignore[attr-defined]
        if len(found) > 1:
            raise InputError(f"callbacks: {len(found)} of LoRARestoration; a run is restored once, so leave one")
        return found[0] if found else None

    def _restore(self, stage: Stage, first: Path) -> None:
        model = stage.run(first)
        if self.is_global_zero:
            print(f"{model}: restored; --model.source {model} quantises it")

    def _fit_passes(self, model: QuantLM, datamodule: CalibrationData, plan: Plan, stage: Stage | None) -> None:
        """One pass over the blocks; with a restoration, two."""
        if stage is None:
            self._fit_blocks(model, plan)
            return
        first = self.run_dir
        if not self.ranks.all(stage.begun):
            self._say(f"stage 1 of 3: first pass, into {first}")
            self._fit_blocks(model, plan)
        self._say(f"stage 2 of 3: LoRA on its model, into {stage.folder}")
        model.source = str(stage.run(first))
        self._enter(stage.run_dir)
        self._say(f"stage 3 of 3: second pass, into {self.run_dir}")
        self._fit_blocks(model, prepare(self, model, datamodule))

    def _fit_blocks(self, model: QuantLM, plan: Plan) -> None:
        began = time.monotonic()
        self.num_blocks = plan.source.num_blocks
        finished = self._open_ledger(plan)
        plan = with_chosen_bits(self, model, plan)
        self._notify("on_model_start", model)
        todo = [index for index in range(self.num_blocks) if index not in finished]
        streams = self._streams(model, plan) if todo else None
        try:
            with BlockReader(plan.source, self.strategy.root_device) as reader:
                self._each_block(model, plan, streams, reader, todo)
        finally:
            if streams is not None:
                streams.close()
            model.engine.forget()
        if self.is_global_zero:
            write_model(plan.source, plan.stored_as, self.ledger, self.run_dir / MODEL)
            write_results(self, model, plan, time.monotonic() - began)
        self._notify("on_model_end", model)
        self.strategy.barrier("model")

    def _each_block(
        self, model: QuantLM, plan: Plan, streams: Streams | None, reader: BlockReader, todo: list[int]
    ) -> None:
        for index in range(self.num_blocks):
            self.block, finished = index, index not in todo
            found = self.ledger.read(index) if finished else None
            if finished and found is None:
                raise RunError(
                    f"block {index} in {self.ledger.folder} was changed while the run went on; start it again"
                )
            if streams is None or (found is not None and index > todo[-1]):
                assert found is not None
                record = found
            else:
                record = self._block(model, plan, streams, reader, found)
            if record.resumed:
                self.first_step += record.summary.get("steps", 0)
            self._notify("on_block_end", record)
            give_back_memory()

    def _open_ledger(self, plan: Plan) -> set[int]:
        """The blocks that are finished; the first process claims the directory before the others look at it."""
        if self.is_global_zero:
            plan.ledger(self.run_dir).start()
        self.strategy.barrier("ledger")
        self.ledger, finished, damaged = shared_ledger(self.run_dir, plan.identity, self.ranks, self.num_blocks)
        self.partial = Partial(self.ledger.folder)
        for path in damaged:
            self._say(f"{path}: missing or not what was written (checksum); this block is done again")
        return finished

    def _streams(self, model: QuantLM, plan: Plan) -> Streams:
        device = self.strategy.root_device
        # the first process has measured it, and all of them should decide alike
        work_bytes = int(self.ranks.largest(torch.tensor(float(plan.work_bytes or 0))).item())
        return Streams(
            plan.source.shell(),
            self.ranks.share(plan.windows),
            plan.batch_size,
            device,
            self.ranks,
            dtype=model.engine.stream_dtype(device, self),
            budget=plan.budget,
            folder=self.run_dir,
            at_a_time=streams_at_a_time(model, plan.source, plan.windows.shape[1]),
            work_bytes=work_bytes or None,
            probabilities=probabilities_in_hand(model, plan.source, plan.windows.shape[1]),
        )

    def _block(
        self, model: QuantLM, plan: Plan, streams: Streams, reader: BlockReader, found: BlockRecord | None
    ) -> BlockRecord:
        """Finish the block in hand, or take what was found; both streams stand before the next one afterwards."""
        began, first_step = time.monotonic(), self.steps
        device, source = self.strategy.root_device, plan.source
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        block = reader.block(self.block)
        reader.ahead(self.block + 1)
        wanted = ((), None) if found else (model.objective.targets, model.objective.attention)
        ranges = streams.teach(block, source.layout, *wanted)
        if not streams.finite():
            raise InputError(
                f"{source.directory}: block {self.block} gives numbers that are not finite; its weights are damaged: "
                "fetch the model again"
            )
        sites = streams.watch(block, source.layout) if model.watches and found is None else None
        student = model.student(block, source)  # the same module, changed in place
        task = model.block_task(self.block, student, source, ranges, streams.context, begin=found is None, sites=sites)
        if found is not None:
            stored = {name: tensor.to(device) for name, tensor in found.stored.items()}
            streams.advance(streams.output(task.student, task.decode(stored)))
            return found
        begin_on_streams(task, streams, source.layout, model)
        self._notify("on_block_start", task)
        learning = time.monotonic()
        if task.initial and self.max_epochs:
            self._learn(task, streams, plan.seed)
        learned = time.monotonic()
        record, output = finish_block(task.to(device), streams, source.layout, ranges)
        record.summary |= {
            "seconds": round(time.monotonic() - began, 3),
            "seconds_learning": round(learned - learning, 3),
            "steps": self.steps - first_step,
            "peak_host_bytes": peak_host_bytes(),
        }
        if device.type == "cuda":
            record.summary["peak_gpu_bytes"] = torch.cuda.max_memory_allocated(device)
            record.summary["peak_gpu_reserved_bytes"] = torch.cuda.max_memory_reserved(device)
        if self.is_global_zero:
            self.ledger.record(self.block, record)
        streams.advance(output)
        return record

    def _learn(self, task: BlockTask, streams: Streams, seed: int) -> None:
        """One ordinary Lightning fit; steps and the logger's axis go on counting from block to block."""
        checkpoint = self._partial_checkpoint()
        if checkpoint is None:  # a block depends on no other block's epochs, random numbers and overflows
            self.fit_loop.epoch_progress.reset()
            task.seed = seed + self.block
            if isinstance(self.precision_plugin, MixedPrecision) and self.precision_plugin.scaler is not None:
                self.precision_plugin.scaler = torch.amp.GradScaler(self.strategy.root_device.type)
        else:
            self._say(f"block {self.block + 1}/{self.num_blocks}: goes on from {checkpoint.name}")
        self.signals.learning = True
        try:
            super().fit(task, train_dataloaders=streams.batches(), ckpt_path=checkpoint, weights_only=True)
        finally:
            task.release_step()
        self.signals.learning = False
        task.load_best()  # Lightning leaves its hooks out where the checkpoint is of the last epoch's end
        if self.ranks.any(self.signals.received is not None):  # after the last look inside
            self.stop()

    def _partial_checkpoint(self) -> Path | None:
        """The checkpoint of the block in hand that an earlier process left, if every process can read it."""
        found = self.partial.find(
            self.block, lambda path: self._say(f"{path}: not what was written (checksum); the block begins anew")
        )
        return found if self.ranks.all(found is not None) else None
