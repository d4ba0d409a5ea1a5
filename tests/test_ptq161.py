"""The recipe ptq161 from end to end: whole runs of tiny models on a CPU."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ptql.callbacks import TestTimeAdaptation
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import ptql
from ptql.calibration.quant_lm import QuantLM
from ptql.checkpoint import Checkpoint
from ptql.cli import main
from ptql.evaluation.recorded_run import RecordedRun
from ptql.functional.packing import unpack
from ptql.nn.salient_linear import SalientLinear
from ptql.parts.weights import SalientBinary
from ptql.recipe import IntScheme
from tests.calibration.test_trainer import loaded_logits, student_logits
from tests.callbacks.adapted import SMALL, evaluated, texts
from tests.models import CONFIGS, some_ids
from tests.words import save_source, save_text

pytestmark = pytest.mark.usefixtures("elsewhere")
ROOT = Path(__file__).parents[1]
ROUNDING = "model.weight_quantizer."
BUDGET = ("-c", "methods/ptq161", "--model.weight", "{bits: 16, salient: null}")
BUDGET += ("--model.layers", "{down_proj: {bits: 1, salient: 0.2}}", "--trainer.callbacks", "null")
Made = Callable[..., Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The directory of a finished run, made once."""
    known: dict[str, Path] = {}

    def run(family: str = "llama", **settings: Any) -> Path:
        key = f"{family} {settings}"
        if key not in known:
            folder = tmp_path_factory.mktemp(family)
            source, text = save_source(folder / "source", CONFIGS[family]), save_text(folder / "words.txt")
            given = {**SMALL, "trainer.callbacks": None}  # one pass
            given |= {name.replace("__", "."): value for name, value in settings.items()}
            at = known[key] = folder / "RUN"
            ptql.quantize(source, data=text, out=at, method="ptq161", scheme="w1.61a16", settings=given)
        return known[key]

    return run


def noted(run: Path) -> list[dict[str, Any]]:
    blocks = json.loads((run / "ledger/manifest.json").read_text())["blocks"]
    return [blocks[str(index)] for index in range(len(blocks))]


def ledger(run: Path, block: int, part: str) -> dict[str, Tensor]:
    found = load_file(run / f"ledger/block-{block:05d}.safetensors")
    return {name.removeprefix(f"{part}."): tensor for name, tensor in found.items() if name.startswith(f"{part}.")}


@pytest.mark.parametrize("faithful", [True, False])
def test_plain_and_eager_steps_learn_alike(made: Made, faithful: bool) -> None:
    runs = [made(**{f"{ROUNDING}faithful": faithful, "model.engine": engine}) for engine in ("plain", "eager")]
    for plain, eager in zip(*map(noted, runs), strict=True):
        assert plain["steps"] == eager["steps"] == 4
        for name in ("loss", "loss_start", "loss_learned", "mse"):
            assert eager[name] == pytest.approx(plain[name], rel=1e-3), name


@pytest.mark.parametrize("family", ["llama", "opt", "qwen3", "phi3"])
def test_the_loaded_model_computes_what_was_calibrated(made: Made, family: str) -> None:
    run = made(family)
    source = run.parent / "source"
    recipe = QuantLM(str(source), weight=IntScheme(1, salient=0.2), weight_quantizer=SalientBinary())
    recipe.open()
    expected = student_logits(run, source, recipe, some_ids())
    assert torch.allclose(loaded_logits(run, some_ids()), expected, rtol=1e-4, atol=1e-4)


def test_what_is_stored_and_the_page_of_the_format_reads_it(made: Made) -> None:
    run = made()
    said = json.loads((run / "model/config.json").read_text())["quantization_config"]
    assert said["format_version"] == 4
    weight = {"bits": 1, "group_size": -1, "symmetric": False, "salient": 0.2, "salient_bits": 4}
    assert said["weight"] == weight
    (code,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/format.md").read_text(), re.MULTILINE | re.DOTALL)
    page: dict[str, Any] = {}
    exec(code, page)
    model = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, SalientLinear)}
    assert len(layers) == 14
    for name, layer in layers.items():
        assert np.array_equal(page["dense"](run / "model", name, layer.in_features), layer.dense_weight().numpy()), name


def test_true_bits(made: Made) -> None:
    run, bits, weights = made(), 0, 0
    shapes = [(48, 48), (24, 48), (24, 48), (48, 48), (80, 48), (80, 48), (48, 80)]
    for rows, columns in shapes:
        few = int(0.2 * columns)
        row = -(-(columns - few) // 8) * 8 + -(-few * 4 // 8) * 8 + 3 * 16
        bits += rows * row + 16 * (columns - few) + -(-columns // 8) * 8 + -(-rows * 4 // 8) * 8
        weights += rows * columns
    assert json.loads((run / "metrics.json").read_text())["bits_per_weight"] == pytest.approx(bits / weights)


@pytest.mark.parametrize("statistic", ["max", "mean"])
def test_layers_that_share_an_input_share_the_channels_with_the_largest(made: Made, statistic: str) -> None:
    run = made(**{f"{ROUNDING}statistic": statistic})
    for block in range(2):
        stored, ranges = ledger(run, block, "stored"), ledger(run, block, "ranges")
        layout = Checkpoint(run.parent / "source").layout
        for group in layout.linears:
            size = ranges[f"{'before' if statistic == 'max' else 'mean'}.{group[0]}"]
            largest = size.argsort(descending=True, stable=True)[: int(0.2 * len(size))]
            for name in group:
                mask = unpack(stored[f"{name}.mask"], 1, len(size))[0]
                assert mask.nonzero().flatten().tolist() == sorted(largest.tolist()), name


def test_each_part_lowers_the_loss(made: Made) -> None:
    """All signs, channels in four bits, learned gains."""
    signs = made(model__weight__salient=0, **{f"{ROUNDING}learn": False})
    channels, learned = made(**{f"{ROUNDING}learn": False}), made(trainer__max_epochs=8)
    losses = [noted(run)[0]["mse"] for run in (signs, channels, learned)]
    assert losses == sorted(losses, reverse=True)
    assert noted(signs)[0].get("steps", 0) == 0
    assert ledger(signs, 0, "learned") == {}
    assert "codes" not in " ".join(ledger(signs, 0, "stored"))
    loaded = loaded_logits(signs, some_ids())
    assert loaded.isfinite().all()


def test_layers_of_other_formats_stand_beside(made: Made) -> None:
    run = made(model__layers={"down_proj": 8, "layers.0.self_attn": {"salient": 0.5, "salient_bits": 3}, "o_proj": 16})
    said = json.loads((run / "model/config.json").read_text())["quantization_config"]["layers"]
    assert said["1.mlp.down_proj"] == {"bits": 8, "group_size": -1, "symmetric": False}
    assert (said["0.self_attn.k_proj"]["salient"], said["0.self_attn.k_proj"]["salient_bits"]) == (0.5, 3)
    assert said["0.self_attn.o_proj"]["bits"] == 16
    stored = ledger(run, 0, "stored")
    assert "mlp.down_proj.signs" not in stored
    assert "self_attn.o_proj.weight" in stored
    assert loaded_logits(run, some_ids()).isfinite().all()


@pytest.mark.parametrize("statistic", ["max", "mean"])
def test_a_finished_run_learns_on_with_its_own_channels(
    made: Made, tmp_path: Path, statistic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = made(**{f"{ROUNDING}statistic": statistic})
    recorded = RecordedRun.open(run)
    record = recorded.record(1)
    assert recorded.ranges(record, torch.device("cpu"))["mlp.down_proj"].mean.equal(record.ranges["mean.mlp.down_proj"])
    block, ranges = recorded.source.block(1), recorded.ranges(record, torch.device("cpu"))
    task = recorded.model.block_task(1, recorded.model.student(block, recorded.source), recorded.source, ranges, {})
    for name in recorded.source.layout.names:
        own: Any = task.quantizer(name)
        stored = unpack(record.stored[f"{name}.mask"], 1, own.row)[0].bool()
        assert torch.equal(own.salient, stored), name
    callbacks = [TestTimeAdaptation(epochs=2), TestTimeAdaptation(epochs=1, compat="rlq")]
    found = evaluated(run, texts(tmp_path, "a"), *callbacks)
    assert len(found["tta"]) == 2
    for name, adapted in found["tta"].items():
        assert adapted["ppl"]["a"] != found["ppl"]["a"]
        assert adapted["ppl"]["a"] < 3 * found["ppl"]["a"], name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((*BUDGET, "--bits_budget", "3"), r"salient channels beside a budget"),
        (("-c", "methods/lrquant"), r"salient=0.2 with Affine, .*SalientBinary"),
        (("-c", "methods/ptq161", "--model.weight.salient", "null"), r"bits=1 with SalientBinary.*salient: 0.2"),
        (("-c", "methods/ptq161", "--model.weight.salient", "0.95"), r"salient=0.95: a share .* from 0 to 0.9"),
        (("-c", "methods/ptq161", "--model.weight.salient_bits", "9"), r"salient_bits=9: .* 2 to 8"),
        (("-c", "methods/ptq161", "--model.weight.group_size", "16"), r"salient=0.2 with bits=1, group_size=16"),
        (("-c", "methods/ptq161", "--model.weight_quantizer.statistic", "median"), r"statistic.*median"),
        (("-c", "methods/ptq161", "--model.transforms+=ptql.parts.transforms.Compensate"), r"Compensate with Salient"),
        (("-c", "methods/ptq161", "--bits_budget", "2"), r"bits_budget=2 with salient=0.2: .*another method"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], message: str
) -> None:
    source, text = save_source(tmp_path / "source"), save_text(tmp_path / "words.txt")
    command = ["fit", *options, "-c", "schemes/w1.61a16"] if "methods/lrquant" in options else ["fit", *options]
    places = [
        "--model.source",
        str(source),
        "--data.text",
        str(text),
        "--trainer.default_root_dir",
        str(tmp_path / "r"),
    ]
    assert main([*command, *places, "--trainer.accelerator", "cpu", "--data.length", "16", "--data.samples", "4"]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert re.search(message, said[-1]), said
    assert not (tmp_path / "r").exists()
