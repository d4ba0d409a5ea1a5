"""What is done with a finished run, by one process: it is measured, or written for another runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ptql.calibration.data import CalibrationData
from ptql.calibration.preparation import check_eval_options, check_strategy
from ptql.calibration.quant_lm import QuantLM
from ptql.calibration.run_trainer import RunTrainer
from ptql.errors import InputError
from ptql.evaluation.evaluate import Measurement, evaluate_run
from ptql.export.command import Sample, export


class FinishedRunTrainer(RunTrainer):
    """A Trainer with the commands `eval` and `export`."""

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
