"""Tiny runs in three stages, and what they leave on the disk."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

import ptql
from tests.callbacks.adapted import SMALL
from tests.words import save_source, save_text

NAME = "ptql.callbacks.LoRARestoration"
LESSON: dict[str, Any] = {"samples": 24, "length": 32, "r": 4, "lr": 1e-3}
PTQ161 = ("-c", "methods/ptq161", "-c", "schemes/w1.61a16")


def callback(**changes: Any) -> dict[str, Any]:
    """As configurations have it; its dropout is the usual one."""
    return {"class_path": NAME, "init_args": {**LESSON, **changes}}


def once(**changes: Any) -> dict[str, Any]:
    """Settings of a run of one pass."""
    return {**SMALL, "trainer.callbacks": None, **changes}


def thrice(more: dict[str, Any] | None = None, **lesson: Any) -> dict[str, Any]:
    """Settings of a run in three stages."""
    return {**SMALL, "trainer.callbacks": [callback(**lesson)], **(more or {})}


def named_source(directory: Path, config: PretrainedConfig | None = None) -> Path:
    """A tiny model whose tokenizer has names for `<bos>`, with which Gemma's windows begin, and `<eos>`."""
    file = save_source(directory, config) / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "bos_token": "w62", "eos_token": "w63"}))
    return directory


def fitted(folder: Path, settings: dict[str, Any], config: PretrainedConfig | None = None, name: str = "RUN") -> Path:
    """A finished run of a tiny model; its source and its text lie beside it."""
    source, text = folder / "source", folder / "words.txt"
    if not source.is_dir():
        named_source(source, config)
    if not text.is_file():
        save_text(text)
    ptql.quantize(source, data=text, out=folder / name, method="ptq161", scheme="w1.61a16", settings=settings)
    return folder / name


def options(settings: dict[str, Any]) -> list[str]:
    """The same settings on a command line."""
    return [f"--{key}={json.dumps(value) if not isinstance(value, str) else value}" for key, value in settings.items()]


def checksum(run: Path) -> str:
    return json.loads((run / "metrics.json").read_text())["fit"]["checksum"]


def facts(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "restoration.json").read_text())


def weights(folder: Path) -> dict[str, str]:
    """Hashes of all tensors' files of a restored model."""
    names = ("*.safetensors", "*.tensors")
    files = [file for name in names for file in (folder / "model").glob(name)]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
