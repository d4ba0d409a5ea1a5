"""The terms of the reconstruction objective."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ptql.errors import InputError
from ptql.functional.losses import mean_squared_error, negative_log_cosine, relative_squared_error
from ptql.parts.objectives import Reconstruction, Target, Targets


@pytest.fixture
def output() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(2, 5, 8)


@pytest.fixture
def targets() -> Targets:
    torch.manual_seed(1)
    return {"fp": torch.randn(2, 5, 8), "fp_on_quantised": torch.randn(2, 5, 8)}


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({}, ["mse_fp", "nlc_fp"]),
        ({"nlc": 0.0}, ["mse_fp"]),
        ({"mse": 0.0}, ["nlc_fp"]),
        ({"mse": 0.0, "nlc": 0.0, "rse": 1.0}, ["rse_fp"]),
        ({"nlc": 0.0, "targets": ["fp", "fp_on_quantised"]}, ["mse_fp", "mse_fp_on_quantised"]),
        ({"targets": ("fp_on_quantised",)}, ["mse_fp_on_quantised", "nlc_fp_on_quantised"]),
    ],
)
def test_terms_are_named_after_loss_and_target(
    settings: dict[str, Any], names: list[str], output: Tensor, targets: Targets
) -> None:
    assert list(Reconstruction(**settings).terms(output, targets)) == names


def test_terms_are_weighted_losses(output: Tensor, targets: Targets) -> None:
    terms = Reconstruction(mse=2.0, nlc=0.5, rse=4.0, targets=("fp", "fp_on_quantised")).terms(output, targets)
    target: Target
    for target in ("fp", "fp_on_quantised"):
        mse, nlc = mean_squared_error(output, targets[target]), negative_log_cosine(output, targets[target])
        torch.testing.assert_close(terms[f"mse_{target}"], 2 * mse)
        torch.testing.assert_close(terms[f"nlc_{target}"], 0.5 * nlc)
        rse = relative_squared_error(output, targets[target])
        torch.testing.assert_close(terms[f"rse_{target}"], 4 * rse)
    assert all(term.shape == () for term in terms.values())


def test_a_perfect_output_loses_nothing(targets: Targets) -> None:
    terms = Reconstruction().terms(targets["fp"].clone(), targets)
    assert sum(terms.values()).item() == pytest.approx(0, abs=1e-6)


def test_only_the_wanted_targets_are_asked_for(output: Tensor, targets: Targets) -> None:
    objective = Reconstruction(targets=["fp"])
    assert objective.targets == ("fp",)
    objective.terms(output, {"fp": targets["fp"]})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mse": -1.0}, r"mse=-1\.0, nlc=1\.0.*: .*0 or more"),
        ({"nlc": -0.1}, r"nlc=-0\.1"),
        ({"rse": -0.1}, r"rse=-0\.1"),
        ({"mse": 0.0, "nlc": 0.0}, r"mse=0\.0, nlc=0\.0.*: .*one is above 0"),
        ({"targets": []}, r"targets=\[\]: .*take \[fp\]"),
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Reconstruction(**wrong)
