"""Loads with transformers, and with whatever package it calls for the format."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
import transformers


def load(folder: str) -> tuple[Callable[[np.ndarray], np.ndarray], dict[str, Any]]:
    """A function from token ids [tokens] to logits [tokens, vocabulary], in float32, and what loaded it."""
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
    )
    model, said = loaded
    wrong = {key: sorted(said[key])[:3] for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if said[key]}
    if wrong:
        raise SystemExit(f"the tensors are not those of the model: {wrong}")
    names = ["transformers"]
    quantization = getattr(model.config, "quantization_config", None)
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
        names.append(str(getattr(method, "value", method)))
    model = model.eval()

    @torch.no_grad()
    def logits(ids: np.ndarray) -> np.ndarray:
        return model(torch.from_numpy(ids)[None]).logits[0].float().numpy()

    held = sum(getattr(module, "quantization_scheme", None) is not None for module in model.modules())
    return logits, {"loader": ", ".join(_with_version(name) for name in names), "quantised": held or None}


def _with_version(name: str) -> str:
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return name
