"""Tiny runs to adapt, and adaptation by hand: one loop in plain torch, with none of the code that it is compared to."""

from __future__ import annotations

import copy
import hashlib
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from ptql.callbacks import BlockCallback
from torch import Tensor
from transformers import PretrainedConfig

import ptql
from ptql.calibration.block_task import BlockTask
from ptql.calibration.tokens import consecutive_windows, load_tokenizer, tokenize
from ptql.checkpoint import Checkpoint
from ptql.evaluation.recorded_run import RecordedRun
from ptql.nn.student import call_block, run_block
from ptql.parts.inputs import InputRange
from ptql.recipe import UNQUANTISED, ActivationScheme
from tests.words import save_source, save_text

LENGTH, WINDOWS = 16, 4
BATCH = 4  # windows at a time where nothing is learned
SMALL: dict[str, Any] = {"data.length": LENGTH, "data.samples": 3, "data.batch_size": 2}
SMALL |= {"trainer.max_epochs": 2, "trainer.accelerator": "cpu", "trainer.logger": False}


def fitted(folder: Path, config: PretrainedConfig | None = None, method: str = "lrquant", settings: Any = None) -> Path:
    """A finished run of a tiny model, W4A4, and its source beside it."""
    source = save_source(folder / "source", config)
    text = save_text(folder / "words.txt")
    ptql.quantize(source, data=text, out=folder / "RUN", method=method, settings={**SMALL, **(settings or {})})
    return folder / "RUN"


def texts(folder: Path, *names: str) -> dict[str, Path]:
    """Texts of other words each, a little longer than what is measured of them."""
    return {
        name: save_text(folder / f"{name}.txt", LENGTH * WINDOWS + 7, seed)
        for seed, name in enumerate(sorted(names), start=1)
    }


def evaluated(run: Path, text: Any, *callbacks: BlockCallback, **options: Any) -> dict[str, Any]:
    """What was found, without the seconds that it took."""
    given = {"length": LENGTH, "batch_size": BATCH, "accelerator": "cpu", "callbacks": callbacks, **options}
    found = ptql.evaluate(run, text=text, **given)
    for details in (found["ppl_details"], *(tta["details"] for tta in found.get("tta", {}).values())):
        for detail in details.values():
            del detail["seconds"]
    return found


def snapshot(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.rglob("*")
        if path.is_file()
    }


def windows_of(run: Path, text: Path) -> Tensor:
    tokenizer = load_tokenizer(run / "model")
    return consecutive_windows(tokenize(tokenizer, text.read_text()), LENGTH)


class ByHand:
    """The slow reference: all blocks of both models, and the last ones learning in a plain loop.

    Args:
        run: A finished one.
        text: Under test.
        blocks: How many of the last blocks learn.
        lr: Of scales and shifts.
        weight_lr: Of clipping.
        epochs: Over the batches.
        batch: Windows of a step.
        both: Compare with the teacher on the quantised stream as well.
        rlq: As the original's code.
    """

    def __init__(
        self,
        run: Path,
        text: Path,
        blocks: int = 1,
        lr: float = 1e-3,
        weight_lr: float = 1e-2,
        epochs: int = 5,
        batch: int = 1,
        both: bool = False,
        rlq: bool = False,
    ) -> None:
        self.lr, self.weight_lr, self.epochs, self.batch, self.both, self.rlq = lr, weight_lr, epochs, batch, both, rlq
        self.ids = windows_of(run, text)
        self.recorded = RecordedRun.open(run)
        self.source, packed = self.recorded.source, Checkpoint(run / "model")
        self.shell = self.source.shell()
        self.fp, self.contexts = self.shell.embed(self.ids[:1])
        self.fp = self.embeddings = torch.cat([self.shell.embed(ids)[0] for ids in self.ids.split(BATCH)])
        self.quantised = self.fp
        self.learning = range(self.source.num_blocks)[-blocks:]
        for index in range(self.learning[0]):
            self.fp = run_block(self.source.block(index), self.fp, self.contexts[index], BATCH)
            self.quantised = run_block(packed.block(index), self.quantised, self.contexts[index], BATCH)
        self.tasks = [self._task(index) for index in self.learning]
        self.teachers = [self.source.block(index) for index in self.learning]
        self.optimizers = [self._optimizer(task) for task in self.tasks]

    def _task(self, index: int) -> BlockTask:
        model, source = self.recorded.model, self.source
        block = source.block(index)
        ones = {name: torch.ones(block.get_submodule(name).in_features) for name in source.layout.names}
        ranges = {name: InputRange(-one, one, 0 * one, one) for name, one in ones.items()}
        rounded = ActivationScheme(UNQUANTISED) if self.rlq else None
        student = model.student(block, source, rounded)
        task = model.block_task(index, student, source, ranges, self.contexts[index])
        record = self.recorded.ledger.read(index)
        assert record is not None
        with torch.no_grad():
            for name, parameter in task.named_parameters():
                if parameter.requires_grad and self.rlq:
                    anew = {"scale": 1.0, "shift": 0.0, "lower": 4.0, "upper": 4.0}
                    parameter.fill_(anew[name.rpartition(".")[2]])
                elif parameter.requires_grad:
                    parameter.copy_(record.learned[name])
        return task

    def _optimizer(self, task: BlockTask) -> torch.optim.Optimizer:
        transforms = {"params": list(task.transforms.parameters()), "lr": self.lr}
        return torch.optim.AdamW(
            [transforms, {"params": list(task.quantizers.parameters()), "lr": self.weight_lr}], weight_decay=0.0
        )

    def _loss(self, output: Tensor, targets: list[Tensor]) -> Tensor:
        """MSE + NLC of each target; in the usual order, as Adam and rounding make much of a gradient's last bit."""
        terms = []
        for target in targets:
            terms.append(F.mse_loss(output, target))
            terms.append(-F.cosine_similarity(output, target, dim=-1, eps=1e-8).mean().abs().log())
        return torch.stack(terms).sum()

    def _step(self, place: int, x: Tensor, targets: list[Tensor]) -> float:
        task, optimizer = self.tasks[place], self.optimizers[place]
        task.project()
        output = call_block(task.student, x, task.context, task.effective_weights())
        loss = self._loss(output, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    @torch.no_grad()
    def _stored_output(self, place: int, x: Tensor) -> Tensor:
        task = self.tasks[place]
        return call_block(task.student, x, task.context, task.decode(task.encode()))

    @torch.no_grad()
    def _targets(self, place: int, fp: Tensor, x: Tensor) -> list[Tensor]:
        inputs = [fp, x] if self.both else [fp]
        context = self.contexts[self.learning[place]]
        return [run_block(self.teachers[place], hidden, context, BATCH) for hidden in inputs]

    def _learn(self, place: int, x: Tensor, targets: list[Tensor]) -> None:
        task = self.tasks[place]
        batches = list(zip(x.split(self.batch), zip(*(t.split(self.batch) for t in targets), strict=True), strict=True))
        start = best = copy.deepcopy(task.learnables())
        lowest = math.inf
        for _ in range(self.epochs):
            loss = sum(self._step(place, inputs, list(wanted)) for inputs, wanted in batches) / len(batches)
            task.project()
            if loss < lowest:
                lowest, best = loss, copy.deepcopy(task.learnables())
        if self.rlq:
            return
        stored = []
        for values in (start, best):
            task.load_learnables(values)
            losses = [self._loss(self._stored_output(place, inputs), list(wanted)) for inputs, wanted in batches]
            stored.append(sum(losses) / len(losses))
        if stored[0] <= stored[1]:
            task.load_learnables(start)

    @torch.no_grad()
    def _losses(self, hidden: Tensor, ids: Tensor) -> list[float]:
        """Of each window."""
        logits = self.shell.logits(hidden, ids).double().log_softmax(-1)
        rows = zip(logits, ids, strict=True)
        return [-sum(row[t, window[t + 1]].item() for t in range(LENGTH - 1)) for row, window in rows]

    def ahead(self, count: int, first: int = 0) -> float:
        """Perplexity of the windows from `first` on, after learning on the first `count`."""
        fp, quantised = self.fp[:count], self.quantised
        for place in range(len(self.tasks)):
            if self.rlq:
                self._learn(place, self.embeddings, self._targets(place, self.embeddings, self.embeddings))
            else:
                targets = self._targets(place, fp, quantised[:count])
                self._learn(place, quantised[:count], targets)
                fp = targets[0]
            quantised = self._stored_output(place, quantised)
        return self._perplexity(self._losses(quantised[first:], self.ids[first:]))

    def online(self) -> float:
        """Perplexity of windows that were measured before each batch of them was learned on."""
        losses = []
        for x, fp, ids in zip(*(all_.split(self.batch) for all_ in (self.quantised, self.fp, self.ids)), strict=True):
            lessons = []
            for place in range(len(self.tasks)):
                targets = self._targets(place, fp, x)
                lessons.append((x, targets))
                x, fp = self._stored_output(place, x), targets[0]
            losses += self._losses(x, ids)
            for place, (inputs, targets) in enumerate(lessons):
                for _ in range(self.epochs):
                    self._step(place, inputs, targets)
                self.tasks[place].project()
        return self._perplexity(losses)

    @staticmethod
    def _perplexity(losses: list[float]) -> float:
        return math.exp(sum(losses) / len(losses) / (LENGTH - 1))
