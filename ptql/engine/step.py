"""One optimiser step of a block in four pieces, none of which waits for the device."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim import Adam, AdamW, Optimizer

from ptql.engine.weights import StepWeights
from ptql.nn.attention_probe import made_by
from ptql.nn.quant_linear import step_products
from ptql.parts.objectives import all_terms, total

if TYPE_CHECKING:
    from ptql.calibration.block_task import BlockTask

Batch = dict[str, Tensor]
PLAIN = {"fused": None, "foreach": None, "capturable": False}
"""How Adam computes unless told otherwise."""


@dataclass(frozen=True)
class StepSettings:
    """What a trainer says of a step.

    Args:
        half: Dtype of matrix products under autocast; None computes in float32.
        accumulate: Batches in a step.
        clip: Largest norm, or largest absolute value, of the gradients; None for any.
        clip_by: Which of the two.
        processes: That average their gradients.
        compiled: Whether the block's forward and backward go through torch.compile.
    """

    half: torch.dtype | None = None
    accumulate: int = 1
    clip: float | None = None
    clip_by: Literal["norm", "value"] = "norm"
    processes: int = 1
    compiled: bool = False


class CaptureError(RuntimeError):
    """A step can't be compiled or captured; nothing was learned of the batch in hand."""


@dataclass(frozen=True)
class Folded:
    """The weights of a step.

    Args:
        made: Those that depend on learnables, with the way back to them.
        leaves: All, as the block is given them; those in `made` collect gradients.
    """

    made: dict[str, Tensor]
    leaves: dict[str, Tensor]


class Step:
    """The pieces of a step: `fold` makes the rounded weights, once; `batch` runs the block forward and backward on a
    batch, up to the gradients of those weights; `gradients` takes these on to the learnables; `update` clips, skips
    the step if a gradient is not finite, and lets the optimiser move.

    Weights are folded and rounded once a step, however many batches it has, and gradients pass back through folding
    and rounding once. The state of a step lies in tensors whose addresses never change.

    Args:
        task: Of the block, on its device.
        optimizer: Adam or AdamW of the task's learnables.
        settings: Of the trainer.
    """

    def __init__(self, task: BlockTask, optimizer: Optimizer, settings: StepSettings) -> None:
        self.task, self.optimizer, self.settings = task, optimizer, settings
        self.device, self.context = task.device, task.context
        self._weights = StepWeights(task, settings.half or torch.float32)
        self._learnables = parameters_of(optimizer)
        self._flat = torch.zeros(sum(p.numel() for p in self._learnables), device=self.device)
        places = self._flat.split([p.numel() for p in self._learnables])
        self._grads = [place.view_as(p) for place, p in zip(places, self._learnables, strict=True)]
        self.epoch_loss = torch.zeros((), device=self.device)
        self.skipped = torch.zeros((), device=self.device)
        self._skip = torch.zeros((), device=self.device)
        self._folded: dict[Hashable, Folded] = {}
        self._sums: list[Tensor] = []
        self._by_weight: dict[Hashable, tuple[Tensor | None, ...]] = {}
        self._terms: dict[Hashable, tuple[Tensor, dict[str, Tensor]]] = {}
        self._batches = 0
        self._shape: Hashable = None
        """Of the batch in hand."""
        self._fold: Hashable = None
        """Which folding the step in hand began with."""
        make_capturable(optimizer, self.captured and self.device.type == "cuda")
        self._state = filled_state(optimizer)
        for parameter, state in zip(self._learnables, self._state, strict=True):
            optimizer.state[parameter] = dict(state)
        self._follow(task)

    def _follow(self, task: BlockTask) -> None:
        """Let the task show what happens here."""
        self._batches = 0
        with torch.no_grad():
            task.epoch_loss = self.epoch_loss.copy_(task.epoch_loss)
            self.skipped.zero_()

    # What a trainer calls

    def micro_batch(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and its terms on a batch, detached; they are overwritten by the next batch of the same shape."""
        self._shape = tuple((name, tuple(tensor.shape)) for name, tensor in batch.items())
        if self._batches == 0:
            # one for each shape of batch: the way back through it is captured together with it
            self._fold = None if self.settings.accumulate > 1 else self._shape
            self._run(("fold", self._fold), self.fold)
        self._batches += 1
        self._run(("batch", self._shape), self.batch, batch)
        return self._terms[self._shape]

    def finish(self) -> None:
        """Move the learnables by what the batches since the last step say."""
        self._batches = 0
        self._run(("gradients", self._fold), self.gradients)
        if self.settings.processes > 1:
            self._share()
        self._run(("update",), self.update)

    captured = False
    """Whether pieces are captured, and run more than once for that."""

    def _share(self) -> None:
        torch.distributed.all_reduce(self._flat)
        for buffer in self.task.balance.buffers():  # as a plain step begins, and as a checkpoint has it for all
            torch.distributed.broadcast(buffer, src=0)

    def take_skipped(self) -> int:
        """How many steps were skipped since this was asked last; waits for the device."""
        count = int(self.skipped)
        self.skipped.zero_()
        return count

    def _run(self, key: Hashable, piece: Callable[..., None], *args: Any) -> None:
        piece(*args)

    # The pieces

    def fold(self) -> None:
        """Bring the learnables back to where they are allowed, and make the weights of this step."""
        self.task.project()
        with torch.enable_grad(), self._in_float32():
            made = self._weights.make()
        self._folded[self._fold] = folded = Folded(
            {name: tensor for name, tensor in made.items() if tensor.requires_grad},
            {n: tensor.detach().requires_grad_() if tensor.requires_grad else tensor for n, tensor in made.items()},
        )
        if self.settings.accumulate > 1:
            if not self._sums:
                self._sums = [torch.zeros_like(folded.leaves[name], dtype=torch.float32) for name in folded.made]
            for tensor in self._sums:
                tensor.zero_()

    def batch(self, batch: Batch) -> None:
        """Forward and backward of the block, to the gradients of the step's weights."""
        folded = self._folded[self._fold]
        with torch.enable_grad(), step_products(self.task.student), self._autocast():
            loss, terms = self._forward(folded.leaves, batch)
            balanced = self.task.balance(loss, terms)
        leaves = [folded.leaves[name] for name in folded.made]
        by_weight = torch.autograd.grad(balanced, leaves, allow_unused=True)
        if self.settings.accumulate > 1:
            for into, grad in zip(self._sums, by_weight, strict=True):
                if grad is not None:
                    into.add_(grad)
        else:
            self._by_weight[self._shape] = by_weight
        loss = loss.detach()
        self._terms[self._shape] = loss, {name: term.detach() for name, term in terms.items()}
        self.epoch_loss.add_(loss)

    def gradients(self) -> None:
        """From the gradients of the weights to those of the learnables: back through rounding and folding, once."""
        share = 1 / (self.settings.accumulate * self.settings.processes)
        by_weight = self._sums if self.settings.accumulate > 1 else self._by_weight[self._shape]
        made = self._folded[self._fold].made.values()
        pairs = [(tensor, grad) for tensor, grad in zip(made, by_weight, strict=True) if grad is not None]
        with self._in_float32():
            found = torch.autograd.grad(
                [tensor for tensor, _ in pairs],
                self._learnables,
                [grad.to(tensor.dtype) for tensor, grad in pairs],
                retain_graph=self.captured,  # pieces are tried before they are captured
                allow_unused=True,
            )
        filled = [
            torch.zeros_like(p) if grad is None else grad for p, grad in zip(self._learnables, found, strict=True)
        ]
        torch.cat([grad.flatten() for grad in filled], out=self._flat)
        if share != 1:
            self._flat.mul_(share)

    def update(self) -> None:
        """One step of the optimiser; it leaves everything as it is if a gradient is not finite."""
        self._skip.copy_(self._flat.isfinite().all().logical_not())
        self.skipped.add_(self._skip)
        for learnable, grad in zip(self._learnables, self._grads, strict=True):
            learnable.grad = grad
        if self.settings.clip is not None:
            if self.settings.clip_by == "norm":
                clip_grad_norm_(self._learnables, self.settings.clip)
            else:
                clip_grad_value_(self._learnables, self.settings.clip)
        self.optimizer.found_inf = self._skip  # type: ignore[attr-defined]  # fused Adam looks at it on the device
        self.optimizer.step()
        for learnable in self._learnables:
            learnable.grad = None

    def _forward(self, weights: dict[str, Tensor], batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        made = made_by(self.task.student, batch["input"].float(), self.context, weights, self.task.probe)
        terms = all_terms(self.task.objective, {**batch, **made})
        return total(terms), terms

    def _in_float32(self) -> Any:
        """Without the autocast in which a trainer may call: what is folded and rounded is computed in float32."""
        return torch.autocast(self.device.type, enabled=False)

    def _autocast(self) -> Any:
        half = self.settings.half
        # a graph must not read what autocast cached outside of it
        return nullcontext() if half is None else torch.autocast(self.device.type, half, cache_enabled=False)


def make_capturable(optimizer: Optimizer, captured: bool) -> None:
    """One kernel a step that needs no answer from the device."""
    for group in optimizer.param_groups:
        group.update(fused=True, foreach=False, capturable=captured)


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def filled_state(optimizer: Optimizer) -> list[dict[str, Tensor]]:
    """Adam's state by parameter, on its device; zeros where it has not begun."""
    states = []
    for parameter in parameters_of(optimizer):
        found = optimizer.state.get(parameter) or {}
        step = torch.as_tensor(found.get("step", 0.0), dtype=torch.float32).to(parameter.device)
        moments = {name: found.get(name, torch.zeros_like(parameter)) for name in ("exp_avg", "exp_avg_sq")}
        states.append({"step": step, **moments})
    return states


def plain_groups(groups: list[dict[str, Any]]) -> None:
    """Undo `make_capturable`."""
    for group in groups:
        group.update({name: value for name, value in PLAIN.items() if name in group})


def can_step(optimizer: Optimizer) -> bool:
    """Whether the optimiser can move, or stay, without the host knowing which."""
    groups = optimizer.param_groups
    return type(optimizer) in (Adam, AdamW) and not any(g["amsgrad"] or g["differentiable"] for g in groups)


@contextmanager
def undone(tensors: list[Tensor]) -> Iterator[None]:
    """Whatever happens to these tensors while it is open, they are as before afterwards."""
    kept = [tensor.detach().clone() for tensor in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, old in zip(tensors, kept, strict=True):
                tensor.data.copy_(old)  # as no change to autograd, which may have kept the tensor for its way back
