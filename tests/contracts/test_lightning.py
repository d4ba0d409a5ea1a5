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
