"""Which way of computing a step a run takes, and the steps that were captured so far."""

from __future__ import annotations

import gc
import sys
from collections.abc import Hashable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch.optim import Optimizer

from ptql.engine.graph import GraphedStep, signature
from ptql.engine.step import Step, StepSettings, can_step
from ptql.engine.weights import attach_signed_products
from ptql.errors import InputError

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from ptql.calibration.block_task import BlockTask

EngineName = Literal["auto", "eager", "plain"]
KEPT = 2  # shapes of blocks whose graphs are kept: some models have two kinds, none has more
STEP_HOOKS = (
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_before_zero_grad",
)
"""Hooks of callbacks that look between the parts of a step, which only a plain step has."""


class Engine:
    """Chooses how the steps of a run are computed.

    Args:
        name: `auto`: on a GPU, pieces of a step with fused kernels, compiled and captured as CUDA graphs; what can't
            be captured falls back to `eager`, what needs another order of things to `plain`, and both are said. On
            a CPU, `plain`. `eager`: the same pieces, launched one by one, without torch.compile. `plain`: torch
            operations and Lightning's own order of things; the reference for the others.
    """

    def __init__(self, name: EngineName = "auto") -> None:
        if name not in get_args(EngineName):
            raise InputError(f"engine={name!r}: one of {', '.join(get_args(EngineName))} is needed; leave out for auto")
        self.name: EngineName = name
        self._graphed: dict[Hashable, GraphedStep] = {}
        self._told: set[str] = set()
        self._captures = True

    def kernels(self, device: torch.device) -> bool:
        """Whether a student on this device rounds by fused kernels, and keeps its matrices as they are stored."""
        return self.name == "eager" or (self.name == "auto" and device.type == "cuda")

    @property
    def memories(self) -> int:
        """How many times the memory of a step is held: graphs keep their own, beside that of everything else."""
        return 2 if self.name == "auto" else 1

    def stream_dtype(self, device: torch.device, trainer: Any) -> torch.dtype:
        """In which hidden states lie between blocks: as wide as the products that read them, where these are narrow."""
        narrow = self.kernels(device) and device.type == "cuda" and str(trainer.precision) == "bf16-mixed"
        return torch.bfloat16 if narrow else torch.float32

    def settings(self, trainer: Trainer) -> StepSettings:
        """What `trainer` says of a step."""
        precision = str(trainer.precision)
        return StepSettings(
            half=torch.bfloat16 if precision == "bf16-mixed" else None,
            accumulate=trainer.accumulate_grad_batches,
            clip=trainer.gradient_clip_val or None,
            clip_by="value" if trainer.gradient_clip_algorithm == "value" else "norm",
            processes=trainer.world_size,
            compiled=self.name == "auto" and self._captures,
        )

    def step(self, task: BlockTask, optimizer: Optimizer, trainer: Any) -> Step | None:
        """What computes the steps of a block that begins; None for Lightning's own way."""
        if not self.kernels(task.device):
            return None
        if (reason := _plain_because(optimizer, trainer)) is not None:
            self._tell(trainer, f"engine: plain, as {reason}")
            return None
        settings = self._begun(task, trainer)
        if self.name == "eager" or not self._captures:
            return Step(task, optimizer, settings)
        key = signature(task, optimizer, settings)
        known = self._graphed.get(key)
        if known is not None:
            known.adopt(task, optimizer)
            return known
        while len(self._graphed) >= KEPT:
            self._graphed.pop(next(iter(self._graphed)))
            gc.collect()
        self._graphed[key] = step = GraphedStep(task, optimizer, settings)
        return step

    def rehearsal(self, task: BlockTask, optimizer: Optimizer, trainer: Any) -> Step | None:
        """A step that is like those of the run, uncompiled and by this process alone; None for Lightning's own way."""
        if not self.kernels(task.device) or _plain_because(optimizer, trainer) is not None:
            return None
        return Step(task, optimizer, replace(self._begun(task, trainer), processes=1, compiled=False))

    def _begun(self, task: BlockTask, trainer: Any) -> StepSettings:
        """What `trainer` says of the steps of a block that begins, whose layers of signs are ready for them now."""
        settings = self.settings(trainer)
        attach_signed_products(task, settings.half or torch.float32)
        return settings

    def failed(self, task: BlockTask, optimizer: Optimizer, trainer: Any, reason: str) -> Step:
        """After compiling or capturing failed, before anything was learned of the step in hand: go on without."""
        self._captures = False
        self.forget()
        self._tell(trainer, f"engine: eager, as the step can't be captured ({reason[:200]})")
        return Step(task, optimizer, self.settings(trainer))

    def forget(self) -> None:
        """Let go of all graphs and their memory."""
        self._graphed.clear()
        gc.collect()  # they hold each other

    def _tell(self, trainer: Any, line: str) -> None:
        if trainer.is_global_zero and line not in self._told:
            self._told.add(line)
            print(f"ptql: {line}", file=sys.stderr, flush=True)


def _plain_because(optimizer: Optimizer, trainer: Any) -> str | None:
    if not can_step(optimizer):
        return f"the optimiser {type(optimizer).__name__} needs the host in each step (Adam and AdamW do not)"
    if str(trainer.precision) == "16-mixed":
        return "16-mixed scales its losses on the host (bf16-mixed does not)"
    for callback in trainer.callbacks:
        for hook in STEP_HOOKS:
            own = getattr(callback, hook, None)  # of its class, or its own, as a LambdaCallback's
            if own is not None and own.__module__.split(".")[0] not in ("lightning", "pytorch_lightning"):
                return f"{type(callback).__name__}.{hook} looks inside a step"
    return None
