"""The README.md of an export: what the hub reads of it, and what people do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import ptql
from ptql.cli import main
from ptql.export.card import base_model
from tests.export.exported import CPU, RTN, export, exported, fit, save_exact_source, weights

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    save_exact_source(folder)
    return fit(folder, "RUN", *RTN, *weights(4, True, 32))


def parts(folder: Path) -> tuple[dict[str, Any], str]:
    """Front matter and text."""
    empty, head, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    assert empty == ""
    return yaml.safe_load(head), text


def bits_of_a_parameter(out: Path) -> float:
    """Counted by hand: embeddings, two norms in each of two blocks and the last one; seven matrices a block."""
    matrices = 2 * (64 * 64 * 2 + 32 * 64 * 2 + 3 * 96 * 64)
    return 8 * (out / "model.safetensors").stat().st_size / (matrices + 64 * 64 + 5 * 64)


def test_a_card_says_what_it_is_and_what_was_found(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = run.parent / "words.txt"
    out = run.parent / "checked"
    assert main(["export", str(run), "--out", str(out), "--text", str(text), "--length", "32", *CPU]) == 0
    head, body = parts(out)
    assert head == {
        "tags": ["ptql", "compressed-tensors", "quantized"], "pipeline_tag": "text-generation", "base_model": "source",
    }  # fmt: skip
    assert body.startswith("# source, rtn, compressed-tensors\n")
    assert "- Method: rtn; scheme: w4a16g32 (4-bit weights (groups of 32 columns, symmetric), activations as" in body
    assert "- Calibrated on: words.txt, 2 windows of 16 tokens" in body
    stored = json.loads((run / "metrics.json").read_text())["bits_per_weight"]
    assert f"- {stored:.3f} bits per quantised weight as ptql packs it" in body
    assert f", {bits_of_a_parameter(out):.3f} bits a parameter" in body
    assert f"- Made by ptql {ptql.__version__}: `ptql export --run RUN --format compressed-tensors" in body
    assert "4 windows of 32 tokens (words.txt):" in body
    assert "Loaded by transformers" in body
    (row,) = (line for line in body.splitlines() if line.startswith("| perplexity"))
    ours, theirs = (float(cell) for cell in row.split("|")[2:4])
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert "Largest difference of a logit: " in body
    assert "vllm serve ." in body
    assert yaml.safe_load(body.split("```yaml\n")[1].split("```")[0])["model"]["weight"]["group_size"] == 32
    assert "Perplexity" not in body
    said = capsys.readouterr().out
    assert f"{out}: " in said
    assert "reads it: perplexity" in said


def test_no_place_of_this_machine_is_told(run: Path) -> None:
    for options in ([], ["--format", "dense", "--dtype", "float32"]):
        out = run.parent / f"places{len(options)}"
        assert export(run, out, "--check", "false", *options) == 0
        for file in ("README.md", "config.json"):
            found = (out / file).read_text()
            assert str(run.parent) not in found
            assert str(Path.home()) not in found.replace(str(Path.home() / "x"), "")
    assert "This directory was not read back when it was made." in parts(out)[1]


def test_perplexity_is_in_it_where_it_was_measured(run: Path) -> None:
    out = run.parent / "measured"
    texts = ["--text.words", str(run.parent / "words.txt"), "--compare_source", "true", "--length", "32"]
    assert main(["eval", "--run", str(run), *texts, *CPU]) == 0
    try:
        found = json.loads((run / "metrics.json").read_text())
        exported(run, out)
        before, after = found["source"]["ppl"]["words"], found["ppl"]["words"]
        table = "| text | full precision | quantised |\n|---|---:|---:|\n"
        assert f"{table}| words | {before:.3f} | {after:.3f} |" in parts(out)[1]
    finally:
        (run / "metrics.json").write_text(json.dumps({k: v for k, v in found.items() if k not in ("ppl", "source")}))


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
        ("/home/x/hub/models--Qwen--Qwen3-0.6B/snapshots/0123abc", "Qwen/Qwen3-0.6B"),  # of a restored run
        ("/home/x/hub/models--gpt2/snapshots/0123abc", "gpt2"),
        ("/home/x/models/Qwen3-0.6B", "Qwen3-0.6B"),
        ("./models/Qwen3-0.6B", "Qwen3-0.6B"),
        ("tests/export", "export"),  # a directory that is there
        ("", "A model"),
    ],
)
def test_the_base_model_is_what_the_hub_calls_it(source: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    assert base_model(source) == name


def test_a_hub_id_keeps_its_owner(run: Path) -> None:
    metrics = run / "metrics.json"
    before = metrics.read_text()
    facts = json.loads(before)
    try:
        metrics.write_text(json.dumps({**facts, "fit": {**facts["fit"], "source": "Qwen/Qwen3-0.6B"}}))
        head, body = parts(exported(run, run.parent / "of-the-hub"))
    finally:
        metrics.write_text(before)
    assert head["base_model"] == "Qwen/Qwen3-0.6B"
    assert body.startswith("# Qwen3-0.6B, rtn, compressed-tensors\n")


def test_a_packed_directory_has_no_run(run: Path) -> None:
    out = run.parent / "of-a-directory"
    args = ["--model.source", str(run / "model"), "--out", str(out), "--check", "false", *CPU]
    assert main(["export", *args]) == 0
    head, body = parts(out)
    assert head["base_model"] == "model"
    assert '- Method: rtn; format: `{"bits": 4, "group_size": 32, "symmetric": true}`' in body
    assert "`ptql export --model.source DIR --format compressed-tensors --dtype float16 --out of-a-directory`" in body
