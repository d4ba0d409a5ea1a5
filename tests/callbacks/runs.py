"""What the callbacks see of a trainer, without one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from ptql.calibration.ledger import BlockRecord
from tests.report.synthetic import SITES, block_summary, peaks


def trainer(**changes: Any) -> Any:
    """A trainer at the start of the first of 80 blocks."""
    values = {
        "is_global_zero": True,
        "num_blocks": 80,
        "block": 0,
        "max_epochs": 20,
        "num_training_batches": 32,
        "current_epoch": 0,
        "callback_metrics": {"loss/total": torch.tensor(0.0123)},
        "loggers": [],
    }
    return SimpleNamespace(**{**values, **changes})


def record(block: int, resumed: bool = False, **changes: Any) -> BlockRecord:
    """A finished block."""
    learned = {
        "quantizers.self_attn/q_proj.lower": torch.full((4, 2), 4.0),
        "quantizers.self_attn/q_proj.upper": torch.zeros(4, 2),
        "transforms.0.sites.0.scale": torch.tensor([1.0, float("nan"), 2.0]),
        "transforms.0.sites.0.shift": torch.full((3,), float("inf")),
    }
    ranges = {
        f"{when}.{site}": peaks(block, place, 64, when == "after")
        for place, site in enumerate(SITES)
        for when in ("before", "after")
    }
    return BlockRecord({}, learned, ranges, {**block_summary(block, 80), **changes}, resumed)
