"""Loads with auto-round's quantizer for transformers."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import auto_round  # type: ignore[import-not-found]  # noqa: F401  (tells transformers of its format)
import numpy as np
import torch
from transformers import AutoModelForCausalLM


def load(folder: str) -> tuple[Callable[[np.ndarray], np.ndarray], dict[str, Any]]:
    """A function from token ids [tokens] to logits [tokens, vocabulary], and what loaded it."""
    place = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True, device_map=place).eval()

    @torch.no_grad()
    def logits(ids: np.ndarray) -> np.ndarray:
        return model(torch.from_numpy(ids)[None].to(model.device)).logits[0].float().cpu().numpy()

    held = sum(hasattr(module, "qweight") for module in model.modules())
    return logits, {"loader": f"auto-round {version('auto-round')}", "quantised": held}
