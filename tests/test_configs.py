"""Every file in configs/ through the real parser: what it builds is what its name and its comment say."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from ptql.calibration.data import CalibrationData
from ptql.calibration.quant_lm import QuantLM
from ptql.calibration.trainer import BlockTrainer
from ptql.cli import main
from ptql.parts.activations import DynamicTokens, StaticClusters
from ptql.parts.objectives import DistributionCorrection, Reconstruction
from ptql.parts.transforms import Compensate, Permute, Smooth
from ptql.parts.weights import Affine, Gptq, SalientBinary
from ptql.recipe import IntScheme

CONFIGS = Path(__file__).parents[1] / "configs"
METHODS = sorted(path.stem for path in (CONFIGS / "methods").glob("*.yaml"))
SCHEMES = sorted(path.stem for path in (CONFIGS / "schemes").glob("*.yaml"))
STRATEGIES = sorted(path.stem for path in (CONFIGS / "strategies").glob("*.yaml"))
OTHERS = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
SMOOTHED = {"omniquant", "lrquant", "lrquant_plus", "lrquant_tokens"}
NOTHING_LEARNED = {"rtn", "gptq", "rptq"}
CPU = ("--trainer.accelerator", "cpu", "--trainer.precision", "32-true")
Built = tuple[QuantLM, CalibrationData, BlockTrainer]


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Runs `ptql fit` up to the call of `fit`, and gives what it would be called with."""
    built: list[Built] = []

    def fit(self: BlockTrainer, model: QuantLM, datamodule: CalibrationData | None = None) -> None:
        assert datamodule is not None
        built.append((model, datamodule, self))

    def run(*names: str, options: tuple[str, ...] = ()) -> Built:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(BlockTrainer, "fit", fit)
        assert main(["fit", *(part for name in names for part in ("-c", name)), *CPU, *options]) == 0
        assert list(tmp_path.iterdir()) == []
        return built.pop()

    return run


def numbers(scheme: str) -> tuple[IntScheme, int]:
    """The format of weights and the bits of activations in a name such as w2a16g64, or w2ba8 of a level more."""
    if scheme == "w1.61a16":
        return IntScheme(1, salient=0.2), 16
    scheme = scheme.removesuffix("_rptq")
    found = re.fullmatch(r"w(\d+)(b?)a(\d+)(?:g(\d+))?", scheme)
    assert found, scheme
    balanced = bool(found[2])
    return IntScheme(int(found[1]), int(found[4] or -1), symmetric=balanced, balanced=balanced), int(found[3])


def test_the_files_that_were_asked_for_are_there() -> None:
    assert {"rtn", "omniquant", "lrquant"} <= set(METHODS)
    asked = "w2a16 w2a16g64 w2a16g128 w3a16 w3a16g128 w4a16 w4a16g128 w6a6 w4a4 w4a8 w3a8 w2a8 w2a6 w8a8"
    assert set(asked.split()) <= set(SCHEMES)
    assert {"base", "demo"} <= set(OTHERS)


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_a_file_opens_with_what_it_is(path: Path) -> None:
    first = path.read_text().splitlines()[0]
    assert re.fullmatch(r"# \S.{20,}", first)
    if path.parent.name == "methods":
        assert first.startswith(f"# ptql fit -c methods/{path.stem} -c schemes/")
        assert yaml.safe_load(path.read_text())["model"]["method"] == path.stem


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_scheme_has_the_numbers_of_its_name_and_of_its_comment(scheme: str) -> None:
    path = CONFIGS / "schemes" / f"{scheme}.yaml"
    weight, activation = numbers(scheme)
    said = {"weight": weight.to_dict(), "activation": {"bits": activation}}
    if scheme.endswith("_rptq"):
        apart = {"bits": {"qkv": 8, "fc1": 8, "softmax": 8}}
        said["activation_quantizer"] = {"class_path": "ptql.parts.activations.StaticClusters", "init_args": apart}
    assert yaml.safe_load(path.read_text()) == {"model": said}
    of_groups = "one scale a row" if weight.group_size == -1 else f"groups of {weight.group_size}"
    of_activations = "not quantised" if activation == 16 else f"{activation} bits, dynamic per token"
    if scheme.endswith("_rptq"):
        of_activations = f"{activation} bits on fixed grids, but 8 for what norms and the softmax give"
    of_weights = f"{weight.bits} bits, {of_groups}, asymmetric"
    if weight.salient is not None:
        assert path.read_text().startswith(
            "# Weights: 4 bits in a fifth of the input channels, the sign of all others;"
        )
        return
    if weight.balanced:
        five, three = "five levels, -2 to 2 (ABQ-LLM's bit balance), 2.33", "three levels, -1 to 1 (ternary), 1.6"
        of_weights = f"{five if weight.bits == 2 else three} bits, {of_groups}"
    assert path.read_text().splitlines()[0] == f"# Weights: {of_weights}. Activations: {of_activations}."


GROUPED = {scheme for scheme in SCHEMES if "g" in scheme}
PAIRS = [(m, s) for m in sorted(set(METHODS) - {"ptq161"}) for s in sorted(set(SCHEMES) - {"w1.61a16"})]


@pytest.mark.parametrize(("method", "scheme"), [(m, s) for m, s in PAIRS if m != "rptq" or s not in GROUPED])
def test_every_method_with_every_scheme(build: Any, method: str, scheme: str) -> None:
    model, _, trainer = build(f"methods/{method}", f"schemes/{scheme}")
    weight, activation = numbers(scheme)
    assert model.weight == replace(weight, clustered=method == "rptq")
    assert model.activation.bits == activation
    assert model.method == method
    assert isinstance(model.weight_quantizer, Affine)
    assert model.weight_quantizer.clip == (method not in NOTHING_LEARNED)
    assert isinstance(model.weight_quantizer, Gptq) == (method in ("gptq", "rptq"))
    smoothed = method in SMOOTHED and activation < 16
    transforms = [Smooth, Compensate] if method == "abq" else [Smooth] * smoothed
    if method == "rptq":
        transforms = [Permute]  # its clusters are those of weights, too
    static = method == "rptq" or scheme.endswith("_rptq")
    assert isinstance(model.activation_quantizer, StaticClusters if static else DynamicTokens)
    assert [type(transform) for transform in model.transforms] == transforms
    assert trainer.max_epochs == (0 if method in NOTHING_LEARNED else 20)
    json.dumps(model.identity())  # what a run is recognised by


def test_what_the_methods_learn_with(build: Any) -> None:
    """The settings that distinguish the papers."""
    found = {}
    for method in ("omniquant", "lrquant", "lrquant_plus", "lrquant_tokens"):
        model, _, _ = build(f"methods/{method}", "schemes/w4a4")
        (smooth,), loss = model.transforms, model.objective
        assert isinstance(smooth, Smooth)
        assert isinstance(loss, Reconstruction)
        clip = model.weight_quantizer
        assert (clip.initial, clip.lr) == (4.0, 0.01)
        assert (clip.factor_rank, loss.balance) == ((1, "ema") if method == "lrquant_plus" else (0, "sum"))
        assert loss.faithful is False
        found[method] = (smooth.initial, smooth.shift, smooth.lr, loss.mse, loss.nlc, loss.rse, tuple(loss.targets))
    assert found == {
        "omniquant": ("balanced", "biased", 0.005, 1.0, 0.0, 0.0, ("fp",)),
        "lrquant": ("log", "all", 0.001, 1.0, 1.0, 0.0, ("fp",)),
        "lrquant_plus": ("log", "all", 0.001, 1.0, 1.0, 0.0, ("fp", "fp_on_quantised")),
        "lrquant_tokens": ("log", "all", 0.001, 0.0, 1.0, 1.0, ("fp",)),
    }


def test_what_abq_learns_with(build: Any) -> None:
    """Its scripts smooth weights alone too; the loss is its code's."""
    model, _, _ = build("methods/abq", "schemes/w2a16")
    (smooth, compensate), loss, clip = model.transforms, model.objective, model.weight_quantizer
    assert isinstance(smooth, Smooth)
    assert isinstance(compensate, Compensate)
    assert isinstance(loss, DistributionCorrection)
    assert (clip.initial, clip.lr, clip.factor_rank) == (4.0, 0.01, 0)
    assert (smooth.initial, smooth.alpha, smooth.shift, smooth.lr) == ("balanced", 0.5, "biased", 0.005)
    assert smooth.sites == ("qkv", "out", "qkt", "fc1", "fc2")
    assert (compensate.rank, compensate.first, compensate.last, compensate.lr) == (1, 3, 4, 0.01)
    assert (loss.mse, loss.dlc, loss.akl, loss.akl_mode, loss.balance) == (1.0, 1.0, 1.0, "faithful", "sum")
    assert loss.targets == ("fp", "fp_on_quantised")


@pytest.mark.parametrize("schemes", [(), ("schemes/w1.61a16",)])
def test_ptq161_has_a_format_of_its_own(build: Any, schemes: tuple[str, ...]) -> None:
    model, _, trainer = build("methods/ptq161", *schemes)
    rounds, loss = model.weight_quantizer, model.objective
    assert (model.weight, model.activation.bits) == (IntScheme(1, salient=0.2, salient_bits=4), 16)
    assert isinstance(rounds, SalientBinary)
    assert (rounds.statistic, rounds.learn, rounds.faithful) == ("max", True, True)
    assert (rounds.lr, rounds.factor_lr) == (5e-4, 1e-3)
    assert (loss.mse, loss.nlc, loss.targets) == (1.0, 1.0, ("fp", "fp_on_quantised"))
    assert model.transforms == []
    assert trainer.max_epochs == 20
    json.dumps(model.identity())


def test_what_rptq_does(build: Any) -> None:
    model, _, _ = build("methods/rptq", "schemes/w4a4")
    (permute,), rounding = model.transforms, model.activation_quantizer
    assert isinstance(permute, Permute)
    assert permute.sites == ("qkv", "qkt", "out", "fc1", "fc2")
    assert permute.clusters == {"qkv": 32, "qkt": 4, "out": 4, "fc1": 32, "fc2": 32}
    assert (permute.multiple, permute.restarts) == (1, 10)
    assert isinstance(rounding, StaticClusters)
    assert (rounding.ranges, rounding.bits, rounding.faithful) == ("ema", {"softmax": 8}, False)
    rounds = model.weight_quantizer
    assert type(rounds) is Gptq
    assert (rounds.clip, rounds.damping, rounds.act_order, rounds.factor_rank) == (False, 0.01, False, 0)
    papers, _, _ = build("methods/rptq", "schemes/w4a4_rptq")
    rounding.bits |= {"qkv": 8, "fc1": 8}
    assert papers.identity() == model.identity()


def test_clusters_of_rptq_make_room_for_groups(build: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the options alone, of a scheme, or of what other runtimes compute with."""
    groups = ("--model.weight.clustered", "false", "--model.weight.group_size", "128")
    for options in (groups, (*groups[2:], *groups[:2])):
        model, _, _ = build("methods/rptq", "schemes/w4a4", options=options)
        assert (model.weight, [type(t) for t in model.transforms]) == (IntScheme(4, 128), [Permute])
    model, _, _ = build("methods/rptq", "schemes/w3a16g64", options=groups[:2])
    assert (model.weight, model.transforms) == (IntScheme(3, 64), [])
    model, _, _ = build("methods/rptq", "schemes/w4a4", "presets/served")
    assert model.weight == IntScheme(4, symmetric=True, scale_dtype="bfloat16")
    with pytest.raises(AssertionError):
        build("methods/rptq", "schemes/w3a16g64")
    assert "clustered=true with group_size=64" in capsys.readouterr().err


def test_ptq161_takes_no_other_format(build: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(AssertionError):
        build("methods/ptq161", "schemes/w4a16")
    assert "salient=0.2 with bits=4" in capsys.readouterr().err


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"ptq161"}))
def test_low_bits_change_where_clipping_begins_and_nothing_else(build: Any, method: str) -> None:
    """Also with GPTQ's codes, and with clipping that nothing learns."""
    one, _, _ = build(f"methods/{method}", "schemes/w3a16")
    two, _, _ = build(f"methods/{method}", "schemes/w3a16", "presets/low_bits")
    assert one.identity()["weight_quantizer"]["initial"] == 4.0
    assert one.weight_quantizer.clip == (method not in NOTHING_LEARNED)
    one.weight_quantizer.clip, one.weight_quantizer.initial = True, "search_on_inputs"
    assert two.identity() == one.identity()


def test_low_bits_come_after_the_method(build: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(AssertionError):
        build("presets/low_bits", "methods/omniquant", "schemes/w3a16")
    assert "put the method first, as -c methods/abq" in capsys.readouterr().err


def test_low_bits_are_not_for_signs(build: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(AssertionError):
        build("methods/ptq161", "schemes/w1.61a16", "presets/low_bits")
    assert "'clip' is not accepted" in capsys.readouterr().err


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"ptq161"}))
def test_gptq_takes_the_settings_of_any_method(
    build: Any, method: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A class that has all that the other has keeps what was said of it."""
    file = tmp_path_factory.mktemp("mine") / "mine.yaml"
    file.write_text("model: {weight_quantizer: {class_path: ptql.parts.weights.Gptq, init_args: {act_order: false}}}\n")
    one, _, _ = build(f"methods/{method}", "schemes/w3a16")
    two, _, _ = build(f"methods/{method}", "schemes/w3a16", str(file))
    assert type(two.weight_quantizer) is Gptq
    own = {"damping": 0.01, "act_order": False}
    assert vars(two.weight_quantizer) == {**vars(one.weight_quantizer), **own}


def test_the_order_of_files_does_not_matter_where_they_do_not_overlap(build: Any) -> None:
    one, _, _ = build("methods/lrquant", "schemes/w4a4")
    two, _, _ = build("schemes/w4a4", "methods/lrquant")
    assert one.identity() == two.identity()


def holds(merged: dict[str, Any], file: dict[str, Any]) -> None:
    """Every value of the file is in the merged configuration."""
    for key, value in file.items():
        if isinstance(value, dict):
            holds(merged[key], value)
        else:
            assert merged[key] == value, key


@pytest.mark.parametrize("name", OTHERS)
def test_files_of_data_and_trainer(build: Any, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:  # base.yaml wants a GPU: only parsed
        main(["fit", "-c", "methods/lrquant", "-c", "schemes/w3a16g64", "-c", name, "--print_config"])
    assert stop.value.code == 0
    holds(yaml.safe_load(capfd.readouterr().out), yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()))
    model, data, _ = build("methods/lrquant", "schemes/w3a16g64", name)
    assert (model.weight.bits, model.weight.group_size) == (3, 64)
    assert data.batch_size <= data.samples


@pytest.mark.parametrize("name", STRATEGIES)
def test_strategies_are_parsed_with_any_recipe(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    path = CONFIGS / "strategies" / f"{name}.yaml"
    assert f"-c strategies/{name} " in path.read_text().splitlines()[0]
    with pytest.raises(SystemExit) as stop:
        main(["fit", "-c", "methods/lrquant", "-c", "schemes/w4a4", "-c", f"strategies/{name}", "--print_config"])
    assert stop.value.code == 0
    holds(yaml.safe_load(capfd.readouterr().out), yaml.safe_load(path.read_text()))


def test_one_process_on_each_device_of_a_host(build: Any) -> None:
    _, _, trainer = build("methods/rtn", "schemes/w4a16", "strategies/ddp")
    assert type(trainer.strategy).__name__ == "DDPStrategy"
