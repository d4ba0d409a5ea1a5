"""Two bars at the bottom of a terminal: blocks of the model, steps of the block in hand."""

from __future__ import annotations

import atexit
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.segment import Segment
from rich.table import Column

NOTE = 30  # characters that the note has at least, so that the bars keep their length


def on_terminal() -> bool:
    """Whether standard error is a terminal on which lines can be drawn again."""
    return sys.stderr.isatty() and Console(stderr=True).is_interactive


@dataclass
class Narrow:
    """What it holds, a few columns narrower than the terminal: else the ^C that it echoes begins a new line."""

    inner: RenderableType

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        yield from console.render(self.inner, options.update(width=max(options.max_width - 3, 1)))


class NarrowProgress(Progress):
    """Bars that leave the terminal's last columns free."""

    def get_renderable(self) -> RenderableType:
        return Narrow(super().get_renderable())


class Bars:
    """The two bars, drawn on standard error until `close`.

    Args:
        blocks: Of the model; None for the bar of steps alone.
        rate: How often they are drawn again, per second.
    """

    def __init__(self, blocks: int | None, rate: float) -> None:
        self._total = blocks or 0
        note = Column(min_width=NOTE, no_wrap=True)
        self._progress = NarrowProgress(
            TextColumn("{task.description}", table_column=Column(no_wrap=True)),
            BarColumn(None, table_column=Column(ratio=1)),
            MofNCompleteColumn(table_column=Column(justify="right", no_wrap=True)),
            TextColumn(" {task.fields[note]}", markup=False, table_column=note),
            console=Console(stderr=True),
            expand=True,
            refresh_per_second=rate,
            redirect_stdout=sys.stdout.isatty(),  # else what is printed would go to the terminal, not to its file
        )
        self._blocks = self._progress.add_task("blocks", total=blocks, note="", visible=blocks is not None)
        self._steps = self._progress.add_task("steps", total=None, note="")
        self._progress.start()
        atexit.register(self.close)  # a cursor that was hidden must come back, however the run ends

    def blocks(self, done: int) -> None:
        """So many blocks are done; the steps begin anew, if there are any left."""
        self._progress.update(self._blocks, completed=done)
        self._progress.reset(self._steps, note="", visible=done < self._total)

    def steps(self, done: int, total: int) -> None:
        """So many steps of the block in hand are done."""
        self._progress.update(self._steps, completed=done, total=total)

    def notes(self, blocks: str | None = None, steps: str | None = None) -> None:
        """The words behind the bars; None leaves them."""
        for task, note in ((self._blocks, blocks), (self._steps, steps)):
            if note is not None:
                self._progress.update(task, note=note)

    def say(self, line: str) -> None:
        """A line above the bars, which stays."""
        self._progress.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Leave the bars as they are and give the terminal back."""
        atexit.unregister(self.close)
        self._progress.stop()
