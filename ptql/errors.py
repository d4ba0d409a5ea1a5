"""The exceptions that end a command with one line instead of a traceback."""

from __future__ import annotations

from typing import Any

LONGEST = 1000  # characters of a line; what is longer is a value that was pasted in by mistake


class InputError(ValueError):
    """Bad input, or a disk or device too small for it. The text says value, rule and remedy; exit code 2."""


class RunError(RuntimeError):
    """Something around the run broke: what was finished is whole, and the same command goes on; exits with 1."""


def check_number(name: str, value: Any, low: int | float, high: int | float, rule: str) -> None:
    """Raise `InputError` with value and rule unless `value` is a number from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:  # nan is not, too
        raise InputError(f"{name}={value}: {rule}")


def one_line(text: object) -> str:
    """A text as one line of a terminal: what can't be shown is escaped, the middle of a very long one left out."""
    line = " ".join(str(text).split())
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    if len(line) <= LONGEST:
        return line
    return f"{line[: LONGEST // 2]} ... {line[-LONGEST // 2 :]}"
