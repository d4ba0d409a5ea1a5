"""Runs with a budget of bits: that it is met, that it is chosen once, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from ptql.api import evaluate
from ptql.calibration import bit_choice
from ptql.calibration.bit_budget import CHOICES, BitBudget, plan_bits
from ptql.calibration.quant_lm import QuantLM
from ptql.calibration.sensitivity import UnitWalk, Walk
from ptql.cli import main
from ptql.errors import InputError
from ptql.evaluation.recorded_run import RecordedRun
from ptql.formats.ptql import PackedFormat
from ptql.parts.inputs import InputRange
from ptql.recipe import IntScheme
from tests.models import llama_config, opt_config
from tests.words import save_source, save_text

pytestmark = pytest.mark.usefixtures("one_thread")

Fit = Callable[..., Path]
NAMES = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
FUSED = [NAMES[:3], NAMES[4:6]]
ONE_STEP = 6 * 80 * 48 / 53_000  # bits per weight: the largest unit from 2 bits to 8


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds two sources, `llama` and `opt`, and a text."""
    folder = tmp_path_factory.mktemp("places")
    save_source(folder / "llama", llama_config(num_hidden_layers=3))
    save_source(folder / "opt", opt_config())
    save_text(folder / "words.txt")
    return folder


def arguments(places: Path, run: Path, *more: str, source: str = "llama", method: str = "rtn") -> list[str]:
    given = ("--model.source", str(places / source), "--data.text", str(places / "words.txt"))
    small = ("--data.length", "16", "--data.samples", "6", "--data.batch_size", "2", "--trainer.accelerator", "cpu")
    learning = ("--trainer.max_epochs", "0" if method == "rtn" else "2", "--trainer.logger", "false")
    recipe = ("-c", f"methods/{method}", "-c", "schemes/w4a16")
    return ["fit", *recipe, *given, *small, *learning, "--trainer.default_root_dir", str(run), *more]


@pytest.fixture(scope="module")
def fit(places: Path, tmp_path_factory: pytest.TempPathFactory) -> Fit:
    """A run, made once."""
    made: dict[tuple[str, ...], Path] = {}

    def run(*more: str, **kinds: str) -> Path:
        key = (*more, *kinds.values())
        if key not in made:
            made[key] = tmp_path_factory.mktemp("run") / "run"
            assert main(arguments(places, made[key], *more, **kinds)) == 0
        return made[key]

    return run


def metrics(run: Path) -> dict[str, Any]:
    return json.loads((run / "metrics.json").read_text())


def stored_format(run: Path) -> PackedFormat:
    return PackedFormat.from_dict(json.loads((run / "model/config.json").read_text())["quantization_config"])


# What is chosen


@pytest.mark.parametrize(
    ("budget", "more", "kinds"),
    [
        ("2.6", (), {}),
        ("3", (), {}),
        ("4.5", ("--model.weight.group_size", "16"), {}),
        ("3.3", ("--model.weight.symmetric", "true", "--bits_choices", "[2, 4]"), {}),
        ("3.5", (), {"source": "opt"}),
        ("4", (), {"source": "opt", "method": "lrquant"}),  # with biases that are added
        ("3.9", (), {"method": "lrquant_plus"}),  # with factors
    ],
)
def test_what_is_stored_meets_the_budget_and_is_near(
    fit: Fit, budget: str, more: tuple[str, ...], kinds: dict[str, str]
) -> None:
    found = metrics(fit("--bits_budget", budget, *more, **kinds))
    assert found["bits"]["budget"] == float(budget)
    assert found["bits_per_weight"] == found["bits"]["reached"] <= float(budget)
    assert found["bits_per_weight"] > float(budget) - ONE_STEP


def test_matrices_that_share_an_input_have_the_same_bits(fit: Fit) -> None:
    run = fit("--bits_budget", "3")
    found, fmt = metrics(run)["bits"], stored_format(run)
    layers = found["layers"]
    assert set(layers) == {f"{block}.{name}" for block in range(3) for name in NAMES}
    assert len(set(layers.values())) > 1
    for block in range(3):
        for names in FUSED:
            assert len({layers[f"{block}.{name}"] for name in names}) == 1
        assert all(fmt.schemes.of(block, name) == IntScheme(layers[f"{block}.{name}"]) for name in NAMES)
    assert sum(found["share_of_weights"].values()) == pytest.approx(1, abs=1e-3)
    assert found["uniform"]["bits"] == 2  # all that fits: 3 bits take more than 3 with their scales
    assert found["divergence"] < found["uniform"]["divergence"]


def test_widths_are_measured_as_clipping_begins(
    places: Path, tmp_path: Path, fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On inputs of the full-precision model, those of the windows that are measured on."""
    kept: list[Any] = []
    chosen, read = bit_choice._Choosing.chosen, Walk.inputs
    found: dict[int, dict[str, InputRange]] = {}

    def kept_inputs(self: Walk, index: int, block: nn.Module) -> dict[str, InputRange]:
        found[index] = read(self, index, block)
        return found[index]

    monkeypatch.setattr(bit_choice._Choosing, "chosen", lambda self: kept.append(self) or chosen(self))
    monkeypatch.setattr(Walk, "inputs", kept_inputs)
    starts = [("--model.weight_quantizer.initial", start) for start in ("search", "search_on_inputs")]
    for start in starts:
        more = ("--bits_budget", "3", "--trainer.max_epochs", "0", *start)
        assert main(arguments(places, tmp_path / start[1], *more, method="omniquant")) == 0
    by_weights, on_inputs = kept
    errors = [json.loads((tmp_path / start[1] / "ledger/bits.json").read_text()) for start in starts]
    assert errors[0] != errors[1]
    assert not by_weights._inputs
    model, seen = AutoModelForCausalLM.from_pretrained(places / "llama", dtype=torch.float64), {}
    for block, layer in enumerate(model.model.layers):
        for name in NAMES:
            look = partial(lambda key, module, given: seen.update({key: given[0]}), (block, name))
            layer.get_submodule(name).register_forward_pre_hook(look)
    model(on_inputs._plan.windows)
    for (block, name), x in seen.items():
        torch.testing.assert_close(found[block][name].mean, x.abs().mean((0, 1)).float(), rtol=1e-4, atol=1e-6)


def test_a_layer_that_is_named_keeps_its_format_and_counts(fit: Fit) -> None:
    """Also where it is the format that all others have without a budget."""
    layers = ("--model.layers", '{"down_proj": 4, "layers.1.self_attn.q_proj": {"bits": 6, "group_size": 16}}')
    run = fit("--bits_budget", "3.4", *layers)
    schemes = stored_format(run).schemes
    assert [schemes.of(block, "mlp.down_proj") for block in range(3)] == [IntScheme(4)] * 3
    assert schemes.of(1, "self_attn.q_proj") == IntScheme(6, 16)
    assert schemes.of(1, "self_attn.k_proj") == schemes.of(1, "self_attn.v_proj") != IntScheme(6, 16)
    assert 3.4 - ONE_STEP < metrics(run)["bits_per_weight"] <= 3.4


def test_all_but_the_smallest_budget_is_one_format(fit: Fit, places: Path) -> None:
    """What two bits take is no InputError, and a model of one format needs no list of others."""
    plain = metrics(fit("--model.weight.bits", "2"))["bits_per_weight"]
    run = fit("--bits_budget", repr(plain))
    assert metrics(run)["bits"]["share_of_weights"] == {"2": 1.0}
    assert stored_format(run).version == 1


def test_a_layer_that_matters_more_gets_more(places: Path, tmp_path: Path) -> None:
    """The last block's output is what is predicted from; without the others' errors it decides."""
    source = Path(shutil.copytree(places / "llama", tmp_path / "source"))
    tensors = load_file(source / "model.safetensors")
    for name in tensors:
        if "layers.0" in name and ("o_proj" in name or "down_proj" in name):
            tensors[name] *= 1e-3  # the block hardly changes what passes through
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    run = tmp_path / "run"
    assert main(arguments(places, run, "--bits_budget", "4", "--model.source", str(source))) == 0
    layers = metrics(run)["bits"]["layers"]
    assert {layers[f"0.{name}"] for name in NAMES} == {2}


def test_a_choice_can_be_given_as_formats_of_layers(fit: Fit) -> None:
    run = fit("--bits_budget", "3")
    again = fit("--model.layers", json.dumps(metrics(run)["bits"]["layers"]))
    assert metrics(again)["fit"]["checksum"] == metrics(run)["fit"]["checksum"]
    assert "bits" not in metrics(again)


def test_a_recorded_run_has_the_formats_that_were_chosen(fit: Fit) -> None:
    run = fit("--bits_budget", "3")
    assert RecordedRun.open(run).model.layer_schemes == stored_format(run).schemes


# Chosen once


class Killed(Exception):
    pass


def killed_after(blocks: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Measuring ends with an exception once so many blocks were asked for; lists them, as -1 - index if known."""
    passed: list[int] = []
    block = UnitWalk.block

    def counted(self: UnitWalk, index: int, module: Any, known: bool = False) -> list[list[float]]:
        if len(passed) == blocks:
            raise Killed
        passed.append(-index - 1 if known else index)
        return block(self, index, module, known)

    monkeypatch.setattr(UnitWalk, "block", counted)
    return passed


def test_a_run_killed_while_measuring_goes_on_and_ends_the_same(
    fit: Fit, places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, run = fit("--bits_budget", "3"), tmp_path / "run"
    with monkeypatch.context() as patch:
        killed_after(2, patch)
        with pytest.raises(Killed):
            main(arguments(places, run, "--bits_budget", "3"))
    assert not (run / "model").exists()
    passed = killed_after(99, monkeypatch)
    assert main(arguments(places, run, "--bits_budget", "3")) == 0
    assert passed == [-1, -2, 2]  # two were measured before
    assert metrics(run)["bits"] == metrics(whole)["bits"]
    assert metrics(run)["fit"]["checksum"] == metrics(whole)["fit"]["checksum"]


def test_measurements_that_are_damaged_are_made_again(
    fit: Fit, places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        killed_after(2, patch)
        with pytest.raises(Killed):
            main(arguments(places, run, "--bits_budget", "3"))
    (run / "ledger" / bit_choice.FILE).write_text('{"0": [[')
    passed = killed_after(99, monkeypatch)
    assert main(arguments(places, run, "--bits_budget", "3")) == 0
    assert passed == [0, 1, 2]
    assert metrics(run)["bits"] == metrics(fit("--bits_budget", "3"))["bits"]


def test_a_choice_is_not_made_again(
    fit: Fit, places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(fit("--bits_budget", "3"), tmp_path / "run"))
    before = metrics(run)
    (run / "ledger/block-00001.safetensors").unlink()
    shutil.rmtree(run / "model")
    passed = killed_after(0, monkeypatch)
    assert main(arguments(places, run, "--bits_budget", "3")) == 0
    assert passed == []
    assert metrics(run)["bits"] == before["bits"]
    assert metrics(run)["fit"]["checksum"] == before["fit"]["checksum"]
    assert f"ptql: bits: {before['bits_per_weight']:.4f} per weight of a budget of 3: " in capsys.readouterr().out


@pytest.mark.parametrize("more", [("--bits_budget", "3.1"), ("--bits_budget", "3", "--bits_choices", "[2,3,4]"), ()])
def test_another_budget_is_another_run(
    fit: Fit, places: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...]
) -> None:
    assert main(arguments(places, fit("--bits_budget", "3"), *more)) == 2
    assert "holds another run, whose bits" in capsys.readouterr().err


def test_two_runs_choose_the_same(fit: Fit, places: Path, tmp_path: Path) -> None:
    assert main(arguments(places, tmp_path / "run", "--bits_budget", "3")) == 0
    assert metrics(tmp_path / "run")["bits"] == metrics(fit("--bits_budget", "3"))["bits"]


def test_lines_while_measuring(
    places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bit_choice, "LINE_EVERY_SECONDS", 0.0)
    assert main(arguments(places, tmp_path / "run", "--bits_budget", "3")) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("bits: ")]
    phases = ("rounded by itself", "rounded with all others")
    expected = [f"bits: groups {phase}: block {index}/3" for phase in phases for index in (1, 2, 3)]
    assert [line.split("  ")[0] for line in said] == expected
    assert [line.endswith(" left") for line in said] == [True, True, False] * 2
    quiet = ("--trainer.enable_progress_bar", "false")
    assert main(arguments(places, tmp_path / "quiet", "--bits_budget", "3", *quiet)) == 0
    assert "bits:" not in capsys.readouterr().err


def test_a_better_start_is_named_where_it_is_not_taken(
    places: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = []
    for name, start in (("usual", ()), ("inputs", ("-c", "presets/low_bits"))):
        assert main(arguments(places, tmp_path / name, "--bits_budget", "3", *start)) == 0
        said.append("clipping begins on inputs: -c presets/low_bits" in capsys.readouterr().out)
    assert said == [True, False]


# What is refused

CLUSTERED = ("--model.transforms", '["ptql.parts.transforms.Permute"]', "--model.layers")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--bits_budget", "2"), "bits_budget=2: .* takes 2.4.* to 8.4.* bits per weight here; give a number between"),
        (("--bits_budget", "9"), "bits_budget=9: .* takes 2.4.* to 8.4.* bits per weight"),
        (("--bits_budget", "nan"), "bits_budget=nan: "),
        (("--bits_budget", "3", "--bits_choices", "[3]"), r"bits_choices=\[3\]: two or more of the widths 1 to 8"),
        (("--bits_budget", "3", "--bits_choices", "[3, 16]"), r"bits_choices=\[3, 16\]: two or more"),
        (("--bits_budget", "3", "--bits_choices", "[0, 4]"), "weight bits=0: "),
        (
            ("--bits_choices", "[3, 4]"),
            r"bits_choices=\[3, 4\]: without a budget nothing is chosen",
        ),
        (("--bits_budget", "3", "--model.layers", "{layers: 4}"), "layers: every layer is named there"),
        (("--bits_budget", "3", "--model.weight.clustered", "true"), "bits_budget=3 with clustered=true: .*false$"),
        (
            ("--bits_budget", "3", *CLUSTERED, "{down_proj: {clustered: true}}"),
            "layers: clustered=true beside a budget: .*, or bits_budget, out$",
        ),
    ],
)
def test_what_can_not_be_met_is_refused_before_anything_is_written(
    places: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], message: str
) -> None:
    assert main(arguments(places, tmp_path / "run", *more)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(f"ptql: error: {message}", line)
    assert not (tmp_path / "run").exists()


def test_one_bit_needs_a_zero_point() -> None:
    assert BitBudget.given(2.0, [1, 2], IntScheme(4)) == BitBudget(2.0, (1, 2))
    with pytest.raises(InputError, match="bits=1, symmetric=true"):
        BitBudget.given(2.0, [1, 2], IntScheme(4, symmetric=True))


def test_choices_are_in_order_and_once() -> None:
    assert BitBudget.given(3.0, [4, 2, 4], IntScheme()) == BitBudget(3.0, (2, 4))
    assert BitBudget.given(3.0, None, IntScheme()) == BitBudget(3.0, CHOICES)
    assert BitBudget.given(None, None, IntScheme()) is None


@pytest.mark.parametrize(("bits", "expected"), [(3.0, 2), (3.5, 3), (8.0, 6)])
def test_until_it_is_chosen_a_model_has_one_format_that_fits(places: Path, bits: float, expected: int) -> None:
    """What the dry run tries: 3 bits take more than 3 with their scales."""
    model = QuantLM(source=str(places / "llama"), weight=IntScheme(4, -1, True))
    plan = plan_bits(model, model.open(), BitBudget(bits, CHOICES))
    assert model.layer_schemes.default == IntScheme(expected, -1, True)
    assert plan.total == int(bits * 3 * (2 * 48 * 48 + 2 * 24 * 48 + 3 * 80 * 48))


# A real model


@pytest.mark.shared
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_real_model_loses_no_more_than_with_uniform_bits(
    stories_dir: Path, shared_dir: Path, tmp_path: Path, bits: int
) -> None:
    text = shared_dir / "data/text"

    def perplexity(name: str, *more: str) -> tuple[float, float]:
        run = tmp_path / name
        given = ("--model.source", str(stories_dir), "--data.text", str(text / "tinystories-train.jsonl"))
        data = ("--data.length", "128", "--data.samples", "16", "--trainer.accelerator", "cpu")
        places = ("--trainer.default_root_dir", str(run), "--trainer.logger", "false")
        assert main(["fit", "-c", "methods/rtn", "-c", "schemes/w4a16", *given, *data, *places, *more]) == 0
        found = evaluate(run, text={"stories": text / "tinystories-test.jsonl"}, length=128, windows=96)
        return found["ppl"]["stories"], metrics(run)["bits_per_weight"]

    uniform, size = perplexity("uniform", "--model.weight.bits", str(bits))
    chosen, reached = perplexity("chosen", "--bits_budget", repr(size))
    assert reached <= size
    assert chosen <= uniform
