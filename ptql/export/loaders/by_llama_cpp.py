"""Loads `model.gguf` with llama.cpp, which rounds the inputs of each matrix to 8 bits."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import numpy as np
from llama_cpp import Llama

FILE = "model.gguf"


def load(folder: str) -> tuple[Callable[[np.ndarray], np.ndarray], dict[str, Any]]:
    """A function from token ids [tokens] to logits [tokens, vocabulary], in float32, and what loaded it."""
    model: Llama | None = None

    def logits(ids: np.ndarray) -> np.ndarray:
        nonlocal model
        if model is None or model.n_ctx() < len(ids):
            model = Llama(f"{folder}/{FILE}", n_ctx=len(ids), n_batch=len(ids), logits_all=True, verbose=False)
        model.reset()
        model.eval(ids.tolist())
        return model.scores[: len(ids)].astype(np.float32)

    return logits, {"loader": f"llama.cpp (llama-cpp-python {version('llama-cpp-python')})"}
