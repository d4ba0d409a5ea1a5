"""What a format to export to has to say."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

import torch

from ptql.checkpoint import Checkpoint


@dataclass(frozen=True)
class Loader:
    """The runtime that reads an export back, in a process of its own in which ptql is not imported.

    Args:
        script: File in `ptql/export/loaders/` that loads the model and measures it.
        package: What must be installed for it, by its name in Python.
        install: How it gets there.
        exact: Whether it computes in float32 with what it reads.
    """

    script: str
    package: str
    install: str
    exact: bool = True


class Target(ABC):
    """A format that another runtime reads. Its settings are its constructor's arguments.

    Args:
        dtype: Of what is not quantised, float16 or bfloat16, and of scales where the format has them in it.
    """

    name: str
    loaders: tuple[Loader, ...]
    """Those that read it; the first one that is installed is taken."""
    exact: bool = True
    """Whether loaders have the weights that were measured; `check` may find out."""

    def __init__(self, dtype: torch.dtype = torch.float16) -> None:
        self.dtype = dtype

    @property
    def dtype_name(self) -> str:
        """As options and `config.json` have it."""
        return str(self.dtype).removeprefix("torch.")

    @classmethod
    def usual_dtype(cls, model: Checkpoint) -> torch.dtype:
        """What `auto` is for this model; `InputError` if the format has none that holds it."""
        return torch.float16

    @abstractmethod
    def check(self, model: Checkpoint) -> None:
        """Raise `InputError` unless the format holds all of this packed model, exactly: value, rule, remedy.

        Only settings and, if it must be, scales are looked at: this comes before any long work.
        """

    def check_readable(self, model: Checkpoint) -> None:  # noqa: B027  (most loaders read all that a format holds)
        """Raise `InputError` if the loader does not read what the format holds; asked where it is to read it back."""

    @abstractmethod
    def write(self, model: Checkpoint, folder: Path) -> None:
        """Write the model's files into the empty directory `folder`, after `check`.

        One block, or one shard, is in memory at a time.
        """
