"""Learnable, block-wise post-training quantisation of Hugging Face causal language models.

`quantize` and `evaluate` are the commands `ptql fit` and `ptql eval` as functions. Importing this package lets
`transformers.AutoModelForCausalLM.from_pretrained` load the models it has packed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ptql.api import evaluate, quantize
from ptql.errors import InputError, RunError
from ptql.formats.hf import register

if TYPE_CHECKING:
    from ptql.nn.packed_cache import PackedCache

__version__ = "0.1.0"

register()


def __getattr__(name: str) -> Any:
    """What takes long to import, when it is asked for."""
    if name == "PackedCache":
        from ptql.nn.packed_cache import PackedCache

        return PackedCache
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["InputError", "PackedCache", "RunError", "__version__", "evaluate", "quantize"]
