from ptql.parts.weights.affine import Affine
from ptql.parts.weights.base import LinearQuantizer, WeightQuantizer

__all__ = ["Affine", "LinearQuantizer", "WeightQuantizer"]
