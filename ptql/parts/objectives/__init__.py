from ptql.parts.objectives.base import Objective, Target, Targets, total
from ptql.parts.objectives.reconstruction import Reconstruction

__all__ = ["Objective", "Reconstruction", "Target", "Targets", "total"]
