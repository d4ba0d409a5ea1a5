"""A step as CUDA graphs: captured for the first block, replayed for every block of the same shape."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Mapping
from functools import partial
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PretrainedConfig

from ptql.engine.step import (
    Batch,
    CaptureError,
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
CHANGING = ("params", "lr", "initial_lr", "fused", "foreach", "capturable")
"""Of an optimiser's groups: what may change while a graph stays good, or is set by a step itself."""


class GraphedStep(Step):
    """A `Step` whose pieces are replayed; the host only launches them.

    The tensors of the first task are those that the graphs read and write. Another block's task is adopted: its
    values are copied there, and its parameters become views of that memory.
    """

    captured = True

    def __init__(self, task: BlockTask, optimizer: Optimizer, settings: StepSettings) -> None:
        super().__init__(task, optimizer, settings)
        self._cuda = CudaGraphs(self.device)
        self._replay: dict[Hashable, Callable[[], None]] = {}
        self._inputs: dict[Hashable, Batch] = {}
        self._ready: set[Hashable] = set()
        self._trying = False
        self._memory = list(_tensors(task))
        self.context = _cloned(task.context)  # the task's is that of other blocks, too
        self._theirs = optimizer
        self._rates = [torch.tensor(group["lr"], device=self.device) for group in optimizer.param_groups]
        self._rates_are = [group["lr"] for group in optimizer.param_groups]
        self.optimizer = self._own_optimizer(optimizer)
        self._compiled = torch.compile(super()._forward, dynamic=False) if settings.compiled else super()._forward
        self._follow(task)

    def _own_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """The same, with rates that the device reads: those of the block's own optimiser may change."""
        groups = [{**group, "lr": rate} for group, rate in zip(optimizer.param_groups, self._rates, strict=True)]
        own = type(optimizer)(groups)  # type: ignore[call-arg]
        for parameter, state in zip(self._learnables, self._state, strict=True):
            own.state[parameter] = dict(state)
        return own

    def adopt(self, task: BlockTask, optimizer: Optimizer) -> None:
        """Go on with another block of the same `signature`."""
        with torch.no_grad():
            for own, new in zip(self._memory, _tensors(task), strict=True):
                own.copy_(new)
                new.data = own
            for own, new in zip(_leaves(self.context), _leaves(task.context), strict=True):
                own.copy_(new)
            for parameter, own, new in zip(parameters_of(optimizer), self._state, filled_state(optimizer), strict=True):
                for name, tensor in own.items():
                    tensor.copy_(new[name])
                optimizer.state[parameter] = dict(own)
        make_capturable(optimizer, self.captured and self.device.type == "cuda")
        self._theirs = optimizer
        self._follow(task)

    def micro_batch(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        shape = tuple((name, tuple(tensor.shape)) for name, tensor in batch.items())
        if shape not in self._ready:
            self._rehearse(batch)
            self._ready.add(shape)
        return super().micro_batch(batch)

    def _rehearse(self, batch: Batch) -> None:
        """A step for nothing: its pieces are captured, or fail, here, in all processes alike."""
        batches, failure = self._batches, None
        try:
            with undone(self._changed()):
                self._trying = True
                super().micro_batch(batch)
                self.finish()
        except Exception as error:  # of torch.compile, of the capture, of memory: of any type
            failure = (str(error).strip().splitlines() or [type(error).__name__])[0]
        finally:
            self._trying, self._batches = False, batches
        if self.settings.processes > 1:
            worked = torch.tensor(float(failure is None), device=self.device)
            torch.distributed.all_reduce(worked, torch.distributed.ReduceOp.MIN)
            failure = failure if worked.item() or failure else "another process could not"
        if failure is not None:
            raise CaptureError(failure)

    def finish(self) -> None:
        rates = [group["lr"] for group in self._theirs.param_groups]
        if rates != self._rates_are:
            for tensor, rate in zip(self._rates, rates, strict=True):
                tensor.fill_(rate)
            self._rates_are = rates
        super().finish()

    def _share(self) -> None:
        if not self._trying:
            super()._share()

    def _forward(self, weights: dict[str, Tensor], batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return self._compiled(weights, batch)

    def _changed(self) -> list[Tensor]:
        """All that a step changes and the next one reads."""
        moments = [tensor for state in self._state for tensor in state.values()]
        counts = [self.epoch_loss, self.skipped, self._skip, self._flat, *self._sums]
        # signs are many, and the same in each step
        buffers = [buffer for name, buffer in self.task.named_buffers() if ".signed." not in name]
        return [*self._learnables, *buffers, *moments, *counts]

    def _run(self, key: Hashable, piece: Callable[..., None], *args: Any) -> None:
        if args:
            args = (self._input(key, args[0]),)
        if key not in self._replay:
            with undone(self._changed()):
                self._cuda.warm_up(partial(piece, *args))
            self._replay[key] = self._cuda.capture(partial(piece, *args))
        self._replay[key]()

    def _input(self, key: Hashable, batch: Batch) -> Batch:
        """The batch, in the memory from which the graph reads it."""
        if key not in self._inputs:
            self._inputs[key] = {name: torch.empty_like(tensor) for name, tensor in batch.items()}
        for name, tensor in self._inputs[key].items():
            tensor.copy_(batch[name], non_blocking=True)
        return self._inputs[key]


class CudaGraphs:
    """Captures functions as CUDA graphs that share their memory and are replayed in the order of their capture."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def warm_up(self, function: Callable[[], None]) -> None:
        """Run it as it will be captured: it compiles, and asks for all that is asked for once."""
        torch.cuda.synchronize(self._device)
        with torch.cuda.stream(self._stream), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*capturable")  # the optimiser would rather be captured at once
            for _ in range(WARM_UP):
                function()
        torch.cuda.synchronize(self._device)

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        """What replays it."""
        graph = torch.cuda.CUDAGraph()
        _forget_workspaces()
        # other threads read the next block and batches meanwhile: their calls are no business of this capture
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            function()
        _forget_workspaces()
        return graph.replay


def _forget_workspaces() -> None:
    """Let cuBLAS ask for its scratch memory anew: what a graph uses must be the graph's own, as Lightning lets go of
    all other at the end of each fit."""
    torch._C._cuda_clearCublasWorkspaces()


def signature(task: BlockTask, optimizer: Optimizer, settings: StepSettings) -> Hashable:
    """Equal for blocks whose steps are the same computation on other numbers."""
    tensors = tuple((tuple(t.shape), t.dtype, t.requires_grad) for t in _tensors(task))
    parts = {part: getattr(task, part) for part in ("student", "transforms", "quantizers", "balance")}
    modules = tuple(
        (f"{part}.{name}", type(module), _fixed(vars(module)))
        for part, whole in parts.items()
        for name, module in whole.named_modules()
    )
    context = tuple(
        (name, tuple((tuple(t.shape), t.dtype) for t in _leaves(value)) or _fixed(value))
        for name, value in sorted(task.context.items())
    )
    groups = tuple(
        (tuple(tuple(p.shape) for p in group["params"]), _fixed({k: v for k, v in group.items() if k not in CHANGING}))
        for group in optimizer.param_groups
    )
    return tensors, modules, context, _fixed(vars(task.objective)), type(optimizer), groups, settings


def _fixed(value: Any, inside: tuple[int, ...] = ()) -> Hashable:
    """What is fixed in a value when a graph is captured: numbers, strings, switches, functions, wherever they are.

    Tensors and modules are looked at elsewhere. The model's configuration is the same for all of its blocks. Things
    whose insides nobody can see are only like themselves.
    """
    if isinstance(value, (Tensor, nn.Module, PretrainedConfig)) or id(value) in inside:
        return None
    if isinstance(value, (bool, int, float, str, bytes, type(None), torch.dtype, torch.device, type)):
        return value
    inside = (*inside, id(value))
    if isinstance(value, (tuple, list)):
        return tuple(_fixed(item, inside) for item in value)
    if isinstance(value, Mapping):  # a hook's key is a number that no other hook of the process has
        kept = [(k, v) for k, v in value.items() if k not in NOT_SHAPE]
        return tuple((None if isinstance(k, int) else str(k), _fixed(v, inside)) for k, v in kept)
    if isinstance(value, (set, frozenset)):
        return frozenset(_fixed(item, inside) for item in value)
    if isinstance(value, MethodType):
        return id(value.__func__)
    if hasattr(value, "__dict__") and not isinstance(value, FunctionType):
        return type(value), _fixed(vars(value), inside)
    return id(value)


def _cloned(value: Any) -> Any:
    """The same containers with copies of the tensors inside."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _cloned(item) for key, item in value.items()}
    return type(value)(map(_cloned, value)) if isinstance(value, (tuple, list)) else value


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
