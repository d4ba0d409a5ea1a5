"""LoRA on a quantised model as a LightningModule: what is learned restores what rounding lost."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed.checkpoint.state_dict as dcp
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from ptql.checkpoint import Checkpoint
from ptql.errors import InputError
from ptql.restoration.dense import block_tensors, empty_model, outside_tensors
from ptql.restoration.documents import IGNORED

FULL = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
POINTS = 200  # of the curve of losses that is kept


@dataclass(frozen=True)
class Lesson:
    """How LoRA learns.

    Args:
        r: Rank.
        alpha: What B A is multiplied with, over `r`.
        dropout: Share of a layer's inputs that its LoRA does not see.
        linears: The layers that get one, by name in a block.
        lr: Peak learning rate.
        steps: Of the optimiser, over all processes of the same restoration.
        warmup: Steps in which the learning rate rises to its peak; then it falls as a cosine.
        clip: Largest norm of a step's gradient; 0 for none.
        distil: Share of the loss that compares predictions with those of the full-precision model (KL divergence); the
            rest is cross-entropy on the text.
        checkpointing: Compute activations again in the backward pass instead of keeping them.
        seed: Of LoRA's start and of dropout.
    """

    r: int
    alpha: float
    dropout: float
    linears: tuple[str, ...]
    lr: float
    steps: int
    warmup: int
    clip: float
    distil: float
    checkpointing: bool
    seed: int

    @property
    def scale(self) -> float:
        return self.alpha / self.r

    def rate(self, step: int) -> float:
        """Share of the peak learning rate at a step, from 0."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        return 0.5 + 0.5 * math.cos(math.pi * min((step - self.warmup) / max(self.steps - self.warmup, 1), 1.0))


class LoRATask(LightningModule):
    """Learns LoRA of a frozen model, on whole windows.

    Args:
        student: The quantised model, packed or not.
        teacher: The full-precision one, for `distil`; None where that is 0.
        lesson: How.
        dtype: Of frozen weights and of the arithmetic; what is learned is float32.
        state: What an earlier process saved (`state`); None to begin.
    """

    def __init__(
        self,
        student: Checkpoint,
        teacher: Checkpoint | None,
        lesson: Lesson,
        dtype: torch.dtype,
        state: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.checkpoint, self.teacher_checkpoint = student, teacher
        self.lesson, self.dtype_of_weights = lesson, dtype
        self._state = state or {}
        self.first_step = int(self._state.get("step", 0))
        self.losses: list[tuple[int, float]] = [(int(step), loss) for step, loss in self._state.get("losses", [])]
        """Mean losses of the steps up to, and without, the step that is noted beside each."""
        self.tokens = int(self._state.get("tokens", 0))
        self.skipped_steps = int(self._state.get("skipped", 0))
        self.seconds = float(self._state.get("seconds", 0.0))
        """Of learning, in earlier processes."""
        self._sum, self._count = float(self._state.get("loss_sum", 0.0)), int(self._state.get("loss_count", 0))
        self._loss: Tensor | None = None
        self._tokens: Tensor | None = None
        self._began = 0.0
        self.model: PreTrainedModel | None = None
        self.teacher: PreTrainedModel | None = None

    # Building: on the meta device first, so that no process holds more than its part

    def configure_model(self) -> None:
        if self.model is None:
            with torch.device("cpu"):  # Lightning would have all that is made here on the GPU, whatever it is for
                self._build()

    def _build(self) -> None:
        model = empty_model(self.checkpoint, self.dtype_of_weights)
        model.requires_grad_(False)
        prefix = self.checkpoint.family.blocks
        targets = [
            f"{prefix}.{index}.{name}" for index in range(self.checkpoint.num_blocks) for name in self.lesson.linears
        ]
        lora = LoraConfig(
            r=self.lesson.r,
            lora_alpha=self.lesson.alpha,  # type: ignore[arg-type]  # peft divides it by r, whole or not
            lora_dropout=self.lesson.dropout,
            target_modules=targets,
        )
        get_peft_model(model, lora, autocast_adapter_dtype=False)  # in place: `model` has LoRA layers from here on
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        self._place(model, self.checkpoint, self._with_lora)
        if self.lesson.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self.model = model
        if self.teacher_checkpoint is not None:
            teacher = empty_model(self.teacher_checkpoint, self.dtype_of_weights).requires_grad_(False).eval()
            self._place(teacher, self.teacher_checkpoint, lambda index, tensors: tensors)
            self.teacher = teacher

    def _place(self, model: PreTrainedModel, checkpoint: Checkpoint, complete: Any) -> None:
        """Give a model on the meta device its weights, or this process's part of them."""
        device, strategy = self.trainer.strategy.root_device, self.trainer.strategy
        path = checkpoint.family.blocks
        if isinstance(strategy, ModelParallelStrategy):
            from torch.distributed.fsdp import fully_shard

            mesh, buffers = strategy.device_mesh["data_parallel"], dict(model.named_buffers())
            for index in range(checkpoint.num_blocks):
                fully_shard(model.get_submodule(f"{path}.{index}"), mesh=mesh)
            fully_shard(model, mesh=mesh)
            model.to_empty(device=device)
            for name, buffer in buffers.items():
                model.get_buffer(name).copy_(buffer)
            load = _load_part
        else:
            load = _load_whole
        for index in range(checkpoint.num_blocks):
            tensors = complete(index, block_tensors(checkpoint, index))
            block = model.get_submodule(f"{path}.{index}")
            # weights that nobody fills would be whatever the memory held
            assert tensors.keys() == dict(block.named_parameters()).keys(), f"block {index}: not the model's tensors"
            load(block, tensors, device)
        load(model, outside_tensors(checkpoint, model), device)
        model.tie_weights()
        model.to(device=device)  # type: ignore[arg-type]  # buffers

    def _with_lora(self, index: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a block as its LoRA layers name them, and LoRA's own: as saved, or at their start."""
        found = {}
        for name, tensor in tensors.items():
            linear, _, kind = name.rpartition(".")
            found[f"{linear}.base_layer.{kind}" if linear in self.lesson.linears else name] = tensor
        saved: dict[str, Tensor] = self._state.get("lora", {})
        for place, linear in enumerate(self.lesson.linears):
            out, row = tensors[f"{linear}.weight"].shape
            name = f"{index}.{linear}"
            if name + ".A" in saved:
                a, b = saved[name + ".A"], saved[name + ".B"]
            else:
                draw = torch.Generator().manual_seed(self.lesson.seed * 1_000_003 + index * 1009 + place)
                bound = 1 / math.sqrt(row)  # Kaiming's uniform start with a = sqrt(5), as peft's
                a = torch.empty(self.lesson.r, row).uniform_(-bound, bound, generator=draw)
                b = torch.zeros(out, self.lesson.r)
            found[f"{linear}.lora_A.default.weight"], found[f"{linear}.lora_B.default.weight"] = a, b
        return found

    # A step

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        assert self.model is not None
        world, rank = self.trainer.world_size, self.trainer.global_rank
        done = self.first_step * self.trainer.accumulate_grad_batches + batch_idx
        torch.manual_seed(self.lesson.seed + done * world + rank)  # dropout is the same for a run that was stopped
        seen = (batch["labels"] != IGNORED).sum()
        self._tokens = seen if self._tokens is None else self._tokens + seen
        mask = batch.get("attention_mask")
        with self._arithmetic():
            out = self.model(input_ids=batch["input_ids"], attention_mask=mask, labels=batch["labels"], use_cache=False)
            loss = out.loss
            if self.teacher is not None:
                with torch.no_grad():
                    wanted = self.teacher(input_ids=batch["input_ids"], attention_mask=mask, use_cache=False).logits
                divergence = kl_divergence(out.logits[:, :-1], wanted[:, :-1], batch["labels"][:, 1:] != IGNORED)
                loss = (1 - self.lesson.distil) * loss + self.lesson.distil * divergence
        self.log("restore/loss", loss.detach())
        self._loss = loss.detach() + (self._sum if self._loss is None else self._loss)
        return loss

    def on_train_start(self) -> None:
        self._began = time.monotonic()

    def on_train_end(self) -> None:
        self.model = self.teacher = None  # or Lightning would take all of it to the host's memory

    def _arithmetic(self) -> Any:
        if self.dtype_of_weights == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype_of_weights)

    def configure_gradient_clipping(self, optimizer: Optimizer, *_: Any, **__: Any) -> None:
        """Clip, and skip a step whose gradient is not finite: without gradients, the optimiser leaves all alone."""
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = get_total_norm(grads)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # type: ignore[attr-defined]
        if not norm.isfinite():  # the same in all processes
            self.skipped_steps += 1
            optimizer.zero_grad(set_to_none=True)
        elif self.lesson.clip:
            share = (self.lesson.clip / (norm + 1e-6)).clamp(max=1.0)
            for grad in grads:
                (grad.to_local() if hasattr(grad, "to_local") else grad).mul_(share)  # type: ignore[attr-defined]

    def optimizer_done(self, step: int) -> None:
        """A step of the optimiser is over, so many in all; a mean loss is noted now and then."""
        self._count += self.trainer.accumulate_grad_batches
        if step == self.lesson.steps or step % max(self.lesson.steps // POINTS, 1) == 0:
            self.losses.append((step, float(f"{self._over_processes(self._loss) / self._count:.5g}")))
            self._loss, self._sum, self._count = None, 0.0, 0

    def _over_processes(self, loss: Tensor | None) -> float:
        """Mean of a sum of losses over the processes; waits for the GPU."""
        return self._sum if loss is None else self.trainer.strategy.reduce(loss.clone(), reduce_op="mean").item()

    def configure_optimizers(self) -> Any:
        optimizer = AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lesson.lr, weight_decay=0.0)
        if "optimizer" in self._state:
            dcp.set_optimizer_state_dict(self, optimizer, self._state.pop("optimizer"), options=FULL)
            for group in optimizer.param_groups:
                group["lr"] = self.lesson.lr  # at its peak, as the schedule takes it
        schedule = LambdaLR(optimizer, lambda step: self.lesson.rate(self.first_step + step))
        self._state.clear()
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # What is kept

    def factors(self) -> dict[str, Tensor]:
        """LoRA's matrices, whole, on the CPU: `BLOCK.LINEAR.A` [r, in] and `.B` [out, r]. All processes come here."""
        found = dcp.get_model_state_dict(self, options=FULL)
        start = f"model.{self.checkpoint.family.blocks}."
        named = {}
        for name, tensor in found.items():
            path, _, which = name.removeprefix(start).removesuffix(".default.weight").rpartition(".lora_")
            named[f"{path}.{which}"] = tensor
        return named

    def state(self, step: int) -> dict[str, Any]:
        """All that a later process needs to go on behind so many steps. All processes come here."""
        if self._tokens is not None:
            self.tokens += int(self.trainer.strategy.reduce(self._tokens, reduce_op="sum"))
            self._tokens = None
        optimizer = self.optimizers(use_pl_optimizer=False)
        optimizer_state: dict[str, Any] = dcp.get_optimizer_state_dict(self, optimizer, options=FULL)  # type: ignore[arg-type]
        for group in optimizer_state.get("param_groups", ()):
            group.pop("initial_lr", None)  # the schedule's, which a new optimiser does not know
        return {
            "step": step,
            "lora": self.factors(),
            "optimizer": optimizer_state,
            "losses": [list(point) for point in self.losses],
            "loss_sum": self._over_processes(self._loss),
            "loss_count": self._count,
            "tokens": self.tokens,
            "skipped": self.skipped_steps,
            "seconds": self.seconds + time.monotonic() - self._began,
        }


def kl_divergence(found: Tensor, wanted: Tensor, counts: Tensor) -> Tensor:
    """Mean over the tokens that count of KL(wanted || found), of logits [batch, tokens, vocabulary]."""
    each = F.kl_div(
        F.log_softmax(found.float(), -1), F.log_softmax(wanted.float(), -1), reduction="none", log_target=True
    ).sum(-1)
    return (each * counts).sum() / counts.sum()


def _dtypes(module: nn.Module, tensors: dict[str, Tensor]) -> dict[str, torch.dtype]:
    """Of the parameters; an error where a tensor belongs to none."""
    dtypes = {name: parameter.dtype for name, parameter in module.named_parameters()}
    if unknown := tensors.keys() - dtypes.keys():
        raise InputError(f"restoration: the model has no {', '.join(sorted(unknown))}; its config.json is of another")
    return dtypes


def _load_whole(module: nn.Module, tensors: dict[str, Tensor], device: torch.device) -> None:
    """Put tensors in the place of parameters, in the parameters' dtype."""
    dtypes = _dtypes(module, tensors)
    module.load_state_dict({name: t.to(device, dtypes[name]) for name, t in tensors.items()}, assign=True, strict=False)


def _load_part(module: nn.Module, tensors: dict[str, Tensor], device: torch.device) -> None:
    """Fill this process's part of sharded parameters."""
    dtypes = _dtypes(module, tensors)
    dcp.set_model_state_dict(
        module,
        {name: tensor.to(dtypes[name]) for name, tensor in tensors.items()},
        options=dcp.StateDictOptions(full_state_dict=True, strict=False),
    )


def merged(
    tensors: Iterator[tuple[str, Tensor]], blocks: str, factors: dict[str, Tensor], scale: float, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a dense model with scale * B A added to those that have LoRA; in `dtype`, those of `blocks`."""
    for name, tensor in tensors:
        key = name.removeprefix(blocks + ".").removesuffix(".weight")
        if key + ".A" in factors:
            tensor = tensor + scale * (factors[key + ".B"] @ factors[key + ".A"])
        yield name, tensor.to(dtype) if name.startswith(blocks + ".") else tensor
