"""Loads with GPTQModel, on its plain torch kernel where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from gptqmodel import BACKEND, GPTQModel  # type: ignore[import-not-found]


def load(folder: str) -> tuple[Callable[[np.ndarray], np.ndarray], dict[str, Any]]:
    """A function from token ids [tokens] to logits [tokens, vocabulary], and what loaded it."""
    gpu = torch.cuda.is_available()
    backend = BACKEND.AUTO if gpu else BACKEND.TORCH
    model = GPTQModel.load(folder, device="cuda" if gpu else "cpu", backend=backend, dtype=torch.float16)
    inner = model.model.eval()

    @torch.no_grad()
    def logits(ids: np.ndarray) -> np.ndarray:
        return inner(torch.from_numpy(ids)[None].to(inner.device)).logits[0].float().cpu().numpy()

    held = sum(hasattr(module, "qweight") for module in inner.modules())
    return logits, {"loader": f"gptqmodel {version('gptqmodel')}", "quantised": held}
