"""What `ptql eval` does: check everything, then measure, then write."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from ptql.calibration.texts import read_text
from ptql.calibration.tokens import bos_token, consecutive_windows, load_tokenizer, tokenize
from ptql.callbacks import BlockCallback
from ptql.checkpoint import Checkpoint, resolve
from ptql.errors import InputError
from ptql.evaluation.domains import domain
from ptql.evaluation.perplexity import perplexity, window_losses
from ptql.evaluation.recorded_run import METRICS, MODEL, RecordedRun, source_of
from ptql.evaluation.report import write_report
from ptql.evaluation.results import merge_metrics, print_results, read_metrics
from ptql.evaluation.tasks import check_tasks
from ptql.evaluation.tasks_under_test import TasksUnderTest
from ptql.evaluation.text_under_test import TextUnderTest

if TYPE_CHECKING:
    from ptql.calibration.run_trainer import RunTrainer

USUAL_LENGTH = 2048


@dataclass(frozen=True)
class Measurement:
    """What to measure, and where.

    Args:
        device: Where blocks run.
        texts: For perplexity, by name. Without texts and tasks it is the evaluation part of `pydoc`.
        tasks: Names of lm-eval tasks.
        include_path: Folder of further task files.
        limit: Items of each task; None for all.
        length: Tokens of a window; None for 2048, or the model's context where that is shorter.
        max_windows: Windows of each text; None for all.
        batch_size: Windows, or items, at a time.

    Raises:
        InputError: A number below 1.
    """

    device: torch.device
    texts: Mapping[str, str]
    tasks: Sequence[str] = ()
    include_path: Path | None = None
    limit: int | None = None
    length: int | None = None
    max_windows: int | None = None
    batch_size: int = 4

    def __post_init__(self) -> None:
        for name, value in (("windows", self.max_windows), ("limit", self.limit), ("batch_size", self.batch_size)):
            if value is not None and value < 1:
                raise InputError(f"{name}={value}: at least 1 is needed; leave --{name} out for the default")


def evaluate_run(
    run: str | Path | None,
    source: str | Path | None,
    results: str | Path | None,
    compare_source: bool,
    measurement: Measurement,
    trainer: RunTrainer,
) -> dict[str, Any]:
    """Measure a finished run's model, or a model directory; print, keep and return what was found.

    Args:
        run: The run; its metrics.json and report get the results.
        source: Or a model directory.
        results: JSON file for the results instead.
        compare_source: Measure the run's full-precision source too; found under `source`.
        measurement: What, and where.
        trainer: Whose callbacks may measure in their ways.
    """
    if (run is None) == (source is None):
        raise InputError("eval measures one model: give either --run RUN or --model.source DIR")
    if run is None:
        if compare_source:
            raise InputError("compare_source=true: only a run has a source; give --run RUN")
        file = Path(results) if results else None
        return Evaluation(Checkpoint(resolve(source or "")), measurement, trainer).save(file)
    run = Path(run)
    if not (run / MODEL).is_dir():
        raise InputError(f"{run}: no finished model in this run; let `ptql fit` end first")
    file = Path(results) if results else run / METRICS
    compared = Checkpoint(resolve(source_of(run, original=True))) if compare_source else None
    found = Evaluation(Checkpoint(run / MODEL), measurement, trainer, run).save(file)
    if compared is not None:
        found = {**found, "source": Evaluation(compared, measurement).save(file, section="source")}
    if not results:
        print(f"{write_report(run)} shows it")
    return found


class Evaluation:
    """One model's measurements. Every input is checked before the first block is read.

    Args:
        model: Full precision, or packed by ptql.
        measurement: What, and where.
        trainer: Whose callbacks may measure in their ways, too; None for no callbacks.
        run: Whose model this is.
    """

    def __init__(
        self,
        model: Checkpoint,
        measurement: Measurement,
        trainer: RunTrainer | None = None,
        run: Path | None = None,
    ) -> None:
        self.model, self.measurement, self._trainer, self._run = model, measurement, trainer, run
        self._callbacks = [c for c in getattr(trainer, "callbacks", []) if isinstance(c, BlockCallback)]
        self._tokenizer = load_tokenizer(model.directory)

    def save(self, results: Path | None, section: str | None = None) -> dict[str, Any]:
        """Measure; print it, merge it into the JSON file `results` (under `section`, if given), and return it."""
        if results is not None:
            read_metrics(results)
        found = self.measured()
        if section is not None:
            print(f"{section}: {self.model.directory}")
        print_results(found, Console())
        if results is not None:
            merge_metrics(results, found if section is None else {section: found})
            print(f"written to {results}")
        return found

    def measured(self) -> dict[str, Any]:
        """Perplexity of each text, scores of the tasks, and what callbacks add."""
        m, model = self.measurement, self.model
        length = _window_length(m.length, model.context)
        texts = m.texts if m.texts or m.tasks else {"pydoc": "pydoc"}
        bos = bos_token(self._tokenizer, model.family.bos)
        windows = {
            name: consecutive_windows(tokenize(self._tokenizer, read_text(text, "evaluation")), length, bos)
            for name, text in texts.items()
        }
        windows = {name: ids[: m.max_windows] for name, ids in windows.items()}
        if m.tasks:
            check_tasks(m.tasks, m.include_path)
        recorded = self._recorded()
        tasks = self._tasks(length, recorded)
        self._notify("on_eval_start", recorded, windows, tasks)
        found: dict[str, Any] = {"ppl": {}, "ppl_details": {}} if windows else {}
        for name, ids in windows.items():
            began = time.monotonic()
            losses = window_losses(model, ids, m.device, m.batch_size, _report(name))
            found["ppl"][name] = perplexity(losses, length)
            seconds = round(time.monotonic() - began, 1)
            found["ppl_details"][name] = {"windows": len(ids), "length": length, "seconds": seconds}
            if self._run is not None and (kind := domain(name, self._run)) is not None:
                found["ppl_details"][name]["domain"] = kind
            if recorded is not None:
                self._notify(
                    "on_text_measured", TextUnderTest(name, ids, losses, recorded, m.device, m.batch_size), found
                )
        if recorded is not None:
            recorded.model.engine.forget()  # a whole model needs the room that graphs of a block keep
        if tasks is not None:
            found["tasks"] = tasks.scores()
            if recorded is not None:
                self._notify("on_tasks_measured", tasks, found)
                recorded.model.engine.forget()
        return found

    def _tasks(self, length: int, run: RecordedRun | None) -> TasksUnderTest | None:
        """The tasks, if there are any; neither their questions nor the model that answers them are loaded yet."""
        m = self.measurement
        if not m.tasks:
            return None
        given = (m.tasks, m.include_path, m.limit)
        return TasksUnderTest(*given, self.model, self._tokenizer, run, m.device, m.batch_size, length)

    def _recorded(self) -> RecordedRun | None:
        """The run, opened again, where a callback wants to know."""
        hooks = ("on_eval_start", "on_text_measured", "on_tasks_measured")
        wanted = any(
            getattr(type(c), hook) is not getattr(BlockCallback, hook) for c in self._callbacks for hook in hooks
        )
        return RecordedRun.open(self._run) if wanted and self._run is not None else None

    def _notify(self, hook: str, *subjects: Any) -> None:
        for callback in self._callbacks:
            getattr(callback, hook)(self._trainer, *subjects)


def _window_length(length: int | None, context: int) -> int:
    if length is None:
        return min(USUAL_LENGTH, context)
    if not 2 <= length <= context:
        raise InputError(f"length={length}: a window holds 2 tokens to the model's context, {context}")
    return length


def _report(name: str):
    """A line a few times per text: enough to see that it moves, on a terminal and in a log."""
    began = time.monotonic()

    def report(done: int, total: int) -> None:
        if done == total or done % max(1, total // 5) == 0:
            print(f"{name}: block {done}/{total}, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)

    return report
