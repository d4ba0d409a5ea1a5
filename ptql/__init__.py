"""Learnable, block-wise post-training quantisation of Hugging Face causal language models.

Importing this package lets `transformers.AutoModelForCausalLM.from_pretrained` load the models it has packed.
"""

from ptql.formats.hf import register

__version__ = "0.1.0"

register()

__all__ = ["__version__"]
