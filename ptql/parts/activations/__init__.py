from ptql.parts.activations.base import ActivationQuantizer
from ptql.parts.activations.dynamic import DynamicTokens, TokenRounding

__all__ = ["ActivationQuantizer", "DynamicTokens", "TokenRounding"]
