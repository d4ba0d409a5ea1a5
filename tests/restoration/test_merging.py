"""The model that is written computes what the one with LoRA computed, in each family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from ptql.cli import main
from ptql.restoration.lora_task import LoRATask
from tests.models import CONFIGS, FAMILIES, some_ids
from tests.restoration.lora import NAME, fitted, once

pytestmark = pytest.mark.usefixtures("elsewhere")
SOME = (*FAMILIES, "llama_untied", "llama_biased", "phi3_longrope", "opt_post_norm", "opt_projected")


@pytest.mark.parametrize("family", SOME)
def test_the_merged_model_computes_what_was_learned(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live: dict[str, Tensor] = {}
    end = LoRATask.on_train_end

    def noting(task: LoRATask) -> None:
        assert task.model is not None
        with torch.no_grad():
            live["logits"] = task.model.eval()(some_ids(), use_cache=False).logits
        live.update(task.factors())
        end(task)

    monkeypatch.setattr(LoRATask, "on_train_end", noting)
    run = fitted(tmp_path, once(**{"trainer.max_epochs": 0}), CONFIGS[family])
    command = ["restore", "--run", str(run), "--out", str(tmp_path / "restored"), "--trainer.accelerator", "cpu"]
    command += ["--trainer.callbacks", NAME, "--trainer.callbacks.samples", "16", "--trainer.callbacks.length", "24"]
    command += ["--trainer.callbacks.r", "4", "--trainer.callbacks.lr", "0.02", "--trainer.logger", "false"]
    assert main(command) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "restored/model", dtype=torch.float32).eval()
    with torch.no_grad():
        found = model(some_ids(), use_cache=False).logits
    torch.testing.assert_close(found, live.pop("logits"), rtol=1e-4, atol=1e-4)
    quantised = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32)
    with torch.no_grad():
        assert (found - quantised(some_ids(), use_cache=False).logits).abs().max() > 0.1, "nothing was learned"
    assert all(factor.isfinite().all() for factor in live.values())
    source = load_file(tmp_path / "source/model.safetensors")
    restored = load_file(tmp_path / "restored/model/model.safetensors")
    assert {name: (t.shape, t.dtype) for name, t in restored.items()} == {
        name: (t.shape, t.dtype) for name, t in source.items()
    }
