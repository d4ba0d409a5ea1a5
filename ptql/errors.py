"""The exceptions that end a command with one line instead of a traceback."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input. The text says the value, the rule it breaks and the remedy; the command line exits with 2."""


class RunError(RuntimeError):
    """Something around the run broke: what was finished is whole, and the same command goes on; exits with 1."""
