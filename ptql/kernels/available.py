"""Triton, if it is installed, and whether to use it; without it the kernels' modules still import.

The kernels run on CUDA tensors. With TRITON_INTERPRET=1 set before Triton is first imported they also run on CPU
tensors, slowly, which is how they are tested where there is no GPU.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import Tensor

tl: Any
libdevice: Any
try:
    import triton
    import triton.language as tl
    from triton.language.extra import libdevice
except ImportError:
    triton = tl = libdevice = None

if TYPE_CHECKING:
    constexpr: TypeAlias = Any  # the arguments that a kernel is compiled for
else:
    constexpr = Any if tl is None else tl.constexpr


class Absent:
    """What stands in a kernel's place without Triton: it can be defined, not launched."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __getitem__(self, grid: object) -> Any:
        raise ImportError(f"{self.name} is a Triton kernel and Triton is not installed: `pip install triton`")


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit` of the function as written: a type checker's wrapper around it could not be compiled."""
    return Absent(function.__name__) if triton is None else triton.jit(inspect.unwrap(function))


def constant(value: int | float) -> Any:
    """A number that kernels may refer to by name."""
    return value if tl is None else tl.constexpr(value)


def on_gpu(tensor: Tensor) -> bool:
    """Whether work on `tensor` goes to the Triton kernels; otherwise to their torch twins."""
    return tensor.is_cuda and triton is not None


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least `n`: kernels' tiles have no other sizes."""
    return 1 << max(n - 1, 0).bit_length()


def blocks(n: int, size: int) -> int:
    """How many blocks of `size` cover `n`."""
    return -(-n // size)
