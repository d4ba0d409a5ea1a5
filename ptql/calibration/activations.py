"""The two streams of hidden states that pass through the model during calibration, block by block."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ptql.calibration.ranks import Ranks
from ptql.calibration.statistics import observe_inputs
from ptql.families import BlockLayout
from ptql.nn.student import run_block
from ptql.parts.objectives import Target
from ptql.parts.transforms import InputRange, Weights
from ptql.shell import Shell

SHARE_OF_GPU = 0.5  # streams stay on the GPU while four of them (two, and two targets) fit into this much of it


class Batches:
    """Slices of prepared tensors in fixed order, as the originals train: sized, no workers, no collation.

    Lightning keeps `state_dict` in its checkpoints, so that an epoch can go on in its middle.
    """

    def __init__(self, tensors: dict[str, Tensor], batch_size: int) -> None:
        self.tensors, self.batch_size = tensors, batch_size
        self.samples = len(tensors["input"])
        self._given = self._first = 0

    def __len__(self) -> int:
        return -(-self.samples // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        first, self._first = self._first, 0
        for index in range(first, len(self)):
            self._given, start = index + 1, index * self.batch_size
            yield {name: tensor[start : start + self.batch_size] for name, tensor in self.tensors.items()}

    def state_dict(self) -> dict[str, int]:
        return {"given": self._given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._given = state["given"]
        self._first = self._given % len(self)  # a whole epoch given: the next one starts at its beginning


class Streams:
    """Hidden states before the next block, [samples, tokens, hidden] float32, full-precision and quantised.

    Args:
        shell: Embeds the windows; can be let go afterwards.
        windows: Token ids [samples, tokens], of this process.
        batch_size: Samples that go through a block at a time.
        device: Where blocks run. The streams lie there too if they fit, else in host memory.
        ranks: The processes that share the samples.
    """

    @torch.no_grad()
    def __init__(
        self, shell: Shell, windows: Tensor, batch_size: int, device: torch.device, ranks: Ranks | None = None
    ) -> None:
        self.batch_size = batch_size
        self.ranks = ranks or Ranks()
        first, contexts = shell.embed(windows[:1])
        home = resting_place(first.numel() * 4 * len(windows), device)
        self.fp = torch.empty((len(windows), *first.shape[1:]), dtype=torch.float32, device=home)
        for start in range(0, len(windows), batch_size):
            self.fp[start : start + batch_size] = shell.embed(windows[start : start + batch_size])[0]
        self.quantised = self.fp.clone()
        self._contexts: list[dict[str, Any]] = move(contexts, device)
        self._block = 0
        self.targets: dict[Target, Tensor] = {}

    @property
    def context(self) -> dict[str, Any]:
        """The keyword arguments of the block in hand: mask, RoPE."""
        return self._contexts[self._block]

    def teach(self, block: nn.Module, layout: BlockLayout, targets: tuple[Target, ...]) -> dict[str, InputRange]:
        """Run the full-precision block: keeps the wanted targets, returns its input ranges.

        The fp stream moves on to the block's output (T1); the quantised one waits for `advance`.
        """
        with observe_inputs(block, layout, self.fp.shape[1], self.ranks) as ranges:
            self.fp = run_block(block, self.fp, self.context, self.batch_size)
        self.targets = {"fp": self.fp}
        if "fp_on_quantised" in targets:
            self.targets["fp_on_quantised"] = run_block(block, self.quantised, self.context, self.batch_size)
        return ranges()

    def finite(self) -> bool:
        """Whether the full-precision stream of every process holds numbers only: no nan, no infinity."""
        return self.ranks.all(bool(self.fp.isfinite().all()))

    def batches(self) -> Batches:
        """Input and targets of the block in hand."""
        return Batches({"input": self.quantised, **self.targets}, self.batch_size)

    def output(self, student: nn.Module, weights: Weights) -> Tensor:
        """What the quantised block makes of the quantised stream."""
        return run_block(student, self.quantised, self.context, self.batch_size, weights)

    def advance(self, output: Tensor) -> None:
        """Make the quantised block's output the next block's input."""
        self.quantised = output
        self.targets = {}
        self._block += 1


def resting_place(stream_bytes: int, device: torch.device) -> torch.device:
    """Where streams of this size lie: on the GPU that runs the blocks if they fit, else in host memory."""
    if device.type != "cuda":
        return device
    free, _ = torch.cuda.mem_get_info(device)
    return device if 4 * stream_bytes < SHARE_OF_GPU * free else torch.device("cpu")


def move(value: Any, device: torch.device, moved: dict[int, Tensor] | None = None) -> Any:
    """Tensors inside (nested) containers, on `device`; one that is there several times is moved once."""
    moved = {} if moved is None else moved  # by the id of what was moved, all of which `value` keeps alive
    if isinstance(value, Tensor):
        if id(value) not in moved:
            moved[id(value)] = value.to(device)
        return moved[id(value)]
    if isinstance(value, dict):
        return {key: move(item, device, moved) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(move(item, device, moved) for item in value)
    return value
