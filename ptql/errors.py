"""The one exception that means: what the user gave is wrong."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input. The text says the value, the rule it breaks and the remedy; the command line exits with 2."""
