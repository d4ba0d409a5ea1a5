"""One block's calibration as a LightningModule: its learnables, its loss, and what is stored in the end."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from ptql.engine.engine import Engine
from ptql.engine.step import CaptureError, Step, plain_groups
from ptql.functional.scaled import Scaled, multiplied_out
from ptql.nn.attention_probe import AttentionProbe, made_by
from ptql.nn.quant_linear import QuantLinear
from ptql.nn.static_rounding import grid_tensors
from ptql.nn.student import weights_of
from ptql.parts.inputs import InputRange
from ptql.parts.objectives import Objective, all_terms, total
from ptql.parts.transforms import TransformState, Weights
from ptql.parts.weights import LinearQuantizer

OptimizerFactory = Callable[[Iterable[Any]], Optimizer]
Moments = Callable[[str, Weights], Tensor]
"""Second moments [in, in] of what a linear layer multiplies, by its name, in a block with these weights."""


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
        engine: Computes the steps; None for Lightning's own way.
        probe: At the student's attention, where the objective looks at it.
        wants_moments: Whether quantisers encode by second moments of inputs.
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
        engine: Engine | None = None,
        probe: AttentionProbe | None = None,
        wants_moments: bool = False,
    ) -> None:
        super().__init__()
        self.strict_loading = False  # state_dict holds the learnables only: the rest comes from the source model
        self.student = student
        self.context = context
        self.transforms = nn.ModuleList(transforms)
        self.quantizers = nn.ModuleDict({name.replace(".", "/"): q for name, q in quantizers.items()})
        self._matrices = {f"{name}.weight" for name, m in student.named_modules() if isinstance(m, QuantLinear)}
        self.objective = objective
        self.probe = probe
        self.wants_moments = wants_moments
        self.balance = objective.balance_for_block()
        self._optimizer = optimizer
        self._dense = dense
        self.seed: int | None = None
        """Of random numbers while learning; None leaves them as they are."""
        self.skipped_steps = 0
        self.epoch_losses: list[float] = []
        """Mean loss of each epoch so far."""
        self.best_epoch: int | None = None
        self.best_loss = float("inf")
        self._best: dict[str, Tensor] | None = None
        self._engine = engine
        self._step: Step | None = None
        self.epoch_loss = torch.zeros(())
        """Sum over the epoch's batches so far."""
        self.begin_here()

    def begin_here(self) -> None:
        """Take the present values for the start: a block that learning makes worse falls back to them."""
        self.project()
        self.initial = copy.deepcopy(self.learnables())

    @torch.no_grad()
    def begin_on_weights(self, inputs: Mapping[str, InputRange] | None = None) -> None:
        """Let quantisers begin on the weights that they will round, as transforms fold them at first.

        Args:
            inputs: What was seen of those that each matrix multiplies, if the recipe asks for it.
        """
        folded, seen = self.folded_weights(scaled=True), inputs or {}
        for name, quantizer in self._by_linear():
            quantizer.begin_on(multiplied_out(folded.pop(f"{name}.weight")), seen.get(name))
        self.begin_here()

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

    def folded_weights(self, scaled: bool = False) -> Weights:
        """The block's weights after the transforms: the same function, in other weights; float32.

        With `scaled`, the matrices of linear layers are not multiplied out, as far as the transforms can do without.
        """
        weights = weights_of(self.student)
        for name, weight in weights.items():
            if scaled and name in self._matrices:
                weights[name] = Scaled(weight)
            elif weight.is_floating_point() and weight.dtype != torch.float64:
                weights[name] = weight.float()
        for transform in self.transforms:
            if not transform.takes_scaled:
                weights = {name: multiplied_out(weight) for name, weight in weights.items()}
            weights = transform(weights)
        return weights

    def effective_weights(self) -> Weights:
        """The block's weights after transforms and rounding; a pure function of frozen weights and learnables."""
        weights = self.folded_weights()
        for name, quantizer in self._by_linear():
            weights[f"{name}.weight"] = quantizer.fake(weights[f"{name}.weight"])
        return weights

    @torch.no_grad()
    def encode(self, moments: Moments | None = None) -> dict[str, Tensor]:
        """What is stored of the block: packed matrices, grids, and everything else as folded, by name in the block.

        Matrices are multiplied out as the engine did while learning, and where it leaves that to kernels, one by one.
        With `moments` each is encoded by its inputs, as the matrices before it, which are rounded by then, make them.
        """
        stored = self.folded_weights(scaled=self._engine is not None and self._engine.kernels(self.device))
        so_far = {} if moments is None else {name: multiplied_out(weight) for name, weight in stored.items()}
        for name, quantizer in self._by_linear():
            weight = multiplied_out(stored.pop(f"{name}.weight"))
            if moments is None:
                packed = quantizer.encode(weight)
            else:
                packed = quantizer.encode_on(weight, moments(name, so_far))
                so_far[f"{name}.weight"] = quantizer.decode(packed)
            stored |= {f"{name}.{part}": tensor for part, tensor in packed.items()}
        tensors = {name: multiplied_out(weight) for name, weight in stored.items()} | grid_tensors(self.student)
        return {name: tensor.to(self._stored_dtype(name, tensor)) for name, tensor in tensors.items()}

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
            packed = _packed(name, stored)
            for part in packed:
                del weights[f"{name}.{part}"]
            weights[f"{name}.weight"] = quantizer.decode(packed)
        return weights

    @torch.no_grad()
    def weight_errors(self, stored: dict[str, Tensor]) -> dict[str, float]:
        """Squared error of each matrix, relative to the square of the matrix as folded: 0 is exact, 1 is all lost."""
        folded, errors = self.folded_weights(scaled=True), {}
        for name, quantizer in self._by_linear():
            weight = multiplied_out(folded.pop(f"{name}.weight"))
            rounded = quantizer.decode(_packed(name, stored))
            errors[name] = ((weight - rounded).square().sum() / weight.square().sum()).item()
        return errors

    def remarks(self) -> dict[str, str]:
        """What a user should know of how matrices were encoded last, by linear layer."""
        return {name: quantizer.remark for name, quantizer in self._by_linear() if quantizer.remark is not None}

    def quantizer(self, linear: str) -> LinearQuantizer | None:
        """What rounds a linear layer's matrix."""
        return dict(self._by_linear()).get(linear)

    def _by_linear(self) -> list[tuple[str, LinearQuantizer]]:
        return [(name.replace("/", "."), q) for name, q in self.quantizers.items()]  # type: ignore[misc]

    # Learning

    def project(self) -> None:
        """Bring the learnables back to where they are allowed."""
        for transform in self.transforms:
            transform.project()  # type: ignore[operator]

    def terms(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weighted terms of the loss on a batch; their sum is what is learned."""
        self.project()
        hidden = batch["input"].to(torch.promote_types(batch["input"].dtype, torch.float32))
        made = made_by(self.student, hidden, self.context, self.effective_weights(), self.probe)
        return all_terms(self.objective, {**batch, **made})

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss, terms = self.plain_loss(batch) if self._step is None else self._captured_loss(batch)
        if self._logger_is_due():
            losses = {f"loss/{name}": term.detach() for name, term in terms.items()}
            plain = total(terms).detach()  # not what is differentiated, which may say nothing of progress
            self.log_dict({**losses, "loss/total": plain})  # on no bar of Lightning's: it waits for the device
        return loss

    def _logger_is_due(self) -> bool:
        """Whether Lightning hands this step on to loggers; `log` takes longer than all else that it does in a step."""
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        return bool(every) and (self.trainer.global_step + 1) % every == 0

    def plain_loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """What is differentiated on a batch, and the weighted terms; their sum is added to `epoch_loss`."""
        terms = self.terms(batch)
        loss = total(terms)
        self.epoch_loss += loss.detach()
        return self.balance(loss, terms), terms

    def _captured_loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        assert self._step is not None
        try:
            return self._step.micro_batch(batch)
        except CaptureError as error:
            reason, failed, self._step = str(error), self._step, None
        # here, where the error holds nothing of what was tried any more
        assert self._engine is not None
        self.skipped_steps += failed.take_skipped()
        self._step = self._engine.failed(self, self.trainer.optimizers[0], self.trainer, reason)
        return self._step.micro_batch(batch)

    def release_step(self) -> None:
        """Let go of what computed the steps, and of its memory."""
        self._step = None

    # Lightning's parts of a step, which are inside the engine's

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        if self._step is None:
            super().backward(loss, *args, **kwargs)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        if self._step is None:
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        if self._step is None:
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        else:
            optimizer_closure()
            self._step.finish()

    def cpu(self) -> BlockTask:  # type: ignore[override]
        """Stay where it is: Lightning would move the block away at a fit's end, and it is finished there next."""
        return self

    def on_train_start(self) -> None:
        if self.seed is not None:  # here, since Lightning sets its own for each fit
            torch.manual_seed(self.seed)
        self.epoch_loss = self.epoch_loss.to(self.device)
        self._step = None if self._engine is None else self._engine.step(self, self.trainer.optimizers[0], self.trainer)
        if self._step is not None and isinstance(model := self.trainer.strategy.model, DistributedDataParallel):
            model.require_backward_grad_sync = False  # there is no backward that it would see

    def on_train_epoch_start(self) -> None:
        self.epoch_loss.zero_()

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Skip a step whose gradients are not finite: without gradients, the optimiser leaves everything alone."""
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if grads and not get_total_norm(grads).isfinite():
            self.skipped_steps += 1
            optimizer.zero_grad(set_to_none=True)

    def on_train_epoch_end(self) -> None:
        """Keep the learnables of the epoch whose mean loss, over the batches of all processes, was lowest."""
        batches = self.trainer.num_training_batches
        loss = self.trainer.strategy.reduce(self.epoch_loss.clone(), reduce_op="mean").item() / batches
        if self._step is not None:
            self.skipped_steps += self._step.take_skipped()
        self.epoch_losses.append(loss)
        self.project()
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
        if self._step is not None:
            self.skipped_steps += self._step.take_skipped()
        for state in checkpoint.get("optimizer_states", ()):
            plain_groups(state["param_groups"])  # another device, or engine, may go on
        checkpoint["ptql"] = {
            "best": self._best,
            "best_epoch": self.best_epoch,
            "best_loss": self.best_loss,
            "epoch_loss": self.epoch_loss,
            "epoch_losses": self.epoch_losses,
            "skipped_steps": self.skipped_steps,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["ptql"]
        self._best = state["best"]
        self.best_epoch, self.best_loss = state["best_epoch"], state["best_loss"]
        self.epoch_loss = state["epoch_loss"]
        self.epoch_losses = state["epoch_losses"]
        self.skipped_steps = state["skipped_steps"]

    def configure_optimizers(self) -> Optimizer:
        by_rate: dict[float, list[nn.Parameter]] = {}
        parts: list[Any] = [*self.transforms, *self.quantizers.values()]
        for part in parts:
            for name, p in part.named_parameters():
                if p.requires_grad:
                    by_rate.setdefault(part.rate(name), []).append(p)
        return self._optimizer([{"params": ps, "lr": lr} for lr, ps in by_rate.items() if ps])


def _packed(linear: str, stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """What is stored of a linear layer's matrix, by the names that its quantiser gave."""
    prefix = f"{linear}."
    own = {name.removeprefix(prefix): tensor for name, tensor in stored.items() if name.startswith(prefix)}
    return {part: tensor for part, tensor in own.items() if part != "bias"}
