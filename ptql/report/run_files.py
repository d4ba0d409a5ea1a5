"""What a run's directory says, however much of it is there: nothing here fails because a part is missing or odd."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open

from ptql.report.numbers import real
from ptql.report.ranges import Peaks

BEFORE, AFTER = "ranges.before.", "ranges.after."


@dataclass(frozen=True)
class Block:
    """A finished block: its index in the model, and what the manifest notes of it."""

    index: int
    summary: dict[str, Any]

    def number(self, key: str) -> float:
        """A figure of the summary; nan if it has none."""
        return real(self.summary.get(key))

    @property
    def layers(self) -> dict[str, float]:
        """Relative squared weight error by linear layer; empty in runs that did not note it."""
        return {str(name): real(value) for name, value in section(self.summary, "layers").items()}


@dataclass(frozen=True)
class RunFiles:
    """The files of a run that the page is made of.

    Args:
        path: The run's directory.
        metrics: metrics.json.
        config: config.yaml, and its text.
        identity: What the ledger says decides the result.
        blocks: Finished blocks, in order.
        troubles: Sentences on files that are missing or can't be read.
    """

    path: Path
    metrics: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    config_text: str = ""
    identity: dict[str, Any] = field(default_factory=dict)
    blocks: list[Block] = field(default_factory=list)
    troubles: list[str] = field(default_factory=list)

    def series(self, key: str) -> list[float]:
        """One figure of every block."""
        return [block.number(key) for block in self.blocks]

    @property
    def layer_names(self) -> list[str]:
        """All linear layers with a noted error, in order of execution."""
        return list(dict.fromkeys(name for block in self.blocks for name in block.layers))

    def ranges(self, block: Block) -> dict[str, tuple[Peaks | None, Peaks | None]]:
        """Largest |input| of each channel before and after, by the first linear layer that reads it."""
        file = self.path / "ledger" / Path(str(block.summary.get("file", ""))).name
        if not file.is_file():
            return {}
        try:
            with safe_open(file, "pt") as tensors:
                names = [name for name in tensors.keys() if name.startswith((BEFORE, AFTER))]  # noqa: SIM118
                found = {name: tensors.get_tensor(name).flatten().float() for name in names}
        except (OSError, SafetensorError):
            return {}
        order = {name: place for place, name in enumerate(self.layer_names)}
        sites = sorted(
            {name.removeprefix(BEFORE).removeprefix(AFTER) for name in found}, key=lambda s: (order.get(s, 99), s)
        )
        return {site: (found.get(BEFORE + site), found.get(AFTER + site)) for site in sites}


def read_run(path: Path) -> RunFiles:
    """Read what there is of a run."""
    troubles: list[str] = []
    metrics = _object(path / "metrics.json", json.loads, troubles)
    config = _object(path / "config.yaml", yaml.safe_load, troubles)
    manifest = _object(path / "ledger" / "manifest.json", json.loads, troubles)
    blocks = [
        Block(int(index), summary)
        for index, summary in section(manifest, "blocks").items()
        if str(index).isdecimal() and isinstance(summary, dict)
    ]
    return RunFiles(
        path=path,
        metrics=metrics,
        config=config,
        config_text=_text(path / "config.yaml"),
        identity=section(manifest, "identity"),
        blocks=sorted(blocks, key=lambda block: block.index),
        troubles=troubles,
    )


def section(values: Any, *keys: str) -> dict[str, Any]:
    """The object at `keys` inside nested objects; empty if there is none."""
    for key in keys:
        values = values.get(key) if isinstance(values, dict) else None
    return values if isinstance(values, dict) else {}


def finite(values: list[float]) -> list[float]:
    """Those that are neither infinite nor nan."""
    return [v for v in values if math.isfinite(v)]


def _object(path: Path, parse: Callable[[str], Any], troubles: list[str]) -> dict[str, Any]:
    try:
        found = parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        troubles.append(f"{path.name} is missing; what it would say is left out.")
        return {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        troubles.append(f"{path.name} can't be read ({' '.join(str(error).split())[:200]}); it is left out.")
        return {}
    if not isinstance(found, dict):
        troubles.append(f"{path.name} holds no object; it is left out.")
        return {}
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
