"""The loop over blocks: one launch, one `Trainer.fit` a block, one block in memory."""

from __future__ import annotations

import copy
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from ptql.calibration.activations import Streams
from ptql.calibration.bit_budget import BitBudget
from ptql.calibration.bit_choice import bits_found, with_chosen_bits
from ptql.calibration.block_reader import BlockReader
from ptql.calibration.block_task import BlockTask
from ptql.calibration.breakdowns import told_in_one_line
from ptql.calibration.data import CalibrationData
from ptql.calibration.finish import finish_block
from ptql.calibration.ledger import BlockRecord, Ledger, shared_ledger
from ptql.calibration.memory import give_back_memory, peak_host_bytes
from ptql.calibration.outcome import fit_metrics
from ptql.calibration.partial import LocalCheckpointIO, Partial
from ptql.calibration.preparation import (
    Plan,
    check_eval_options,
    check_nodes,
    check_strategy,
    prepare,
    probabilities_in_hand,
    streams_at_a_time,
)
from ptql.calibration.quant_lm import QuantLM
from ptql.calibration.ranks import Ranks, host_group
from ptql.calibration.run_logger import RunLogger
from ptql.calibration.static_ranges import find_grids
from ptql.calibration.stopping import Stopped, StopSignals, tell_children, tell_children_no_more
from ptql.calibration.trainer_options import check_options
from ptql.calibration.usual_callbacks import with_usual_callbacks
from ptql.callbacks import BlockCallback, BlockCheckpoint, LoRARestoration
from ptql.errors import InputError, RunError
from ptql.evaluation.evaluate import Measurement, evaluate_run
from ptql.evaluation.recorded_run import METRICS, MODEL
from ptql.evaluation.report import REPORT, write_report
from ptql.evaluation.results import merge_metrics
from ptql.evaluation.size import model_size
from ptql.export.command import Sample, export
from ptql.formats.write import write_model
from ptql.restoration.command import check_restore_options, recorded_stage
from ptql.restoration.restore import FIRST, Stage
from ptql.restoration.restored import restored_by
from ptql.restoration.stages import check_passes, first_stage

PROCESSES = ("accelerator", "devices", "num_nodes", "strategy")


class BlockTrainer(Trainer):
    """A Trainer whose `fit` calibrates a model one transformer block at a time.

    Its directory, `default_root_dir`, is the run: ledger, model, metrics, report, TensorBoard. With `LoRARestoration`
    among the callbacks there are three stages, the first two in folders of their own in it.
    """

    block: int = 0
    """The block in hand, from 0."""
    num_blocks: int = 0
    ranks: Ranks
    signals: StopSignals
    ledger: Ledger
    partial: Partial

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        check_options(kwargs)
        self._processes = {name: copy.deepcopy(kwargs[name]) for name in PROCESSES if name in kwargs}
        self.arithmetic = str(kwargs.get("precision") or "32-true")
        """What `precision` says."""
        if isinstance(kwargs.get("strategy"), ModelParallelStrategy):
            kwargs["precision"] = None  # of mixed ones it takes none; restoring, for which it is, has its own
        self.dry_run_only = bool(kwargs.pop("fast_dev_run", False))  # Lightning's own would end each block's fit
        kwargs["use_distributed_sampler"] = False  # windows are spread already
        kwargs["callbacks"] = with_usual_callbacks(
            kwargs.get("callbacks"),
            progress=kwargs.get("enable_progress_bar") is not False,
            checkpoints=kwargs.pop("enable_checkpointing", None) is not False,
        )
        if SLURMEnvironment.detect():  # its own checkpoint would be loaded into every block; ours is in the ledger
            kwargs["plugins"] = [SLURMEnvironment(auto_requeue=False)]
        try:
            super().__init__(*args, **kwargs)
        except Exception as error:  # of many types: MisconfigurationException, ModuleNotFoundError, KeyError ...
            given = ", ".join(f"{name}={kwargs.get(name, 'auto')}" for name in ("accelerator", "devices", "strategy"))
            reason = " ".join(str(error).split())
            raise InputError(f"trainer ({given}): {reason}; correct --trainer.*, `ptql fit --help` lists it") from error
        check_nodes(self)
        self.strategy.checkpoint_io = LocalCheckpointIO()
        self.ranks, self.signals = Ranks(), StopSignals()
        self._first_step, self._ended_together = 0, False
        if any(isinstance(callback, BlockCheckpoint) for callback in self.callbacks):  # type: ignore[attr-defined]
            # It asks all processes after each batch whether one had SIGTERM. Lightning would ask, too, and wait for the
            # GPU to answer.
            self.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
        self._own_log = kwargs.get("logger") in (None, True)
        self._enter(Path(self.default_root_dir))

    @property
    def run_dir(self) -> Path:
        """The directory of the pass in hand: the run's, or, of the first of two passes, a folder in it."""
        return self._run_dir

    def _enter(self, run_dir: Path) -> None:
        """From now on this is the run's directory, and steps count from 0."""
        self._run_dir = run_dir
        self._close_log()
        if self._own_log:
            self.logger = RunLogger(run_dir, name="tensorboard", version="")
        self.first_step = -self.global_step

    def _close_log(self) -> None:
        for logger in self.loggers:
            if isinstance(logger, RunLogger):
                logger.close()

    def processes(self) -> dict[str, Any]:
        """Options of a Trainer that works in the processes of this one, on the same devices."""
        options: dict[str, Any] = copy.deepcopy(self._processes)
        if SLURMEnvironment.detect():
            options["plugins"] = [SLURMEnvironment(auto_requeue=False)]
        return options

    # fit

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

    @contextmanager
    def _together(self, datamodule: CalibrationData | None) -> Iterator[None]:
        """Errors are told in one line, signals are heard, and no process outlives the first."""
        assert datamodule is not None
        launcher = self.strategy.launcher
        try:
            with told_in_one_line(self, datamodule), StopSignals(self.is_global_zero) as self.signals:
                yield
        except BaseException as error:
            self._notify("on_exception", None, error)  # Lightning tells of those inside a block's fit only
            raise
        finally:
            self._close_log()
            if isinstance(launcher, _SubprocessScriptLauncher) and not self._ended_together:
                launcher.kill(signal.SIGKILL)  # they would wait for this process for half an hour
                launcher.procs.clear()  # or Lightning's watch over them ends this process, too

    def _launch(self, work: Callable[..., None], *subjects: Any) -> None:
        """Do it in every process."""
        launcher = self.strategy.launcher
        if launcher is None:
            self._in_process(work, *subjects)
        else:
            tell_children()
            launcher.launch(self._in_process, work, *subjects, trainer=self)

    def _in_process(self, work: Callable[..., None], *subjects: Any) -> None:
        tell_children_no_more()
        self.strategy.setup_environment()
        host = host_group(self.num_nodes)
        self.ranks = Ranks(self.global_rank, self.world_size, self.strategy.root_device, host)
        work(*subjects)
        self.strategy.barrier("end")
        self._ended_together = True

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
            self._write_results(model, plan, time.monotonic() - began)
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
        find_grids(task, streams, source.layout, model.activation_quantizer)
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

    def stop(self) -> NoReturn:
        """End this process after a signal; all processes come here at the same step."""
        self._ended_together = True
        raise Stopped(self.signals.received or signal.SIGTERM, first=self.is_global_zero)

    # One axis of steps over all blocks, also of earlier processes, which Lightning's own counter does not know

    @property
    def first_step(self) -> int:
        """Steps that Lightning's counter of this process leaves out."""
        return self._first_step

    @first_step.setter
    def first_step(self, steps: int) -> None:
        self._first_step = steps
        for logger in self.loggers:
            if isinstance(logger, RunLogger):
                logger.first_step = steps

    @property
    def steps(self) -> int:
        """Steps of the run so far."""
        return self.first_step + self.global_step

    # The end

    def _write_results(self, model: QuantLM, plan: Plan, seconds: float) -> None:
        size = model_size(self.run_dir / MODEL, plan.source)
        fit = fit_metrics(self, model, plan, seconds)
        bits = {} if plan.bits is None else {"bits": bits_found(self, plan)}
        merge_metrics(self.run_dir / METRICS, {**size, **bits, **restored_by(plan.source.directory), "fit": fit})
        write_report(self.run_dir)
        print(
            f"{self.run_dir / MODEL}: {size['bits_per_weight']:.3f} bits per quantised weight, "
            f"{size['bits_per_weight_with_embeddings']:.3f} with embeddings, {size['size_bytes'] / 1e6:.1f} MB; "
            f"checksum {fit['checksum']}; {self.run_dir / REPORT} shows it"
        )

    def _say(self, line: str) -> None:
        if self.is_global_zero:
            print(f"ptql: {line}", file=sys.stderr, flush=True)

    def _notify(self, hook: str, *subjects: Any) -> None:
        for callback in self.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, BlockCallback):
                getattr(callback, hook)(self, *subjects)

    # eval

    def eval(
        self,
        model: QuantLM,
        datamodule: CalibrationData | None = None,
        run: str | None = None,
        text: dict[str, str] | None = None,
        tasks: list[str] | str | None = None,
        include_path: str | None = None,
        limit: int | None = None,
        length: int | None = None,
        windows: int | None = None,
        batch_size: int = 4,
        json: str | None = None,
        compare_source: bool = False,
    ) -> dict[str, Any]:
        """Measure a model: perplexity on texts, lm-eval tasks.

        Args:
            run: A finished run, whose model is measured; its metrics.json gets the results. Or --model.source.
            text: Texts for perplexity, by name: --text.NAME FILE.
            tasks: lm-eval tasks: a list, or names with commas between them.
            include_path: Folder of further lm-eval task files.
            limit: Items of each task; all by default.
            length: Tokens of a window; 2048, or the model's context where that is shorter.
            windows: Windows of each text; all by default.
            batch_size: Windows, or items, at a time.
            json: File for the results, merged into what it holds.
            compare_source: Measure the run's full-precision source as well, for comparison.
        """
        if self.world_size > 1:
            raise InputError(
                f"devices={self.world_size}: eval is one process, and spreads a model that needs it over all GPUs by "
                "itself; leave --trainer.devices at 1"
            )
        check_strategy(self.strategy)
        check_eval_options(model, datamodule)
        self.strategy.setup_environment()
        self._precision_of_products(model)
        return evaluate_run(
            run,
            model.source,
            json,
            compare_source,
            Measurement(
                device=self.strategy.root_device,
                texts=text or {},
                tasks=tasks.split(",") if isinstance(tasks, str) else tasks or [],
                include_path=None if include_path is None else Path(include_path),
                limit=limit,
                length=length,
                max_windows=windows,
                batch_size=batch_size,
            ),
            self,
        )

    def export(
        self,
        model: QuantLM,
        datamodule: CalibrationData | None = None,
        run: str | None = None,
        format: str = "compressed-tensors",
        out: str | None = None,
        dtype: str = "auto",
        check: bool = True,
        python: str | None = None,
        text: str = "pydoc",
        windows: int = 4,
        length: int = 512,
        widen: bool = False,
    ) -> None:
        """Write a finished model in the format of another runtime, which must load it and give our logits.

        Args:
            run: A finished run, whose model is written. Or --model.source, a directory that ptql packed.
            format: compressed-tensors, gptq, gptq_v2, auto-round, gguf or dense.
            out: The directory that is made.
            dtype: float16, bfloat16 or float32; by default bfloat16 where scales were made for it, else float16.
            check: Read it back with that runtime, in a process of its own, and compare.
            python: The Python of the environment in which that runtime is; this one by default.
            text: What it is compared on.
            windows: How many windows of it.
            length: Tokens of a window.
            widen: Of gguf: formats that it has no type for are stored with wider codes, as exact, but larger.
        """
        if self.world_size > 1:
            raise InputError(f"devices={self.world_size}: export is one process; leave --trainer.devices at 1")
        check_eval_options(model, datamodule, "export")
        self.strategy.setup_environment()
        sample = Sample(text, windows, length) if check else None
        export(run, model.source, format, out, dtype, sample, self.strategy.root_device, python, widen)

    def _precision_of_products(self, model: QuantLM) -> None:
        if self.strategy.root_device.type == "cuda":
            torch.set_float32_matmul_precision(model.matmul)
