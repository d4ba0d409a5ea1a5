from ptql.parts.transforms.base import AddedBiases, BlockFacts, InputRange, Transform, TransformState, Weights
from ptql.parts.transforms.compensate import Compensate
from ptql.parts.transforms.smooth import Smooth

__all__ = ["AddedBiases", "BlockFacts", "Compensate", "InputRange", "Smooth", "Transform", "TransformState", "Weights"]
