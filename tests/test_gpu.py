"""What only a GPU can show: blocks run there, the result is that of the CPU, and what is stored loads anywhere."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import ptql  # noqa: F401  (registers the format)
from benchmarks.kills import alive
from ptql.checkpoint import Checkpoint
from ptql.evaluation.whole import load_whole, spread
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


def learned(run_dir: Path) -> list[dict[str, torch.Tensor]]:
    files = sorted((run_dir / "ledger").glob("block-*.safetensors"))
    return [{k: v for k, v in load_file(file).items() if k.startswith("learned.")} for file in files]


def fit_command(run_dir: Path, source: Path, text: Path, *extra: str) -> list[str]:
    return [
        *(sys.executable, str(ROOT / "cli.py"), "fit", "-c", "methods/lrquant", "-c", "schemes/w4a16"),
        *("--model.source", str(source), "--data.text", str(text), "--data.length", "128", "--data.samples", "16"),
        *("--trainer.accelerator", "gpu", "--trainer.max_epochs", "3", "--model.matmul", "highest"),
        *("--trainer.default_root_dir", str(run_dir), *extra),
    ]


def test_too_little_memory_is_said_before_the_run(stories_dir: Path, tmp_path: Path) -> None:
    """In a process that may use little of the GPU: one line, and nothing left."""
    large = ("--data.samples", "64", "--data.batch_size", "64", "--data.length", "512")
    args = fit_command(tmp_path / "run", stories_dir, Path("pydoc"), *large)
    code = "import torch, runpy; torch.cuda.set_per_process_memory_fraction(0.001); "
    code += f"import sys; sys.argv = {args[1:]!r}; runpy.run_path(sys.argv[0], run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "out of memory on cuda:0 with batches of 64 x 512 tokens" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "run").exists()


two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
SPREAD = ("--trainer.devices", "2", "--trainer.strategy", "ddp", "--data.batch_size", "2")


@two_gpus
def test_two_gpus_learn_what_one_learns_on_the_same_global_batch(
    tmp_path: Path, stories_dir: Path, shared_dir: Path
) -> None:
    text = shared_dir / "data/text/tinystories-test.jsonl"
    for name, more in (("one", ("--data.batch_size", "4")), ("two", SPREAD)):
        subprocess.run(fit_command(tmp_path / name, stories_dir, text, *more), check=True)
    for mine, theirs in zip(learned(tmp_path / "one"), learned(tmp_path / "two"), strict=True):
        for name, value in mine.items():
            torch.testing.assert_close(theirs[name], value, rtol=1e-2, atol=1e-3)


@two_gpus
@pytest.mark.parametrize("whom", ["first", "other"])
def test_a_process_that_dies_ends_the_others(tmp_path: Path, stories_dir: Path, shared_dir: Path, whom: str) -> None:
    """NCCL's own time limit is half an hour; ours is a minute."""
    run_dir, text = tmp_path / "run", shared_dir / "data/text/tinystories-test.jsonl"
    args = fit_command(run_dir, stories_dir, text, *SPREAD, "--trainer.max_epochs", "5000")
    with subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        while not list((run_dir / "tensorboard").glob("events*")):
            assert process.poll() is None
            time.sleep(0.1)
        time.sleep(2)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(process.pid if whom == "first" else int(children[0]), signal.SIGKILL)
        died = time.monotonic()
        out, _ = process.communicate(timeout=90)
    while alive(run_dir):
        assert time.monotonic() - died < 60
        time.sleep(0.1)
    print(f"all gone after {time.monotonic() - died:.1f} s: {out[-400:]}")
    words = ("ended with signal SIGKILL", "terminated with code -9", "the first process is gone")
    assert any(word in out for word in words)


@two_gpus
def test_a_stopped_run_on_two_gpus_goes_on(tmp_path: Path, stories_dir: Path, shared_dir: Path) -> None:
    run_dir, text = tmp_path / "run", shared_dir / "data/text/tinystories-test.jsonl"
    args = fit_command(run_dir, stories_dir, text, *SPREAD, "--trainer.max_epochs", "30")
    with subprocess.Popen(args, stderr=subprocess.PIPE, text=True) as process:
        while not list((run_dir / "tensorboard").glob("events*")):
            assert process.poll() is None
            time.sleep(0.1)
        time.sleep(1)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert err.splitlines()[-1] == "ptql: stopped; the same command goes on from here"
    again = subprocess.run(args, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "goes on from partial-" in again.stderr


@two_gpus
@torch.no_grad()
def test_a_model_spread_over_two_gpus_computes_the_same(tmp_path: Path, stories_dir: Path, shared_dir: Path) -> None:
    text = shared_dir / "data/text/tinystories-test.jsonl"
    subprocess.run(fit_command(tmp_path / "run", stories_dir, text), check=True)
    model = Checkpoint(tmp_path / "run/model")
    ids = torch.arange(3, 99)[None]
    whole = load_whole(model, torch.device("cuda", 0))(ids.cuda()).logits.cpu()
    parted = spread(model, {0: 350_000, 1: 350_000, "cpu": 10**9})
    assert {parameter.device.index for parameter in parted.parameters()} == {0, 1}
    torch.testing.assert_close(parted(ids.cuda()).logits.cpu(), whole, rtol=1e-3, atol=1e-3)
