"""Restoration (PTQ1.61, ACL 2025): LoRA learns on the quantised model, which is then quantised once more."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

from lightning.pytorch import Callback
from ptql.callbacks.block import BlockCallback
from ptql.callbacks.restore_progress import RestorationProgress

from ptql.errors import InputError
from ptql.families import BlockLayout
from ptql.parts import check_learning_rate

if TYPE_CHECKING:
    from ptql.calibration.trainer import BlockTrainer

Masks = Literal["first", "new"]


class LoRARestoration(BlockCallback):
    """A callback that makes three stages of `fit`: a first pass into RUN/first, LoRA on its model into RUN/restored,
    a second pass on that into RUN. `ptql restore` is the middle one alone.

    LoRA is merged into the quantised weights: the second pass begins with W_q + alpha / r * B A.

    Args:
        text: What LoRA learns on: `.txt` and `.jsonl` files (a line is a document), `pydoc`, `wikitext2`, `c4`, `ptb`,
            or hub sets (owner/name; column `text`); the calibration's text by default.
        samples: Documents, or windows where they are packed, that are learned on in all.
        length: The most tokens of a sample; 2048, or the model's context where that is shorter.
        packing: Join documents to windows of full length; else a sample is one document, cut off at `length`.
        batch_size: Samples of a process's batch.
        accumulate: Batches of a step.
        r: LoRA's rank.
        alpha: Its scale, over `r`.
        dropout: Share of its inputs that it does not see.
        targets: Layers that get one, by parts of their names, whole words between dots; by default all but the
            attention's output projection, as in the original.
        lr: Peak learning rate.
        warmup: Share of the steps in which it rises; then it falls as a cosine.
        gradient_clip: Largest norm of a gradient; 0 for none.
        distil: Share of the loss that is the KL divergence from the full-precision model's predictions; the rest is
            cross-entropy on the text, which is all of it in the original.
        gradient_checkpointing: Compute activations again in the backward pass, which takes less memory.
        masks: Salient channels of the second pass: those of the `first`, or `new` ones.
        seed: Of the samples' order, of LoRA's start and of dropout.
        every_seconds: Save at the end of a step if the last save is at least so long ago.

    Raises:
        InputError: A setting is out of its range.
    """

    def __init__(
        self,
        text: str | list[str] | None = None,
        samples: int = 20_000,
        length: int | None = None,
        packing: bool = False,
        batch_size: int = 1,
        accumulate: int = 2,
        r: int = 64,
        alpha: float = 16.0,
        dropout: float = 0.1,
        targets: list[str] | None = None,
        lr: float = 1e-4,
        warmup: float = 0.1,
        gradient_clip: float = 1.0,
        distil: float = 0.0,
        gradient_checkpointing: bool = True,
        masks: Masks = "first",
        seed: int = 42,
        every_seconds: float = 60.0,
    ) -> None:
        whole = {"samples": samples, "batch_size": batch_size, "accumulate": accumulate, "r": r}
        if length is not None:
            whole["length"] = length
        for name, number in whole.items():
            least = 2 if name == "length" else 1
            if type(number) is not int or number < least:
                raise InputError(f"restoration {name}={number}: a whole number, {least} or more, is needed")
        for name, share in (("dropout", dropout), ("warmup", warmup), ("distil", distil)):
            if not 0 <= share <= 1 or (name == "dropout" and share == 1):
                raise InputError(
                    f"restoration {name}={share}: a share from 0 to 1 is needed; leave it out for the usual"
                )
        for name, size in (("gradient_clip", gradient_clip), ("every_seconds", every_seconds)):
            if not size >= 0:
                raise InputError(f"restoration {name}={size}: 0 or more is needed; leave it out for the usual")
        if not 0 < alpha < float("inf"):
            raise InputError(f"restoration alpha={alpha}: a number above 0 is needed; 16 is usual")
        if masks not in get_args(Masks):
            raise InputError(f"restoration masks={masks!r}: one of {', '.join(get_args(Masks))} is needed")
        if targets is not None and not targets:
            raise InputError("restoration targets=[]: nothing would learn; leave it out for the usual layers")
        check_learning_rate(lr, "leave the restoration out to learn nothing")
        self.text = [text] if isinstance(text, str) else list(text or [])
        self.samples, self.length, self.packing = samples, length, packing
        self.batch_size, self.accumulate = batch_size, accumulate
        self.r, self.alpha, self.dropout, self.targets = r, alpha, dropout, targets
        self.lr, self.warmup, self.gradient_clip, self.distil = lr, warmup, gradient_clip, distil
        self.gradient_checkpointing = gradient_checkpointing
        self.masks: Masks = masks
        self.seed, self.every_seconds = seed, every_seconds

    def linears(self, layout: BlockLayout) -> tuple[str, ...]:
        """Names, in a block, of the layers that get a LoRA; `InputError` if a target is none."""
        if self.targets is None:
            return tuple(name for name in layout.names if name != layout.attention.o)
        found = []
        for target in self.targets:
            words = target.split(".")
            named = [
                name
                for name in layout.names
                if any(name.split(".")[k : k + len(words)] == words for k in range(name.count(".") + 1))
            ]
            if not named:
                raise InputError(
                    f"restoration targets: {target!r} is no layer of a block; its layers are {', '.join(layout.names)}"
                )
            found += named
        return tuple(name for name in layout.names if name in found)

    def progress(self, trainer: BlockTrainer, steps: int, done: int) -> list[Callback]:
        """What shows how far the stage is, where the run shows such things."""
        shown = trainer.is_global_zero and trainer.progress_bar_callback is not None
        return [RestorationProgress(steps, done)] if shown else []
