"""A Lightning Trainer whose directory is a run: its options, its processes, its signals, its one axis of steps."""

from __future__ import annotations

import copy
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from ptql.calibration.breakdowns import told_in_one_line
from ptql.calibration.data import CalibrationData
from ptql.calibration.partial import LocalCheckpointIO
from ptql.calibration.preparation import check_nodes
from ptql.calibration.quant_lm import QuantLM
from ptql.calibration.ranks import Ranks, host_group
from ptql.calibration.run_logger import RunLogger
from ptql.calibration.stopping import Stopped, StopSignals, tell_children, tell_children_no_more
from ptql.calibration.trainer_options import check_options
from ptql.calibration.usual_callbacks import with_usual_callbacks
from ptql.callbacks import BlockCallback, BlockCheckpoint
from ptql.errors import InputError

PROCESSES = ("accelerator", "devices", "num_nodes", "strategy")


class RunTrainer(Trainer):
    """What all commands need of a Trainer: `BlockTrainer`, without what it does with models."""

    ranks: Ranks
    signals: StopSignals

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        check_options(kwargs)
        self._processes = {name: copy.deepcopy(kwargs[name]) for name in PROCESSES if name in kwargs}
        self.arithmetic = str(kwargs.get("precision") or "32-true")
        """What `precision` says."""
        if isinstance(kwargs.get("strategy"), ModelParallelStrategy):
            kwargs["precision"] = None  # of mixed ones it takes none; restoring, for which it is, has its own
        self.dry_run_only = bool(kwargs.pop("fast_dev_run", False))  # Lightning's own would end each block's fit
        kwargs["use_distributed_sampler"] = False  # windows are spread already
        kwargs["callbacks"] = with_usual_callbacks(
            kwargs.get("callbacks"),
            progress=kwargs.get("enable_progress_bar") is not False,
            checkpoints=kwargs.pop("enable_checkpointing", None) is not False,
        )
        if SLURMEnvironment.detect():  # its own checkpoint would be loaded into every block; ours is in the ledger
            kwargs["plugins"] = [SLURMEnvironment(auto_requeue=False)]
        try:
            super().__init__(*args, **kwargs)
        except Exception as error:  # of many types: MisconfigurationException, ModuleNotFoundError, KeyError ...
            given = ", ".join(f"{name}={kwargs.get(name, 'auto')}" for name in ("accelerator", "devices", "strategy"))
            reason = " ".join(str(error).split())
            raise InputError(f"trainer ({given}): {reason}; correct --trainer.*, `ptql fit --help` lists it") from error
        check_nodes(self)  # type: ignore[arg-type]
        self.strategy.checkpoint_io = LocalCheckpointIO()
        self.ranks, self.signals = Ranks(), StopSignals()
        self._first_step, self._ended_together = 0, False
        if any(isinstance(callback, BlockCheckpoint) for callback in self.callbacks):  # type: ignore[attr-defined]
            # It asks all processes after each batch whether one had SIGTERM. Lightning would ask, too, and wait for the
            # GPU to answer.
            self.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
        self._own_log = kwargs.get("logger") in (None, True)
        self._enter(Path(self.default_root_dir))

    @property
    def run_dir(self) -> Path:
        """The directory of the pass in hand: the run's, or, of the first of two passes, a folder in it."""
        return self._run_dir

    def _enter(self, run_dir: Path) -> None:
        """From now on this is the run's directory, and steps count from 0."""
        self._run_dir = run_dir
        self._close_log()
        if self._own_log:
            self.logger = RunLogger(run_dir, name="tensorboard", version="")
        self.first_step = -self.global_step

    def _close_log(self) -> None:
        for logger in self.loggers:
            if isinstance(logger, RunLogger):
                logger.close()

    def processes(self) -> dict[str, Any]:
        """Options of a Trainer that works in the processes of this one, on the same devices."""
        options: dict[str, Any] = copy.deepcopy(self._processes)
        if SLURMEnvironment.detect():
            options["plugins"] = [SLURMEnvironment(auto_requeue=False)]
        return options

    def _precision_of_products(self, model: QuantLM) -> None:
        if self.strategy.root_device.type == "cuda":
            torch.set_float32_matmul_precision(model.matmul)

    # Processes

    @contextmanager
    def _together(self, datamodule: CalibrationData | None) -> Iterator[None]:
        """Errors are told in one line, signals are heard, and no process outlives the first."""
        assert datamodule is not None
        launcher = self.strategy.launcher
        try:
            with told_in_one_line(self, datamodule), StopSignals(self.is_global_zero) as self.signals:
                yield
        except BaseException as error:
            self._notify("on_exception", None, error)  # Lightning tells of those inside a block's fit only
            raise
        finally:
            self._close_log()
            if isinstance(launcher, _SubprocessScriptLauncher) and not self._ended_together:
                launcher.kill(signal.SIGKILL)  # they would wait for this process for half an hour
                launcher.procs.clear()  # or Lightning's watch over them ends this process, too

    def _launch(self, work: Callable[..., None], *subjects: Any) -> None:
        """Do it in every process."""
        launcher = self.strategy.launcher
        if launcher is None:
            self._in_process(work, *subjects)
        else:
            tell_children()
            launcher.launch(self._in_process, work, *subjects, trainer=self)

    def _in_process(self, work: Callable[..., None], *subjects: Any) -> None:
        tell_children_no_more()
        self.strategy.setup_environment()
        host = host_group(self.num_nodes)
        self.ranks = Ranks(self.global_rank, self.world_size, self.strategy.root_device, host)
        work(*subjects)
        self.strategy.barrier("end")
        self._ended_together = True

    def stop(self) -> NoReturn:
        """End this process after a signal; all processes come here at the same step."""
        self._ended_together = True
        raise Stopped(self.signals.received or signal.SIGTERM, first=self.is_global_zero)

    # One axis of steps over all blocks, also of earlier processes, which Lightning's own counter does not know

    @property
    def first_step(self) -> int:
        """Steps that Lightning's counter of this process leaves out."""
        return self._first_step

    @first_step.setter
    def first_step(self, steps: int) -> None:
        self._first_step = steps
        for logger in self.loggers:
            if isinstance(logger, RunLogger):
                logger.first_step = steps

    @property
    def steps(self) -> int:
        """Steps of the run so far."""
        return self.first_step + self.global_step

    # What is said, and to whom

    def _say(self, line: str) -> None:
        if self.is_global_zero:
            print(f"ptql: {line}", file=sys.stderr, flush=True)

    def _notify(self, hook: str, *subjects: Any) -> None:
        for callback in self.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, BlockCallback):
                getattr(callback, hook)(self, *subjects)
