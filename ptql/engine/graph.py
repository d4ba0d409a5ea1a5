"""A step as CUDA graphs: captured for the first block, replayed for every block of the same shape."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ptql.engine.step import (
    Batch,
    Step,
    StepSettings,
    filled_state,
    make_capturable,
    parameters_of,
    undone,
)

if TYPE_CHECKING:
    from ptql.calibration.block_task import BlockTask

WARM_UP = 2  # runs of a piece before it is captured: compiling, cuBLAS workspaces, the optimiser's moments
NOT_SHAPE = ("layer_idx", "training")  # attributes of modules that say which block it is, not how it computes


class GraphedStep(Step):
    """A `Step` whose pieces are replayed; the host only launches them.

    The tensors of the first task are those that the graphs read and write. Another block's task is adopted: its
    values are copied there, and its parameters become views of that memory.
    """

    captured = True

    def __init__(self, task: BlockTask, optimizer: Optimizer, settings: StepSettings) -> None:
        super().__init__(task, optimizer, settings)
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._inputs: dict[Hashable, Batch] = {}
        self._ready = False
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(self.device)
        self._memory = list(_tensors(task))
        self._follow(task)

    def adopt(self, task: BlockTask, optimizer: Optimizer) -> None:
        """Go on with another block of the same `signature`."""
        with torch.no_grad():
            for own, new in zip(self._memory, _tensors(task), strict=True):
                own.copy_(new)
                new.data = own
            for own, new in zip(_leaves(self.task.context), _leaves(task.context), strict=True):
                if own is not new:
                    own.copy_(new)
            for parameter, own, new in zip(parameters_of(optimizer), self._state, filled_state(optimizer), strict=True):
                for name, tensor in own.items():
                    tensor.copy_(new[name])
                optimizer.state[parameter] = dict(own)
        make_capturable(optimizer, self.captured)
        self._follow(task)

    def micro_batch(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        if not self._ready:
            with undone(self._changed()):  # a step for nothing: every piece is captured, or fails, here
                super().micro_batch(batch)
                self.finish()
            self._ready = True
        return super().micro_batch(batch)

    @property
    def can_fail(self) -> bool:  # type: ignore[override]
        return not self._ready

    def _changed(self) -> list[Tensor]:
        """All that a step changes and the next one reads."""
        moments = [tensor for state in self._state for tensor in state.values()]
        return [*self._learnables, *moments, self.epoch_loss, self.skipped, self._skip, self._flat, *self._sums]

    def _run(self, key: Hashable, piece: Callable[..., None], *args: Any) -> None:
        if args:
            args = (self._input(key, args[0]),)
        if key not in self._graphs:
            self._capture(key, piece, *args)
        self._graphs[key].replay()

    def _input(self, key: Hashable, batch: Batch) -> Batch:
        """The batch, in the memory from which the graph reads it."""
        if key not in self._inputs:
            self._inputs[key] = {name: torch.empty_like(tensor) for name, tensor in batch.items()}
        for name, tensor in self._inputs[key].items():
            tensor.copy_(batch[name], non_blocking=True)
        return self._inputs[key]

    def _capture(self, key: Hashable, piece: Callable[..., None], *args: Any) -> None:
        torch.cuda.synchronize(self.device)
        with torch.cuda.stream(self._stream), undone(self._changed()), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*capturable")  # the optimiser would rather be captured at once
            for _ in range(WARM_UP):
                piece(*args)
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        _forget_workspaces()
        torch.cuda.empty_cache()  # what trying took was this stream's own, and nobody else can use it
        # other threads read the next block and batches meanwhile: their calls are no business of this capture
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            piece(*args)
        _forget_workspaces()
        self._graphs[key] = graph


def _forget_workspaces() -> None:
    """Let cuBLAS ask for its scratch memory anew: what a graph uses must be the graph's own, as Lightning lets go of
    all other at the end of each fit."""
    torch._C._cuda_clearCublasWorkspaces()


def signature(task: BlockTask, optimizer: Optimizer, settings: StepSettings) -> Hashable:
    """Equal for blocks whose steps are the same computation on other numbers."""
    tensors = tuple((tuple(t.shape), t.dtype, t.requires_grad) for t in _tensors(task))
    modules = tuple((name, type(module), _plain(vars(module))) for name, module in task.named_modules())
    context = tuple(
        (name, tuple((tuple(t.shape), t.dtype) for t in _leaves(value)) or _plain({name: value}))
        for name, value in sorted(task.context.items())
    )
    groups = tuple((tuple(tuple(p.shape) for p in group["params"]), _plain(group)) for group in optimizer.param_groups)
    return tensors, modules[1:], context, type(optimizer), groups, settings


def _plain(values: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Numbers, strings and switches among the values: what is fixed when a graph is captured."""
    flags = ("fused", "foreach", "capturable")  # set when a step begins
    return tuple(
        (key, value)
        for key, value in sorted(values.items())
        if key not in NOT_SHAPE and key not in flags and _is_plain(value)
    )


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, frozenset)):
        return all(map(_is_plain, value))
    return isinstance(value, (bool, int, float, str, type(None)))


def _tensors(task: nn.Module) -> list[Tensor]:
    return [*task.parameters(), *task.buffers()]


def _leaves(value: Any) -> list[Tensor]:
    """Tensors inside (nested) containers, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [tensor for key in sorted(value) for tensor in _leaves(value[key])]
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in _leaves(item)]
    return []
