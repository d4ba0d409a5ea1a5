"""What only a GPU can show: blocks run there, the result is that of the CPU, and what is stored loads anywhere."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import ptql  # noqa: F401  (registers the format)
from ptql.functional.affine import fake_quantize_tokens

ROOT = Path(__file__).parents[1]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.shared,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def run(*args: str) -> None:
    done = subprocess.run([sys.executable, str(ROOT / "cli.py"), *args], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def fit(run_dir: Path, source: Path, text: Path, *extra: str) -> dict:
    run(
        *("fit", "-c", "methods/lrquant", "-c", "schemes/w4a4", "--model.source", str(source)),
        *("--data.text", str(text), "--data.length", "128", "--data.samples", "16"),
        *("--trainer.max_epochs", "3", "--trainer.default_root_dir", str(run_dir), *extra),
    )
    run(
        "eval",
        "--run",
        str(run_dir),
        "--text.tiny",
        str(text),
        "--windows",
        "8",
        "--length",
        "128",
        *extra[:2],
    )
    return json.loads((run_dir / "metrics.json").read_text())


def test_a_run_on_the_gpu_equals_one_on_the_cpu(tmp_path: Path, stories_dir: Path, shared_dir: Path) -> None:
    text = shared_dir / "data/text/tinystories-test.jsonl"
    gpu = fit(tmp_path / "gpu", stories_dir, text, "--trainer.accelerator", "gpu", "--model.matmul", "highest")
    cpu = fit(tmp_path / "cpu", stories_dir, text, "--trainer.accelerator", "cpu")
    assert gpu["fit"]["device"] == torch.cuda.get_device_name(0)
    assert gpu["fit"]["peak_gpu_bytes"] > 0
    assert gpu["bits_per_weight"] == cpu["bits_per_weight"]
    assert gpu["ppl"]["tiny"] == pytest.approx(cpu["ppl"]["tiny"], rel=0.05)
    for device in ("cpu", "cuda"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "gpu/model", dtype=torch.float32).to(device)
        ids = torch.arange(3, 99, device=device)[None]
        assert model(ids).logits.isfinite().all()


def test_mixed_precision_learns_too(tmp_path: Path, stories_dir: Path, shared_dir: Path) -> None:
    text = shared_dir / "data/text/tinystories-test.jsonl"
    flags = ("--trainer.accelerator", "gpu", "--trainer.precision", "bf16-mixed")
    metrics = fit(tmp_path / "run", stories_dir, text, *flags)
    ledger = json.loads((tmp_path / "run/ledger/manifest.json").read_text())["blocks"]
    assert metrics["fit"]["skipped_steps"] == 0
    assert all(block["loss"] <= block["loss_start"] for block in ledger.values())
    assert sum(block["loss"] < block["loss_start"] for block in ledger.values()) >= 3


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_token_rounding_and_its_gradient_equal_the_cpu(bits: int) -> None:
    x = torch.randn(7, 65, 48)
    pairs = []
    for device in ("cpu", "cuda"):
        leaf = x.detach().clone().to(device).requires_grad_()
        rounded = fake_quantize_tokens(leaf, bits)
        (rounded * torch.linspace(-1, 1, 48, device=device)).sum().backward()
        pairs.append((rounded.detach().cpu(), leaf.grad.cpu()))  # type: ignore[union-attr]
    torch.testing.assert_close(pairs[0][0], pairs[1][0])
    torch.testing.assert_close(pairs[0][1], pairs[1][1], rtol=1e-4, atol=1e-4)
