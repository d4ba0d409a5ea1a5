"""The README and the guide: links lead somewhere, options and shipped names exist, YAML and Python parse."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import yaml

from ptql.cli import main

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
OTHERS = {"--no-deps", "--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint", "--logdir"}
OTHERS |= {"--aug_loss", "--true-sequential", "--static-groups"}
"""Options of pip, torchrun and TensorBoard, and some of the originals."""
BESIDE_HELP = {"--text.NAME", "--print_config", "--help"}
OWN = {"--model.objective.skip", "--model.activation_quantizer.keep"}  # of the pages' example parts


@pytest.fixture(scope="module")
def options() -> set[str]:
    """What `--help` of the commands names."""
    import contextlib
    import io

    text = io.StringIO()
    for command in ("fit", "eval", "restore", "export"):
        with contextlib.redirect_stdout(text), pytest.raises(SystemExit):
            main([command, "--help"])
    return set(re.findall(r"--[a-z][\w.]*", text.getvalue()))


def fences(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path) if path else page
        assert found.exists(), target
        if anchor:
            assert anchor in anchors(found), target


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs/README.md").read_text()
    pages = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")} - {"README.md"}
    assert {page for page in pages if f"({page}" not in index} == set()


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_options_exist(page: Path, options: set[str]) -> None:
    known = options | OTHERS | BESIDE_HELP | OWN
    for option in set(re.findall(r"(?<![\w-])--[a-z][\w.-]*\w", page.read_text())):
        # An argument of a part has no line of its own in the help: `--model.objective.rse`.
        part = option.rpartition(".")[0]
        of_part = part.startswith(("--model.", "--trainer.")) and f"{part}.help" in known
        assert option in known or of_part or option.startswith("--text."), option


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_shipped_names_exist(page: Path) -> None:
    for folder, name in re.findall(r"-c (methods|schemes|strategies)/(\w+(?:\.\w+)*)", page.read_text()):
        assert (ROOT / "configs" / folder / f"{name}.yaml").is_file(), name
    for name in re.findall(r"`(ptql/[\w/]+\.py|tests/[\w/]+\.py|benchmarks/[\w/]+\.py)`", page.read_text()):
        assert (ROOT / name).is_file() or "NAME" in name, name


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_python_and_yaml_parse(page: Path) -> None:
    for code in fences(page, "python"):
        ast.parse(code)
    for text in fences(page, "yaml"):
        assert isinstance(yaml.safe_load(text), dict)
