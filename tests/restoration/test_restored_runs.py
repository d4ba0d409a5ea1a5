"""Whole runs in three stages: what lies on the disk, what was learned, and the stages one by one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from ptql.callbacks import TestTimeAdaptation
from safetensors.torch import load_file
from torch import Tensor

import ptql
from ptql.checkpoint import Checkpoint
from ptql.cli import main
from tests.callbacks.adapted import SMALL, evaluated, texts
from tests.restoration.lora import LESSON, NAME, PTQ161, checksum, facts, fitted, options, thrice, weights

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; the text it learns from repeats eight words."""
    folder = tmp_path_factory.mktemp("three")
    (folder / "lesson.jsonl").write_text((json.dumps({"text": "w3 w9 w27 w17 w51 w25 w11 w33 " * 4}) + "\n") * 5)
    return fitted(folder, thrice(text=[str(folder / "lesson.jsonl")], samples=80, lr=0.01))


def metrics(run: Path) -> dict[str, Any]:
    return json.loads((run / "metrics.json").read_text())


def masks(run: Path) -> dict[str, Tensor]:
    found = {}
    for index in range(2):
        stored = load_file(run / f"ledger/block-{index:05d}.safetensors")
        found |= {f"{index}.{name}": tensor for name, tensor in stored.items() if name.endswith(".mask")}
    return found


def test_what_is_on_the_disk(run: Path) -> None:
    source = run.parent / "source"
    assert {path.name for path in run.iterdir()} == {
        *("first", "restored", "ledger", "model", "config.yaml", "metrics.json", "report.html")
    }
    for stage in ("first", "."):
        packed = Checkpoint(run / stage / "model")
        assert packed.packed is not None
        assert packed.packed.method == "ptq161"
        assert (run / stage / "config.yaml").is_file()
    dense = run / "restored/model"
    assert Checkpoint(dense).packed is None
    names = {path.name for path in dense.iterdir()}
    assert names >= {"config.json", "tokenizer.json", "restoration.json", "salience.tensors"}
    assert json.loads((dense / "config.json").read_text()) == json.loads((source / "config.json").read_text())
    original, restored = (load_file(folder / "model.safetensors") for folder in (source, dense))
    assert {k: (t.shape, t.dtype) for k, t in original.items()} == {k: (t.shape, t.dtype) for k, t in restored.items()}
    assert torch.equal(original["model.embed_tokens.weight"], restored["model.embed_tokens.weight"])
    assert "restoration.json" not in {path.name for path in (run / "model").iterdir()}
    first, second = metrics(run / "first")["fit"], metrics(run)["fit"]
    assert first["source"] == str(source)
    assert "original" not in first
    assert (second["source"], second["original"]) == (str(dense), str(source))


def test_lora_lowers_the_loss_of_what_it_learns(run: Path) -> None:
    found = facts(run / "restored")
    assert found == facts(run / "restored/model")
    assert found["steps"] == 40
    assert [step for step, _ in found["losses"]] == list(range(1, 41))
    losses = [loss for _, loss in found["losses"]]
    assert all(math.isfinite(loss) for loss in losses)
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    assert found["skipped_steps"] == 0
    assert found["tokens"] == 80 * 32
    assert (found["source"], found["first"]) == (str(run.parent / "source"), str(run / "first"))
    assert found["identity"]["first"] == checksum(run / "first")


def test_lora_is_merged_into_the_quantised_weights(run: Path) -> None:
    """What it adds to them has its rank; the output projection has none."""
    quantised, restored = Checkpoint(run / "first/model"), Checkpoint(run / "restored/model")
    for index in range(2):
        before, after = quantised.block(index).state_dict(), restored.block(index).state_dict()
        for name, weight in after.items():
            added = (weight - before[name]).double()
            if weight.ndim < 2 or name == "self_attn.o_proj.weight":
                assert added.abs().max() == 0, name
            else:
                singular = torch.linalg.svdvals(added)
                assert singular[0] > 1e-2
                assert singular[LESSON["r"]] < 1e-4 * singular[0], name


def test_the_second_pass_keeps_the_channels_of_the_first(run: Path) -> None:
    first, second = masks(run / "first"), masks(run)
    assert len(first) == 14
    assert all(torch.equal(mask, second[name]) for name, mask in first.items())


def test_new_channels_and_what_lora_says_of_targets(run: Path, tmp_path: Path) -> None:
    """LoRA changes the input of what is behind it, so other channels are the largest there."""
    new = fitted(tmp_path, thrice(masks="new", samples=80, lr=0.05, targets=["down_proj", "v_proj"]))
    assert not (new / "restored/model/salience.tensors").exists()
    first, second = masks(new / "first"), masks(new)
    assert any(not torch.equal(mask, second[name]) for name, mask in first.items())
    assert facts(new / "restored")["identity"]["linears"] == ["self_attn.v_proj", "mlp.down_proj"]
    quantised, restored = Checkpoint(new / "first/model"), Checkpoint(new / "restored/model")
    before, after = quantised.block(1).state_dict(), restored.block(1).state_dict()
    changed = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    assert changed == {"self_attn.v_proj.weight", "mlp.down_proj.weight"}


def test_a_finished_run_is_left_alone(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """But for what a process leaves that is killed when the restored model has just been written."""
    before = checksum(run), weights(run / "restored"), (run / "restored/restoration.json").stat().st_mtime_ns
    (run / "restored/partial-00000-0123456789abcdef.ckpt").write_bytes(b"")
    settings = thrice(text=[str(run.parent / "lesson.jsonl")], samples=80, lr=0.01)
    fitted(run.parent, settings)
    assert (checksum(run), weights(run / "restored")) == before[:2]
    assert (run / "restored/restoration.json").stat().st_mtime_ns == before[2]
    assert "restored earlier" in capsys.readouterr().err
    assert not list(run.rglob("partial*"))


def test_one_stage_after_the_other_ends_in_the_same_bytes(run: Path, tmp_path: Path) -> None:
    """One pass, `restore` with --out, one pass on what came of it."""
    source, words, lesson = (run.parent / name for name in ("source", "words.txt", "lesson.jsonl"))
    once: dict[str, Any] = {**SMALL, "trainer.callbacks": None}
    given: dict[str, Any] = {"data": words, "method": "ptq161", "scheme": "w1.61a16", "settings": once}
    ptql.quantize(source, out=tmp_path / "a", **given)
    assert checksum(tmp_path / "a") == checksum(run / "first")
    command = ["restore", "--run", str(tmp_path / "a"), "--out", str(tmp_path / "b"), "--trainer.accelerator", "cpu"]
    learn = {**LESSON, "samples": 80, "lr": 0.01, "text": [str(lesson)]}
    command += ["--trainer.callbacks", NAME, *options({f"trainer.callbacks.{k}": v for k, v in learn.items()})]
    assert main(command) == 0
    assert weights(tmp_path / "b") == weights(run / "restored")
    ptql.quantize(
        tmp_path / "b/model", data=words, out=tmp_path / "c", method="ptq161", scheme="w1.61a16", settings=once
    )
    assert checksum(tmp_path / "c") == checksum(run)
    assert metrics(tmp_path / "c")["fit"]["original"] == str(source)


def test_restore_takes_up_a_run_of_three_stages(run: Path, tmp_path: Path) -> None:
    """After the first pass it does the second stage as the run's configuration says, and `fit` goes on from there."""
    words = run.parent / "words.txt"
    settings = thrice(text=[str(run.parent / "lesson.jsonl")], samples=80, lr=0.01)
    here = tmp_path / "RUN"
    once = {**settings, "trainer.default_root_dir": str(here / "first"), "model.source": str(run.parent / "source")}
    whole = ["fit", *PTQ161, *options({**once, "data.text": str(words), "trainer.callbacks": None})]
    assert main(whole) == 0
    config = (run / "first/config.yaml").read_text()
    (here / "first/config.yaml").write_text(config)
    assert main(["restore", "--run", str(here), "--trainer.accelerator", "cpu", "--trainer.logger", "false"]) == 0
    assert weights(here / "restored") == weights(run / "restored")
    going = {**once, "trainer.default_root_dir": str(here), "data.text": str(words)}
    assert main(["fit", *PTQ161, *options(going)]) == 0
    assert checksum(here) == checksum(run)


def test_eval_compares_with_the_original_source_and_adapts(run: Path, tmp_path: Path) -> None:
    text = texts(tmp_path, "a")
    found = evaluated(run, text, TestTimeAdaptation(epochs=1), compare_source=True)
    alone = ptql.evaluate(source=run.parent / "source", text=text, length=16, accelerator="cpu")
    assert found["source"]["ppl"]["a"] == pytest.approx(alone["ppl"]["a"], rel=1e-5)
    (adapted,) = found["tta"].values()
    assert math.isfinite(adapted["ppl"]["a"])
    assert adapted["ppl"]["a"] != found["ppl"]["a"]


@pytest.mark.parametrize(
    "lesson", [{"packing": True, "batch_size": 2}, {"distil": 0.5, "gradient_checkpointing": False}]
)
def test_other_ways_to_learn(tmp_path: Path, lesson: dict) -> None:
    run = fitted(tmp_path, thrice({"trainer.max_epochs": 0}, warmup=0, gradient_clip=0, **lesson))
    losses = [loss for _, loss in facts(run / "restored")["losses"]]
    assert len(losses) == 24 // (2 * lesson.get("batch_size", 1))
    assert all(math.isfinite(loss) for loss in losses)


def test_a_dry_run_learns_nothing(tmp_path: Path) -> None:
    run = fitted(tmp_path, thrice({"trainer.fast_dev_run": True}))
    assert not run.exists()
