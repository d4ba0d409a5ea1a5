"""The two streams of hidden states that pass through the model during calibration, block by block."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ptql.calibration.memory_budget import Budget, Place
from ptql.calibration.ranks import Ranks
from ptql.calibration.statistics import SiteObserver, observe_inputs
from ptql.calibration.stream_store import StreamStore
from ptql.families import BlockLayout
from ptql.nn.attention_probe import AttentionProbe, made_by, watched_attention
from ptql.nn.static_rounding import watched_sites
from ptql.nn.student import call_block, run_block
from ptql.nn.transfer import Writer, batches_on
from ptql.parts.inputs import InputRange, SiteRange
from ptql.parts.objectives import ATTENTION, AttentionView, Target
from ptql.parts.transforms import Weights
from ptql.shell import Shell

PASS_BYTES = 64 * 2**20  # of float32 hidden states that a pass without gradients takes at a time: a GPU is busy then


class Batches:
    """Slices of prepared tensors in fixed order, as the originals train: sized, no workers, no collation.

    Where the tensors do not lie on `device`, the next batch is on its way there while one is
    used. Lightning keeps `state_dict` in its checkpoints, so that an epoch can go on in its middle.

    Args:
        tensors: All of them [samples, ...].
        batch_size: Samples in a batch; the last may hold fewer.
        device: Where batches are given; by default where the tensors lie.
    """

    def __init__(self, tensors: dict[str, Tensor], batch_size: int, device: torch.device | None = None) -> None:
        self.tensors, self.batch_size = tensors, batch_size
        self.device = device or tensors["input"].device
        self.samples = len(tensors["input"])
        self._given = self._first = 0

    def __len__(self) -> int:
        return -(-self.samples // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        first, self._first = self._first, 0
        batches = batches_on(self.device, self.tensors, self.batch_size, None, first)
        for index, batch in enumerate(batches, start=first):
            self._given = index + 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"given": self._given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._given = state["given"]
        self._first = self._given % len(self)  # a whole epoch given: the next one starts at its beginning


class Streams:
    """Hidden states before the next block, [samples, tokens, hidden], full-precision and quantised.

    Args:
        shell: Embeds the windows; can be let go afterwards.
        windows: Token ids [samples, tokens], of this process.
        batch_size: Samples of a training step. Passes without gradients take more at a time.
        device: Where blocks run.
        ranks: The processes that share the samples.
        dtype: In which hidden states are kept; blocks are given float32.
        budget: Decides where the streams lie: on the device, in host memory, or in files.
        folder: For such files; without one, streams never lie on disk.
        at_a_time: Streams that exist at a time: both, the second target, the quantised block's output, attention.
        work_bytes: What work on a block takes on the GPU, if somebody has measured it.
        probabilities: Of attention that a pass looks at, for each token; passes take fewer samples where these are
            more than the numbers of a hidden state.
    """

    @torch.no_grad()
    def __init__(
        self,
        shell: Shell,
        windows: Tensor,
        batch_size: int,
        device: torch.device,
        ranks: Ranks | None = None,
        dtype: torch.dtype = torch.float32,
        budget: Budget | None = None,
        folder: Path | None = None,
        at_a_time: int = 4,
        work_bytes: int | None = None,
        probabilities: int = 0,
    ) -> None:
        self.batch_size, self.device = batch_size, device
        self.ranks = ranks or Ranks()
        first, contexts = shell.embed(windows[:1])
        shape = (len(windows), *first.shape[1:])
        place = (budget or Budget()).place(device, math.prod(shape) * dtype.itemsize, at_a_time, work_bytes)
        place = "host" if place == "disk" and folder is None else place
        self._store = StreamStore(place, device, folder, self.ranks.rank)
        self.fp = self._store.empty(shape, dtype)
        for start in range(0, len(windows), batch_size):
            self.fp[start : start + batch_size] = shell.embed(windows[start : start + batch_size])[0]
        self.quantised = self._store.empty(shape, dtype).copy_(self.fp)
        self._contexts: list[dict[str, Any]] = move(contexts, device)
        self._block = 0
        self._finite = torch.ones((), dtype=torch.bool, device=device)
        self.targets: dict[str, Tensor] = {}
        batch_bytes = 4 * batch_size * shape[1] * max(shape[2], probabilities)
        self._at_once = max(PASS_BYTES // batch_bytes, 1) * batch_size
        """Samples of a pass without gradients: whole training batches, as many as keep a GPU busy. As many in all
        passes: how many there are is in the last bits of what they give, and a block may be gone through again."""

    @property
    def place(self) -> Place:
        """Where the streams lie."""
        return self._store.place

    @property
    def context(self) -> dict[str, Any]:
        """The keyword arguments of the block in hand: mask, RoPE."""
        return self._contexts[self._block]

    def teach(
        self,
        block: nn.Module,
        layout: BlockLayout,
        targets: tuple[Target, ...],
        attention: AttentionView | None = None,
    ) -> dict[str, InputRange]:
        """Run the full-precision block: keeps the wanted targets, returns its input ranges.

        The fp stream moves on, in place, to the block's output (T1); the quantised one waits for `advance`.
        """
        self.targets = {"fp": self.fp}
        with (
            self._watched(block),
            self._attention_kept(block, layout, attention),
            observe_inputs(block, layout, self.fp.shape[1], self.ranks) as ranges,
        ):
            self._run(block, self.fp, self.fp)
        if "fp_on_quantised" in targets:
            self.targets["fp_on_quantised"] = self._run(block, self.quantised)
        return ranges()

    @contextmanager
    def _watched(self, block: nn.Module) -> Iterator[None]:
        """Note whether all outputs are finite while they are made: nobody has to read the stream again."""

        def note(module: nn.Module, given: tuple[Any, ...], output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            self._finite = self._finite & hidden.isfinite().all()

        self._finite = torch.ones_like(self._finite)
        handle = block.register_forward_hook(note)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def _attention_kept(self, block: nn.Module, layout: BlockLayout, view: AttentionView | None) -> Iterator[None]:
        """While open, what is seen of the block's attention becomes a target [samples, heads or 1, rows, keys]."""
        if view is None:
            yield
            return
        shape = view.shape(layout.attention.heads, self.fp.shape[1])
        self.targets[ATTENTION] = self._store.empty((len(self.fp), *shape), self.fp.dtype)
        with Writer(self.targets[ATTENTION], self.device) as writer, watched_attention(block, layout, view, writer.put):
            yield

    def watch(self, block: nn.Module, layout: BlockLayout, weights: Weights | None = None) -> dict[str, SiteRange]:
        """What all samples of the quantised stream, of all processes, show at the sites of a block that rounds nothing;
        `weights` in place of its own."""
        observer = SiteObserver()
        self.show_sites(block, layout, observer.see, weights)
        return observer.ranges(self.ranks)

    def show_sites(
        self,
        block: nn.Module,
        layout: BlockLayout,
        see: Callable[[str, Tensor], None],
        weights: Weights | None = None,
    ) -> None:
        """Run a block on the quantised stream for what it shows on the way (`watched_sites`)."""
        with watched_sites(block, layout, self.quantised.shape[1], see):
            self.show(block, weights)

    def inputs(self, block: nn.Module, layout: BlockLayout, weights: Weights) -> dict[str, InputRange]:
        """What the linear layers of a block read where it goes through the quantised stream with these `weights`."""
        with observe_inputs(block, layout, self.quantised.shape[1], self.ranks) as ranges:
            self.show(block, weights)
        return ranges()

    def finite(self) -> bool:
        """Whether the full-precision block in every process gave numbers only: no nan, no infinity."""
        return self.ranks.all(bool(self._finite))

    def batches(self) -> Batches:
        """Input and targets of the block in hand."""
        return Batches({"input": self.quantised, **self.targets}, self.batch_size, self.device)

    def output(self, student: nn.Module, weights: Weights) -> Tensor:
        """What the quantised block makes of the quantised stream."""
        return self._run(student, self.quantised, weights=weights)

    @torch.no_grad()
    def compared(
        self, student: nn.Module, weights: Weights, out: Tensor | None, probe: AttentionProbe | None = None
    ) -> Iterator[dict[str, Tensor]]:
        """A training batch's input and targets, and what the quantised block makes of it (`made_by`), float32.

        All outputs go to `out`, too, where that is given: they are read once, while they are made.
        """
        tensors = {"input": self.quantised, **self.targets}
        batches = batches_on(self.device, tensors, self._at_once, torch.float32)
        with nullcontext() if out is None else Writer(out, self.device) as writer:
            for index, batch in enumerate(batches):
                made = made_by(student, batch["input"], self.context, weights, probe)
                if writer is not None:
                    writer.put(index * self._at_once, made["output"])
                parts = {name: tensor.split(self.batch_size) for name, tensor in {**batch, **made}.items()}
                yield from (dict(zip(parts, part, strict=True)) for part in zip(*parts.values(), strict=True))

    @torch.no_grad()
    def show(self, block: nn.Module, weights: Weights | None = None) -> None:
        """Run a block on the quantised stream for what hooks in it see; its output is let go."""
        for batch in batches_on(self.device, {"input": self.quantised}, self._at_once, torch.float32):
            call_block(block, batch["input"], self.context, weights)

    def empty(self) -> Tensor:
        """Room for a stream."""
        return self._store.empty(tuple(self.quantised.shape), self.quantised.dtype)

    def advance(self, output: Tensor) -> None:
        """Make the quantised block's output the next block's input."""
        self.quantised = output
        self.targets = {}
        self._block += 1

    def close(self) -> None:
        """Let go of all hidden states."""
        self.targets = {}
        del self.fp, self.quantised
        self._store.remove_left_over()

    def _run(
        self, block: nn.Module, hidden: Tensor, out: Tensor | None = None, weights: Weights | None = None
    ) -> Tensor:
        out = self._store.empty(tuple(hidden.shape), hidden.dtype) if out is None else out
        return run_block(block, hidden, self.context, self._at_once, weights, out)


def resting_place(stream_bytes: int, device: torch.device, streams: int = 2) -> torch.device:
    """Where an evaluation's streams of this size lie: on the device if they fit, else in host memory."""
    place = Budget().place(device, stream_bytes, streams)
    return device if place == "device" else torch.device("cpu")


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
