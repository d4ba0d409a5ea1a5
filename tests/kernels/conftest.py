"""The kernels run on the GPU where there is one, else on CPU tensors in Triton's interpreter."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is first imported

from ptql.kernels import available, matvec


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def round_to_bfloat16(builder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter cuts float32 off to bfloat16, where the compiler, like torch, rounds."""
    cut_off, tl = builder.cast_impl, available.tl

    def cast(self: Any, source: Any, to: Any) -> Any:
        if (source.dtype.scalar, to.scalar) != (tl.float32, tl.bfloat16):
            return cut_off(self, source, to)
        rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16()
        return type(source)(rounded.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)

    monkeypatch.setattr(builder, "cast_impl", cast)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Send everything to the Triton kernels, CPU tensors too."""
    if available.triton is None:
        pytest.skip("Triton is not installed")
    if torch.cuda.is_available():
        return
    if type(matvec._forward_kernel).__name__ != "InterpretedFunction":
        pytest.fail("Triton was imported before tests/kernels: without a GPU, set TRITON_INTERPRET=1 before pytest")
    from triton.runtime.interpreter import InterpreterBuilder

    round_to_bfloat16(InterpreterBuilder, monkeypatch)
    monkeypatch.setattr(available, "on_gpu", lambda tensor: True)
