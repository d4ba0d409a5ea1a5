from ptql.parts.transforms.base import AddedBiases, BlockFacts, Transform, TransformState, Weights
from ptql.parts.transforms.compensate import Compensate
from ptql.parts.transforms.permute import Permute
from ptql.parts.transforms.smooth import Smooth

__all__ = ["AddedBiases", "BlockFacts", "Compensate", "Permute", "Smooth", "Transform", "TransformState", "Weights"]
