"""What `ptql eval` does: check everything, then measure, then write."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ptql.calibration.texts import read_text
from ptql.calibration.tokens import bos_token, consecutive_windows, load_tokenizer, tokenize
from ptql.checkpoint import Checkpoint, resolve
from ptql.errors import InputError
from ptql.evaluation.perplexity import perplexity
from ptql.evaluation.report import write_report
from ptql.evaluation.results import merge_metrics, print_results, read_metrics
from ptql.evaluation.tasks import check_tasks, run_tasks
from ptql.evaluation.whole import load_whole

USUAL_LENGTH = 2048
METRICS = "metrics.json"
MODEL = "model"


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
) -> dict[str, Any]:
    """Measure a finished run's model, or a model directory; print, keep and return what was found.

    Args:
        run: The run; its metrics.json and report get the results.
        source: Or a model directory.
        results: JSON file for the results instead.
        compare_source: Measure the run's full-precision source too; found under `source`.
        measurement: What, and where.
    """
    if (run is None) == (source is None):
        raise InputError("eval measures one model: give either --run RUN or --model.source DIR")
    if run is None:
        if compare_source:
            raise InputError("compare_source=true: only a run has a source; give --run RUN")
        return evaluate(source or "", None if results is None else Path(results), measurement)
    run = Path(run)
    if not (run / MODEL).is_dir():
        raise InputError(f"{run}: no finished model in this run; let `ptql fit` end first")
    file = Path(results) if results else run / METRICS
    compared = Checkpoint(resolve(_source_of(run))) if compare_source else None
    found = evaluate(run / MODEL, file, measurement)
    if compared is not None:
        found = {**found, "source": evaluate(compared.directory, file, measurement, section="source")}
    if not results:
        print(f"{write_report(run)} shows it")
    return found


def evaluate(
    source: str | Path, results: Path | None, measurement: Measurement, section: str | None = None
) -> dict[str, Any]:
    """Perplexity on texts and lm-eval tasks; printed, merged into the file `results`, and returned.

    Every input is checked before the first block is read.

    Args:
        source: Model directory or hub id.
        results: JSON file, or None.
        measurement: What, and where.
        section: Key under which `results` gets it all; None for the top.
    """
    m = measurement
    if results is not None:
        read_metrics(results)
    model = Checkpoint(resolve(source))
    tokenizer = load_tokenizer(model.directory)
    length = _window_length(m.length, model.context)
    texts = m.texts if m.texts or m.tasks else {"pydoc": "pydoc"}
    bos = bos_token(tokenizer, model.family.bos)
    windows = {
        name: consecutive_windows(tokenize(tokenizer, read_text(text, "evaluation")), length, bos)[: m.max_windows]
        for name, text in texts.items()
    }
    if m.tasks:
        check_tasks(m.tasks, m.include_path)
    found: dict[str, Any] = {"ppl": {}, "ppl_details": {}} if windows else {}
    for name, ids in windows.items():
        began = time.monotonic()
        found["ppl"][name] = perplexity(model, ids, m.device, m.batch_size, _report(name))
        seconds = round(time.monotonic() - began, 1)
        found["ppl_details"][name] = {"windows": len(ids), "length": length, "seconds": seconds}
    if m.tasks:
        whole = load_whole(model, m.device)
        found["tasks"] = run_tasks(
            whole, tokenizer, m.tasks, m.include_path, m.limit, m.batch_size, length, model.family.bos
        )
    if section is not None:
        print(f"{section}: {model.directory}")
    print_results(found, Console())
    if results is not None:
        merge_metrics(results, found if section is None else {section: found})
        print(f"written to {results}")
    return found


def _source_of(run: Path) -> str:
    source = read_metrics(run / METRICS).get("fit", {}).get("source")
    if not isinstance(source, str):
        raise InputError(f"{run / METRICS}: does not say what the source was; measure it with --model.source DIR")
    return source


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
