"""What the loop over blocks leans on in Lightning: where one of these fails, `BlockTrainer` needs another way."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

pytestmark = pytest.mark.filterwarnings("ignore:.*")
BATCHES, EPOCHS = 3, 2


class Steps(Logger):
    """Remembers which steps were logged."""

    name, version = "steps", 0

    def __init__(self) -> None:
        super().__init__()
        self.logged: list[int] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if "loss" in metrics:
            assert step is not None
            self.logged.append(step)

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        return None


class Task(LightningModule):
    """A parameter that is pulled to 1; gradients of the global steps in `broken` are nan."""

    def __init__(self, broken: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.p = torch.nn.Parameter(torch.zeros(2))
        self.frozen = torch.nn.Linear(2, 2).eval()
        self.broken = broken
        self.values: list[Tensor] = []
        self.epochs: list[int] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.values.append(self.p.detach().clone())
        self.epochs.append(self.trainer.current_epoch)
        assert not self.frozen.training  # Lightning leaves the mode of submodules alone
        loss = ((self.p - batch.mean()) ** 2).sum()
        self.log("loss", loss)
        return loss * (torch.nan if len(self.values) - 1 in self.broken else 1)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        assert self.p.grad is not None
        if not self.p.grad.isfinite().all():
            optimizer.zero_grad(set_to_none=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([self.p], lr=0.1, weight_decay=0.5)


class Calls(Callback):
    def __init__(self) -> None:
        self.calls: list[str] = []

    def setup(self, *_: Any, **__: Any) -> None:
        self.calls.append("setup")

    def teardown(self, *_: Any, **__: Any) -> None:
        self.calls.append("teardown")


class Plain:
    """Batches without a DataLoader: sized and iterable is all that Lightning asks for."""

    def __init__(self, count: int = BATCHES) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Tensor]:
        yield from torch.ones(self.count, 2)


def trainer(tmp_path: Path, **options: Any) -> Trainer:
    return Trainer(
        **{
            "accelerator": "cpu",
            "devices": 1,
            "default_root_dir": tmp_path,
            "max_epochs": EPOCHS,
            "logger": False,
            "log_every_n_steps": 1,
            "enable_checkpointing": False,
            "enable_model_summary": False,
            "enable_progress_bar": False,
            **options,
        }
    )


def test_fits_on_one_trainer_add_up(tmp_path: Path) -> None:
    calls, steps = Calls(), Steps()
    loop = trainer(tmp_path, callbacks=[calls], logger=steps)
    for block in range(3):
        loop.fit_loop.epoch_progress.reset()
        task = Task()
        loop.fit(task, train_dataloaders=Plain())
        assert loop.global_step == (block + 1) * EPOCHS * BATCHES
        assert task.epochs == [0] * BATCHES + [1] * BATCHES  # epochs count within the block
        assert calls.calls == ["setup", "teardown"] * (block + 1)
        assert torch.equal(task.values[0], torch.zeros(2))
    assert steps.logged == list(range(3 * EPOCHS * BATCHES))
    assert list(tmp_path.iterdir()) == []


def test_without_the_reset_a_second_fit_does_nothing(tmp_path: Path) -> None:
    loop = trainer(tmp_path)
    loop.fit(Task(), train_dataloaders=Plain())
    second = Task()
    loop.fit(second, train_dataloaders=Plain())
    assert second.values == []


def test_every_fit_has_its_own_optimizer(tmp_path: Path) -> None:
    """Two equal blocks take equal steps: nothing of AdamW's state is carried over."""
    loop = trainer(tmp_path)
    tasks = [Task(), Task()]
    for task in tasks:
        loop.fit_loop.epoch_progress.reset()
        loop.fit(task, train_dataloaders=Plain())
        assert loop.optimizers[0].param_groups[0]["params"][0] is task.p
    assert torch.equal(torch.stack(tasks[0].values), torch.stack(tasks[1].values))


def test_a_step_without_gradients_changes_nothing(tmp_path: Path) -> None:
    """Not even AdamW's weight decay or its momentum; and the next step is taken."""
    task = Task(broken=(2,))
    trainer(tmp_path).fit(task, train_dataloaders=Plain())
    moved = [not torch.equal(a, b) for a, b in zip(task.values, task.values[1:], strict=False)]
    assert moved == [True, True, False, True, True]
    assert task.p.isfinite().all()
    clean = Task()
    loop = trainer(tmp_path, max_epochs=1)
    loop.fit(clean, train_dataloaders=Plain(EPOCHS * BATCHES - 1))
    assert torch.equal(task.p, clean.p)  # as if the broken step had never been


def test_a_skipped_step_counts_on_the_axis(tmp_path: Path) -> None:
    steps = Steps()
    loop = trainer(tmp_path, logger=steps)
    loop.fit(Task(broken=(0, 1)), train_dataloaders=Plain())
    assert steps.logged == list(range(EPOCHS * BATCHES))
    assert loop.global_step == EPOCHS * BATCHES


def test_sigterm_ends_a_fit_with_an_exit_of_code_zero(tmp_path: Path) -> None:
    """Which the command line has to tell from success; and only while a fit runs."""

    class Terminated(Task):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            os.kill(os.getpid(), signal.SIGTERM)
            return super().training_step(batch, batch_idx)

    before = signal.getsignal(signal.SIGTERM)
    loop, task = trainer(tmp_path), Terminated()
    with pytest.raises(SIGTERMException) as stop:
        loop.fit(task, train_dataloaders=Plain())
    assert isinstance(stop.value, SystemExit)
    assert stop.value.code in (None, 0)
    assert len(task.values) == 1
    assert signal.getsignal(signal.SIGTERM) == before


def test_sigterm_after_the_last_epoch_is_noted_but_not_raised(tmp_path: Path) -> None:
    class Late(Callback):
        def on_train_end(self, *_: Any) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    loop = trainer(tmp_path, callbacks=[Late()])
    loop.fit(Task(), train_dataloaders=Plain())
    assert loop.received_sigterm


def test_an_interrupt_ends_a_fit_with_an_exit_that_remembers_it(tmp_path: Path) -> None:
    class Interrupted(Task):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit) as stop:
            trainer(tmp_path).fit(Interrupted(), train_dataloaders=Plain())
    finally:
        signal.signal(signal.SIGINT, before)  # Lightning leaves it ignored
    assert isinstance(stop.value.__context__, KeyboardInterrupt)


def test_the_private_names_that_are_used_are_there(tmp_path: Path) -> None:
    """Each stands where there is no public way; the pinned minor version of Lightning keeps them."""
    from lightning.pytorch.cli import LightningCLI
    from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher, _SubprocessScriptLauncher

    assert callable(_MultiProcessingLauncher.launch)
    assert callable(_SubprocessScriptLauncher.kill)
    assert callable(LightningCLI._parse_ckpt_path)
    assert callable(LightningCLI._set_seed)
    assert callable(trainer(tmp_path)._logger_connector.update_train_step_metrics)
    assert callable(trainer(tmp_path).fit_loop.epoch_loop._broadcast_sigterm_tensor)


def test_an_epoch_that_goes_on_in_its_middle_sees_the_rest_of_the_batches(tmp_path: Path) -> None:
    """A loader with a state is asked for it, and the epoch's start is not announced again."""
    seen: list[int] = []

    class Numbered(Plain):
        given = first = 0

        def __iter__(self) -> Iterator[Tensor]:
            first, self.first = self.first, 0
            for index in range(first, self.count):
                self.given = index + 1
                yield torch.full((2,), float(index))

        def state_dict(self) -> dict[str, int]:
            return {"given": self.given}

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.first = state["given"]

    class Noted(Task):
        starts = 0

        def on_train_epoch_start(self) -> None:
            self.starts += 1

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            seen.append(int(batch[0]))
            return super().training_step(batch, batch_idx)

    class Stop(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Tensor, batch_idx: int) -> None:
            if (trainer.current_epoch, batch_idx) == (0, 1):
                trainer.save_checkpoint(tmp_path / "middle.ckpt", weights_only=False)
                raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        trainer(tmp_path, callbacks=[Stop()], enable_checkpointing=True).fit(Noted(), train_dataloaders=Numbered())
    assert seen == [0, 1]
    again = Noted()
    trainer(tmp_path).fit(again, train_dataloaders=Numbered(), ckpt_path=tmp_path / "middle.ckpt", weights_only=True)
    assert seen == [0, 1, 2, 0, 1, 2]
    assert again.starts == EPOCHS - 1


# Steps that are computed by the module itself


class OwnSteps(Task):
    """Lightning's parts of a step do nothing but be noted; the loss has no way back to the parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.calls.append("loss")
        return super().training_step(batch, batch_idx).detach()

    def optimizer_zero_grad(self, *_: Any, **__: Any) -> None:
        self.calls.append("zero")

    def backward(self, *_: Any, **__: Any) -> None:
        self.calls.append("backward")

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        self.calls.append("step(")
        optimizer_closure()
        self.calls.append(")")

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.calls.append("never")


@pytest.mark.parametrize(
    ("accumulate", "epoch"),
    [
        (1, ["step(", "loss", "zero", "backward", ")"] * BATCHES),
        (2, ["loss", "zero", "backward", "step(", "loss", "backward", ")", "step(", "loss", "zero", "backward", ")"]),
    ],
)
def test_a_step_that_only_calls_the_closure_counts_as_one(tmp_path: Path, accumulate: int, epoch: list[str]) -> None:
    """The closure is the loss, zeroing and the way back; only `optimizer_step` itself would clip and move."""
    steps, task = Steps(), OwnSteps()
    loop = trainer(tmp_path, logger=steps, accumulate_grad_batches=accumulate, gradient_clip_val=0.1)
    loop.fit(task, train_dataloaders=Plain())
    assert task.calls == epoch * EPOCHS
    assert loop.global_step == EPOCHS * epoch.count("step(")
    assert steps.logged == list(range(loop.global_step))
    assert not task.p.any()


def test_the_end_of_a_fit_moves_the_module_by_its_own_method(tmp_path: Path) -> None:
    calls = []

    class Stays(Task):
        def cpu(self) -> Stays:  # type: ignore[override]
            calls.append("cpu")
            return self

        def on_train_end(self) -> None:
            calls.append("end")

    trainer(tmp_path).fit(Stays(), train_dataloaders=Plain())
    assert calls == ["end", "cpu"]


class SavesAt(Callback):
    """Saves at the end of a batch, or of an epoch (batch -1), and ends the fit."""

    def __init__(self, path: Path, epoch: int, batch: int) -> None:
        self.path, self.at = path, (epoch, batch)

    def _save(self, trainer: Any, batch: int) -> None:
        if (trainer.current_epoch, batch) == self.at:
            trainer.save_checkpoint(self.path, weights_only=False)
            raise RuntimeError("stopped")

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Tensor, batch_idx: int) -> None:
        self._save(trainer, batch_idx)

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        self._save(trainer, -1)


class LogsWhenDue(Task):
    """Logs in the steps in which it counts itself that Lightning will hand values on."""

    def __init__(self) -> None:
        super().__init__()
        self.wrong: list[int] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = ((self.p - batch.mean()) ** 2).sum()
        step, every = self.trainer.global_step + 1, self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        due = bool(every) and step % every == 0
        if due != self.trainer._logger_connector.should_update_logs:  # type: ignore[attr-defined]
            self.wrong.append(step)
        if due:
            self.log("loss", loss)
        return loss


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("every", [0, 1, 2, 3])
def test_loggers_get_the_steps_that_can_be_told_beforehand(tmp_path: Path, every: int, accumulate: int) -> None:
    steps = Steps()
    loop = trainer(tmp_path, logger=steps, log_every_n_steps=every, accumulate_grad_batches=accumulate)
    for _ in range(2):
        loop.fit_loop.epoch_progress.reset()
        task = LogsWhenDue()
        loop.fit(task, train_dataloaders=Plain())
        assert task.wrong == []
    assert steps.logged == (list(range(every - 1, loop.global_step, every)) if every else [])


@pytest.mark.parametrize(("epoch", "batch"), [(0, 0), (0, 1), (1, 1), (0, -1)])
def test_a_fit_that_goes_on_can_tell_them_too(tmp_path: Path, epoch: int, batch: int) -> None:
    path = tmp_path / "saved.ckpt"
    with pytest.raises(RuntimeError, match="stopped"):
        trainer(tmp_path, callbacks=[SavesAt(path, epoch, batch)]).fit(LogsWhenDue(), train_dataloaders=Plain())
    steps, task = Steps(), LogsWhenDue()
    loop = trainer(tmp_path, logger=steps, log_every_n_steps=2)
    loop.fit(task, train_dataloaders=Plain(), ckpt_path=path, weights_only=True)
    assert task.wrong == []
    saved = epoch * BATCHES + (BATCHES if batch < 0 else batch + 1)
    assert steps.logged == [step for step in range(saved, loop.global_step) if (step + 1) % 2 == 0]


def test_what_is_saved_of_an_optimizer_can_be_changed_and_is_back_before_training_starts(tmp_path: Path) -> None:
    path = tmp_path / "saved.ckpt"

    class Fused(Task):
        found: Any = None

        def on_train_start(self) -> None:
            optimizer = self.trainer.optimizers[0]
            self.found = [float(state["step"]) for state in optimizer.state.values()]
            optimizer.param_groups[0]["fused"] = True

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["optimizer_states"][0]["param_groups"][0]["fused"] = None
            assert self.trainer.optimizers[0].param_groups[0]["fused"]

    with pytest.raises(RuntimeError, match="stopped"):
        trainer(tmp_path, callbacks=[SavesAt(path, 0, 1)]).fit(Fused(), train_dataloaders=Plain())
    assert torch.load(path, weights_only=True)["optimizer_states"][0]["param_groups"][0]["fused"] is None
    again = Fused()
    trainer(tmp_path).fit(again, train_dataloaders=Plain(), ckpt_path=path, weights_only=True)
    assert again.found == [2.0]


class Noted:
    """In place of what DDP reduces gradients with."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: self.calls.append(name)


@pytest.mark.parametrize("sync", [False, True])
def test_ddp_that_is_told_not_to_reduce_leaves_its_reducer_alone(tmp_path: Path, sync: bool) -> None:
    """Two forwards without a backward, each under `no_sync` and not: what was told stays."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(torch.nn.Linear(2, 2))
        noted = Noted()
        wrapped.reducer = noted  # type: ignore[assignment]
        wrapped.require_backward_grad_sync = sync
        with wrapped.no_sync():
            wrapped(torch.ones(1, 2))
        assert not any(name.startswith("prepare_for_") for name in noted.calls)
        assert wrapped.require_backward_grad_sync is sync
        for _ in range(2):
            assert wrapped(torch.ones(1, 2)).requires_grad
        assert any(name.startswith("prepare_for_") for name in noted.calls) is sync
    finally:
        torch.distributed.destroy_process_group()
