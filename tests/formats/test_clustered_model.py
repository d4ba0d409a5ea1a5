"""Runs whose weights have scales of clusters: what is stored, how large it is, who reads it, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ptql.callbacks import TestTimeAdaptation
from transformers import AutoModelForCausalLM

from ptql.calibration.quant_lm import QuantLM
from ptql.checkpoint import Checkpoint
from ptql.errors import InputError
from ptql.evaluation.size import layer_sizes
from ptql.formats.ptql import PackedFormat, prepare_block, unpack_block
from ptql.nn.clustered_linear import ClusteredLinear
from ptql.nn.packed_linear import PackedLinear
from ptql.nn.quant_linear import QuantLinear
from ptql.parts.transforms import Permute
from ptql.parts.weights import Affine
from ptql.recipe import IntScheme
from tests.callbacks.adapted import evaluated, texts
from tests.export.exported import exported, loaded, logits, plain_model
from tests.models import blocks_of, random_model, some_ids
from tests.test_rptq import fit
from tests.words import save_source

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[2]
SITES = ["out", "fc2"]  # none that norms gather for
PERMUTE = json.dumps([{"class_path": "ptql.parts.transforms.Permute", "init_args": {"sites": SITES}}])
LAYERS = json.dumps(
    {
        "q_proj": {"clustered": False, "group_size": 16},
        "layers.0.mlp.gate_proj": 16,
        "layers.1.mlp.gate_proj": {"bits": 2, "balanced": True},
    }
)
SHAPES = {f"self_attn.{name}_proj": (rows, 48) for name, rows in zip("qkvo", (48, 24, 24, 48), strict=True)}
SHAPES |= {"mlp.gate_proj": (80, 48), "mlp.up_proj": (80, 48), "mlp.down_proj": (48, 80)}
COUNTS = {**dict.fromkeys(SHAPES, 1), "self_attn.o_proj": 4 * 4, "mlp.down_proj": 32}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights alone, in several formats."""
    folder = tmp_path_factory.mktemp("clustered")
    source = save_source(folder / "source")
    assert fit(folder, source, "-c", "schemes/w3a16", "--model.transforms", PERMUTE, "--model.layers", LAYERS) == 0
    return folder / "run"


def stored_format(run: Path) -> dict[str, Any]:
    return json.loads((run / "model/config.json").read_text())["quantization_config"]


# What is stored


def test_config_json_says_how_many_clusters_each_layer_has(run: Path) -> None:
    stored = stored_format(run)
    assert stored["format_version"] == 7
    assert stored["weight"] == {"bits": 3, "group_size": -1, "symmetric": False, "clustered": True}
    assert "clustered" not in stored["layers"]["0.self_attn.q_proj"]
    assert stored["clusters"] == {name: count for name, count in COUNTS.items() if not name.endswith("q_proj")}
    fmt = PackedFormat.from_dict(stored)
    assert fmt.to_dict() == stored
    assert fmt.schemes.of(1, "mlp.gate_proj") == IntScheme(2, balanced=True, clustered=True)


def test_true_bits_are_codes_scales_zero_points_and_numbers(run: Path) -> None:
    found, bits = json.loads((run / "metrics.json").read_text()), 0
    for block in range(2):
        for name, (rows, columns) in SHAPES.items():
            groups = 3 if name.endswith("q_proj") else COUNTS[name]
            numbers = 0 if name.endswith("q_proj") else 8 * columns
            packed = [-(-n * 3 // 8) for n in (columns, groups)]
            if name.endswith("gate_proj"):
                if block == 0:
                    bits += 32 * rows * columns  # as in the source
                    continue
                packed = [-(-(-(-n // 3) * 7) // 8) for n in (columns, groups)]
            bits += rows * (8 * sum(packed) + 16 * groups) + numbers
    assert found["bits_per_weight"] == pytest.approx(bits / found["weights"], rel=1e-12)
    source = Checkpoint(run.parent / "source")
    fmt = Checkpoint(run / "model").packed
    assert fmt is not None
    assert sum(size.bits for size in layer_sizes(source, fmt).values()) == bits


def test_the_report_says_what_shares_a_scale(run: Path) -> None:
    assert "3-bit weights (a scale per row and cluster of columns)" in (run / "report.html").read_text()


def test_the_page_of_the_format_reads_it(run: Path) -> None:
    """Its few lines of numpy give the numbers of loaded layers, bit by bit."""
    (code,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/format.md").read_text(), re.MULTILINE | re.DOTALL)
    page: dict[str, Any] = {}
    exec(code, page)
    model = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    assert [isinstance(layer, ClusteredLinear) for layer in layers.values()].count(True) == 2 * 6 - 1
    for name, layer in layers.items():
        assert np.array_equal(page["dense"](run / "model", name, layer.in_features), layer.dense_weight().numpy()), name


@torch.no_grad()
def test_unpacked_it_computes_the_same(run: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32)
    expected = model(some_ids()).logits
    unpack_block(model)
    assert not any(isinstance(module, ClusteredLinear) for module in model.modules())
    assert sum(isinstance(module, QuantLinear) for module in model.modules()) == 13
    torch.testing.assert_close(model(some_ids()).logits, expected, rtol=1e-5, atol=1e-5)


def test_a_dense_export_is_exact(run: Path, tmp_path: Path) -> None:
    out = exported(run, tmp_path / "out", "dense", "float32")
    assert torch.equal(logits(loaded(out)), logits(plain_model(run)))


# What is refused


@pytest.mark.parametrize("target", ["compressed-tensors", "gptq", "gptq_v2", "auto-round", "gguf"])
def test_no_other_runtime_has_scales_of_clusters(run: Path, tmp_path: Path, target: str) -> None:
    with pytest.raises(
        InputError, match=r"scales of clusters.*\(0\.self_attn\.k_proj\); .*weight.clustered false.*dense"
    ):
        exported(run, tmp_path / "out", target)
    assert not list(tmp_path.iterdir())


def test_a_model_that_does_not_say_how_many_there_are(run: Path) -> None:
    stored = stored_format(run)
    with pytest.raises(InputError, match=r"'clusters' is missing; config\.json was edited"):
        PackedFormat.from_dict({name: value for name, value in stored.items() if name != "clusters"})
    fmt = PackedFormat.from_dict({**stored, "clusters": {"mlp.up_proj": 1}})
    block = blocks_of(random_model(Checkpoint(run.parent / "source").config))[0]
    with pytest.raises(InputError, match=r"clusters: self_attn\.k_proj is missing, whose scales are of clusters"):
        prepare_block(block, fmt, 0)


@pytest.mark.parametrize(
    "transforms", ["[]", PERMUTE.replace(json.dumps(SITES), '["qkt"]'), "[ptql.parts.transforms.Smooth]"]
)
def test_something_has_to_make_clusters(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], transforms: str
) -> None:
    options = ("-c", "schemes/w4a4", "--model.transforms", transforms)
    assert fit(tmp_path, run.parent / "source", *options) == 2
    assert (
        "clustered=true, and no transform makes clusters of what linear layers read; use -c methods/rptq, which has"
        in (capfd.readouterr().err)
    )
    assert not (tmp_path / "run").exists()


def test_blocks_do_not_learn_again(run: Path, tmp_path: Path) -> None:
    """Which columns share a scale is stored, and how clusters were found is not."""
    with pytest.raises(InputError, match="how these were found is not kept, so none can learn again"):
        evaluated(run, texts(tmp_path, "mine"), TestTimeAdaptation())


def test_published_files_know_no_clusters(run: Path, tmp_path: Path) -> None:
    source = Checkpoint(run.parent / "source")
    names = (f"{name}.weight_quantizer.{end}_factor" for name in SHAPES for end in ("upbound", "lowbound"))
    clipping = {name: torch.ones(SHAPES[name.partition(".weight_")[0]][0], 1) for name in names}
    torch.save({0: clipping, 1: clipping}, tmp_path / "omni_parameters.pth")
    model = QuantLM(
        str(source.directory),
        weight=IntScheme(3, clustered=True),
        transforms=[Permute(sites=["out", "fc2"])],
        weight_quantizer=Affine(),
        published=str(tmp_path / "omni_parameters.pth"),
    )
    with pytest.raises(InputError, match=r"o_proj.* holds 48 numbers and the recipe has 768; choose the scheme"):
        model.block_task(0, model.student(source.block(0), source), source, {}, {})


def test_a_run_without_clusters_is_another_run(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = ("-c", "schemes/w3a16", "--model.transforms", PERMUTE, "--model.weight.clustered", "false")
    assert fit(run.parent, run.parent / "source", *options) == 2
    assert re.search("recipe.* was .* and is .* now", capfd.readouterr().err)
