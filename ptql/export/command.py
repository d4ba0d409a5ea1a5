"""`ptql export`: everything is checked, written beside its place, read back by another runtime, then named."""

from __future__ import annotations

import json
import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from ptql.calibration.texts import read_text
from ptql.calibration.tokens import bos_token, consecutive_windows, load_tokenizer, tokenize
from ptql.checkpoint import Checkpoint, resolve
from ptql.disk import new_directory, put_text, told_if_full
from ptql.errors import InputError, check_number
from ptql.evaluation.recorded_run import MODEL
from ptql.export.card import card
from ptql.export.compressed_tensors import CompressedTensors
from ptql.export.dense import Dense
from ptql.export.gguf import Gguf
from ptql.export.gptq import AutoRound, Gptq, GptqV2
from ptql.export.reload import Reloaded, installed, reload
from ptql.export.target import Target

TARGETS: dict[str, type[Target]] = {
    target.name: target for target in (CompressedTensors, Gptq, GptqV2, AutoRound, Gguf, Dense)
}
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
FACTS = "ptql_export.json"
"""In an export: its format, its size, and what the runtime made of it."""
FILE_ENDS = (".safetensors", ".gguf")


@dataclass(frozen=True)
class Sample:
    """What an export is checked on.

    Args:
        text: A text as for calibration.
        windows: How many.
        length: Tokens of a window; shorter where the model's context is.

    Raises:
        InputError: Numbers below 1, or 2.
    """

    text: str = "pydoc"
    windows: int = 4
    length: int = 512

    def __post_init__(self) -> None:
        check_number("windows", self.windows, 1, 1_000_000, "1 or more are needed; use --check false for no check")
        check_number("length", self.length, 2, 1_000_000, "a window holds 2 tokens or more; 512 is usual")

    def ids(self, model: Checkpoint) -> Int[Tensor, "windows tokens"]:
        """Token ids."""
        tokenizer = load_tokenizer(model.directory)
        tokens = tokenize(tokenizer, read_text(self.text, "evaluation"))
        bos = bos_token(tokenizer, model.family.bos)
        return consecutive_windows(tokens, min(self.length, model.context), bos)[: self.windows]


def export(
    run: str | None,
    source: str | None,
    target: str,
    out: str | None,
    dtype: str,
    sample: Sample | None,
    device: torch.device,
    python: str | None = None,
    widen: bool = False,
) -> Path:
    """Write a finished run's model, or a packed model directory, in the format of another runtime.

    Args:
        run: The run.
        source: Or a directory that ptql packed.
        target: Name of the format.
        out: The directory that is made.
        dtype: `float16`, `bfloat16` or `float32`; `auto`, see `Target.usual_dtype`.
        sample: What it is checked on; None for no check.
        device: Where our own logits are computed.
        python: Of the environment in which the runtime is; this one by default.
        widen: Of GGUF, see `Gguf`.

    Raises:
        InputError: The format can't hold the model, or an option is wrong; nothing is written.
        RunError: It was written, and the runtime does not load it or gives other logits; it is removed again.
    """
    if (run is None) == (source is None):
        raise InputError("export writes one model: give either --run RUN or --model.source DIR")
    if target not in TARGETS:
        raise InputError(f"format={target}: no such format; one of {', '.join(TARGETS)}")
    if out is None:
        raise InputError(f"--out is missing: say which directory the {target} model shall be")
    folder = Path(out)
    if folder.name in ("", ".."):
        raise InputError(f"out={out}: the directory is made whole and then named; give a name, ./model for one")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"out={out}: is there already; give another name, or remove it first")
    place = next(path for path in folder.absolute().parents if path.exists())
    if not (place.is_dir() and os.access(place, os.W_OK)):
        raise InputError(f"out={out}: can't be made in {place}; give a place where you may write")
    if run is not None and not (Path(run) / MODEL).is_dir():
        raise InputError(f"{run}: no finished model in this run; let `ptql fit` end first")
    model = Checkpoint(Path(run) / MODEL if run is not None else resolve(source or ""))
    if widen and target != Gguf.name:
        raise InputError(f"widen=true: only {Gguf.name} has wider codes to hold narrow ones in; leave it out")
    served = _dtype(dtype, model, TARGETS[target])
    writer = Gguf(served, widen) if target == Gguf.name else TARGETS[target](served)
    writer.check(model)
    loader, ids, python = None, None, python or sys.executable
    if sample is not None:
        writer.check_readable(model)
        loader, ids = installed(writer, python), sample.ids(model)
    with told_if_full(folder), new_directory(folder) as scratch:
        _say(f"{target}: writing {model.num_blocks} blocks")
        writer.write(model, scratch)
        found: Reloaded | None = None
        if sample is not None and ids is not None and loader is not None:
            _say(f"{target}: reading it back with {loader.package}")
            found = reload(writer, scratch, model, ids, sample.text, device, loader, python)
        size = sum(file.stat().st_size for file in scratch.iterdir() if file.name.endswith(FILE_ENDS))
        given = "--run RUN" if run is not None else "--model.source DIR"
        command = f"ptql export {given} --format {target} --dtype {writer.dtype_name} --out {shlex.quote(folder.name)}"
        facts = {
            "format": target,
            "dtype": writer.dtype_name,
            "size_bytes": size,
            "parameters": model.parameters,
            "read_back": None if found is None else found.to_dict(),
        }
        put_text(scratch / FACTS, json.dumps(facts, indent=2) + "\n")
        put_text(scratch / "README.md", card(model, None if run is None else Path(run), target, size, command, found))
    print(f"{folder}: {size / 1e6:.1f} MB, {8 * size / model.parameters:.3f} bits a parameter; {_words(found)}")
    return folder


def _dtype(given: str, model: Checkpoint, target: type[Target]) -> torch.dtype:
    if given == "auto":
        return target.usual_dtype(model)
    if given not in DTYPES:
        raise InputError(f"dtype={given}: one of auto, {', '.join(DTYPES)} is needed")
    return DTYPES[given]


def _words(found: Reloaded | None) -> str:
    if found is None:
        return "not read back (--check false)"
    return (
        f"{found.loader} reads it: perplexity {found.perplexity_reloaded:.4f}, ours {found.perplexity:.4f}; logits "
        f"{found.logits_off:.2g} off at most (their spread is {found.logits_spread:.2g})"
    )


def _say(line: str) -> None:
    print(f"ptql: {line}", file=sys.stderr, flush=True)
