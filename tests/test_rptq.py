"""The recipe rptq from end to end: what is stored, what a loaded model computes, runs that were stopped, refusals."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ptql.callbacks import TestTimeAdaptation
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import ptql
from ptql.calibration.activations import Streams
from ptql.calibration.quant_lm import QuantLM
from ptql.checkpoint import SINGLE, Checkpoint
from ptql.cli import main
from ptql.engine.graph import signature
from ptql.engine.step import StepSettings
from ptql.errors import InputError
from ptql.formats.ptql import PackedFormat
from ptql.nn.static_rounding import GRIDS
from ptql.parts.activations import StaticClusters
from ptql.parts.transforms import Permute, Smooth
from ptql.parts.weights import Affine, Gptq
from ptql.recipe import ActivationScheme, IntScheme, StaticSite
from ptql.restoration.dense import why_not_dense
from tests.calibration.test_trainer import loaded_logits, student_logits
from tests.callbacks.adapted import evaluated, texts
from tests.models import CONFIGS, some_ids
from tests.words import save_source, save_text

pytestmark = pytest.mark.usefixtures("one_thread")

CLI = str(Path(__file__).parents[1] / "cli.py")
CLUSTERS = {"qkv": 6, "qkt": 3, "out": 3, "fc1": 6, "fc2": 8}
PERMUTE: dict[str, Any] = {"class_path": "ptql.parts.transforms.Permute", "init_args": {"clusters": CLUSTERS}}
SMOOTH: dict[str, Any] = {"class_path": "ptql.parts.transforms.Smooth", "init_args": {"shift": "all", "lr": 0.01}}
LEARNED = ("--model.transforms", json.dumps([PERMUTE, SMOOTH]), "--trainer.max_epochs", "2")
GPTQ = "ptql.parts.weights.Gptq"
NEAREST = {"class_path": "ptql.parts.weights.Affine", "init_args": {"clip": True}}
FORMS: dict[str, Any] = {"clip": True, "initial": "search", "factor_rank": 1, "act_order": True}
ROWS = ("--model.weight.clustered", "false")
PLAIN = ("--model.transforms", json.dumps([PERMUTE]))
KINDS: dict[str, tuple[str, ...]] = {
    "plain": ("-c", "schemes/w4a4", *PLAIN),
    "papers": ("-c", "schemes/w4a4_rptq", *PLAIN, "--model.activation_quantizer.ranges", "mse"),
    "cache": ("-c", "schemes/w4a16", *PLAIN, "--model.activation.kv_bits", "3"),
    "learned": ("-c", "schemes/w4a4", *LEARNED, "--model.weight_quantizer.clip", "true"),
    "nearest": ("-c", "schemes/w4a4", *LEARNED, "--model.weight_quantizer", json.dumps(NEAREST)),
    "weights": ("-c", "schemes/w4a16", *PLAIN),
    "forms": (
        *("-c", "schemes/w3a16", *PLAIN, "--model.weight.symmetric", "true", "--model.weight.scale_dtype", "bfloat16"),
        *(
            "--trainer.max_epochs",
            "2",
            "--model.weight_quantizer",
            json.dumps({"class_path": GPTQ, "init_args": FORMS}),
        ),
    ),
    "grids": ("-c", "schemes/w4a4", "--model.transforms", "[]", *ROWS),
}
FEW = ("--data.length", "16", "--data.samples", "6", "--data.batch_size", "2", "--trainer.accelerator", "cpu")
Runs = Callable[[str, str], Path]


def fit(folder: Path, source: Path, *options: str) -> int:
    text = save_text(folder / "words.txt")
    places = (
        "--model.source",
        str(source),
        "--data.text",
        str(text),
        "--trainer.default_root_dir",
        str(folder / "run"),
    )
    with torch.enable_grad():
        return main(["fit", "-c", "methods/rptq", *options, *FEW, *places])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """The run of a model and a kind of recipe, made once: RUN/source is the model, RUN/run what `fit` left."""
    made: dict[tuple[str, str], Path] = {}

    def run(name: str, kind: str) -> Path:
        if (name, kind) not in made:
            folder = made[name, kind] = tmp_path_factory.mktemp("run")
            save_source(folder / "source", CONFIGS[name])
            assert fit(folder, folder / "source", *KINDS[kind]) == 0
        return made[name, kind]

    return run


def recipe_of(kind: str) -> QuantLM:
    bits = {"qkv": 8, "fc1": 8, "softmax": 8} if kind == "papers" else {"softmax": 8}
    weight = {
        "forms": IntScheme(3, symmetric=True, clustered=True, scale_dtype="bfloat16"),
        "grids": IntScheme(4),
    }
    learned = kind in ("learned", "nearest")
    return QuantLM(
        weight=weight.get(kind, IntScheme(4, clustered=True)),
        activation={
            "cache": ActivationScheme(16, kv_bits=3),
            "weights": ActivationScheme(),
            "forms": ActivationScheme(),
        }.get(kind, ActivationScheme(4)),
        transforms=[*([Permute(clusters=CLUSTERS)] if kind != "grids" else []), *([Smooth()] if learned else [])],
        weight_quantizer=Gptq(**FORMS) if kind == "forms" else Affine(clip=learned),  # which codes is no matter
        activation_quantizer=StaticClusters("mse" if kind == "papers" else "ema", bits),
    )


def stored_format(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run/model/config.json").read_text())["quantization_config"]


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "run/model" / SINGLE)


# What is stored and what is loaded


EVERYWHERE = [(name, kind) for name in ("llama", "qwen3", "opt") for kind in ("plain", "cache", "learned", "grids")]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *EVERYWHERE,
        ("llama", "papers"),
        ("llama", "nearest"),
        ("llama", "forms"),
        ("qwen3", "weights"),
        ("opt", "weights"),
    ],
)
def test_the_loaded_model_computes_what_was_calibrated(runs: Runs, name: str, kind: str) -> None:
    folder, ids = runs(name, kind), some_ids(tokens=20)
    expected = student_logits(folder / "run", folder / "source", recipe_of(kind), ids)
    found = loaded_logits(folder / "run", ids)
    if kind in ("weights", "forms"):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert ((found - expected).abs() < 1e-4).float().mean() > 0.97  # a difference in the last bit may move a code
    original = AutoModelForCausalLM.from_pretrained(folder / "source", dtype=torch.float32)(ids).logits
    assert 1e-3 < (found - original).norm() / original.norm() < 1.3


@pytest.mark.parametrize("name", ["phi3", "mistral"])
def test_other_families(runs: Runs, name: str) -> None:
    folder = runs(name, "plain")
    found = AutoModelForCausalLM.from_pretrained(folder / "run/model", dtype=torch.float32)(some_ids()).logits
    assert found.isfinite().all()
    blocks = Checkpoint(folder / "run/model")
    assert blocks.packed is not None
    assert len(blocks.packed.gathered_norms) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_keep_orders_and_grids(runs: Runs, dtype: torch.dtype) -> None:
    folder = runs("llama", "plain")
    model = AutoModelForCausalLM.from_pretrained(folder / "run/model", dtype=dtype)
    state, stored = model.state_dict(), stored_tensors(folder)
    kept = [name for name in stored if GRIDS in name or name.endswith(".order")]
    assert len(kept) == 2 * (7 * 3 + 2)
    assert all(torch.equal(state[name], stored[name]) for name in kept)
    assert model(some_ids()).logits.isfinite().all()


def test_config_json_says_it_in_a_version_of_its_own(runs: Runs) -> None:
    found = stored_format(runs("llama", "papers"))
    assert (found["format_version"], found["method"]) == (7, "rptq")
    assert found["activation"] == {"bits": 16, "qkv": False}  # nothing is rounded per token
    assert found["gathered_norms"] == ["input_layernorm", "post_attention_layernorm"]
    sites = found["static"]["sites"]
    assert found["static"]["softmax_bits"] == 8
    assert {name: site["bits"] for name, site in sites.items()} == {
        **dict.fromkeys(("qkv", "fc1"), 8),
        **dict.fromkeys(("out", "fc2", "q", "k", "v"), 4),
    }
    assert StaticSite(**{**sites["k"], "linears": ()}) == StaticSite(4, 2, 12, 3)
    cache = stored_format(runs("llama", "cache"))
    assert set(cache["static"]["sites"]) == {"k", "v"}
    assert cache["static"]["softmax_bits"] == 16
    rows = stored_format(runs("llama", "grids"))
    assert (rows["format_version"], "clusters" in rows) == (6, False)


def test_tensors_of_a_block(runs: Runs) -> None:
    stored = stored_tensors(runs("llama", "plain"))
    for block in range(2):
        prefix = f"model.layers.{block}."
        for site, rows, width, k in (("qkv", 1, 48, 6), ("out", 4, 12, 3), ("fc2", 1, 80, 8), ("k", 2, 12, 3)):
            grid = {part: stored[f"{prefix}{GRIDS}.{site}.{part}"] for part in ("scale", "zero", "cluster")}
            assert (grid["scale"].dtype, grid["zero"].dtype) == (torch.int16, torch.int32)
            assert grid["cluster"].dtype == torch.uint8
            assert grid["scale"].shape == grid["zero"].shape == (rows, k)
            assert grid["cluster"].shape == (rows, width)
            assert grid["cluster"].max() < k
            if site != "k":
                assert (grid["cluster"].int().diff(dim=1) >= 0).all()
        order = stored[f"{prefix}input_layernorm.order"]
        assert order.dtype == torch.int32
        assert order.sort().values.tolist() == list(range(48))
        assert order.tolist() != list(range(48))


def test_the_format_comes_back(runs: Runs) -> None:
    stored = stored_format(runs("llama", "papers"))
    fmt = PackedFormat.from_dict(stored)
    assert fmt.to_dict() == stored
    assert fmt.rounds_attention
    assert why_not_dense(fmt) == "channels in an order of their own, and activations on fixed grids"
    for broken, message in (
        ({"static": {"sites": {}}}, "'softmax_bits' is missing"),
        ({"static": {"sites": {"k": {"bits": 4}}, "softmax_bits": 16}}, "'rows' is missing"),
        ({"gathered_norms": [1]}, "more than names"),
        ({"clusters": {"mlp.up_proj": 0}}, "clusters: mlp.up_proj=0 is not from 1 to 32768"),
        ({"clusters": {"mlp.up_proj": "6"}}, "mlp.up_proj='6' is not a int"),
        ({"clusters": ["mlp.up_proj"]}, r"clusters=\['mlp.up_proj'\] is not a dict"),
        ({"weight": {**stored["weight"], "clustered": 1}}, "clustered=1 is not a bool"),
    ):
        with pytest.raises(InputError, match=message):
            PackedFormat.from_dict({**stored, **broken})


@pytest.mark.parametrize("kind", ["learned", "nearest"])
def test_smoothing_and_clipping_learn_with_the_grids(runs: Runs, kind: str) -> None:
    blocks = json.loads((runs("llama", kind) / "run/ledger/manifest.json").read_text())["blocks"]
    assert all(block["loss"] <= block["loss_start"] for block in blocks.values())
    assert any(block["loss"] < block["loss_start"] for block in blocks.values())


def test_what_is_captured_of_a_block_serves_the_next(runs: Runs) -> None:
    source, model = Checkpoint(runs("llama", "learned") / "source"), recipe_of("learned")
    streams, signatures = Streams(source.shell(), some_ids(), 3, torch.device("cpu")), []
    for index in range(2):
        block = source.block(index)
        ranges = streams.teach(block, source.layout, ("fp",))
        sites = streams.watch(block, source.layout)
        task = model.block_task(index, model.student(block, source), source, ranges, streams.context, sites=sites)
        signatures.append(signature(task, task.configure_optimizers(), StepSettings()))
        streams.advance(streams.fp)
    assert signatures[0] == signatures[1]


def test_steps_in_pieces_learn_the_same(runs: Runs, tmp_path: Path) -> None:
    """As on a GPU, where orders come with a step's weights and grids are the student's own."""
    folder = runs("llama", "learned")
    assert fit(tmp_path, folder / "source", *KINDS["learned"], "--model.engine", "eager") == 0
    plain, pieces = (
        json.loads((run / "run/ledger/manifest.json").read_text())["blocks"]["0"] for run in (folder, tmp_path)
    )
    assert pieces["loss_start"] == pytest.approx(plain["loss_start"], rel=1e-3)
    assert pieces["epoch_losses"] == pytest.approx(plain["epoch_losses"], rel=1e-2)


# Stopped runs


@pytest.mark.parametrize("kind", ["plain", "learned"])
def test_a_block_done_again_has_the_same_bytes(runs: Runs, tmp_path: Path, kind: str) -> None:
    """As after a stop: blocks before it are taken from the ledger, with the order and the grids that they had."""
    folder = runs("llama", kind)
    shutil.copytree(folder / "run", tmp_path / "run")
    whole = (folder / "run/model" / SINGLE).read_bytes()
    (tmp_path / "run/ledger/block-00001.safetensors").unlink()
    shutil.rmtree(tmp_path / "run/model")
    assert fit(tmp_path, folder / "source", *KINDS[kind]) == 0
    assert (tmp_path / "run/model" / SINGLE).read_bytes() == whole


@pytest.mark.slow
@pytest.mark.shared
def test_two_processes_find_the_orders_and_grids_of_one(
    stories_dir: Path, shared_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the byte: each sees half of the windows, and running means go over all in their order."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    text, nearest = (
        shared_dir / "data/text/tinystories-train.jsonl",
        json.dumps({**NEAREST, "init_args": {"clip": False}}),
    )
    stored = []
    for processes in ("1", "2"):
        given = ["--model.source", str(stories_dir), "--data.text", str(text), "--trainer.accelerator", "cpu"]
        given += [
            "--data.samples",
            "16",
            "--data.length",
            "64",
            "--trainer.default_root_dir",
            str(tmp_path / processes),
        ]
        given += ["--trainer.devices", processes, *(["--trainer.strategy", "ddp"] if processes == "2" else [])]
        recipe = ["-c", "methods/rptq", "-c", "schemes/w4a4", "--model.weight_quantizer", nearest]
        subprocess.run([sys.executable, CLI, "fit", *recipe, *given], check=True, capture_output=True)
        stored.append(load_file(tmp_path / processes / "model" / SINGLE))
    assert stored[0].keys() == stored[1].keys()
    assert not [name for name, tensor in stored[0].items() if not torch.equal(tensor, stored[1][name])]


def test_another_recipe_is_another_run(runs: Runs, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = runs("llama", "plain")
    shutil.copytree(folder / "run", tmp_path / "run")
    assert fit(tmp_path, folder / "source", *KINDS["plain"], "--model.activation_quantizer.ranges", "minmax") == 2
    assert "recipe.activation_quantizer.ranges was 'ema' and is 'minmax' now" in capfd.readouterr().err


# Refusals


def test_norms_behind_the_residual(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = save_source(tmp_path / "source", CONFIGS["opt_post_norm"])
    assert fit(tmp_path, source, *KINDS["plain"]) == 2
    assert "sites: qkv: the output of this model's norms is the residual" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()
    some = json.dumps([{**PERMUTE, "init_args": {"sites": ["qkt", "out", "fc2"]}}])
    assert fit(tmp_path, source, "-c", "schemes/w4a4", "--model.transforms", some) == 0
    stored = stored_format(tmp_path)
    assert "gathered_norms" not in stored
    one_a_row = {f"self_attn.{part}_proj": 1 for part in "qkv"} | {"fc1": 1}
    assert stored["clusters"] == {**one_a_row, "self_attn.out_proj": 16, "fc2": 32}


def test_two_of_a_kind() -> None:
    with pytest.raises(InputError, match="transforms: Permute, Permute: channels are clustered once"):
        QuantLM(activation=ActivationScheme(4), transforms=[Permute(sites=["qkv"]), Permute(sites=["fc2"])])


def test_adaptation(runs: Runs, tmp_path: Path) -> None:
    given = texts(tmp_path, "mine")
    for kind in ("learned", "grids"):
        run = runs("llama", kind) / "run"
        with pytest.raises(InputError, match=r"its blocks sort channels or have fixed grids.*without adaptation"):
            evaluated(run, given, TestTimeAdaptation())
        assert ptql.evaluate(run, text=given, length=16, accelerator="cpu")["ppl"]["mine"] > 1


# A real model


@pytest.mark.shared
def test_clusters_help_a_real_model(stories_dir: Path, shared_dir: Path, tmp_path: Path) -> None:
    """Weights as they are, activations of 4 bits: one grid a tensor, and clusters."""
    text = shared_dir / "data/text/tinystories-train.jsonl"
    errors = {}
    for name, transforms in (("tensors", "[]"), ("clusters", json.dumps(["ptql.parts.transforms.Permute"]))):
        run = tmp_path / name
        options = ("--model.weight.bits", "16", "--model.activation.bits", "4", "--model.transforms", transforms)
        few = ("--data.length", "64", "--data.samples", "8", "--trainer.accelerator", "cpu", "--data.text", str(text))
        places = ("--model.source", str(stories_dir), "--trainer.default_root_dir", str(run))
        assert main(["fit", "-c", "methods/rptq", *options, *few, *places]) == 0
        errors[name] = json.loads((run / "metrics.json").read_text())["fit"]["last_block_mse"]
    assert errors["clusters"] < 0.5 * errors["tensors"]
