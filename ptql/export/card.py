"""The model card of an export: what it is, how it was made, what was measured."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path, PurePath
from typing import Any

import yaml

from ptql import __version__
from ptql.checkpoint import Checkpoint, is_hub_id
from ptql.evaluation.recorded_run import CONFIG
from ptql.export.reload import Reloaded
from ptql.report.recipe_words import recipe_of
from ptql.report.run_files import RunFiles, read_run, section

TASK = "text-generation"
USE = {
    "compressed-tensors": "vllm serve DIR\n# or, with compressed-tensors: AutoModelForCausalLM.from_pretrained(DIR)",
    "gptq": "vllm serve DIR        # 4 and 8 bits, symmetric\n# or GPTQModel.load(DIR)",
    "gptq_v2": "GPTQModel.load(DIR)   # Python: from gptqmodel import GPTQModel",
    "auto-round": "vllm serve DIR\n# or, in Python: import auto_round; AutoModelForCausalLM.from_pretrained(DIR)",
    "dense": "AutoModelForCausalLM.from_pretrained(DIR)   # Python; a model like any other",
    "gguf": "llama-cli -m DIR/model.gguf",
}


def card(model: Checkpoint, run: Path | None, target: str, size: int, command: str, found: Reloaded | None) -> str:
    """README.md in the form of the hub.

    Args:
        model: What was exported.
        run: Whose model it is, if it is a run's.
        target: The format.
        size: Of the weight files, in bytes.
        command: That made the directory.
        found: What the runtime made of it.
    """
    files = None if run is None else read_run(run)
    assert model.packed is not None
    name = base_model(recipe_of(files).source if files is not None else str(model.directory))
    head = {"tags": ["ptql", target, "quantized"], "pipeline_tag": TASK, "base_model": name}
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {PurePath(name).name}, {model.packed.method}, {target}",
        *_made(files, model),
        f"- Size: {size / 1e6:,.1f} MB, {8 * size / model.parameters:.3f} bits a parameter, embeddings included.",
        f"- Made by ptql {__version__}: `{command}`",
        f"\n```\n{USE[target].replace('DIR', '.')}\n```",
        *_quality(files),
        *_check(found),
        *_recipe(run),
    ]
    return "\n".join(parts) + "\n"


def base_model(source: str) -> str:
    """What the hub calls a model, `owner/name`, also of a directory in the hub's cache; of others their own name."""
    for folder, inner in pairwise(PurePath(source).parts):
        if folder.startswith("models--") and inner == "snapshots":
            return folder.removeprefix("models--").replace("--", "/")
    return source if is_hub_id(source) else PurePath(source).name or "A model"


def _made(files: RunFiles | None, model: Checkpoint) -> list[str]:
    assert model.packed is not None
    if files is None:
        return [f"- Method: {model.packed.method}; format: `{json.dumps(model.packed.weight.to_dict())}`"]
    recipe, data = recipe_of(files), section(files.config, "data")
    lines = [f"- Method: {recipe.method}; scheme: {recipe.scheme} ({recipe.words})"]
    if data:
        text = PurePath(str(data.get("text", "pydoc"))).name
        lines.append(f"- Calibrated on: {text}, {data.get('samples')} windows of {data.get('length')} tokens")
    if bits := files.metrics.get("bits_per_weight"):
        lines.append(f"- {bits:.3f} bits per quantised weight as ptql packs it, scales and zero points included")
    return lines


def _quality(files: RunFiles | None) -> list[str]:
    """Perplexity before and after, as `ptql eval` found it."""
    after = section(files.metrics, "ppl") if files is not None else {}
    if files is None or not after:
        return []
    before = section(files.metrics, "source", "ppl")
    rows = [f"| {text} | {_number(before.get(text))} | {_number(value)} |" for text, value in after.items()]
    return ["\n## Perplexity\n", "| text | full precision | quantised |", "|---|---:|---:|", *rows]


def _number(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else "" if value is None else str(value)


def _check(found: Reloaded | None) -> list[str]:
    if found is None:
        return ["\nThis directory was not read back when it was made."]
    held = "" if found.quantised is None else f" Quantised matrices that it holds as codes: {found.quantised}, all."
    return [
        "\n## Read back\n",
        f"Loaded by {found.loader} in a process of its own; {found.windows} windows of {found.length} tokens "
        f"({PurePath(found.text).name}):\n",
        "| | ptql, float32 | " + found.loader.split(",")[0] + " |",
        "|---|---:|---:|",
        f"| perplexity | {found.perplexity:.4f} | {found.perplexity_reloaded:.4f} |",
        f"\nLargest difference of a logit: {found.logits_off:.2g}; the logits' own spread: "
        f"{found.logits_spread:.2g}.{held}",
    ]


def _recipe(run: Path | None) -> list[str]:
    """The run's recipe, without places on the machine that made it."""
    if run is None:
        return []
    config = yaml.safe_load((run / CONFIG).read_text(encoding="utf-8"))
    recipe = {name: value for name, value in config.get("model", {}).items() if name != "source"}
    return ["\n## Recipe\n", f"```yaml\n{yaml.safe_dump({'model': recipe}, sort_keys=False)}```"]
