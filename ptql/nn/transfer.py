"""Batches on their way between the place where hidden states lie and the device that works on them.

One batch is on its way while the device works on another. What lies on the device already is only sliced.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from types import TracebackType

import torch
from torch import Tensor


def batches_on(
    device: torch.device, tensors: dict[str, Tensor], batch_size: int, dtype: torch.dtype | None, first: int = 0
) -> Iterator[dict[str, Tensor]]:
    """Slices of all tensors [samples, ...] in order from batch `first`, on `device`, in `dtype` (None: their own)."""
    samples = len(next(iter(tensors.values())))
    starts = range(first * batch_size, samples, batch_size)
    if all(within_reach(tensor, device) for tensor in tensors.values()):
        for start in starts:
            yield {
                name: tensor[start : start + batch_size].to(dtype or tensor.dtype) for name, tensor in tensors.items()
            }
    else:
        yield from _fetched(device, tensors, min(batch_size, samples), dtype, starts)


def within_reach(tensor: Tensor, device: torch.device) -> bool:
    """Whether work on `device` can use this tensor as it lies."""
    return tensor.device.type == device.type


class Lane:
    """A queue of copies beside the device's own queue of work. On the CPU all is done at once, in order."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._cuda = device, device.type == "cuda"
        if self._cuda:
            self._stream = torch.cuda.Stream(device)
            self._work, self._copies = torch.cuda.Event(), torch.cuda.Event()

    def mark_work(self) -> None:
        """Copies from now on wait for the work that is queued by now."""
        if self._cuda:
            self._work.record(torch.cuda.current_stream(self._device))

    def copy(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Queue copies, (to, from)."""
        with torch.cuda.stream(self._stream) if self._cuda else nullcontext():
            if self._cuda:
                self._stream.wait_event(self._work)
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
            if self._cuda:
                self._copies.record(self._stream)

    def hold_work(self) -> None:
        """Work from now on waits for the copies that are queued by now."""
        if self._cuda:
            torch.cuda.current_stream(self._device).wait_event(self._copies)

    def wait(self) -> None:
        """Return when the copies are done."""
        if self._cuda:
            self._copies.synchronize()


class Fetcher:
    """One batch on its way to a device; `fetch` may run in another thread than `take`, but not beside it.

    A batch is read into `staging` unless it can be copied from where it lies (pinned memory), copied into `landing` on
    the device, and taken from there into tensors that belong to who asked: nothing that is still in use is overwritten.
    """

    def __init__(
        self, device: torch.device, tensors: dict[str, Tensor], batch_size: int, dtype: torch.dtype | None
    ) -> None:
        self._tensors, self._batch_size, self._dtype = tensors, batch_size, dtype
        shapes = {name: (batch_size, *tensor.shape[1:]) for name, tensor in tensors.items()}
        self._landing = {n: torch.empty(shapes[n], dtype=t.dtype, device=device) for n, t in tensors.items()}
        self._staging = {
            name: torch.empty(shapes[name], dtype=tensor.dtype, pin_memory=device.type == "cuda")
            for name, tensor in tensors.items()
            if not tensor.is_pinned()
        }
        self._lane = Lane(device)
        self._lane.mark_work()  # earlier work may still use the memory that `landing` was given
        self._count = 0

    def fetch(self, start: int) -> None:
        """Send the batch that begins with sample `start` on its way."""
        self._lane.wait()  # the batch before has left `staging`
        parts = {name: tensor[start : start + self._batch_size] for name, tensor in self._tensors.items()}
        self._count = len(next(iter(parts.values())))
        for name, staging in self._staging.items():
            parts[name] = staging[: self._count].copy_(parts[name])
        self._lane.copy((self._landing[name][: self._count], part) for name, part in parts.items())

    def take(self) -> dict[str, Tensor]:
        """The batch that was fetched; the next one may be fetched then."""
        self._lane.hold_work()
        taken = {name: t[: self._count].to(self._dtype or t.dtype, copy=True) for name, t in self._landing.items()}
        self._lane.mark_work()
        return taken

    def close(self) -> None:
        """Whoever gets the memory of `landing` waits for a copy into it."""
        self._lane.hold_work()


def _fetched(
    device: torch.device, tensors: dict[str, Tensor], batch_size: int, dtype: torch.dtype | None, starts: range
) -> Iterator[dict[str, Tensor]]:
    fetcher = Fetcher(device, tensors, batch_size, dtype)
    try:
        with ThreadPoolExecutor(1, "ptql-fetch") as reader:  # its end waits for what is being fetched
            coming = [reader.submit(fetcher.fetch, start) for start in starts[:1]]
            for start in starts:
                coming.pop().result()
                batch = fetcher.take()
                if start != starts[-1]:
                    coming.append(reader.submit(fetcher.fetch, start + batch_size))
                yield batch
    finally:
        fetcher.close()


class Writer:
    """Puts batches that a device has made into `out` [samples, ...], in its dtype, while the device works on.

    A batch is copied from the device when the batch before has arrived, so that at most two wait there. All have
    arrived at the end of the `with`.
    """

    def __init__(self, out: Tensor, device: torch.device) -> None:
        self._out, self._direct = out, within_reach(out, device)
        self._cuda, self._pinned = device.type == "cuda", out.is_pinned()
        self._staging: Tensor | None = None
        self._lane = Lane(device)
        self._going: Future[None] | None = None
        self._writer = None if self._direct else ThreadPoolExecutor(1, "ptql-write")

    def put(self, start: int, batch: Tensor) -> None:
        """Put a batch at sample `start`."""
        target = self._out[start : start + len(batch)]
        if self._writer is None:
            target.copy_(batch)
            return
        batch = batch.to(self._out.dtype)
        self._arrived()
        if self._staging is None and not self._pinned:  # the first batch is the largest
            self._staging = torch.empty(batch.shape, dtype=batch.dtype, pin_memory=self._cuda)
        self._lane.mark_work()
        self._going = self._writer.submit(self._send, target, batch)

    def _send(self, target: Tensor, batch: Tensor) -> None:
        """In a thread, which holds `batch` until it was copied."""
        stop = target if self._staging is None else self._staging[: len(batch)]
        self._lane.copy([(stop, batch)])
        self._lane.wait()
        if stop is not target:
            target.copy_(stop)

    def _arrived(self) -> None:
        if self._going is not None:
            self._going.result()
            self._going = None

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.shutdown(wait=True)
            if kind is None:
                self._arrived()
