"""What was run: model, recipe, data, software, and the whole configuration."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ptql.report.html import Markup, tag
from ptql.report.numbers import real
from ptql.report.recipe_words import recipe_of
from ptql.report.run_files import RunFiles, section
from ptql.report.tables import titled

PACKAGES = ("torch", "lightning", "transformers")


def setup(run: RunFiles) -> Markup:
    """The section on how to get the same result again."""
    facts = [(name, value) for name, value in _facts(run) if value]
    rows = [tag("div", tag("dt", name), tag("dd", value)) for name, value in facts]
    parts: list[Markup] = [tag("dl", rows, class_="facts")]
    if run.config_text:
        parts.append(tag("p", "The configuration below runs it again: ", tag("code", "ptql fit -c config.yaml"), "."))
        text = tag("pre", run.config_text, tabindex=0)
        parts.append(tag("details", tag("summary", "Whole configuration (config.yaml)"), text, id="config"))
    else:
        parts.append(tag("p", "The configuration is not in the run's directory.", class_="absent"))
    return titled("What was run", "setup", parts)


def _facts(run: RunFiles) -> list[tuple[str, str]]:
    recipe, fit = recipe_of(run), section(run.metrics, "fit")
    data, trainer, model = (section(run.config, key) for key in ("data", "trainer", "model"))
    return [
        ("Model", str(fit.get("original") or fit.get("source") or model.get("source") or "")),
        ("Restored", str(fit.get("source")) if fit.get("original") else ""),
        ("Method", recipe.method),
        ("Scheme", f"{recipe.scheme}: {recipe.words}" if recipe.scheme else ""),
        ("Transforms", _transforms(run)),
        ("Objective", _part(section(run.identity, "recipe", "objective"))),
        ("Calibration", _calibration(data)),
        ("Learning", _learning(trainer)),
        ("Device", _device(fit)),
        ("Software", _software(run)),
        ("Checksum", str(fit.get("checksum", ""))),
        ("Directory", run.path.resolve().name),
    ]


def _device(fit: dict[str, Any]) -> str:
    several = real(fit.get("processes"))
    return str(fit.get("device", "")) + (f", {several:g} processes" if several > 1 else "")


def _calibration(data: dict[str, Any]) -> str:
    if not data:
        return ""
    windows = f"{data.get('samples', '?')} windows of {data.get('length', '?')} tokens"
    return f"{windows} from {data.get('text', '?')}, in batches of {data.get('batch_size', '?')}"


def _learning(trainer: dict[str, Any]) -> str:
    epochs = trainer.get("max_epochs")
    precision = trainer.get("precision")
    if epochs is None:
        return ""
    return f"{epochs} epochs a block" + (f", {precision}" if precision else "")


def _transforms(run: RunFiles) -> str:
    found = section(run.identity, "recipe").get("transforms")
    return "; ".join(_part(part) for part in found if isinstance(part, dict)) if isinstance(found, list) else ""


def _part(settings: dict[str, Any]) -> str:
    """A part's class and those of its settings that are numbers or words, and not off."""
    words = [
        f"{key} {value if isinstance(value, str) else f'{value:g}'}"
        for key, value in settings.items()
        if key != "class" and isinstance(value, (str, int, float)) and not isinstance(value, bool) and value
    ]
    return str(settings.get("class", "")) + (f" ({', '.join(words)})" if words else "")


def _software(run: RunFiles) -> str:
    """ptql as the ledger has it; the others are those that wrote the page."""
    ours = section(run.identity, "recipe").get("ptql")
    found = [f"ptql {ours}"] if ours else []
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)
