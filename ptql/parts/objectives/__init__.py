from ptql.parts.objectives.balance import PlainSum, RunningAverages
from ptql.parts.objectives.base import (
    ATTENTION,
    ATTENTION_MADE,
    AttentionView,
    Objective,
    Target,
    Targets,
    all_terms,
    total,
)
from ptql.parts.objectives.distribution import DistributionCorrection
from ptql.parts.objectives.reconstruction import Reconstruction

__all__ = [
    "ATTENTION",
    "ATTENTION_MADE",
    "AttentionView",
    "DistributionCorrection",
    "Objective",
    "PlainSum",
    "Reconstruction",
    "RunningAverages",
    "Target",
    "Targets",
    "all_terms",
    "total",
]
