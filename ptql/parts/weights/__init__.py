from ptql.parts.weights.affine import Affine
from ptql.parts.weights.base import LinearQuantizer, WeightQuantizer
from ptql.parts.weights.column_clusters import ColumnClusters
from ptql.parts.weights.gptq import Gptq
from ptql.parts.weights.salient_binary import SalientBinary

__all__ = ["Affine", "ColumnClusters", "Gptq", "LinearQuantizer", "SalientBinary", "WeightQuantizer"]
