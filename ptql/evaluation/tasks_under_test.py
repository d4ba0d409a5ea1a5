"""Tasks that were run as usual, for callbacks that run them in another way as well."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ptql.checkpoint import Checkpoint
from ptql.evaluation.prompt_text import PromptText
from ptql.evaluation.recorded_run import RecordedRun
from ptql.evaluation.standing import Standing
from ptql.evaluation.tasks import Parts, read_prompts, run_tasks
from ptql.evaluation.whole import fits, load_whole
from ptql.parts.transforms import Weights
from ptql.shell import Shell


class TasksUnderTest:
    """Tasks of lm-eval, their prompts, and the model that answers them.

    Args:
        names: Of tasks, groups or tags.
        include_path: Folder of further task files.
        limit: Documents of each task; None for all.
        model: That is measured.
        tokenizer: Its tokenizer.
        run: Whose model this is, where a callback asked for it.
        device: Where it runs.
        batch_size: Items, or windows, at a time.
        length: Tokens of a window, and of the longest prompt.
    """

    def __init__(
        self,
        names: Sequence[str],
        include_path: Path | None,
        limit: int | None,
        model: Checkpoint,
        tokenizer: PreTrainedTokenizerBase,
        run: RecordedRun | None,
        device: torch.device,
        batch_size: int,
        length: int,
    ) -> None:
        self.names, self.include_path, self.limit = names, include_path, limit
        self.model, self.tokenizer, self.run = model, tokenizer, run
        self.device, self.batch_size, self.length = device, batch_size, length

    @cached_property
    def texts(self) -> dict[str, PromptText]:
        """The prompts of each task that is none of tasks itself, by name, read from its data set."""
        prompts = read_prompts(self.names, self.include_path, self.limit)
        bos = self.model.family.bos
        return {
            task: PromptText.of(task, documents, self.tokenizer, self.length, bos)
            for task, documents in prompts.items()
        }

    @cached_property
    def shell(self) -> Shell:
        """Embeddings, final norm and head, which quantising leaves alone."""
        return self.model.shell().to(self.device)

    def start(self, windows: torch.Tensor, batch_size: int) -> Standing:
        """Hidden states of windows before block 0."""
        return Standing.at_start(self.shell, windows, self.device, batch_size)

    # The whole model

    @cached_property
    def whole(self) -> PreTrainedModel:
        """The model in memory, all of it."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # what texts left in torch's pool would count as taken
        return load_whole(self.model, self.device)

    @cached_property
    def on_one_device(self) -> bool:
        """Whether it is, so that its blocks can be given other weights: asked before anything is loaded."""
        return fits(self.model, self.device)

    @torch.no_grad()
    def swap(self, weights: Mapping[int, Weights]) -> dict[int, Weights]:
        """Give blocks of the whole model these weights; returns those that they had."""
        former = {}
        for index, new in weights.items():
            own = dict(self.whole.get_submodule(f"{self.model.family.blocks}.{index}").named_parameters())
            assert own.keys() == new.keys()
            former[index] = {name: parameter.detach().clone() for name, parameter in own.items()}
            for name, parameter in own.items():
                parameter.copy_(new[name])
        return former

    def scores(self, samples: Mapping[str, Sequence[int]] | None = None, parts: Parts | None = None) -> dict[str, Any]:
        """As `run_tasks` returns them; of these documents of each task only, and asked in these parts, if given."""
        return run_tasks(
            self.whole,
            self.tokenizer,
            self.names,
            self.include_path,
            self.limit,
            self.batch_size,
            self.length,
            self.model.family.bos,
            samples,
            parts,
        )
