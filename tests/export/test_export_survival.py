"""Exports that are killed or found wrong leave nothing under their name, and what reads them back needs no ptql."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch import Tensor

from ptql.cli import main
from ptql.export.compressed_tensors import CompressedTensors
from ptql.export.dense import Dense
from ptql.export.layers import IntLayer
from ptql.export.reload import SCRIPTS
from ptql.recipe import ActivationScheme
from tests.export.exported import CPU, RTN, fit, left, loaded, logits, plain_model, save_exact_source, weights

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[2]
SLOWLY = """
import sys, time
from ptql.cli import main
from ptql.export import directory
block = directory.LayerTarget.block
def slow(self, model, index):
    time.sleep(600 if index else 0)
    return block(self, model, index)
directory.LayerTarget.block, directory.SHARD_BYTES = slow, 10_000
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    save_exact_source(folder)
    return fit(folder, "RUN", *RTN, *weights(4, True))


def command(run: Path, out: Path) -> list[str]:
    return ["export", str(run), "--out", str(out), "--text", str(run.parent / "words.txt"), "--length", "32", *CPU]


def test_a_killed_export_has_no_name_and_the_same_command_succeeds(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    args = [*command(run, out), "--check", "false"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", SLOWLY, *args], env=environment, stderr=subprocess.DEVNULL) as process:
        while not (tmp_path / ".out.tmp/0.part").exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert left(tmp_path) == {".out.tmp"}
    assert main(args) == 0
    assert left(tmp_path) == {"out"}
    assert left(out) >= {"config.json", "model.safetensors", "tokenizer.json", "README.md"}
    assert not list(out.glob("*.part"))
    assert logits(loaded(out)).equal(logits(plain_model(run)))


def test_other_logits_leave_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = CompressedTensors.layer

    def wrong(self: CompressedTensors, layer: IntLayer, activation: ActivationScheme) -> dict[str, Tensor]:
        stored = right(self, layer, activation)
        return {**stored, "weight_scale": -stored["weight_scale"]}

    monkeypatch.setattr(CompressedTensors, "layer", wrong)
    assert main(command(run, tmp_path / "out")) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("ptql: error: compressed-tensors: transformers ")
    assert "so nothing was written" in said
    assert left(tmp_path) == set()


def test_an_export_that_does_not_load_leaves_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = Dense.block

    def fewer(self: Dense, model, index: int):
        return (found for found in right(self, model, index) if found[0] != "self_attn.q_proj.weight")

    monkeypatch.setattr(Dense, "block", fewer)
    assert main([*command(run, tmp_path / "out"), "--format", "dense"]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert "dense: transformers could not load the export (the tensors are not those of the model" in said
    assert "model.layers.0.self_attn.q_proj.weight" in said
    assert left(tmp_path) == set()


def test_loaders_import_nothing_of_ptql() -> None:
    for file in SCRIPTS.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or "."] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] in ("ptql", "") for name in names), file
