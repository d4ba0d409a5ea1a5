"""ptql from Python: the command line's engine, with its errors as exceptions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.pytorch import Callback


def quantize(
    source: str | Path,
    *,
    method: str | Path = "lrquant",
    scheme: str | Path = "w4a4",
    data: str | Path = "pydoc",
    out: str | Path = "ptql-run",
    configs: Sequence[str | Path] = (),
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Quantise a model, as `ptql fit` does; called again with the same arguments, a stopped run goes on.

    With several devices (`settings={"trainer.devices": 2, "trainer.strategy": "ddp"}`) Lightning starts the calling
    script once for each, so the call belongs under `if __name__ == "__main__":`, and after an error the script must
    end: the other processes wait for this one.

    Args:
        source: Model directory, or a hub id (owner/name).
        method: A shipped method (`lrquant`, `omniquant`, …), or a file.
        scheme: Shipped bits (`w4a4`, `w2a16g64`, …), or a file.
        data: Text to calibrate on: a .txt or .jsonl file, or a name as for --data.text.
        out: The run's directory.
        configs: Further configuration files; later ones win.
        settings: Further options by their names on the command line, without `--`: `{"trainer.max_epochs": 5}`.

    Returns:
        The run's metrics.json; the model is in `out`/model.

    Raises:
        InputError: Something given is wrong; the text says the value, the rule and the remedy.
        RunError: Something around the run broke; the same call goes on.
        KeyboardInterrupt: Stopped by Ctrl-C; the same call goes on.
        Stopped: Stopped by SIGTERM, a SystemExit of 143; the same call goes on.
    """
    from ptql.calibration.stopping import Stopped, end_with_parent
    from ptql.cli import run_command
    from ptql.evaluation.recorded_run import METRICS
    from ptql.evaluation.results import read_metrics

    end_with_parent()  # where this is one of several processes, started by the first
    args = ["fit", "-c", _shipped("methods", method), "-c", _shipped("schemes", scheme)]
    for file in configs:
        args += ["-c", str(file)]
    named = {"model.source": source, "data.text": data, "trainer.default_root_dir": out, **(settings or {})}
    try:
        run_command([*args, *(f"--{name}={_written(value)}" for name, value in named.items())])
    except Stopped as stop:
        if stop.code == 130:
            raise KeyboardInterrupt from None
        raise
    return read_metrics(Path(named["trainer.default_root_dir"]) / METRICS)


def evaluate(
    run: str | Path | None = None,
    *,
    source: str | Path | None = None,
    text: str | Path | Mapping[str, str | Path] | None = None,
    tasks: str | Sequence[str] = (),
    include_path: str | Path | None = None,
    limit: int | None = None,
    length: int | None = None,
    windows: int | None = None,
    batch_size: int = 4,
    out: str | Path | None = None,
    compare_source: bool = False,
    accelerator: str = "auto",
    callbacks: Sequence[Callback] = (),
) -> dict[str, Any]:
    """Measure a finished run or a model directory, as `ptql eval` does.

    Args:
        run: A finished run, whose metrics.json and report get the results.
        source: Or a model directory or hub id.
        text: Texts for perplexity by name; one file is called by its stem.
        tasks: Names of lm-eval tasks: a list, or with commas between them.
        include_path: Folder of further lm-eval task files.
        limit: Items of each task; None for all.
        length: Tokens of a window; None for 2048, or the model's context where that is shorter.
        windows: Windows of each text; None for all.
        batch_size: Windows, or items, at a time.
        out: JSON file for the results, merged into what it holds.
        compare_source: Measure the run's full-precision source as well.
        accelerator: Where: `cpu`, `gpu`, `auto`.
        callbacks: That measure in their ways as well: `TestTimeAdaptation(mode="prefix")` of `ptql.callbacks`.

    Returns:
        `{"ppl": {name: float}, "ppl_details": …, "tasks": …}`, and the same of the source under `source`.

    Raises:
        InputError: Something given is wrong.
    """
    from ptql.calibration.quant_lm import QuantLM
    from ptql.calibration.trainer import BlockTrainer
    from ptql.cli import quieten

    quieten()
    trainer = BlockTrainer(
        accelerator=accelerator,
        devices=1,
        logger=False,
        enable_progress_bar=False,
        max_epochs=0,
        callbacks=list(callbacks),
    )
    texts = {Path(text).stem: text} if isinstance(text, (str, Path)) else dict(text or {})
    return trainer.eval(
        QuantLM(source=None if source is None else str(source)),
        run=None if run is None else str(run),
        text={name: str(file) for name, file in texts.items()},
        tasks=tasks if isinstance(tasks, str) else list(tasks),
        include_path=None if include_path is None else str(include_path),
        limit=limit,
        length=length,
        windows=windows,
        batch_size=batch_size,
        json=None if out is None else str(out),
        compare_source=compare_source,
    )


def _shipped(folder: str, name: str | Path) -> str:
    return str(name) if Path(name).is_file() else f"{folder}/{name}"


def _written(value: Any) -> str:
    """A value as on the command line: text as it is, everything else as JSON, which YAML includes."""
    return str(value) if isinstance(value, (str, Path)) else json.dumps(value, default=str)
