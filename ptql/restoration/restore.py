"""The restoring stage: LoRA learns on a finished run's model, and is merged into its quantised weights."""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, Trainer
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from ptql.calibration.ledger import FOLDER, MANIFEST, Ledger, difference, read_manifest
from ptql.calibration.memory import give_back_memory
from ptql.calibration.partial import PATTERN, LocalCheckpointIO, Partial
from ptql.calibration.run_logger import RunLogger
from ptql.calibration.tokens import bos_token, load_tokenizer
from ptql.checkpoint import Checkpoint
from ptql.disk import put_text
from ptql.errors import InputError
from ptql.evaluation.recorded_run import MODEL
from ptql.formats.write import write_dense
from ptql.restoration.dense import dense_tensors, why_not_dense
from ptql.restoration.documents import Documents, check_sources, collate, digest, read_documents
from ptql.restoration.lora_task import Lesson, LoRATask, merged
from ptql.restoration.restored import Salience, describe, restoration_of, salience_of

if TYPE_CHECKING:
    from ptql.calibration.trainer import BlockTrainer
    from ptql.callbacks.restore_lora import LoRARestoration

FIRST, RESTORED = "first", "restored"  # folders of a run in three stages
FACTS = "restoration.json"
HOW = ("processes", "precision", "matmul")
DTYPES = {"bf16-mixed": torch.bfloat16, "bf16": torch.bfloat16, "32-true": torch.float32, "32": torch.float32}


@dataclass(frozen=True)
class Reading:
    """The training text, read.

    Args:
        sources: What it was read from.
        sha256: Of its documents.
        samples: In the order in which they are learned.
        length: The most tokens of a sample.
    """

    sources: list[str]
    sha256: str
    samples: Documents
    length: int


class Stage:
    """LoRA on one model; its folder holds what is needed to go on, TensorBoard's files, and in the end the model.

    Args:
        settings: What was asked for.
        trainer: Whose processes and devices do it.
        source: The full-precision model from which the first pass began.
        folder: Of this stage.
        default_text: The text where the settings name none.

    Raises:
        InputError: Something can't be had, or does not go together; nothing is written then.
    """

    def __init__(
        self, settings: LoRARestoration, trainer: BlockTrainer, source: Checkpoint, folder: Path, default_text: str
    ) -> None:
        self.settings, self.trainer, self.source, self.folder = settings, trainer, source, folder
        precision = trainer.arithmetic
        if precision not in DTYPES:
            raise InputError(
                f"precision={precision} with LoRARestoration: its gradients would vanish; use --trainer.precision "
                "bf16-mixed, or leave it out"
            )
        self.dtype = DTYPES[precision]
        self.reading = self._read(default_text)
        batch = settings.batch_size * settings.accumulate * trainer.world_size
        steps = settings.samples // batch
        if steps < 1:
            raise InputError(
                f"restoration samples={settings.samples}: a step of all {trainer.world_size} processes takes {batch}; "
                "use more"
            )
        self.lesson = Lesson(
            r=settings.r,
            alpha=settings.alpha,
            dropout=settings.dropout,
            linears=settings.linears(source.layout),
            lr=settings.lr,
            steps=steps,
            warmup=max(round(settings.warmup * steps), 1) if settings.warmup else 0,
            clip=settings.gradient_clip,
            distil=settings.distil,
            checkpointing=settings.gradient_checkpointing,
            seed=settings.seed,
        )
        self.identity = json.loads(json.dumps(self._identity()))
        self._salience: dict[str, Tensor] | None = None
        self._refuse_another()

    @property
    def model(self) -> Path:
        """Where the restored model is in the end."""
        return self.folder / MODEL

    @property
    def run_dir(self) -> Path:
        """Of the run in three stages that it belongs to."""
        return self.folder.parent

    @property
    def begun(self) -> bool:
        """Whether it has begun, so that the first pass is finished."""
        return (self.folder / FACTS).is_file()

    @property
    def finished(self) -> bool:
        return self.model.is_dir()

    @property
    def _learned(self) -> bool:
        """Whether anything that was learned is kept."""
        return self.finished or any(self.folder.glob(PATTERN))

    def _how(self) -> tuple[int, str, str]:
        return self.trainer.world_size, self.trainer.arithmetic, torch.get_float32_matmul_precision()

    def _identity(self) -> dict[str, Any]:
        """What decides the result, but for the first pass."""
        settings = self.settings
        names = ("samples", "packing", "batch_size", "accumulate", "r", "alpha", "dropout", "lr", "warmup")
        names += ("gradient_clip", "distil", "masks", "seed")
        return {
            "source": self.source.fingerprint(),
            "text_sha256": self.reading.sha256,
            "length": self.reading.length,
            "linears": list(self.lesson.linears),
            **{name: getattr(settings, name) for name in names},
            **dict(zip(HOW, self._how(), strict=True)),
        }

    def _read(self, default: str) -> Reading:
        settings, source = self.settings, self.source
        sources = settings.text or [default]
        check_sources(sources)
        tokenizer = load_tokenizer(source.directory)
        length = min(settings.length or 2048, source.context)
        if settings.length is not None and settings.length > source.context:
            raise InputError(
                f"restoration length={settings.length}: a sample is at most the model's context of {source.context} "
                "tokens; use that or less"
            )
        documents = read_documents(sources, tokenizer, length, bos_token(tokenizer, source.family.bos))
        samples = Documents(documents, tokenizer, settings.samples, length, settings.packing, settings.seed)
        samples[0]  # fails now if there is nothing to learn
        return Reading(sources, digest(documents), samples, length)

    def _refuse_another(self) -> None:
        """Raise `InputError` if the folder holds a stage that began in another way."""
        if not self.folder.exists():
            return
        if not self.folder.is_dir():
            raise InputError(f"{self.folder}: no directory; give another place for the restored model")
        try:
            found = dict(json.loads((self.folder / FACTS).read_text(encoding="utf-8")))["identity"]
        except FileNotFoundError:
            if any(file.name != f"{FACTS}.tmp" for file in self.folder.iterdir()):  # left by a process that was killed
                raise InputError(f"{self.folder}: holds files, but no {FACTS}; move them away") from None
            return
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise InputError(f"{self.folder / FACTS}: damaged ({error!r}); remove {self.folder}") from None
        if not self._learned:
            return  # nothing hangs on how it began: other devices may have more room
        apart = ("first", *(HOW if self.finished else ()))  # other processes may quantise what these have restored
        known, mine = ({k: v for k, v in each.items() if k not in apart} for each in (found, self.identity))
        if change := difference(known, mine):
            key, before, now = change
            raise InputError(
                f"{self.folder}: restored in another way: {key} was {before!r} and is {now!r} now; give another "
                "directory, or remove this one"
            )

    def check_room(self, run: Path) -> None:
        """Refuse a disk that has no room for the dense model beside what is written of the passes."""
        if self.finished:
            return
        needed = self.source.stored_bytes(list(self.source.files))
        place = next(folder for folder in (run, *run.absolute().parents) if folder.exists())
        free = shutil.disk_usage(place).free
        if needed > free:
            raise InputError(
                f"{run}: {free / 1e9:.2f} GB are free, and the restored model takes {needed / 1e9:.2f} GB; make room"
            )

    def check_first(self, first: Path) -> None:
        """Refuse a first pass whose model no plain one can take the place of, or another one than before."""
        packed = Checkpoint(first / MODEL)
        assert packed.packed is not None
        if reason := why_not_dense(packed.packed):
            raise InputError(
                f"{first / MODEL}: it has {reason}, so nothing can be merged into it; use a recipe without them "
                "(`learn_shift: false`)"
            )
        manifest = first / FOLDER / MANIFEST
        if not manifest.is_file():
            raise InputError(f"{manifest}: missing; a model is restored together with its run: keep the run's ledger")
        ledger = Ledger(first, read_manifest(manifest)["identity"])
        self.identity["first"] = ledger.checksum()
        if self.settings.masks == "first":  # now: what is damaged there would show after all of the learning
            before = Salience.beside(self.source.directory)  # a first pass of a restored model had these channels
            self._salience = salience_of(ledger, self.source) if before is None else load_file(before.file)
        if self._learned:
            found = json.loads((self.folder / FACTS).read_text(encoding="utf-8"))["identity"].get("first")
            if found != self.identity["first"]:
                raise InputError(f"{self.folder}: restores another first pass than {first}; remove it, to do it again")

    # Learning

    def run(self, first: Path) -> Path:
        """Learn, from where an earlier process stopped, and write the restored model; every process comes here.

        Args:
            first: The finished first pass.

        Returns:
            The model's directory.
        """
        if self.trainer.ranks.all(self.finished):
            self._say("restored earlier")
            if self.trainer.is_global_zero:
                Partial(self.folder).clear()  # left by a process that was killed when the model was in place
            return self.model
        trainer = self.trainer
        self.check_first(first)
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not self._learned:
                put_text(self.folder / FACTS, json.dumps({"identity": self.identity}, indent=2) + "\n")
        trainer.strategy.barrier("restoration")
        partial = Partial(self.folder)
        student, state = Checkpoint(first / MODEL), self._state(partial)
        task = LoRATask(student, self.source if self.lesson.distil else None, self.lesson, self.dtype, state)
        if task.first_step:
            self._say(f"goes on behind step {task.first_step} of {self.lesson.steps}")
        keeper = Keeper(trainer, partial, self.settings.every_seconds, self.lesson.steps)
        left = self.lesson.steps - task.first_step
        if left:
            self._learn(task, keeper, left)
            state = keeper.state
        if trainer.is_global_zero:
            assert state is not None  # of this process, or of one that was stopped while the model was being written
            self._write(student, first, state)
            partial.clear()
        del task
        give_back_memory()
        trainer.strategy.barrier("restored")
        return self.model

    def _learn(self, task: LoRATask, keeper: Keeper, left: int) -> None:
        settings, outer = self.settings, self.trainer
        first = task.first_step * settings.accumulate
        size, world, rank = settings.batch_size, outer.world_size, outer.global_rank
        mine = [
            (batch * world + rank) * size + place
            for batch in range(first, self.lesson.steps * settings.accumulate)
            for place in range(size)
        ]
        loader = DataLoader(Subset(self.reading.samples, mine), size, collate_fn=collate)
        logger: Any = False
        if outer.loggers:
            logger = RunLogger(self.folder, name="tensorboard", version="")
            logger.first_step = task.first_step
            logger.forget_after(task.first_step)
        inner = Trainer(
            **outer.processes(),
            precision="32-true",  # the task has its own arithmetic: every strategy takes that
            max_steps=left,
            accumulate_grad_batches=settings.accumulate,
            default_root_dir=self.folder,
            logger=logger,
            log_every_n_steps=outer.log_every_n_steps,  # type: ignore[attr-defined]
            callbacks=[keeper, *self.settings.progress(outer, self.lesson.steps, task.first_step)],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        inner.strategy.checkpoint_io = LocalCheckpointIO()
        # signals are asked for by Keeper; Lightning would wait for the GPU in each step
        inner.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
        try:
            inner.fit(task, loader)
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"restoration: out of memory on {outer.strategy.root_device} with batches of {size} x "
                f"{self.reading.length} tokens; let its gradient_checkpointing be true and its batch_size 1, or spread "
                "the model over several GPUs: `ptql restore --run RUN -c strategies/fsdp2`"
            ) from error
        finally:
            outer.signals.learning = False
            if logger:
                logger.close()
        if outer.ranks.any(outer.signals.received is not None):  # after the last look inside
            outer.stop()

    def _state(self, partial: Partial) -> dict[str, Any] | None:
        """What an earlier process saved, if every process can read it."""
        path = partial.find(0, lambda file: self._say(f"{file}: not what was written (checksum); it begins anew"))
        if not self.trainer.ranks.all(path is not None):
            return None
        return torch.load(path, map_location="cpu", weights_only=True)  # type: ignore[arg-type]

    def _write(self, student: Checkpoint, first: Path, state: dict[str, Any]) -> None:
        before = json.loads((self.folder / FACTS).read_text(encoding="utf-8"))
        facts = {
            **before,
            # of a model that was restored before, the very first
            "source": restoration_of(self.source.directory).get("source", str(self.source.directory.absolute())),
            "first": str(first.absolute()),
            "text": self.reading.sources,
            "steps": self.lesson.steps,
            "tokens": state["tokens"],
            "seconds": round(state["seconds"], 1),
            "skipped_steps": state["skipped"],
            "losses": [[step, loss if math.isfinite(loss) else str(loss)] for step, loss in state["losses"]],
        }
        blocks, dtype = student.family.blocks, self.source.dtype()
        dense = merged(dense_tensors(student), blocks, state["lora"], self.lesson.scale, dtype)
        put_text(self.folder / FACTS, json.dumps(facts, indent=2) + "\n")
        write_dense(student, dense, self.model, describe(facts, self._salience))

    def _say(self, line: str) -> None:
        if self.trainer.is_global_zero:
            print(f"ptql: restoration: {line}", file=sys.stderr, flush=True)


class Keeper(Callback):
    """Saves the stage now and then, and when a signal came; holds what was learned in the end.

    Args:
        outer: The run's trainer, which knows of signals and processes.
        partial: Where it is saved.
        every_seconds: Save if the last save, or the start, is at least so long ago.
        steps: Of the whole stage.
    """

    def __init__(self, outer: BlockTrainer, partial: Partial, every_seconds: float, steps: int) -> None:
        self.outer, self.partial, self.every_seconds, self.steps = outer, partial, every_seconds, steps
        self.state: dict[str, Any] | None = None
        """What was saved last."""
        self._saved = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LoRATask) -> None:  # type: ignore[override]
        self.outer.signals.learning = True  # from here on a signal waits for the end of the step
        self.outer.signals.take_over()  # from Lightning, which has just put its own handler in place
        self._saved = time.monotonic()

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: Trainer, pl_module: LoRATask, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return  # gradients of part of a step are not saved
        step = pl_module.first_step + trainer.global_step
        pl_module.optimizer_done(step)
        ranks, stop = self.outer.ranks, self.outer.ranks.any(self.outer.signals.received is not None)
        due = trainer.is_global_zero and time.monotonic() - self._saved >= self.every_seconds
        if step == self.steps or ranks.any(due) or stop:
            self.state = pl_module.state(step)
            if trainer.is_global_zero:
                torch.save(self.state, self.partial.scratch)
                self.partial.keep(0)
            trainer.strategy.barrier("restoration saved")
            self._saved = time.monotonic()
        if stop:
            self.outer.stop()
