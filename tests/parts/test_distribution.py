"""ABQ-LLM's objective: its terms, what it looks at, and what it refuses."""

from __future__ import annotations

import inspect
import json
from typing import Any

import pytest
import torch
from torch import Tensor

from ptql.errors import InputError
from ptql.functional.attention import softmaxed_divergence, symmetric_divergence
from ptql.functional.losses import mean_squared_error, negative_log_cosine
from ptql.parts import settings
from ptql.parts.objectives import (
    ATTENTION,
    ATTENTION_MADE,
    AttentionView,
    DistributionCorrection,
    PlainSum,
    Reconstruction,
    RunningAverages,
    all_terms,
    total,
)

OUTPUTS = ["mse_fp", "nlc_fp", "mse_fp_on_quantised", "nlc_fp_on_quantised"]


def maps(seed: int, heads: int = 4) -> Tensor:
    torch.manual_seed(seed)
    hidden = torch.arange(6) > torch.tensor([1, 3, 5])[:, None]
    return torch.randn(2, heads, 3, 6).masked_fill(hidden, float("-inf")).softmax(-1)


@pytest.fixture
def batch() -> dict[str, Tensor]:
    torch.manual_seed(0)
    outputs = {name: torch.randn(2, 6, 8) for name in ("input", "output", "fp", "fp_on_quantised")}
    return {**outputs, ATTENTION: maps(1), ATTENTION_MADE: maps(2)}


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ({}, [*OUTPUTS, "akl"]),
        ({"akl": 0.0}, OUTPUTS),
        ({"mse": 0.0}, ["nlc_fp", "nlc_fp_on_quantised", "akl"]),
        ({"mse": 0.0, "dlc": 0.0}, ["akl"]),
        ({"dlc": 0.0, "akl": 0.0}, ["mse_fp", "mse_fp_on_quantised"]),
    ],
)
def test_terms_are_of_both_targets_and_of_attention(
    given: dict[str, float], names: list[str], batch: dict[str, Tensor]
) -> None:
    assert list(all_terms(DistributionCorrection(**given), batch)) == names


def test_terms_are_weighted_losses(batch: dict[str, Tensor]) -> None:
    terms = all_terms(DistributionCorrection(mse=2.0, dlc=0.5, akl=3.0), batch)
    for target in ("fp", "fp_on_quantised"):
        torch.testing.assert_close(terms[f"mse_{target}"], 2 * mean_squared_error(batch["output"], batch[target]))
        torch.testing.assert_close(terms[f"nlc_{target}"], 0.5 * negative_log_cosine(batch["output"], batch[target]))
    torch.testing.assert_close(terms["akl"], 3 * symmetric_divergence(batch[ATTENTION_MADE], batch[ATTENTION]))
    faithful = all_terms(DistributionCorrection(akl_mode="faithful"), batch)
    torch.testing.assert_close(faithful["akl"], softmaxed_divergence(batch[ATTENTION_MADE], batch[ATTENTION]))
    assert all(term.shape == () for term in (*terms.values(), *faithful.values()))


def test_a_block_that_gives_what_it_should_loses_nothing(batch: dict[str, Tensor]) -> None:
    same = {**batch, "output": batch["fp"], "fp_on_quantised": batch["fp"], ATTENTION_MADE: batch[ATTENTION]}
    assert total(all_terms(DistributionCorrection(), same)).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("given", "view"),
    [
        ({}, AttentionView(64)),
        ({"akl_rows": 0}, AttentionView(0)),
        ({"akl_heads": "mean", "akl_rows": 7}, AttentionView(7, averaged=True)),
        ({"akl_mode": "faithful"}, AttentionView(64, averaged=True)),
        ({"akl_mode": "faithful", "akl_heads": "each"}, AttentionView(64, averaged=True)),
        ({"akl": 0.0}, None),
    ],
)
def test_what_it_looks_at(given: dict[str, Any], view: AttentionView | None) -> None:
    assert DistributionCorrection(**given).attention == view


def test_what_a_view_takes() -> None:
    assert AttentionView(64).shape(32, 2048) == (32, 64, 2048)
    assert AttentionView(64).shape(32, 20) == (32, 20, 20)
    assert AttentionView(0, averaged=True).shape(32, 2048) == (1, 2048, 2048)


def test_without_the_weight_nothing_of_attention_is_asked_for(batch: dict[str, Tensor]) -> None:
    without = {name: tensor for name, tensor in batch.items() if "attention" not in name}
    assert list(all_terms(DistributionCorrection(akl=0.0), without)) == OUTPUTS
    assert Reconstruction().attention is None
    assert Reconstruction().attention_terms(batch[ATTENTION_MADE], batch[ATTENTION]) == {}
    assert list(all_terms(Reconstruction(), without)) == ["mse_fp", "nlc_fp"]


def test_settings_are_its_arguments_and_json() -> None:
    given: dict[str, Any] = {
        "mse": 0.5,
        "dlc": 2.0,
        "akl": 0.0,
        "akl_mode": "faithful",
        "akl_heads": "mean",
        "akl_rows": 8,
        "balance": "ema",
    }
    assert given.keys() == inspect.signature(DistributionCorrection).parameters.keys()
    found = settings(DistributionCorrection(**given))
    assert {name: found[name] for name in given} == given
    json.dumps(found)


@pytest.mark.parametrize(
    ("given", "kinds"),
    [
        ({}, [["mse_fp", "mse_fp_on_quantised"], ["nlc_fp", "nlc_fp_on_quantised"], ["akl"]]),
        ({"akl": 0.0, "dlc": 0.0}, [["mse_fp", "mse_fp_on_quantised"]]),
        ({"mse": 0.0, "dlc": 0.0}, [["akl"]]),
    ],
)
def test_attention_is_a_kind_of_its_own_in_a_balance(
    given: dict[str, float], kinds: list[list[str]], batch: dict[str, Tensor]
) -> None:
    objective = DistributionCorrection(**given, balance="ema")
    balance = objective.balance_for_block()
    assert isinstance(balance, RunningAverages)
    assert balance.kinds == tuple(map(tuple, kinds))
    assert not balance.averages.any()
    terms = all_terms(objective, batch)
    assert balance(total(terms), terms).item() == pytest.approx(len(kinds), rel=1e-2)
    assert type(DistributionCorrection(**given).balance_for_block()) is PlainSum


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mse": -1.0}, r"mse=-1\.0, dlc=1\.0, akl=1\.0: .*0 or more"),
        ({"akl": -0.1}, r"akl=-0\.1: .*take mse: 1"),
        ({"mse": 0.0, "dlc": 0.0, "akl": 0.0}, r"akl=0\.0: .*one is above 0"),
        ({"akl_mode": "paper"}, r"akl_mode='paper': one of exact, faithful is needed; leave out for exact"),
        ({"akl_heads": "all"}, r"akl_heads='all': one of each, mean is needed; leave out for each"),
        ({"akl_rows": -1}, r"akl_rows=-1: .*or 0 for all; 64 is usual"),
        ({"akl_rows": True}, r"akl_rows=True"),
        ({"balance": "mean"}, r"balance='mean': one of sum, ema"),
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, Any], message: str) -> None:
    unchecked = inspect.unwrap(DistributionCorrection.__init__)  # as outside of tests: no check of types
    with pytest.raises(InputError, match=message):
        unchecked(object.__new__(DistributionCorrection), **wrong)
