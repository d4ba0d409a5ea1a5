"""Learnable, block-wise post-training quantisation of Hugging Face causal language models.

`quantize` and `evaluate` are the commands `ptql fit` and `ptql eval` as functions. Importing this package lets
`transformers.AutoModelForCausalLM.from_pretrained` load the models it has packed.
"""

from ptql.api import evaluate, quantize
from ptql.errors import InputError, RunError
from ptql.formats.hf import register
from ptql.nn.packed_cache import PackedCache

__version__ = "0.1.0"

register()

__all__ = ["InputError", "PackedCache", "RunError", "__version__", "evaluate", "quantize"]
