"""The recipe abq from end to end: whole runs of tiny models on a CPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ptql.callbacks import TestTimeAdaptation
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.callbacks.adapted import evaluated, fitted, texts
from tests.models import CONFIGS, some_ids

pytestmark = pytest.mark.usefixtures("elsewhere")
ROWS = "model.objective.akl_rows"
Made = Callable[..., Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The directory of a finished run, made once."""
    known: dict[str, Path] = {}

    def run(family: str = "llama", **settings: Any) -> Path:
        key = f"{family} {settings}"
        if key not in known:
            named = {name.replace("__", "."): value for name, value in settings.items()}
            known[key] = fitted(tmp_path_factory.mktemp(family), CONFIGS[family], "abq", {ROWS: 5, **named})
        return known[key]

    return run


def noted(run: Path) -> list[dict[str, Any]]:
    blocks = json.loads((run / "ledger/manifest.json").read_text())["blocks"]
    return [blocks[str(index)] for index in range(len(blocks))]


def learned(run: Path, block: int) -> dict[str, Tensor]:
    found = load_file(run / f"ledger/block-{block:05d}.safetensors")
    return {name.removeprefix("learned."): tensor for name, tensor in found.items() if name.startswith("learned.")}


@pytest.mark.parametrize("mode", ["faithful", "exact"])
def test_plain_and_eager_steps_learn_alike(made: Made, mode: str) -> None:
    """Few steps: later, a last bit is another code."""
    runs = [made(model__objective__akl_mode=mode, model__engine=engine) for engine in ("plain", "eager")]
    for plain, eager in zip(*map(noted, runs), strict=True):
        assert plain["steps"] == eager["steps"] == 4
        for name in ("loss", "loss_start", "loss_learned", "mse"):
            assert eager[name] == pytest.approx(plain[name], rel=1e-2), name


def test_the_modes_of_the_divergence_are_other_losses(made: Made) -> None:
    faithful, exact = (noted(made(model__objective__akl_mode=mode)) for mode in ("faithful", "exact"))
    without = noted(made(model__objective__akl=0.0))
    for coded, true, none in zip(faithful, exact, without, strict=True):
        assert none["loss_start"] < coded["loss_start"] < true["loss_start"]
        # windows of 16 tokens leave more of the code's divergence than long ones
        assert coded["loss_start"] - none["loss_start"] < 0.1 * (true["loss_start"] - none["loss_start"])


def test_all_of_its_parts_have_learned_and_are_in_the_ledger(made: Made) -> None:
    run = made()
    for index, block in enumerate(noted(run)):
        found = learned(run, index)
        sites = {name for name in found if name.startswith("transforms.0.sites.") and name.endswith(".scale")}
        assert len(sites) == 5  # qkv, fc1, out, qkt, fc2
        assert {"transforms.1.left", "transforms.1.right"} <= found.keys()
        assert found["transforms.1.left"].any() != block["fell_back"]
        assert not any("left" in name or "right" in name for name in load_file(run / "model/model.safetensors"))


@pytest.mark.parametrize("family", ["mistral", "qwen3", "phi3", "opt"])
def test_other_families_run_too(made: Made, family: str) -> None:
    run = made(family)
    assert all(block["loss"] <= block["loss_start"] for block in noted(run))
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    assert model(some_ids()).logits.isfinite().all()


def test_what_it_made_can_be_adapted_by_outputs(made: Made, tmp_path: Path) -> None:
    text = texts(tmp_path, "mine")["mine"]
    found = evaluated(made(), text, TestTimeAdaptation(lr=0.02), out=tmp_path / "out.json")
    assert found["tta"]["transductive"]["ppl"]["mine"] > 0
