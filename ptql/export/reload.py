"""The end of an export: another runtime loads it in a fresh process, and must give our logits."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ptql.checkpoint import Checkpoint
from ptql.errors import InputError, RunError
from ptql.evaluation.perplexity import embedded, losses_after_blocks, perplexity
from ptql.export.refusals import schemes
from ptql.export.target import Loader, Target
from ptql.nn.student import run_block

SCRIPTS = Path(__file__).parent / "loaders"
LAST = 64
"""Tokens whose logits are compared."""
LOGITS = 0.02
"""Of the spread of our logits: how far they may be off where both compute in float32 with the same weights."""
LOSS = {16: 0.005, 8: 0.02, 4: 0.15}
"""How far the loss (the logarithm of perplexity, at least 1) may be off, a share of it, by activation bits: runtimes
have their own ways to round a token's activations."""


@dataclass(frozen=True)
class Reloaded:
    """What another runtime made of an export, beside what ptql makes of the model.

    Args:
        loader: Its name and version.
        quantised: Matrices that it holds as codes; None where it multiplies them out, or does not say.
        text: What the windows are from.
        windows: How many.
        length: Tokens of a window.
        perplexity: Ours, of these windows, in float32.
        perplexity_reloaded: The runtime's.
        logits_off: The largest difference between two logits, of the last tokens of a window.
        logits_spread: Standard deviation of ours.
    """

    loader: str
    quantised: int | None
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


def installed(target: Target, python: str) -> Loader:
    """The runtime with which this Python reads the format; `InputError` if there is none in its environment."""
    for loader in target.loaders:
        if _is_there(loader, python):
            return loader
    packages = " and ".join(loader.package for loader in target.loaders)
    raise InputError(
        f"check=true: {packages}, with which the export is read back, is not installed for {python}; "
        f"{target.loaders[-1].install} (in an environment of its own, perhaps: --python says where), or write it "
        "unchecked with --check false"
    )


def _is_there(loader: Loader, python: str) -> bool:
    wanted = f"import importlib.util as u; raise SystemExit(None in map(u.find_spec, ('numpy', '{loader.package}')))"
    try:
        return subprocess.run([python, "-c", wanted], capture_output=True).returncode == 0
    except OSError as error:
        raise InputError(f"python={python}: can't be run ({error.strerror}); give the path of a Python") from None


def reload(
    target: Target,
    folder: Path,
    model: Checkpoint,
    ids: Int[Tensor, "windows tokens"],
    text: str,
    device: torch.device,
    loader: Loader,
    python: str = sys.executable,
) -> Reloaded:
    """Load the export in `folder` with a runtime, in a process of this `python`, and compare with the packed `model`.

    Raises:
        RunError: It does not load, or gives other logits.
    """
    losses, logits = ours(model, ids, device, target.dtype)
    with tempfile.TemporaryDirectory(prefix="ptql-export-") as scratch:
        request, result = Path(scratch) / "windows.npz", Path(scratch) / "result.npz"
        np.savez(request, ids=ids.numpy(), last=LAST)
        command = [python, "-P", str(SCRIPTS / "measure.py"), str(SCRIPTS / loader.script)]
        ended = subprocess.run(
            [*command, str(folder), str(request), str(result)],
            capture_output=True,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        if ended.returncode:
            reason = (ended.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise RunError(f"{target.name}: {loader.package} could not load the export ({reason})")
        facts = json.loads(ended.stdout.strip().splitlines()[-1])
        with np.load(result, allow_pickle=False) as found:
            theirs = {name: torch.from_numpy(found[name]) for name in ("losses", "logits")}
    length = ids.shape[1]
    reloaded = Reloaded(
        loader=facts["loader"],
        quantised=facts.get("quantised"),
        text=text,
        windows=len(ids),
        length=length,
        perplexity=perplexity(losses, length),
        perplexity_reloaded=perplexity(theirs["losses"], length),
        logits_off=(theirs["logits"] - logits).abs().max().item(),
        logits_spread=logits.std().item(),
    )
    _compare(reloaded, model, target, loader)
    return reloaded


def _compare(found: Reloaded, model: Checkpoint, target: Target, loader: Loader) -> None:
    assert model.packed is not None
    codes = sum(scheme.quantised for _, scheme, _ in schemes(model))
    if found.quantised not in (None, codes):
        raise RunError(
            f"{target.name}: {found.loader} holds {found.quantised} matrices as codes, and {codes} were exported, so "
            "nothing was written"
        )
    bits = model.packed.activation.bits
    allowed, loss, reloaded = LOSS[bits], math.log(found.perplexity), math.log(found.perplexity_reloaded)
    if not abs(reloaded - loss) <= allowed * max(1.0, loss):
        raise RunError(
            f"{target.name}: {found.loader} reads the export, and its perplexity is {found.perplexity_reloaded:.4f} "
            f"where ours is {found.perplexity:.4f}; {allowed:.1%} of the loss were allowed, so nothing was "
            "written"
        )
    if bits == 16 and target.exact and loader.exact and not found.logits_off <= LOGITS * found.logits_spread:
        raise RunError(
            f"{target.name}: {found.loader} reads the export, and a logit is {found.logits_off:.4f} off where ours "
            f"have a spread of {found.logits_spread:.4f}; at most {LOGITS:.0%} were allowed, so nothing was written"
        )


@torch.no_grad()
def ours(
    model: Checkpoint, ids: Tensor, device: torch.device, served: torch.dtype
) -> tuple[Tensor, Float[Tensor, "last vocabulary"]]:
    """Losses of each window, and the last logits of the last one, in float32, a block at a time.

    Embeddings and head are as the export has them, in the `served` dtype: what is compared is the rest.
    """
    shell = model.shell().to(device)
    for parameter in shell.model.parameters():
        if parameter.dim() > 1:
            parameter.copy_(parameter.to(served))
    hidden, contexts = embedded(shell, ids, device, 1)
    for index, context in enumerate(contexts):
        hidden = run_block(model.block(index, device), hidden, context, 1)
    losses = losses_after_blocks(shell, hidden, ids, device)
    last = shell.logits(hidden[-1:].to(device), ids[-1:].to(device))[0, -LAST:]
    return losses.cpu(), last.float().cpu()
