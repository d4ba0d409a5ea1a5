"""Zero-shot and few-shot tasks of lm-eval on a model that is in memory.

lm-eval and what it imports take seconds to load, so every import of it is inside a function.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import logging
import os
import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from itertools import groupby
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptql.errors import InputError

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Parts = Callable[[str, "list[Instance]"], "Generator[list[Instance], None, None]"]
"""Yields a task's requests, in order, in the parts in which they are to be answered; may change the model between."""

# lm-eval computes no standard error at all with 0, not even that of a mean, which needs no resampling.
BOOTSTRAP_ITERS = 1000


def check_tasks(tasks: Sequence[str], include_path: Path | None) -> None:
    """Fail before any work is done if lm-eval can't find one of the tasks.

    A task's questions are not read, so a missing download shows up in `run_tasks` only.

    Args:
        tasks: Names of tasks, groups or tags.
        include_path: Folder with task YAML files of the user's own; they win over lm-eval's.

    Raises:
        InputError: A name is unknown, or `include_path` is not a folder.
    """
    _index_tasks(tasks, include_path)


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    include_path: Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
    bos: bool = False,
    samples: Mapping[str, Sequence[int]] | None = None,
    parts: Parts | None = None,
) -> dict[str, Any]:
    """Scores of the model on each task, as `lm_eval --model hf` gives them with its default settings.

    The model runs where it is and in its own precision; its weights and the random state stay as they are.
    It is left in eval mode. Of several processes that all call this only the first of each host gets scores,
    as in lm-eval.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        tasks: Names of tasks, groups or tags.
        include_path: Folder with task YAML files of the user's own; they win over lm-eval's.
        limit: Only the first so many questions of each task.
        batch_size: Questions in one forward pass.
        max_length: Longest prompt in tokens, a longer one loses its beginning; None takes the model's limit.
        bos: Begin every prompt with the tokenizer's `<bos>`; else it begins as the tokenizer does by itself.
        samples: The documents to ask, by their index, of each (sub)task; then `limit` does not count.
        parts: Each (sub)task is asked after the other, in these parts; else all at once.

    Returns:
        `{"lm_eval_version": str, "limit": int | None, "results": {task: {"acc": float, ..., "n": int}}}` with
        every metric that is a number. `acc` comes from filter "none"; another filter's name stays, as in
        "exact_match,strict-match". `n` is the number of questions.

    Raises:
        InputError: A task is unknown, its questions can't be read, or the tokenizer can't add `<bos>`.
    """
    manager = _index_tasks(tasks, include_path)
    if bos:
        _add_bos(tokenizer)

    import lm_eval
    from lightning.pytorch.utilities.seed import isolate_rng
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    with _quiet(), _no_retying(model), isolate_rng():
        # add_bos_token None: as the tokenizer does by itself
        options: dict[str, Any] = {"batch_size": batch_size, "max_length": max_length, "add_bos_token": bos or None}
        kind = HFLM if parts is None else _in_parts(parts)
        harness = kind(pretrained=model, tokenizer=tokenizer, **options)  # pyright: ignore[reportCallIssue]
        with _readable(tasks):
            report = simple_evaluate(
                model=harness,
                tasks=list(tasks),
                task_manager=manager,
                limit=limit if samples is None else None,
                samples=None if samples is None else {task: list(indices) for task, indices in samples.items()},
                bootstrap_iters=BOOTSTRAP_ITERS,
                log_samples=False,
            )
    return {
        "lm_eval_version": lm_eval.__version__,
        "limit": limit,
        "results": {
            # A group that doesn't aggregate has no scores of its own, and no sample_len.
            name: _plain_metrics(metrics)
            for name, metrics in (report or {}).get("results", {}).items()
            if "sample_len" in metrics
        },
    }


def read_prompts(
    tasks: Sequence[str], include_path: Path | None = None, limit: int | None = None
) -> dict[str, list[list[str]]]:
    """What a model would be asked, by (sub)task and document: each context of a document once, and no answer.

    Examples that a task puts before its questions (few-shot) are left out, since they show answers, of the documents
    under test where a task has no others.

    Args:
        tasks: Names of tasks, groups or tags.
        include_path: As in `run_tasks`.
        limit: Only the first so many documents of each task.

    Raises:
        InputError: As in `run_tasks`; or a task has no prompts but the texts themselves.
    """
    manager, found = _index_tasks(tasks, include_path), {}
    with _quiet(), _readable(tasks):
        for name, task in manager.load(list(tasks))["tasks"].items():
            if task.OUTPUT_TYPE == "loglikelihood_rolling":
                raise InputError(
                    f"tasks={name}: it has no prompts, and measures how likely its texts are; "
                    "leave it out, or measure the perplexity of a text file with --text.NAME FILE"
                )
            task.set_config("num_fewshot", 0)
            task.set_fewshot_seed(0)
            with contextlib.redirect_stderr(io.StringIO()):  # a bar of progress, of a moment
                task.build_all_requests(limit=limit)
            documents = [
                dict.fromkeys(context for instance in instances if (context := instance.args[0]))
                for _, instances in groupby(task.instances, key=lambda instance: instance.doc_id)
            ]
            found[name] = [list(contexts) for contexts in documents]
    return found


def _in_parts(parts: Parts) -> type[HFLM]:
    """lm-eval's model that answers the requests of one task after the other, each in parts."""
    from lm_eval.models.huggingface import HFLM

    class InParts(HFLM):
        def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            return _answers(super().loglikelihood, requests)

        def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
            return _answers(super().generate_until, requests)

    def _answers(answer: Callable[..., list[Any]], requests: list[Instance]) -> list[Any]:
        answers = []
        for task, asked in groupby(requests, key=lambda instance: instance.task_name):
            # Closed by hand: what the parts changed is put back at once, also where answering breaks.
            with contextlib.closing(parts(str(task), every := list(asked))) as pieces:
                for piece in pieces:
                    answers += answer(piece, disable_tqdm=len(piece) < len(every)) if piece else []
        return answers

    return InParts


def _add_bos(tokenizer: PreTrainedTokenizerBase) -> None:
    """Make the tokenizer begin texts with `<bos>`, which lm-eval can only ask it to do."""
    if _adds_bos(tokenizer):
        return
    tokenizer.add_bos_token = True  # pyright: ignore[reportAttributeAccessIssue]
    if not _adds_bos(tokenizer):
        raise InputError(
            f"tokenizer {tokenizer.name_or_path!r}: it does not put bos_token {tokenizer.bos_token!r} before a text, "
            "which this model needs; put the model's own tokenizer.json and tokenizer_config.json there"
        )


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    return tokenizer("a", add_special_tokens=True)["input_ids"][:1] == [tokenizer.bos_token_id]


def _index_tasks(tasks: Sequence[str], include_path: Path | None) -> TaskManager:
    """lm-eval's index of task files, which holds all of `tasks`."""
    if include_path is not None and not include_path.is_dir():
        raise InputError(f"include_path={include_path}: not a folder; give the one that holds the tasks' YAML files")
    import lm_eval
    from lm_eval.tasks import TaskManager

    with _quiet():
        if include_path is not None:
            manager = TaskManager(include_path=include_path, include_defaults=False)
            # A group may name members among lm-eval's own files; without it their 6-second index is spared.
            if set(tasks) <= set(manager.all_tasks) - set(manager.all_groups):
                return manager
        manager = TaskManager(include_path=include_path)
    known = manager.all_tasks
    if unknown := [name for name in dict.fromkeys(tasks) if name not in manager.task_index]:
        near = [match for name in unknown for match in difflib.get_close_matches(name, known)]
        raise InputError(
            f"tasks={','.join(unknown)}: no such task in lm-eval {lm_eval.__version__}"
            + (f" or {include_path}" if include_path is not None else "")
            + (f" (near: {', '.join(dict.fromkeys(near))})" if near else "")
            + "; correct the name, or give --include_path DIR with the task's YAML file"
        )
    return manager


def _plain_metrics(metrics: Mapping[str, Any]) -> dict[str, float | int]:
    numbers = {
        key.removesuffix(",none"): float(value)
        for key, value in metrics.items()
        if isinstance(value, Real) and key != "sample_len"
    }
    return {**numbers, "n": int(metrics["sample_len"])}


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


@contextlib.contextmanager
def _readable(tasks: Sequence[str]) -> Iterator[None]:
    """Say in one line that a task's questions can't be read."""
    try:
        yield
    except (ConnectionError, FileNotFoundError) as error:  # also datasets.DatasetNotFoundError
        raise InputError(
            f"tasks={','.join(tasks)}: the questions must be readable, but {_one_line(error)}; "
            "fetch them once while online, or give --include_path with tasks that read local files"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep lm-eval's notes off the terminal and its prints off stdout, and let it start no processes."""
    logger = logging.getLogger("lm_eval")
    level, single = logger.level, os.environ.get("DISABLE_MULTIPROC")
    logger.setLevel(logging.ERROR)
    # The bootstrap would otherwise fork one process per core, from a process that holds threads and a GPU.
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        logger.setLevel(level)
        if single is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = single


@contextlib.contextmanager
def _no_retying(model: PreTrainedModel) -> Iterator[None]:
    """Hide `tie_weights`: HFLM calls it, which would put the embedding back in place of a head of its own."""
    model.tie_weights = lambda *args, **kwargs: None
    try:
        yield
    finally:
        del model.tie_weights
