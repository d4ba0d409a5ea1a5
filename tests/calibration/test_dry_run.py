"""What would fail late in a run fails in the dry run, which leaves nothing behind."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ptql.calibration import dry_run
from ptql.calibration.dry_run import DryRun
from ptql.calibration.quant_lm import QuantLM
from ptql.errors import InputError
from ptql.parts.activations import DynamicTokens
from ptql.parts.transforms import Smooth
from ptql.recipe import ActivationScheme, IntScheme
from tests.models import some_ids
from tests.words import save_source

Try = Callable[..., str]


class Halved(DynamicTokens):
    """Does with queries, keys and values what no stored model does."""

    def for_attention(self, scheme: ActivationScheme) -> Any:
        return lambda x: x * 0.5


class OnlyLearning(DynamicTokens):
    """Does it while learning alone: what is measured is what is stored."""

    def for_attention(self, scheme: ActivationScheme) -> Any:
        rounding = super().for_attention(scheme)
        return lambda x: x * 0.5 if torch.is_grad_enabled() else rounding(x)


class Usage(NamedTuple):
    total: int
    used: int
    free: int


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_source(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture
def attempt(source: Path, tmp_path: Path) -> Try:
    """A dry run of W4A4 with smoothing into tmp_path/run."""

    def run(directory: Path = source, learns: bool = True, **recipe: Any) -> str:
        options: dict[str, Any] = {"weight": IntScheme(4, -1), "activation": ActivationScheme(4), **recipe}
        model = QuantLM(source=str(directory), transforms=[Smooth()], **options)
        opened = model.open()
        fmt = model.packed_format(opened, model.added_biases(opened.block(0), opened))
        tried = DryRun(tmp_path / "run", torch.device("cpu"), contextlib.nullcontext(), learns)
        return tried(model, opened, fmt, some_ids(2, 16))

    return run


@pytest.fixture
def changed(source: Path, tmp_path: Path) -> Callable[[Callable[[dict[str, Tensor]], None]], Path]:
    """The source with other weights."""

    def change(by: Callable[[dict[str, Tensor]], None]) -> Path:
        directory = Path(shutil.copytree(source, tmp_path / "changed"))
        tensors = load_file(directory / "model.safetensors")
        by(tensors)
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
        return directory

    return change


@pytest.mark.parametrize("learns", [True, False])
def test_it_says_how_it_went_and_leaves_nothing(attempt: Try, tmp_path: Path, learns: bool) -> None:
    assert attempt(learns=learns).startswith("dry run: one batch through one block, written and read again, in ")
    assert os.listdir(tmp_path) == []


def test_a_directory_that_was_there_stays_as_it_was(attempt: Try, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    attempt()
    assert os.listdir(tmp_path / "run") == []
    (tmp_path / "run/mine.txt").write_text("mine")
    (tmp_path / "run/.dry-run-killed").mkdir()  # by a process that was killed
    (tmp_path / "run/.dry-run-killed/x").touch()
    attempt()
    assert os.listdir(tmp_path / "run") == ["mine.txt"]


def test_folders_above_are_removed_again_if_it_made_them(source: Path, tmp_path: Path) -> None:
    model = QuantLM(source=str(source))
    opened = model.open()
    fmt = model.packed_format(opened, model.added_biases(opened.block(0), opened))
    (tmp_path / "mine").mkdir()
    tried = DryRun(tmp_path / "mine/deep/er/run", torch.device("cpu"), contextlib.nullcontext(), learns=False)
    tried(model, opened, fmt, some_ids(2, 16))
    assert os.listdir(tmp_path) == ["mine"]
    assert os.listdir(tmp_path / "mine") == []


def test_random_numbers_go_on_as_if_it_had_not_been(attempt: Try) -> None:
    torch.rand(1)  # Python's own generator is not looked at: beartype, under test alone, draws from it
    states = torch.get_rng_state(), np.random.get_state()[1].tolist()  # type: ignore[union-attr]
    attempt()
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]  # type: ignore[union-attr]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(attempt: Try, changed: Any, tmp_path: Path, value: float) -> None:
    def damage(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.mlp.down_proj.weight"][0, 0] = value

    with pytest.raises(InputError, match=r"changed: .*numbers that are not finite; .*fetch the model again"):
        attempt(changed(damage))
    assert os.listdir(tmp_path) == ["changed"]


def test_not_enough_room(attempt: Try, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = [0]
    monkeypatch.setattr(dry_run.shutil, "disk_usage", lambda _: Usage(10**9, 0, free[0]))
    with pytest.raises(InputError, match=r"run: 0\.00 GB are free where about .* GB are needed; make room"):
        attempt()
    assert os.listdir(tmp_path) == []
    # Two blocks, each in the ledger and in the model; float32 embeddings of 64 x 48 and a norm beside them.
    free[0] = 200_000
    attempt()
    free[0] = 4 * 48 * 65 + 2 * 2 * 11_000
    with pytest.raises(InputError, match="make room"):
        attempt()


def test_activations_that_the_stored_model_rounds_otherwise(attempt: Try, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"differs from the measured one by .*; use DynamicTokens"):
        attempt(activation_quantizer=Halved())
    assert os.listdir(tmp_path) == []
    attempt(activation_quantizer=OnlyLearning())  # another gradient is a method, not a fault


@pytest.mark.parametrize("kind", [torch.optim.LBFGS, torch.optim.SparseAdam])
def test_an_optimiser_that_can_not_learn_a_block(attempt: Try, tmp_path: Path, kind: Any) -> None:
    with pytest.raises(InputError, match=r"optimizer: it can't learn a block .*; correct --model.optimizer"):
        attempt(optimizer=kind)
    assert os.listdir(tmp_path) == []
    attempt(optimizer=kind, learns=False)


def test_a_directory_that_can_not_be_written(attempt: Try, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(InputError, match="run: can't be written to"):
        attempt()
    assert (tmp_path / "run").read_text() == "mine"


def test_a_bug_is_no_input_error_and_leaves_nothing(
    attempt: Try, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("ours")

    monkeypatch.setattr(dry_run, "finish_block", broken)
    with pytest.raises(RuntimeError, match="ours"):
        attempt()
    assert os.listdir(tmp_path) == []
