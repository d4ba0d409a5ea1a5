"""Each section of the page: what it says of a whole run, of an odd one, and of one that lacks its figures."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from ptql.report import bits, cost, losses, notices, outliers, quality, restoration, setup, size, summary, weight_error
from ptql.report.recipe_words import recipe_of
from ptql.report.run_files import read_run
from tests.report.synthetic import NAMES, SITES, make_run

SECTIONS = (
    quality.quality,
    losses.losses,
    weight_error.weight_error,
    outliers.outliers,
    size.size,
    cost.cost,
    setup.setup,
    summary.head,
    notices.box,
)


def run_with(path: Path, metrics: dict[str, Any] | None = None, **options: Any):
    """A synthetic run, some of whose metrics are others; None removes one."""
    make_run(path, **options)
    file = path / "metrics.json"
    merged = {**json.loads(file.read_text()), **(metrics or {})}
    file.write_text(json.dumps({key: value for key, value in merged.items() if value is not None}))
    return read_run(path)


def words(markup: str) -> str:
    return " ".join("".join(ET.fromstring(markup).itertext()).split())


@pytest.mark.parametrize("make", SECTIONS)
def test_every_section_is_well_formed_whatever_there_is(make, tmp_path):
    odd = {
        2: {"loss": math.nan, "seconds": math.inf, "layers": {"a": math.nan}},
        0: {"loss_start": math.inf, "loss": 0},
    }
    runs = [
        read_run(make_run(tmp_path / "whole", blocks=3)),
        read_run(make_run(tmp_path / "odd", blocks=3, changes=odd, measured=False)),
        read_run(make_run(tmp_path / "none", blocks=0)),
        read_run(tmp_path / "nothing"),
    ]
    for run in runs:
        ET.fromstring(make(run))


def test_the_verdict_compares_with_the_source(tmp_path):
    run = run_with(tmp_path / "a")
    assert summary.verdict(run) == (
        "Quantised with lrquant to 4-bit weights (a scale per row), 4-bit activations. "
        "Perplexity on wikitext2 rises from 21.63 to 147.5 (×6.82) at 4.06 bits per weight."
    )
    ours = {"ppl": {"c4": 9.0, "wikitext2": 21.64}}
    assert "on c4 is" not in summary.verdict(
        run_with(tmp_path / "b", {**ours, "source": {"ppl": {"wikitext2": 21.63}}})
    )
    assert "stays at 21.64" in summary.verdict(
        run_with(tmp_path / "c", {**ours, "source": {"ppl": {"wikitext2": 21.63}}})
    )
    assert "the full-precision model was not measured" in summary.verdict(run_with(tmp_path / "d", {"source": None}))
    assert "has not been measured" in summary.verdict(run_with(tmp_path / "e", {"ppl": None}))
    assert "broken" in summary.verdict(run_with(tmp_path / "f", {"ppl": {"wikitext2": "inf"}}))


def test_perplexities_and_tasks_stand_beside_the_sources(tmp_path):
    text = words(quality.quality(run_with(tmp_path / "a")))
    assert "wikitext221.63147.5×6.82148 × 2048 tokens" in text
    assert "piqaacc0.671 ± 0.0110.412 ± 0.012−0.2591838" in text
    text = words(quality.quality(run_with(tmp_path / "b", {"source": None})))
    assert "The full-precision model was not measured." in text
    assert "147.5" in text
    assert "Full precision" not in text  # an empty column is left out
    assert "ptql eval" in words(quality.quality(run_with(tmp_path / "c", measured=False)))


def test_the_loss_section_counts_and_marks(tmp_path):
    run = run_with(tmp_path / "a", blocks=6, changes={5: {"loss": math.nan}})
    made = losses.losses(run)
    assert "Learning lowered it in 4 of 6 blocks" in words(made)
    chart = losses.loss_chart(run.blocks)
    dots = re.findall(r'<circle[^>]*class="(\w+)"', chart)
    assert (dots.count("before"), dots.count("after"), dots.count("fell")) == (6, 4, 1)
    assert chart.count("×</text>") == 1
    assert [row.count("<td") for row in made.split("<tr>")[2:]] == [11] * 6


@pytest.mark.parametrize(("width", "name"), [(1, "three-level"), (2, "five-level")])
def test_a_level_more_is_said_and_not_taken_for_bits(tmp_path, width, name):
    make_run(tmp_path / "a")
    manifest = tmp_path / "a/ledger/manifest.json"
    noted = json.loads(manifest.read_text())
    noted["identity"]["recipe"]["weight"] |= {"bits": width, "symmetric": True, "balanced": True}
    manifest.write_text(json.dumps(noted))
    recipe = recipe_of(read_run(tmp_path / "a"))
    assert recipe.scheme == f"w{width}ba4"
    assert recipe.words == f"{name} weights (a scale per row, symmetric), 4-bit activations"


def test_long_tables_are_folded(tmp_path):
    assert '<details class="figures" open="">' in losses.losses(run_with(tmp_path / "a", blocks=12))
    assert '<details class="figures">' in losses.losses(run_with(tmp_path / "b", blocks=13))


def test_the_heat_map_has_a_cell_for_every_layer_of_every_block(tmp_path):
    run = run_with(tmp_path / "a", blocks=5, changes={1: {"layers": {NAMES[0]: math.nan}}})
    made = weight_error.weight_error(run)
    assert len(re.findall("<title>", made)) == 5 * 7
    assert made.count('class="none"') == 7
    assert ">q_proj</text>" in made


def with_budget(path: Path) -> Any:
    """A run whose layers have 2, 3 and 4 bits."""
    layers = {f"{block}.{name}": str(2 + (block + place) % 3) for block in range(3) for place, name in enumerate(NAMES)}
    layers["1.mlp.down_proj"] = "2b"
    shares = {"2": 0.25, "2b": 0.05, "3": 0.4, "4": 0.3}
    lost = {"divergence": 0.812, "uniform": {"bits": 3, "divergence": 1.25}}
    found = {"budget": 3.25, "reached": 3.2479, "share_of_weights": shares, "layers": layers, **lost}
    run_with(path, {"bits": found}, blocks=3)
    manifest = path / "ledger/manifest.json"
    noted = json.loads(manifest.read_text())
    noted["identity"]["bits"] = {"bits": 3.25, "choices": [2, 3, 4]}
    manifest.write_text(json.dumps(noted))
    return read_run(path)


def test_the_bits_of_a_budget_have_a_map(tmp_path):
    run = with_budget(tmp_path / "a")
    made = bits.bits(run)
    assert "a budget of 3.25 bits per weight; 3.248 are stored" in words(made)
    assert "25 % at 2, 5 % at 2b, 40 % at 3, 30 % at 4" in words(made)
    assert "0.812 nats from full precision on calibration text; with 3 bits for all, 1.25." in words(made)
    assert len(re.findall("<title>", made)) == 3 * 7
    assert "mlp.down_proj, block 1: 2" in words(made)
    assert "to 3.25-bit weights on average (a scale per row), 4-bit activations" in summary.verdict(run)


def test_without_a_budget_there_is_no_map_of_bits(tmp_path):
    assert bits.bits(run_with(tmp_path / "a")) == ""
    assert bits.bits(run_with(tmp_path / "b", {"bits": {"layers": {}}})) == ""


def test_shades_follow_the_logarithm_where_errors_are_far_apart():
    even, wide = weight_error.Shade([1.0, 2.0, 3.0]), weight_error.Shade([0.0, 0.01, 0.1, 1.0, math.nan])
    assert not even.log
    assert even(3.0) == 1.0
    assert even(2.0) == pytest.approx((even(1.0) + even(3.0)) / 2)
    assert wide.log
    assert wide(0.1) == pytest.approx((wide(0.01) + wide(1.0)) / 2)
    assert wide(0.0) == wide(0.01)
    assert weight_error.Shade([5.0])(5.0) == 1.0


def test_names_of_layers_are_short_where_they_can_be():
    assert weight_error.short("mlp.up_proj", list(NAMES)) == "up_proj"
    assert weight_error.short("b.w", ["a.w", "b.w"]) == "b.w"
    assert weight_error.short("x" * 40, ["x" * 40]) == "…" + "x" * 13


def test_outliers_are_shown_before_and_after_and_for_the_worst_block(tmp_path):
    run = run_with(tmp_path / "a", blocks=4)
    sites = outliers.read_sites(run)
    assert list(sites) == list(SITES)
    for site in sites.values():
        assert site.worst is not None
        assert site.worst[1].index == 2
        assert site.after[2] == site.worst[0] == max(site.after)
    first = sites["self_attn.q_proj"]
    assert all(after < before for after, before in zip(first.after, first.before, strict=True))
    made = outliers.outliers(run)
    assert made.count("in block 2, the worst") == 4


def test_bytes_are_counted_by_what_they_are_for(tmp_path):
    run = run_with(tmp_path / "a", blocks=2)
    found = size.stored_bytes(run.path / "model")
    layers = 2 * 7
    assert found == {
        "codes": layers * 64 * 32,
        "scales and zero points": layers * 64 * 2,
        "biases of these layers": layers * 64 * 2,
        "rest of the blocks": 2 * 64 * 4,
        "embeddings, head, norm": 512 * 64 * 4,
    }
    assert size.stored_bytes(tmp_path / "nowhere") == {}


def test_warnings_of_blocks_are_drawn_together():
    text = "learning ended worse than it began; the start was kept"
    warned = [f"block {i}: {text}" for i in (0, 3, 4)] + ["9 windows were dropped", "block 7: 2 steps skipped"]
    assert notices.grouped(warned) == [f"Blocks 0, 3–4: {text}", "9 windows were dropped", "Block 7: 2 steps skipped"]


def test_the_ledger_speaks_where_the_run_noted_no_warnings(tmp_path):
    run = run_with(tmp_path / "a", blocks=9, changes={8: {"loss": math.nan}})
    assert notices.notices(run) == [
        "Learning made block 4 worse, so the initial values were kept there.",
        "3 steps with gradients that were not finite left out in block 7.",
        "The loss of block 8 is not finite.",
    ]
    fit = {**run.metrics["fit"], "warnings": ["block 4: kept"], "blocks": 12}
    run = run_with(tmp_path / "b", {"fit": fit}, blocks=9)
    assert notices.notices(run) == ["Block 4: kept", "Only 9 of 12 blocks are in the ledger."]


def test_a_run_without_warnings_says_so(tmp_path):
    assert "No warnings" in notices.box(run_with(tmp_path / "a", blocks=3))


def test_the_configuration_is_there_in_full(tmp_path):
    run = run_with(tmp_path / "a")
    text = words(setup.setup(run))
    assert "128 windows of 2048 tokens from wikitext2, in batches of 4" in text
    assert "Smooth (initial log, alpha 0.5, shift all, lr 0.001)" in text
    assert " ".join(run.config_text.split()) in text


def test_long_blocks_are_timed_in_minutes(tmp_path):
    changes = {i: {"seconds": 900.0, "seconds_learning": 600.0} for i in range(6)}
    assert ">minutes</p>" in cost.cost(run_with(tmp_path / "a", changes=changes))
    assert ">seconds</p>" in cost.cost(run_with(tmp_path / "b"))


RESTORED = {
    "text": ["stories.jsonl"],
    "steps": 40,
    "tokens": 81920,
    "seconds": 75.0,
    "skipped_steps": 1,
    "losses": [[10, 5.5], [20, 5.0], [30, 4.75], [40, 4.5]],
}


def test_a_restored_run_shows_what_lora_learned(tmp_path: Path) -> None:
    run = run_with(tmp_path / "run", {"restoration": RESTORED})
    (run.path / "first").mkdir()
    (run.path / "first" / "report.html").write_text("")
    made = restoration.restoration(run)
    said = words(made)
    assert "on stories.jsonl: 40 steps, 81,920 tokens, 1 min 15 s" in said
    assert "1 step had gradients" in said
    assert "Training loss of LoRA from 5.500 to 4.500" in made
    assert 'href="first/report.html"' in made
    assert "step 30: 4.750" in said


def test_a_run_of_one_pass_says_nothing_of_lora(tmp_path: Path) -> None:
    assert restoration.restoration(run_with(tmp_path / "run")) == ""
    for number, odd in enumerate(
        ({"losses": "none"}, {"losses": [[1], "x", [2, None]], "text": 3, "skipped_steps": "x"}, {"steps": "many"})
    ):
        ET.fromstring(restoration.restoration(run_with(tmp_path / str(number), {"restoration": odd})))


def test_a_restored_run_is_called_after_the_model_it_began_with(tmp_path: Path) -> None:
    run = run_with(tmp_path / "run", {"fit": {"source": "/runs/RUN/restored/model", "original": "/models/Llama-7B"}})
    assert recipe_of(run).model == "Llama-7B"
    assert "/runs/RUN/restored/model" in words(setup.setup(run))
