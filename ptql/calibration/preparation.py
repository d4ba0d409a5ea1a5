"""What is checked before a run begins, beside options by themselves: what fails here leaves nothing behind."""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from torch import Tensor, nn
from torch.optim import Optimizer

from ptql.calibration.bit_budget import BitBudget, BitPlan, plan_bits
from ptql.calibration.data import CalibrationData
from ptql.calibration.dry_run import DryRun
from ptql.calibration.ledger import Ledger
from ptql.calibration.memory_budget import Budget
from ptql.calibration.quant_lm import QuantLM
from ptql.calibration.run_logger import RunLogger
from ptql.checkpoint import Checkpoint
from ptql.errors import InputError
from ptql.formats.ptql import PackedFormat
from ptql.kernels.available import power_of_two

if TYPE_CHECKING:
    from ptql.calibration.trainer import BlockTrainer


@dataclass(frozen=True)
class Plan:
    """A run that may begin.

    Args:
        source: The model.
        stored_as: How the result is described in its config.json.
        windows: Token ids [samples, length] of all processes.
        batch_size: Windows in a batch of one process.
        identity: What decides the result; a ledger of another identity is refused.
        seed: Random numbers of block i are seeded with this + i.
        dropped: A line about samples that do not divide evenly, or None.
        budget: The memory that it may take.
        work_bytes: What work on a block takes of the GPU, as the dry run found; None without one.
        bits: What a budget of bits leaves to choose; None without one.
    """

    source: Checkpoint
    stored_as: PackedFormat
    windows: Tensor
    batch_size: int
    identity: dict[str, Any]
    seed: int
    dropped: str | None
    budget: Budget = Budget()  # noqa: RUF009
    work_bytes: int | None = None
    bits: BitPlan | None = None

    def ledger(self, run: Path) -> Ledger:
        return Ledger(run, self.identity)


def check_nodes(trainer: BlockTrainer) -> None:
    """Refuse several machines where nothing starts the processes on the others: this one would wait for ever."""
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if trainer.num_nodes > 1 and not (environment and environment.creates_processes_externally):
        raise InputError(
            f"num_nodes={trainer.num_nodes}: nothing starts the processes of other machines; start them with torchrun "
            "or a cluster's scheduler, or leave --trainer.num_nodes at 1"
        )


def check_optimizer(model: QuantLM) -> None:
    """Refuse what makes no optimiser; whether it can learn a block, the dry run tells."""
    try:
        made = model.optimizer([nn.Parameter(torch.zeros(1))])
    except Exception as error:  # whatever the constructor of any optimiser says of its arguments
        raise InputError(f"optimizer: {' '.join(str(error).split())}; correct --model.optimizer") from error
    if not isinstance(made, Optimizer):
        raise InputError(f"optimizer={made}: not an optimiser; give a class as torch.optim.AdamW to --model.optimizer")


def check_directory(run: Path) -> None:
    """Refuse a file where the run's directory should be."""
    if os.path.exists(run) and not os.path.isdir(run):  # pathlib's raise where a folder can't be looked into
        raise InputError(f"{run}: not a directory, so it can't be written to; give another --trainer.default_root_dir")
    if any(run.glob("hpc_ckpt*")):  # Lightning would go on from it in every block
        raise InputError(f"{run}: holds a checkpoint of another training (hpc_ckpt…); remove it")


def check_loggers(trainer: BlockTrainer) -> None:
    """Refuse a logger whose files can't be written; the run's own directory is tried by the dry run."""
    for logger in trainer.loggers:
        if isinstance(logger, RunLogger) or logger.save_dir is None:
            continue
        path = Path(logger.save_dir).absolute()
        there = next(folder for folder in (path, *path.parents) if os.path.exists(folder))
        if not os.path.isdir(there) or not os.access(there, os.W_OK):
            raise InputError(
                f"logger {type(logger).__name__}: save_dir={logger.save_dir} can't be written to; give another save_dir"
            )


def check_memory(
    trainer: BlockTrainer, data: CalibrationData, hidden: int, item_bytes: int = 4, at_a_time: int = 4
) -> None:
    """Refuse hidden states that fit nowhere: `at_a_time` streams, of `item_bytes` a number."""
    stream = data.samples // trainer.world_size * data.length * hidden * item_bytes
    processes = trainer.num_devices
    place = data.budget(processes).place(trainer.strategy.root_device, stream, at_a_time)
    if place != "disk":
        return
    run = trainer.run_dir.absolute()
    there = next(folder for folder in (run, *run.parents) if os.path.isdir(folder))
    needed, free = stream * at_a_time * processes, shutil.disk_usage(there).free
    if needed > free:
        raise InputError(
            f"samples={data.samples}, length={data.length}: their hidden states need {needed / 1e9:,.0f} GB, too much "
            f"for memory, and {free / 1e9:,.0f} GB of the disk are free; use a smaller --data.samples or --data.length"
        )


def check_accumulation(trainer: BlockTrainer, batches: int) -> None:
    """Refuse steps of more batches than an epoch has."""
    if trainer.accumulate_grad_batches > batches:
        raise InputError(
            f"accumulate_grad_batches={trainer.accumulate_grad_batches}: an epoch has {batches} batches; leave "
            "--trainer.accumulate_grad_batches at 1, or use a smaller --data.batch_size"
        )


def check_eval_options(model: QuantLM, data: CalibrationData | None, command: str = "eval") -> None:
    """Refuse what `eval` and `export` do not read: they take a model as it is stored, and texts of their own."""
    if data is not None and data.settings() != CalibrationData().settings():
        text = "--text.NAME FILE" if command == "eval" else "--text FILE"
        raise InputError(f"data: these are the windows to calibrate on; {command} takes text as {text}")
    if model.identity() != QuantLM().identity():
        raise InputError(
            f"model: {command} {'measures' if command == 'eval' else 'writes'} a model as it is stored, whatever the "
            "recipe; give --model.source, or --run RUN alone"
        )


def check_strategy(strategy: Strategy) -> None:
    """Refuse strategies that can't calibrate: a block fits on one device, so only samples are spread."""
    if isinstance(strategy, SingleDeviceStrategy):
        return
    if not isinstance(strategy, DDPStrategy):
        raise InputError(
            f"strategy={type(strategy).__name__}: a block is learned whole on each device, and the samples are "
            "spread; use --trainer.strategy=ddp"
        )
    if isinstance(strategy.launcher, _MultiProcessingLauncher):
        raise InputError(
            "strategy=ddp_spawn (or ddp_fork, ddp_notebook): these start their processes anew for every block; use "
            "--trainer.strategy=ddp, or torchrun"
        )


def prepare(trainer: BlockTrainer, model: QuantLM, data: CalibrationData, bits: BitBudget | None = None) -> Plan:
    """Check all that was given, and try one block; the first process does what is needed once."""
    source = model.open()
    to_choose = None if bits is None else plan_bits(model, source, bits)
    check_optimizer(model)
    check_directory(trainer.run_dir)
    check_loggers(trainer)
    data.check_length(source.context)
    dtype = model.engine.stream_dtype(trainer.strategy.root_device, trainer)
    streams = streams_at_a_time(model, source, data.length)
    check_memory(trainer, data, source.config.hidden_size, dtype.itemsize, streams)
    stored_as = model.packed_format(source, model.added_biases(source.block(0), source))
    windows = data.windows(source.directory, source.context, source.family.bos)
    processes = trainer.world_size
    if len(windows) < processes:
        raise InputError(
            f"samples={len(windows)}: each of the {processes} processes needs one; use --data.samples {processes}"
        )
    used = len(windows) // processes * processes
    dropped = None
    if used < len(windows):
        rest = f"the last {len(windows) - used} are left out"
        dropped = f"{len(windows)} samples do not divide by {processes} processes: {rest}"
    check_accumulation(trainer, -(-used // processes // data.batch_size))
    identity = _identity(trainer, model, data, source, windows)
    if bits is not None:
        identity["bits"] = bits.identity()
    budget = data.budget(processes // trainer.num_nodes)
    plan = Plan(source, stored_as, windows[:used], data.batch_size, identity, _seed(), dropped, budget, bits=to_choose)
    if trainer.is_global_zero:
        if dropped is not None:
            print(f"ptql: {dropped}")
        if trainer.dry_run_only or not plan.ledger(trainer.run_dir).manifest["blocks"]:
            measured = _dry_run(trainer, model, plan)
            if measured is not None:
                budget.check_work(measured)
                plan = replace(plan, work_bytes=measured * model.engine.memories)
    return plan


def streams_at_a_time(model: QuantLM, source: Checkpoint, tokens: int) -> int:
    """Streams of hidden states that exist at once, in windows of so many tokens: both, the second target, the quantised
    block's output; and as many as take the room of attention probabilities, where these are a target."""
    view, found = model.objective.attention, 3 + ("fp_on_quantised" in model.objective.targets)
    if view is None:
        return found
    heads, rows, _ = view.shape(source.layout.attention.heads, tokens)
    # a power of two, as pinned memory is
    return found + power_of_two(-(-heads * rows // source.config.hidden_size))


def probabilities_in_hand(model: QuantLM, source: Checkpoint, tokens: int) -> int:
    """Attention probabilities that a pass computes, for each token of a window."""
    view = model.objective.attention
    return 0 if view is None else source.layout.attention.heads * view.rows_of(tokens)


def _seed() -> int:
    """Lightning's seed; a fixed one without it, or no run could go on."""
    return int(os.environ.get("PL_GLOBAL_SEED", "2"))


def _dry_run(trainer: BlockTrainer, model: QuantLM, plan: Plan) -> int | None:
    """What it took of the GPU at most; None on a CPU."""
    attempt = DryRun(
        trainer.run_dir,
        trainer.strategy.root_device,
        trainer.precision_plugin.forward_context(),
        bool(trainer.max_epochs),
        lambda task, optimizer: model.engine.rehearsal(task, optimizer, trainer),
    )
    print(f"ptql: {attempt(model, plan.source, plan.stored_as, plan.windows[: plan.batch_size])}")
    device = trainer.strategy.root_device
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None


def _identity(
    trainer: BlockTrainer, model: QuantLM, data: CalibrationData, source: Checkpoint, windows: Tensor
) -> dict[str, Any]:
    tokens = hashlib.sha256(windows.numpy().tobytes()).hexdigest()  # another tokenizer is another run
    return {
        "source": source.fingerprint(),
        "data": {**data.identity(), "tokens_sha256": tokens},
        "recipe": model.identity(),
        "max_epochs": trainer.max_epochs,
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "gradient_clip": [trainer.gradient_clip_val, trainer.gradient_clip_algorithm],
        "precision": f"{trainer.precision}, matmul {model.matmul}",
        "processes": trainer.world_size,
        "seed": _seed(),
    }
