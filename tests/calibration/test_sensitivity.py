"""What rounding a unit does, against transformers' own forward pass of the whole model."""

from __future__ import annotations

import copy
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import kl_div
from transformers import PreTrainedModel

from ptql.calibration.memory_budget import Budget
from ptql.calibration.ranks import Ranks
from ptql.calibration.sensitivity import ChoiceWalk, ContextWalk, Unit, UnitWalk, Walk
from ptql.checkpoint import Checkpoint
from ptql.errors import InputError
from ptql.parts.weights import Affine
from ptql.recipe import IntScheme, LayerSchemes
from tests.models import CONFIGS, block_calls, blocks_of, llama_config, random_model, save, some_ids

ROOT = Path(__file__).parents[2]
SCHEMES = (IntScheme(2), IntScheme(3, 20), IntScheme(4, 16, True))
REFERENCE = 1
IDS = some_ids(4, 12)


def units_of(source: Checkpoint) -> list[Unit]:
    return [Unit(index, group) for index in range(source.num_blocks) for group in source.layout.linears]


def rounding(name: str, w: Tensor, scheme: IntScheme) -> Tensor:
    return Affine().for_linear(name, w, scheme).fake(w).detach()


def a_walk(source: Checkpoint, run: Path, ids: Tensor = IDS, ranks: Ranks | None = None) -> Walk:
    return Walk(source, ids, torch.device("cpu"), ranks or Ranks(), Budget(), run, 8)


def walked(
    directory: Path, run: Path, known: tuple[int, ...] = (), ids: Tensor = IDS, ranks: Ranks | None = None
) -> tuple[list[list[float]], list[float]]:
    """Errors of the units of blocks that are not known, and divergences of all units."""
    source, errors = Checkpoint(directory), []
    walk = a_walk(source, run, ids, ranks)
    units = UnitWalk(walk, units_of(source), SCHEMES, REFERENCE, rounding)
    for index in range(source.num_blocks):
        errors += units.block(index, source.block(index), index in known)
    return errors, walk.divergences()


def with_rounded(
    model: PreTrainedModel, schemes: dict[tuple[int, str], IntScheme], share: float = 1.0
) -> PreTrainedModel:
    changed = copy.deepcopy(model)
    for (index, name), scheme in schemes.items():
        linear = blocks_of(changed)[index].get_submodule(name)
        before: Tensor = linear.weight.data  # type: ignore[assignment]
        linear.weight.data = before + share * (rounding(name, before, scheme) - before)
    return changed


def nats(model: PreTrainedModel, other: PreTrainedModel) -> float:
    """The divergence of the other's predictions."""
    said, expected = (m(IDS).logits.log_softmax(-1) for m in (other, model))
    return kl_div(said, expected, log_target=True, reduction="sum").item() / IDS.numel()


@pytest.mark.parametrize("name", ["llama", "opt", "gemma2", "phi3"])
def test_errors_and_divergences_are_those_of_the_whole_model(tmp_path: Path, name: str) -> None:
    model = random_model(CONFIGS[name])
    directory = save(model, tmp_path / "model")
    errors, divergences = walked(directory, tmp_path)
    units = units_of(Checkpoint(directory))
    assert len(errors) == len(divergences) == len(units)
    outputs = [call[2] for call in block_calls(model, IDS)]
    for unit, of_unit, divergence in zip(units, errors, divergences, strict=True):
        for place, scheme in enumerate(SCHEMES):
            rounded = with_rounded(model, {(unit.block, name): scheme for name in unit.linears})
            output, target = block_calls(rounded, IDS)[unit.block][2].double(), outputs[unit.block].double()
            squares, error = target.square().sum(-1), (output - target).square().sum(-1)
            both = (error / squares).mean() + error.sum() / squares.sum()
            assert of_unit[place] == pytest.approx(both.item(), rel=1e-3)
            if place == REFERENCE:
                assert divergence == pytest.approx(nats(model, rounded), rel=1e-2)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_choices_are_tried_as_a_whole(tmp_path: Path, name: str) -> None:
    model = random_model(CONFIGS[name])
    source = Checkpoint(save(model, tmp_path / "model"))
    names, walk = source.layout.names, a_walk(source, tmp_path)
    odd = {f"1.{names[0]}": IntScheme(2), f"0.{names[-1]}": IntScheme(16), f"0.{names[1]}": IntScheme(4, 16, True)}
    choices = [LayerSchemes(IntScheme(3)), LayerSchemes(IntScheme(4), odd)]
    trials = [(choice, share) for share in (1.0, 0.4) for choice in choices]
    trial = ChoiceWalk(walk, trials, rounding)
    for index in range(source.num_blocks):
        trial.block(index, source.block(index), names)
    for (choice, share), found in zip(trials, walk.divergences(), strict=True):
        schemes = {(index, name): choice.of(index, name) for index in range(source.num_blocks) for name in names}
        schemes = {key: scheme for key, scheme in schemes.items() if scheme.quantised}
        assert found == pytest.approx(nats(model, with_rounded(model, schemes, share)), rel=1e-2)


@pytest.mark.parametrize("share", [1.0, 0.4])
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_a_unit_among_rounded_ones(tmp_path: Path, name: str, share: float) -> None:
    model = random_model(CONFIGS[name])
    source = Checkpoint(save(model, tmp_path / "model"))
    names, walk, units = source.layout.names, a_walk(source, tmp_path), units_of(source)[1:]
    base = LayerSchemes(IntScheme(4), {f"1.{names[0]}": IntScheme(3, 16), f"0.{names[1]}": IntScheme(16)})
    tried = ContextWalk(walk, units, base, IntScheme(2), rounding, share)
    for index in range(source.num_blocks):
        tried.block(index, source.block(index), names)
    schemes = {(index, name): base.of(index, name) for index in range(source.num_blocks) for name in names}
    for unit, found in zip([Unit(0, ()), *units], walk.divergences(), strict=True):
        changed = {**schemes, **{(unit.block, name): IntScheme(2) for name in unit.linears}}
        quantised = {key: scheme for key, scheme in changed.items() if scheme.quantised}
        assert found == pytest.approx(nats(model, with_rounded(model, quantised, share)), rel=1e-2)


def test_blocks_whose_errors_are_known_are_passed_and_change_nothing(tmp_path: Path) -> None:
    directory = save(random_model(llama_config(num_hidden_layers=3)), tmp_path / "model")
    errors, divergences = walked(directory, tmp_path)
    assert walked(directory, tmp_path, known=(0, 2)) == (errors[4:8], divergences)


def test_streams_on_the_disk_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = save(random_model(llama_config()), tmp_path / "model")
    before = walked(directory, tmp_path)
    monkeypatch.setattr(Budget, "place", lambda *_: "disk")
    assert walked(directory, tmp_path) == before
    assert not list(tmp_path.glob(".stream*"))


def test_a_damaged_block_is_an_input_error(tmp_path: Path) -> None:
    model = random_model(llama_config())
    blocks_of(model)[1].get_submodule("mlp.up_proj").weight.data[0, 0] = torch.nan  # type: ignore[index]
    with pytest.raises(InputError, match=r"block 1 gives numbers that are not finite; .*fetch the model again"):
        walked(save(model, tmp_path / "model"), tmp_path)


TWO = """
import json, sys
from pathlib import Path
import torch
import torch.distributed as dist
from ptql.calibration.ranks import Ranks
from tests.calibration.test_sensitivity import IDS, walked

rank, folder = int(sys.argv[1]), Path(sys.argv[3])
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{sys.argv[2]}", rank=rank, world_size=2)
ranks = Ranks(rank, 2)
print(json.dumps(walked(folder / "model", folder, ids=ranks.share(IDS), ranks=ranks)))
dist.destroy_process_group()
"""


def test_two_processes_find_the_same_and_what_one_finds(tmp_path: Path) -> None:
    errors, divergences = walked(save(random_model(llama_config()), tmp_path / "model"), tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    commands = [[sys.executable, "-c", TWO, str(rank), port, str(tmp_path)] for rank in range(2)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for command in commands]
    said = [json.loads(process.communicate(timeout=120)[0]) for process in both]
    assert said[0] == said[1]
    assert said[0][1] == pytest.approx(divergences, rel=1e-3)
    for mine, alone in zip(said[0][0], errors, strict=True):
        assert mine == pytest.approx(alone, rel=1e-3)
