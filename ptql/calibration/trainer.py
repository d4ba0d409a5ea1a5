"""The loop over blocks: one process, one `Trainer.fit` a block, one block in memory."""

from __future__ import annotations

import ctypes
import hashlib
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from ptql.calibration.activations import Streams
from ptql.calibration.block_task import BlockTask
from ptql.calibration.data import CalibrationData
from ptql.calibration.finish import finish_block
from ptql.calibration.ledger import Ledger
from ptql.calibration.quant_lm import QuantLM
from ptql.callbacks.block import BlockCallback
from ptql.checkpoint import Checkpoint
from ptql.errors import InputError
from ptql.evaluation.evaluate import evaluate
from ptql.evaluation.results import merge_metrics
from ptql.evaluation.size import model_size
from ptql.formats.write import write_model

METRICS = "metrics.json"
MODEL = "model"


class RunLogger(TensorBoardLogger):
    """TensorBoard on one step axis, also where a run goes on: the steps of blocks finished earlier count."""

    first_step = 0

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        super().log_metrics(metrics, None if step is None else self.first_step + step)


class BlockTrainer(Trainer):
    """A Trainer whose `fit` calibrates a model one transformer block at a time.

    Its directory, `default_root_dir`, is the run: ledger, model, metrics, TensorBoard.
    """

    block: int = 0
    """The block in hand, from 0."""
    num_blocks: int = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        try:
            super().__init__(*args, **kwargs)
        except (MisconfigurationException, ValueError) as error:
            given = f"accelerator={kwargs.get('accelerator', 'auto')}, devices={kwargs.get('devices', 'auto')}"
            reason = " ".join(str(error).split())
            raise InputError(f"trainer ({given}): {reason}; correct --trainer.*, `ptql fit --help` lists it") from error
        if self.max_steps != -1 or self.max_epochs is None or self.max_epochs < 0:
            raise InputError(
                f"max_epochs={self.max_epochs}, max_steps={self.max_steps}: every block learns for the same number "
                "of epochs; use --trainer.max_epochs N, 0 or more, without max_steps and fast_dev_run"
            )
        if self.world_size > 1:
            raise InputError(f"devices={self.world_size}: a run uses one device for now; leave --trainer.devices at 1")
        if kwargs.get("logger") in (None, True):
            self.logger = RunLogger(self.default_root_dir, name="tensorboard", version="")

    @property
    def run_dir(self) -> Path:
        return Path(self.default_root_dir)

    def fit(self, model: QuantLM, datamodule: CalibrationData | None = None) -> None:
        """Quantise a model block by block."""
        assert datamodule is not None
        began = time.monotonic()
        self._start(model)
        source = model.open()
        stored_as = model.packed_format(source, model.added_biases(source.block(0), source))
        windows = datamodule.windows(source.directory, source.context)
        ledger = Ledger(self.run_dir, self._identity(model, datamodule, source, windows))
        self.num_blocks = source.num_blocks
        device = self.strategy.root_device
        streams = Streams(source.shell(), windows, datamodule.batch_size, device)
        ledger.start()
        self._notify("on_model_start", model)
        for index in range(self.num_blocks):
            self.block = index
            self._notify("on_block_end", self._block(index, model, source, streams, ledger))
            _give_back_memory()
        write_model(source, stored_as, ledger, self.run_dir / MODEL)
        self._record(model, ledger, source, time.monotonic() - began)
        self._notify("on_model_end", model)

    def _start(self, model: QuantLM) -> None:
        self.strategy.setup_environment()
        if self.strategy.root_device.type == "cuda":
            torch.set_float32_matmul_precision(model.matmul)

    def _block(
        self, index: int, model: QuantLM, source: Checkpoint, streams: Streams, ledger: Ledger
    ) -> dict[str, Any]:
        """Finish one block, or take it from the ledger; both streams stand before the next block afterwards."""
        began, device = time.monotonic(), self.strategy.root_device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        block = source.block(index, device)
        found = ledger.read(index)
        ranges = streams.teach(block, source.layout, () if found else model.objective.targets)
        task = model.block_task(index, model.student(block, source), source, ranges, streams)
        if found is not None:
            stored = {name: tensor.to(device) for name, tensor in found[0].items()}
            streams.advance(streams.output(task.student, task.decode(stored)))
            summary = ledger.summary(index) or {}
            if isinstance(self.logger, RunLogger):
                self.logger.first_step += summary.get("steps", 0)
            return {**summary, "resumed": True}
        self._notify("on_block_start", task)
        learning, first_step = time.monotonic(), self.global_step
        if task.initial and self.max_epochs:
            self._learn(task, streams)
        learned = time.monotonic()
        finished = finish_block(task.to(device), streams)
        summary = {
            **finished.summary,
            "seconds": round(time.monotonic() - began, 3),
            "seconds_learning": round(learned - learning, 3),
            "steps": self.global_step - first_step,
        }
        if device.type == "cuda":
            summary["peak_gpu_bytes"] = torch.cuda.max_memory_allocated(device)
        ledger.record(index, finished.stored, finished.learned, summary)
        streams.advance(finished.output)
        return summary

    def _learn(self, task: BlockTask, streams: Streams) -> None:
        """One ordinary Lightning fit; steps and the logger's axis go on counting from block to block."""
        self.fit_loop.epoch_progress.reset()
        super().fit(task, train_dataloaders=streams.batches())
        if self.received_sigterm:  # after the loop's own last look
            raise SIGTERMException

    def _identity(self, model: QuantLM, data: CalibrationData, source: Checkpoint, windows: Tensor) -> dict[str, Any]:
        tokens = hashlib.sha256(windows.numpy().tobytes()).hexdigest()  # another tokenizer is another run
        return {
            "source": source.fingerprint(),
            "data": {**data.identity(), "tokens_sha256": tokens},
            "recipe": model.identity(),
            "max_epochs": self.max_epochs,
            "accumulate_grad_batches": self.accumulate_grad_batches,
            "gradient_clip": [self.gradient_clip_val, self.gradient_clip_algorithm],
            "limit_train_batches": self.limit_train_batches,
            "precision": f"{self.precision}, matmul {model.matmul}",
        }

    def _record(self, model: QuantLM, ledger: Ledger, source: Checkpoint, seconds: float) -> None:
        size = model_size(self.run_dir / MODEL, source)
        summaries = [ledger.summary(i) or {} for i in range(self.num_blocks)]
        fit = {
            "method": model.method,
            "source": str(model.source),
            "blocks": self.num_blocks,
            "seconds": round(sum(s["seconds"] for s in summaries), 1),
            "seconds_learning": round(sum(s["seconds_learning"] for s in summaries), 1),
            "seconds_this_process": round(seconds, 1),
            "device": _device_name(self.strategy.root_device),
            "checksum": ledger.checksum(),
            "last_block_mse": summaries[-1]["mse"],
            "fell_back": sum(s["fell_back"] for s in summaries),
            "skipped_steps": sum(s.get("skipped_steps", 0) for s in summaries),
        }
        if peaks := [s["peak_gpu_bytes"] for s in summaries if "peak_gpu_bytes" in s]:
            fit["peak_gpu_bytes"] = max(peaks)
        merge_metrics(self.run_dir / METRICS, {**size, "fit": fit})
        print(
            f"{self.run_dir / MODEL}: {size['bits_per_weight']:.3f} bits per quantised weight, "
            f"{size['bits_per_weight_with_embeddings']:.3f} with embeddings, {size['size_bytes'] / 1e6:.1f} MB; "
            f"checksum {fit['checksum']}"
        )

    def _notify(self, hook: str, subject: Any) -> None:
        for callback in self.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, BlockCallback):
                getattr(callback, hook)(self, subject)

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
    ) -> None:
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
        """
        self._start(model)
        directory, results = self._what_to_measure(model, run, json)
        evaluate(
            directory,
            results,
            device=self.strategy.root_device,
            texts=text or {},
            tasks=tasks.split(",") if isinstance(tasks, str) else tasks or [],
            include_path=None if include_path is None else Path(include_path),
            limit=limit,
            length=length,
            max_windows=windows,
            batch_size=batch_size,
        )

    def _what_to_measure(self, model: QuantLM, run: str | None, json: str | None) -> tuple[str | Path, Path | None]:
        if (run is None) == (model.source is None):
            raise InputError("eval measures one model: give either --run RUN or --model.source DIR")
        if run is None:
            return model.source or "", None if json is None else Path(json)
        if not (Path(run) / MODEL).is_dir():
            raise InputError(f"{run}: no finished model in this run; let `ptql fit` end first")
        return Path(run) / MODEL, Path(json) if json else Path(run) / METRICS


def _give_back_memory() -> None:
    """Return what is free to the system: glibc would keep up to 100 MB between a 15 MB block's tensors."""
    with suppress(OSError, AttributeError, TypeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
