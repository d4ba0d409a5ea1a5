"""Loads `model.gguf` with llama.cpp, which rounds the inputs of quantised matrices to 8 bits."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import numpy as np
from llama_cpp import Llama, llama_cpp

FILE = "model.gguf"


def load(folder: str) -> tuple[Callable[[np.ndarray], np.ndarray], dict[str, Any]]:
    """A function from token ids [tokens] to logits [tokens, vocabulary], in float32, and what loaded it."""
    _leave_out_amx()
    sizes: dict[int, Llama] = {}

    def logits(ids: np.ndarray) -> np.ndarray:
        if len(ids) not in sizes:
            sizes[len(ids)] = Llama(
                f"{folder}/{FILE}", n_ctx=len(ids), n_batch=len(ids), logits_all=True, verbose=False
            )
        model = sizes[len(ids)]
        model.reset()
        model.eval(ids.tolist())
        return np.array(model.scores[: len(ids)], np.float32)

    return logits, {"loader": f"llama.cpp (llama-cpp-python {version('llama-cpp-python')})"}


def _leave_out_amx() -> None:
    """Matrices stay as they are in the file: with AMX they are arranged anew, and where a virtual machine shows these
    instructions without allowing them, the process is killed."""
    usual = llama_cpp.llama_model_default_params

    def params() -> Any:
        changed = usual()
        changed.use_extra_bufts = False
        return changed

    llama_cpp.llama_model_default_params = params
