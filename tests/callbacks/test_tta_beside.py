"""Test-time adaptation beside other things: random parts, other callbacks, earlier results, a changed run."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from ptql.callbacks import BlockCallback, TestTimeAdaptation
from torch import Tensor

from ptql.cli import main
from ptql.errors import InputError
from ptql.functional.affine import fake_quantize_tokens
from ptql.parts.activations import ActivationQuantizer, TokenRounding
from ptql.recipe import ActivationScheme
from tests.callbacks.adapted import evaluated, fitted, texts


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@dataclass(frozen=True)
class DropRounding:
    """Leaves half of the values alone, at random, where something learns."""

    bits: int

    def __call__(self, x: Tensor) -> Tensor:
        rounded = fake_quantize_tokens(x, self.bits)
        return torch.where(torch.rand_like(x) < 0.5, x, rounded) if torch.is_grad_enabled() else rounded


class Dropped(ActivationQuantizer):
    def for_linear(self, name: str, scheme: ActivationScheme) -> TokenRounding | None:
        return TokenRounding(scheme.bits) if scheme.quantised else None

    def for_attention(self, scheme: ActivationScheme) -> DropRounding | None:
        return DropRounding(scheme.bits) if scheme.quantised else None


def test_random_numbers_do_not_carry_from_text_to_text(tmp_path: Path) -> None:
    run = fitted(tmp_path, settings={"model.activation_quantizer": f"{__name__}.Dropped"})
    words = texts(tmp_path, "one", "other")
    backwards = dict(reversed(words.items()))
    first, second = (evaluated(run, w, TestTimeAdaptation("online"), out="o.json") for w in (words, backwards))
    assert first == second


class OnlyTexts(BlockCallback):
    def on_text_measured(self, trainer: Any, text: Any, found: dict[str, Any]) -> None:
        found["seen"] = text.name


def test_one_hook_is_enough(tmp_path: Path) -> None:
    assert evaluated(fitted(tmp_path), texts(tmp_path, "one"), OnlyTexts())["seen"] == "one"


def test_results_of_other_settings_are_not_kept_under_the_same_name(tmp_path: Path) -> None:
    run, words = fitted(tmp_path), texts(tmp_path, "one", "other")
    evaluated(run, {"one": words["one"]}, TestTimeAdaptation(epochs=1, compat="rlq", name="mine"))
    evaluated(run, {"other": words["other"]}, TestTimeAdaptation(epochs=2, name="mine"))
    tta = json.loads((run / "metrics.json").read_text())["tta"]["mine"]
    assert "compat" not in tta
    assert list(tta["ppl"]) == ["other"]
    evaluated(run, {"one": words["one"]}, TestTimeAdaptation(epochs=2, name="mine"))
    assert set(json.loads((run / "metrics.json").read_text())["tta"]["mine"]["ppl"]) == {"one", "other"}


def test_gradients_are_clipped_as_the_trainer_says(tmp_path: Path) -> None:
    run, text = fitted(tmp_path), texts(tmp_path, "mine")["mine"]
    found = []
    for clip in ("null", "1e-12"):
        command = ["eval", "--run", str(run), "--text.mine", str(text), "--length", "16", "-c", "tta/online"]
        command += ["--trainer.accelerator", "cpu", "--trainer.gradient_clip_val", clip, "--json", f"{clip}.json"]
        assert main(command) == 0
        found.append(json.loads(Path(f"{clip}.json").read_text())["tta"]["online"]["ppl"])
    assert found[0] != found[1]


def test_a_model_that_is_not_the_runs_own_is_refused(tmp_path: Path) -> None:
    for name in ("mine", "another"):
        (tmp_path / name).mkdir()
    run, other = fitted(tmp_path / "mine"), fitted(tmp_path / "another", settings={"trainer.max_epochs": 0})
    shutil.rmtree(run / "model")
    shutil.copytree(other / "model", run / "model")
    with pytest.raises(InputError, match="is not the one in the run's ledger"):
        evaluated(run, texts(tmp_path, "mine"), TestTimeAdaptation())


def test_the_report_shows_adaptation(tmp_path: Path) -> None:
    run = fitted(tmp_path)
    evaluated(run, texts(tmp_path, "mine"), TestTimeAdaptation(compat="rlq", name="as published"))
    page = (run / "report.html").read_text()
    assert "Test-time adaptation" in page
    assert "as published (rlq)" in page
