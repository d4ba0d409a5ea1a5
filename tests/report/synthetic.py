"""Runs as `ptql fit` leaves them, of any number of blocks, made in milliseconds."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NAMES = tuple(f"self_attn.{n}" if n[0] in "qkvo" else f"mlp.{n}" for n in LINEARS)
SITES = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
RECIPE = {
    "ptql": "0.1.0",
    "weight": {"bits": 4, "group_size": -1, "symmetric": False},
    "activation": {"bits": 4},
    "transforms": [{"class": "Smooth", "initial": "log", "alpha": 0.5, "shift": "all", "lr": 0.001}],
    "objective": {"class": "Reconstruction", "mse": 1.0, "nlc": 1.0, "rse": 0.0},
}


def peaks(block: int, place: int, channels: int, smooth: bool) -> Tensor:
    """Ranges with a few outlier channels, fewer and smaller ones where they were smoothed."""
    random = torch.Generator().manual_seed(1000 * block + 10 * place)
    values = torch.randn(channels, generator=random).abs() * 0.3 + 0.5 + 0.02 * block
    chosen = torch.randperm(channels, generator=random)[:4]
    values[chosen] *= torch.rand(4, generator=random) * (60 if block != 2 else 2000) + 5
    return values.sqrt() if smooth and place != 3 else values


def block_summary(index: int, blocks: int) -> dict[str, Any]:
    """What the manifest notes of a block; losses grow with depth, every ninth block falls back."""
    start = 0.002 * 1.17 ** (index * 30 / blocks) * (1.3 + math.sin(index))
    fell = index % 9 == 4
    share = 1.0 if fell else 0.55 + 0.1 * math.sin(3 * index)
    layers = {
        name: 0.006 * (1 + place) * (1 + 0.6 * math.sin(index + place)) * (1 + 0.01 * index)
        for place, name in enumerate(NAMES)
    }
    return {
        "loss_start": start,
        "loss": start * share,
        "loss_learned": start * share * 1.02,
        "mse": start * share / 3,
        "best_epoch": 0 if fell else 17,
        "skipped_steps": 3 if index == 7 else 0,
        "fell_back": fell,
        "seconds": 62.0 + 5 * math.sin(index),
        "seconds_learning": 55.0 + 5 * math.sin(index),
        "steps": 640,
        "peak_gpu_bytes": int(2.4e9 + 1e7 * index),
        "peak_host_bytes": int(4.1e9 + 3e6 * index),
        "layers": layers,
    }


def make_run(
    run: Path,
    blocks: int = 6,
    channels: int = 256,
    measured: bool = True,
    changes: dict[int, dict[str, Any]] | None = None,
) -> Path:
    """A run's directory.

    Args:
        run: Where.
        blocks: How many are finished.
        channels: Inputs of each linear layer.
        measured: Whether perplexity and tasks are there, of the source too.
        changes: Other values in the summaries of some blocks.
    """
    (run / "ledger").mkdir(parents=True)
    noted = {}
    for index in range(blocks):
        name = f"block-{index:05d}.safetensors"
        tensors = {
            f"ranges.{when}.{site}": peaks(index, place, channels * (3 if place == 3 else 1), when == "after")
            for place, site in enumerate(SITES)
            for when in ("before", "after")
        }
        save_file(tensors, run / "ledger" / name)
        noted[str(index)] = {"file": name, **block_summary(index, blocks), **(changes or {}).get(index, {})}
    manifest = {"version": 1, "identity": {"source": "ab12", "recipe": RECIPE}, "blocks": noted}
    (run / "ledger" / "manifest.json").write_text(json.dumps(manifest))
    (run / "config.yaml").write_text(yaml.safe_dump(config(run), sort_keys=False))
    (run / "metrics.json").write_text(json.dumps(metrics(blocks, measured)))
    _model(run / "model", blocks)
    return run


def config(run: Path) -> dict[str, Any]:
    return {
        "seed_everything": 2,
        "trainer": {"max_epochs": 20, "precision": "bf16-mixed", "default_root_dir": run.name},
        "model": {"source": "models/SmolLM2-135M-Instruct", "method": "lrquant"},
        "data": {"text": "wikitext2", "samples": 128, "length": 2048, "batch_size": 4},
    }


def metrics(blocks: int, measured: bool) -> dict[str, Any]:
    found: dict[str, Any] = {
        "bits_per_weight": 4.056,
        "bits_per_weight_with_embeddings": 9.953,
        "size_bytes": 167_400_000,
        "weights": 106_168_320,
        "parameters": 134_515_008,
        "fit": {
            "method": "lrquant",
            "source": "models/SmolLM2-135M-Instruct",
            "blocks": blocks,
            "seconds": 62.0 * blocks,
            "device": "NVIDIA H100 80GB HBM3",
            "checksum": "80ba9fc9c3b486cc",
            "peak_gpu_bytes": 2_700_000_000,
        },
    }
    if measured:
        task = {"acc": 0.412, "acc_stderr": 0.012, "acc_norm": 0.433, "acc_norm_stderr": 0.012, "n": 1838}
        better = {"acc": 0.671, "acc_stderr": 0.011, "acc_norm": 0.668, "acc_norm_stderr": 0.011, "n": 1838}
        details = {"windows": 148, "length": 2048, "seconds": 10.0}
        found |= {
            "ppl": {"wikitext2": 147.5, "c4": 183.8},
            "ppl_details": {"wikitext2": details, "c4": {**details, "windows": 243}},
            "tasks": {"lm_eval_version": "0.4.11", "limit": None, "results": {"piqa": task, "arc_easy": task}},
            "source": {
                "ppl": {"wikitext2": 21.63, "c4": 30.6},
                "tasks": {"lm_eval_version": "0.4.11", "limit": None, "results": {"piqa": better, "arc_easy": better}},
            },
        }
    return found


def _model(folder: Path, blocks: int) -> None:
    """Packed tensors of a model of width 64."""
    folder.mkdir()
    packed = {"quant_method": "ptql", "blocks": "model.layers", "linears": list(NAMES)}
    (folder / "config.json").write_text(json.dumps({"quantization_config": packed}))
    tensors: dict[str, Tensor] = {"model.embed_tokens.weight": torch.zeros(512, 64)}
    for index in range(blocks):
        tensors[f"model.layers.{index}.input_layernorm.weight"] = torch.zeros(64)
        for name in NAMES:
            prefix = f"model.layers.{index}.{name}"
            tensors[f"{prefix}.codes"] = torch.zeros(64, 32, dtype=torch.uint8)
            tensors[f"{prefix}.scale"] = torch.zeros(64, 1, dtype=torch.int16)
            tensors[f"{prefix}.bias"] = torch.zeros(64, dtype=torch.float16)
    save_file(tensors, folder / "model.safetensors")
