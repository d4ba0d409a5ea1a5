from ptql.parts.objectives.balance import PlainSum, RunningAverages
from ptql.parts.objectives.base import Objective, Target, Targets, total
from ptql.parts.objectives.reconstruction import Reconstruction

__all__ = ["Objective", "PlainSum", "Reconstruction", "RunningAverages", "Target", "Targets", "total"]
