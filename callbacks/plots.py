"""What TensorBoard shows of each block: losses, errors, what was learned, activations before and after."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.loggers import TensorBoardLogger
from ptql.callbacks.block import BlockCallback
from ptql.callbacks.range_figure import range_figure
from torch import Tensor

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from ptql.calibration.block_task import BlockTask
    from ptql.calibration.ledger import BlockRecord
    from ptql.calibration.quant_lm import QuantLM
    from ptql.calibration.trainer import BlockTrainer

GIB = 2**30
SCALARS = {
    "loss_start": 1,
    "mse": 1,
    "seconds": 1,
    "skipped_steps": 1,
    "peak_gpu_bytes": GIB,
    "peak_host_bytes": GIB,
    "loss": 1,  # the last one: a block that has it has all
}
LAST, TEXT = "block/loss", "configuration"


class BlockPlots(BlockCallback):
    """Plots of each block, with the block's index as step; each is written once, however often a run is resumed.

    A TensorBoard logger gets everything; other loggers get the scalars.

    Args:
        histograms: Distributions of clipping (share of the range that is kept) and of smoothing scales and shifts.
        images: Largest input of each channel before and after.
    """

    def __init__(self, histograms: bool = True, images: bool = True) -> None:
        self.histograms = histograms
        self.images = images
        self._drawn: dict[str, set[int]] = {}  # by directory of a logger
        self._sites: dict[str, str] = {}

    def on_model_start(self, trainer: BlockTrainer, model: QuantLM) -> None:
        if trainer.is_global_zero:
            self._drawn = {logger.log_dir: drawn_blocks(Path(logger.log_dir)) for logger in _boards(trainer)}

    def on_block_start(self, trainer: BlockTrainer, task: BlockTask) -> None:
        self._sites = dict(_sites(task))

    def on_block_end(self, trainer: BlockTrainer, record: BlockRecord) -> None:
        if not trainer.is_global_zero:
            return
        scalars = dict(_scalars(record.summary))
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                drawn = self._drawn.setdefault(logger.log_dir, set())
                if not drawn:
                    _configuration(logger.experiment, trainer.run_dir / "config.yaml")
                if trainer.block not in drawn:
                    self._draw(logger.experiment, trainer.block, record, scalars)
                    drawn.add(trainer.block)
            elif not record.resumed:
                logger.log_metrics(scalars, step=trainer.block)

    def _draw(self, board: SummaryWriter, block: int, record: BlockRecord, scalars: dict[str, float]) -> None:
        if self.histograms:
            for name, values in _clipping(record.learned):
                board.add_histogram(name, values, block)
            for name, values in self._smoothing(record.learned):
                board.add_histogram(name, values, block)
        if self.images and record.ranges:
            board.add_image("activations", range_figure(record.ranges, f"Block {block}"), block, dataformats="HWC")
        for name, value in scalars.items():
            board.add_scalar(name, value, block)
        board.flush()  # a kill would lose up to two minutes of what is not yet on disk

    def _smoothing(self, learned: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        for name, values in learned.items():
            path, _, kind = name.rpartition(".")
            if path.startswith("transforms.") and len(values := _finite(values)):
                yield f"smoothing_{kind}/{self._sites.get(path, path.removeprefix('transforms.'))}", values


def drawn_blocks(directory: Path) -> set[int]:
    """Blocks that an earlier process has drawn into the event files of a directory."""
    if not any(directory.glob("events.out.tfevents.*")):
        return set()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory), {"scalars": 0, "images": 1, "histograms": 1, "tensors": 1})
    with _quiet(logging.getLogger("tensorboard")):  # it tells of steps that were taken back when a run went on
        events.Reload()
    return {event.step for event in events.Scalars(LAST)} if LAST in events.Tags()["scalars"] else set()


@contextmanager
def _quiet(logger: logging.Logger) -> Iterator[None]:
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _boards(trainer: BlockTrainer) -> list[TensorBoardLogger]:
    return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def _configuration(board: SummaryWriter, file: Path) -> None:
    """The merged configuration, as TensorBoard's text tab shows it."""
    if file.is_file():
        board.add_text(TEXT, f"```yaml\n{file.read_text(encoding='utf-8')}\n```", 0)


def _scalars(summary: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for layer, error in summary.get("layers", {}).items():
        yield f"weight_error/{layer}", float(error)
    for key, unit in SCALARS.items():
        if key in summary:
            yield f"block/{key.replace('_bytes', '_gib')}", float(summary[key]) / unit


def _clipping(learned: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Shares of the range that are kept, 1 is no clipping; of each layer's lower and upper ends."""
    for name, logits in learned.items():
        path, _, end = name.rpartition(".")
        if path.startswith("quantizers.") and end in ("lower", "upper") and len(values := _finite(logits)):
            yield f"clipping_{end}/{path.removeprefix('quantizers.').replace('/', '.')}", values.sigmoid()


def _sites(task: BlockTask) -> Iterator[tuple[str, str]]:
    """What is smoothed, by the path of the module that does it."""
    for path, module in task.named_modules():
        if path.startswith("transforms.") and (site := getattr(module, "site", None)) is not None:
            yield path, getattr(module, "name", None) or getattr(site, "name", type(module).__name__)


def _finite(values: Tensor) -> Tensor:
    """Those that a histogram can hold, flat."""
    flat = values.detach().flatten().float()
    return flat[flat.isfinite()]
