"""Writes Hugging Face directories: a finished run, its blocks packed and the rest as in the source; a dense model."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from ptql.calibration.ledger import Ledger
from ptql.checkpoint import INDEX, SINGLE, Checkpoint
from ptql.disk import new_directory, put, put_text, save_tensors
from ptql.errors import RunError
from ptql.formats.ptql import PackedFormat

SHARD_BYTES = 1 << 28  # what is held in memory while writing
RESTORATION = "restoration.json"  # of a restored model; says nothing of what is made of it
COPIED = ("*.json", "*.txt", "*.model", "*.jinja")


def write_model(
    source: Checkpoint,
    fmt: PackedFormat,
    ledger: Ledger,
    out: Path,
    shard_bytes: int = SHARD_BYTES,
    blocks: int | None = None,
) -> None:
    """Write the model directory `out`, whole or not at all; an older one is replaced.

    Holds one shard in memory. Tokenizer and generation settings are copied from the source. With `blocks`, only
    so many first blocks and nothing around them are written: enough to read a block back.
    """
    config = json.loads((source.directory / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = fmt.to_dict()
    with new_directory(out) as scratch:
        write_files(scratch, source.directory, config, _tensors(source, ledger, blocks), shard_bytes)


def write_dense(
    source: Checkpoint, tensors: Iterator[tuple[str, Tensor]], out: Path, more: Callable[[Path], None]
) -> None:
    """Write `tensors` as the full-precision model directory `out`, whole or not at all; an older one is replaced.

    Args:
        source: Whose configuration, tokenizer and generation settings it gets.
        tensors: All of the model, by name.
        out: The directory.
        more: Is given the directory before it gets its name, to put further files there.
    """
    config = json.loads((source.directory / "config.json").read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    with new_directory(out) as scratch:
        write_files(scratch, source.directory, config, tensors, SHARD_BYTES)
        more(scratch)


def write_files(
    folder: Path, like: Path, config: dict[str, Any], tensors: Iterator[tuple[str, Tensor]], shard_bytes: int
) -> None:
    """Fill `folder` with tensors, the configuration, and the tokenizer and generation settings of the model `like`."""
    _write_shards(tensors, folder, shard_bytes)
    for pattern in COPIED:
        for file in like.glob(pattern):
            if file.name not in ("config.json", INDEX, RESTORATION):
                shutil.copyfile(file, folder / file.name)
    put_text(folder / "config.json", json.dumps(config, indent=2) + "\n")


def _tensors(source: Checkpoint, ledger: Ledger, blocks: int | None) -> Iterator[tuple[str, Tensor]]:
    for index in range(source.num_blocks if blocks is None else blocks):
        block = ledger.read(index)
        if block is None:
            raise RunError(f"block {index} is missing or damaged in {ledger.folder}; run the same command again")
        for name, tensor in block.stored.items():
            yield f"{source.family.blocks}.{index}.{name}", tensor
    if blocks is None:
        yield from source.read(source.outside_names())


def _write_shards(tensors: Iterator[tuple[str, Tensor]], folder: Path, shard_bytes: int) -> None:
    """Fill one file after the other; their number is known at the end, so they are named then."""
    where: dict[str, int] = {}
    shard: dict[str, Tensor] = {}
    count = held = total = 0

    def flush() -> None:
        nonlocal shard, count, held
        put(folder / f"{count}.part", lambda scratch: save_tensors(shard, scratch))
        shard, count, held = {}, count + 1, 0

    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if shard and held + size > shard_bytes:
            flush()
        shard[name], where[name] = tensor.contiguous(), count
        held, total = held + size, total + size
    flush()
    if count == 1:
        os.replace(folder / "0.part", folder / SINGLE)
        return
    names = [f"model-{k + 1:05d}-of-{count:05d}.safetensors" for k in range(count)]
    for k, name in enumerate(names):
        os.replace(folder / f"{k}.part", folder / name)
    index = {"metadata": {"total_size": total}, "weight_map": {name: names[k] for name, k in where.items()}}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
