"""What `ptql eval` does: check everything, then measure, then write."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from ptql.calibration.texts import read_text
from ptql.calibration.tokens import consecutive_windows, load_tokenizer, tokenize
from ptql.checkpoint import Checkpoint, resolve
from ptql.errors import InputError
from ptql.evaluation.perplexity import perplexity
from ptql.evaluation.results import merge_metrics, print_results, read_metrics
from ptql.evaluation.tasks import check_tasks, run_tasks
from ptql.formats.ptql import unpack_block

USUAL_LENGTH = 2048


def evaluate(
    source: str | Path,
    results: Path | None,
    *,
    device: torch.device,
    texts: Mapping[str, str],
    tasks: Sequence[str],
    include_path: Path | None,
    limit: int | None,
    length: int | None,
    max_windows: int | None,
    batch_size: int,
) -> dict[str, Any]:
    """Perplexity on `texts` and lm-eval `tasks`; printed, merged into the file `results`, and returned.

    Without texts and tasks, the evaluation part of `pydoc` is measured. Every input is checked before the
    first block is read.
    """
    for name, value in (("windows", max_windows), ("limit", limit), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise InputError(f"{name}={value}: at least 1 is needed; leave --{name} out for the default")
    if results is not None:
        read_metrics(results)
    model = Checkpoint(resolve(source))
    tokenizer = load_tokenizer(model.directory)
    length = _window_length(length, model.context)
    if not texts and not tasks:
        texts = {"pydoc": "pydoc"}
    windows = {
        name: consecutive_windows(tokenize(tokenizer, read_text(text, "evaluation")), length)[:max_windows]
        for name, text in texts.items()
    }
    if tasks:
        check_tasks(tasks, include_path)
    found: dict[str, Any] = {"ppl": {}, "ppl_details": {}} if windows else {}
    for name, ids in windows.items():
        began = time.monotonic()
        found["ppl"][name] = perplexity(model, ids, device, batch_size, _report(name))
        seconds = round(time.monotonic() - began, 1)
        found["ppl_details"][name] = {"windows": len(ids), "length": length, "seconds": seconds}
    if tasks:
        whole = AutoModelForCausalLM.from_pretrained(model.directory, dtype=torch.float32, local_files_only=True)
        unpack_block(whole)  # once, instead of at every call
        whole.to(device)  # type: ignore[arg-type]
        found["tasks"] = run_tasks(whole.eval(), tokenizer, tasks, include_path, limit, batch_size, length)
    print_results(found, Console())
    if results is not None:
        merge_metrics(results, found)
        print(f"written to {results}")
    return found


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
