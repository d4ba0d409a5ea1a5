"""What a tensor is quantised to: frozen descriptions of number formats."""

from __future__ import annotations

from dataclasses import dataclass

from ptql.errors import InputError

UNQUANTISED = 16
"""The bit width that means: leave this tensor as it is."""


def check_bits(bits: int, what: str) -> None:
    """Raise `InputError` unless `bits` is 2 to 8, or 16."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not (2 <= bits <= 8 or bits == UNQUANTISED):
        raise InputError(f"{what} bits={bits}: a whole number from 2 to 8 is supported; use 16 to leave it unquantised")


@dataclass(frozen=True)
class IntScheme:
    """Integer format of the weights of a linear layer.

    Args:
        bits: Width of a code, 2 to 8; 16 leaves the weights unquantised.
        group_size: Neighbouring input columns that share a scale; -1 means a whole row (per channel). Where it
            does not divide the row, the last group is shorter.
        symmetric: No zero point: the range is the same on both sides of zero.
    """

    bits: int = 4
    group_size: int = -1
    symmetric: bool = False

    def __post_init__(self) -> None:
        check_bits(self.bits, "weight")
        whole = isinstance(self.group_size, int) and not isinstance(self.group_size, bool)
        if not whole or (self.group_size != -1 and self.group_size < 1):
            raise InputError(
                f"group_size={self.group_size}: a group holds at least 1 column; use -1 for one scale a row"
            )

    @property
    def quantised(self) -> bool:
        return self.bits < UNQUANTISED

    def columns(self, row: int) -> int:
        """Columns of a full group in a row of `row` columns."""
        return row if self.group_size == -1 else min(self.group_size, row)

    def groups(self, row: int) -> int:
        """Groups in a row of `row` columns, the shorter last one included."""
        return -(-row // self.columns(row))


@dataclass(frozen=True)
class ActivationScheme:
    """Integer format of the activations inside a block.

    Args:
        bits: Width of a rounded activation, 2 to 8; 16 leaves activations unquantised.
    """

    bits: int = UNQUANTISED

    def __post_init__(self) -> None:
        check_bits(self.bits, "activation")

    @property
    def quantised(self) -> bool:
        return self.bits < UNQUANTISED
