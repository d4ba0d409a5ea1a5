from ptql.parts.activations.base import ActivationQuantizer
from ptql.parts.activations.dynamic import DynamicTokens, TokenRounding
from ptql.parts.activations.static import StaticClusters

__all__ = ["ActivationQuantizer", "DynamicTokens", "StaticClusters", "TokenRounding"]
