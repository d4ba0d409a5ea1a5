"""The end of an export: another runtime loads it in a fresh process, and must give our logits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor

from ptql.checkpoint import Checkpoint
from ptql.errors import InputError, RunError
from ptql.evaluation.perplexity import embedded, losses_after_blocks, perplexity
from ptql.export.target import Loader, Target
from ptql.nn.student import run_block

SCRIPTS = Path(__file__).parent / "loaders"
LAST = 64
"""Tokens whose logits are compared."""
LOGITS = 0.02
"""Of the spread of our logits: how far they may be off where both compute in float32 with the same weights."""
PERPLEXITY = {16: 0.005, 8: 0.02, 4: 0.15}
"""How far perplexity may be off, by activation bits: runtimes have their own ways to round a token's activations."""


@dataclass(frozen=True)
class Reloaded:
    """What another runtime made of an export, beside what ptql makes of the model.

    Args:
        loader: Its name and version.
        text: What the windows are from.
        windows: How many.
        length: Tokens of a window.
        perplexity: Ours, of these windows, in float32.
        perplexity_reloaded: The runtime's.
        logits_off: The largest difference between two logits, of the last tokens of a window.
        logits_spread: Standard deviation of ours.
    """

    loader: str
    text: str
    windows: int
    length: int
    perplexity: float
    perplexity_reloaded: float
    logits_off: float
    logits_spread: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def check_loader(loader: Loader) -> None:
    """Raise `InputError` unless the runtime is there."""
    if find_spec(loader.package) is None:
        raise InputError(
            f"check=true: {loader.package} is not installed, with which the export is read back; {loader.install}, or "
            "write it unchecked with --check false"
        )


def reload(
    target: Target, folder: Path, model: Checkpoint, ids: Int[Tensor, "windows tokens"], text: str, device: torch.device
) -> Reloaded:
    """Load the export in `folder` and compare it with the packed `model`.

    Raises:
        RunError: It does not load, or gives other logits.
    """
    losses, logits = _ours(model, ids, device)
    with tempfile.TemporaryDirectory(prefix="ptql-export-") as scratch:
        request, result = Path(scratch) / "windows", Path(scratch) / "result"
        save_file({"ids": ids, "last": torch.tensor([LAST])}, request)
        command = [sys.executable, "-P", str(SCRIPTS / "measure.py"), str(SCRIPTS / target.loader.script)]
        ended = subprocess.run(
            [*command, str(folder), str(request), str(result)],
            capture_output=True,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        if ended.returncode:
            reason = (ended.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise RunError(f"{target.name}: {target.loader.package} could not load the export ({reason})")
        facts, theirs = json.loads(ended.stdout.strip().splitlines()[-1]), load_file(result)
    length = ids.shape[1]
    found = Reloaded(
        loader=facts["loader"],
        text=text,
        windows=len(ids),
        length=length,
        perplexity=perplexity(losses, length),
        perplexity_reloaded=perplexity(theirs["losses"], length),
        logits_off=(theirs["logits"] - logits).abs().max().item(),
        logits_spread=logits.std().item(),
    )
    _compare(found, model, target)
    return found


def _compare(found: Reloaded, model: Checkpoint, target: Target) -> None:
    assert model.packed is not None
    bits = model.packed.activation.bits
    allowed = max(target.allowed_perplexity, PERPLEXITY[bits])
    off = found.perplexity_reloaded / found.perplexity - 1
    if not abs(off) <= allowed:
        raise RunError(
            f"{target.name}: {found.loader} reads the export, and its perplexity is {found.perplexity_reloaded:.4f} where "
            f"ours is {found.perplexity:.4f}; at most {allowed:.1%} were allowed, so nothing was written"
        )
    if bits == 16 and target.exact and not found.logits_off <= LOGITS * found.logits_spread:
        raise RunError(
            f"{target.name}: {found.loader} reads the export, and a logit is {found.logits_off:.4f} off where ours have a "
            f"spread of {found.logits_spread:.4f}; at most {LOGITS:.0%} were allowed, so nothing was written"
        )


@torch.no_grad()
def _ours(model: Checkpoint, ids: Tensor, device: torch.device) -> tuple[Tensor, Float[Tensor, "last vocabulary"]]:
    """Losses of each window, and the last logits of the last one, in float32, a block at a time."""
    shell = model.shell().to(device)
    hidden, contexts = embedded(shell, ids, device, 1)
    for index, context in enumerate(contexts):
        hidden = run_block(model.block(index, device), hidden, context, 1)
    losses = losses_after_blocks(shell, hidden, ids, device)
    last = shell.logits(hidden[-1:].to(device), ids[-1:].to(device))[0, -LAST:]
    return losses.cpu(), last.float().cpu()
