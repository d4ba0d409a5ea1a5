"""Which texts are like the one that a run was calibrated on, as far as their names tell."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

import yaml

from ptql.evaluation.recorded_run import CONFIG

Domain = Literal["calibration", "unseen"]


def domain(text: str, run: Path) -> Domain | None:
    """Whether a text is of the domain that the run was calibrated on; None where nobody can tell.

    Names are compared up to the first `-`, `_` or `.`: of a run that read wikitext2-valid.txt, `wikitext2` is the
    calibration's own domain.
    """
    calibration = _calibration_text(run / CONFIG)
    if calibration is None:
        return None
    return "calibration" if _kind(text) == _kind(Path(calibration).name) else "unseen"


def _kind(name: str) -> str:
    return re.split(r"[-_.]", name.lower())[0]


def _calibration_text(config: Path) -> str | None:
    try:
        text = yaml.safe_load(config.read_text(encoding="utf-8"))["data"]["text"]
    except (OSError, UnicodeDecodeError, yaml.YAMLError, LookupError, TypeError):
        return None
    return text if isinstance(text, str) else None
