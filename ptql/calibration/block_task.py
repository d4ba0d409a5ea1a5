"""One block's calibration as a LightningModule: its learnables, its loss, and what is stored in the end."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from ptql.nn.student import call_block, weights_of
from ptql.parts.objectives import Objective, Targets, total
from ptql.parts.transforms import TransformState, Weights
from ptql.parts.weights import LinearQuantizer

OptimizerFactory = Callable[[Iterable[Any]], Optimizer]


class BlockTask(LightningModule):
    """Learns the parameters of the transforms and weight quantisers of one block.

    Args:
        student: The live block with stand-ins; its own weights stay as they are.
        context: Keyword arguments of the block: mask, RoPE.
        transforms: Applied to the weights, in order, before rounding.
        quantizers: By name of the linear layer.
        objective: Compares the student's output with the targets.
        optimizer: Makes an optimiser of parameter groups.
        dense: Dtype in which matrices that are not quantised are stored.
    """

    def __init__(
        self,
        student: nn.Module,
        context: dict[str, Any],
        transforms: list[TransformState],
        quantizers: dict[str, LinearQuantizer],
        objective: Objective,
        optimizer: OptimizerFactory,
        dense: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.strict_loading = False  # state_dict holds the learnables only: the rest comes from the source model
        self.student = student
        self.context = context
        self.transforms = nn.ModuleList(transforms)
        self.quantizers = nn.ModuleDict({name.replace(".", "/"): q for name, q in quantizers.items()})
        self.objective = objective
        self._optimizer = optimizer
        self._dense = dense
        self.seed: int | None = None
        """Of random numbers while learning; None leaves them as they are."""
        self.skipped_steps = 0
        self.best_epoch: int | None = None
        self.best_loss = float("inf")
        self._best: dict[str, Tensor] | None = None
        self._epoch_loss = torch.zeros(())
        self._project()
        self.initial = copy.deepcopy(self.learnables())

    # What is learned, and what it makes of the weights

    def learnables(self) -> dict[str, Tensor]:
        """Learned tensors by name, detached."""
        return {name: p.detach() for name, p in self.named_parameters() if p.requires_grad}

    def load_learnables(self, values: dict[str, Tensor]) -> None:
        """Overwrite the learned tensors; every one must be given."""
        with torch.no_grad():
            for name, p in self.named_parameters():
                if p.requires_grad:
                    p.copy_(values[name])

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {k: v for k, v in super().state_dict(*args, **kwargs).items() if not k.startswith("student.")}

    def folded_weights(self) -> Weights:
        """The block's weights after the transforms: the same function, in other weights."""
        weights = weights_of(self.student)
        for transform in self.transforms:
            weights = transform(weights)
        return weights

    def effective_weights(self) -> Weights:
        """The block's weights after transforms and rounding; a pure function of frozen weights and learnables."""
        weights = self.folded_weights()
        for name, quantizer in self._by_linear():
            weights[f"{name}.weight"] = quantizer.fake(weights[f"{name}.weight"])
        return weights

    @torch.no_grad()
    def encode(self) -> dict[str, Tensor]:
        """What is stored of the block: packed matrices, and everything else as folded, by name in the block."""
        stored = self.folded_weights()
        for name, quantizer in self._by_linear():
            packed = quantizer.encode(stored.pop(f"{name}.weight"))
            stored |= {f"{name}.{part}": tensor for part, tensor in packed.items()}
        return {name: tensor.to(self._stored_dtype(name, tensor)) for name, tensor in stored.items()}

    def _stored_dtype(self, name: str, tensor: Tensor) -> torch.dtype:
        """Matrices that aren't quantised keep the source's dtype, biases of linear layers take float16.

        Norms are few, and folding needs their precision: they stay float32. Codes and scales are what they are.
        """
        if not tensor.is_floating_point():
            return tensor.dtype
        if tensor.ndim > 1:
            return self._dense
        linear = name.removesuffix(".bias").replace(".", "/")
        return torch.float16 if linear in self.quantizers and tensor.abs().max() < 65504 else torch.float32

    @torch.no_grad()
    def decode(self, stored: dict[str, Tensor]) -> Weights:
        """The weights that `encode`'s result stands for: what a loaded model computes with."""
        weights = {k: v.float() if v.is_floating_point() else v for k, v in stored.items()}
        for name, quantizer in self._by_linear():
            prefix = f"{name}."
            own = {k: v for k, v in stored.items() if k.startswith(prefix) and k != f"{prefix}bias"}
            weights = {k: v for k, v in weights.items() if k not in own}
            weights[f"{prefix}weight"] = quantizer.decode({k.removeprefix(prefix): v for k, v in own.items()})
        return weights

    @property
    def quantised(self) -> list[str]:
        """The linear layers whose weights are quantised."""
        return [name for name, _ in self._by_linear()]

    def _by_linear(self) -> list[tuple[str, LinearQuantizer]]:
        return [(name.replace("/", "."), q) for name, q in self.quantizers.items()]  # type: ignore[misc]

    # Learning

    def _project(self) -> None:
        for transform in self.transforms:
            transform.project()  # type: ignore[operator]

    def terms(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weighted terms of the loss on a batch; their sum is what is learned."""
        self._project()
        output = call_block(self.student, batch["input"], self.context, self.effective_weights())
        targets: Targets = {name: batch[name] for name in self.objective.targets}
        return self.objective.terms(output, targets)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        terms = self.terms(batch)
        loss = total(terms)
        self._epoch_loss = self._epoch_loss.to(loss.device) + loss.detach()
        self.log_dict({f"loss/{name}": term.detach() for name, term in terms.items()})
        self.log("loss/total", loss.detach(), prog_bar=True)
        return loss

    def on_train_start(self) -> None:
        if self.seed is not None:  # here, since Lightning sets its own for each fit
            torch.manual_seed(self.seed)

    def on_train_epoch_start(self) -> None:
        self._epoch_loss = torch.zeros((), device=self.device)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Skip a step whose gradients are not finite: without gradients, the optimiser leaves everything alone."""
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if grads and not get_total_norm(grads).isfinite():
            self.skipped_steps += 1
            optimizer.zero_grad(set_to_none=True)

    def on_train_epoch_end(self) -> None:
        """Keep the learnables of the epoch whose mean loss, over the batches of all processes, was lowest."""
        batches = self.trainer.num_training_batches
        loss = self.trainer.strategy.reduce(self._epoch_loss.clone(), reduce_op="mean").item() / batches
        self._project()
        if loss < self.best_loss:
            self.best_loss, self.best_epoch = loss, self.trainer.current_epoch
            self._best = copy.deepcopy(self.learnables())

    def on_train_end(self) -> None:
        self.load_best()

    def load_best(self) -> None:
        """Take the learnables of the best epoch, if one had a finite loss."""
        if self._best is not None:
            self.load_learnables(self._best)

    # What a checkpoint inside a block holds beside the learnables and the optimiser

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["ptql"] = {
            "best": self._best,
            "best_epoch": self.best_epoch,
            "best_loss": self.best_loss,
            "epoch_loss": self._epoch_loss,
            "skipped_steps": self.skipped_steps,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["ptql"]
        self._best = state["best"]
        self.best_epoch, self.best_loss = state["best_epoch"], state["best_loss"]
        self._epoch_loss = state["epoch_loss"]
        self.skipped_steps = state["skipped_steps"]

    def configure_optimizers(self) -> Optimizer:
        parts: list[Any] = [*self.transforms, *self.quantizers.values()]
        by_rate: dict[float, list[nn.Parameter]] = {}
        for part in parts:
            by_rate.setdefault(part.lr, []).extend(p for p in part.parameters() if p.requires_grad)
        return self._optimizer([{"params": ps, "lr": lr} for lr, ps in by_rate.items() if ps])
