"""Test-time adaptation: its figures are those of a plain loop, nothing leaks, and a run is only read."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from ptql.callbacks import TestTimeAdaptation
from torch import Tensor

import ptql
from ptql.calibration.trainer import BlockTrainer
from ptql.checkpoint import Checkpoint
from ptql.evaluation.perplexity import perplexity, window_losses
from ptql.evaluation.pupil import Lesson, Pupil
from ptql.evaluation.recorded_run import RecordedRun
from ptql.evaluation.text_under_test import TextUnderTest
from ptql.functional.clipping import best_share
from ptql.nn.student import weights_of
from ptql.parts.activations import TokenRounding
from ptql.parts.objectives import Reconstruction
from tests.callbacks.adapted import BATCH, LENGTH, WINDOWS, ByHand, evaluated, fitted, snapshot, texts, windows_of
from tests.models import opt_config

CPU = torch.device("cpu")
NOTHING = 1e-30  # a learning rate that moves no float32
BOTH = ("fp", "fp_on_quantised")

pytestmark = pytest.mark.usefixtures("elsewhere")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fitted(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def opt_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fitted(tmp_path_factory.mktemp("opt"), opt_config(), "omniquant")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return texts(tmp_path, "mine")["mine"]


def adapted(run: Path, text: Path, out: Path | None = None, **settings: Any) -> tuple[float, float]:
    """Perplexity with adaptation and without, of the same windows."""
    callback = TestTimeAdaptation(**settings)
    found = evaluated(run, text, callback, out=out or "out.json")["tta"][callback.name]
    return found["ppl"]["mine"], found["without"]["mine"]


def pupil(run: Path, text: Path, **lesson: Any) -> tuple[Pupil, TextUnderTest]:
    """The last block, as it stands before it learns on a text."""
    recorded, ids = RecordedRun.open(run), windows_of(run, text)
    trainer = BlockTrainer(accelerator="cpu", devices=1, logger=False, max_epochs=0)
    under_test = TextUnderTest("mine", ids, torch.zeros(len(ids), dtype=torch.float64), recorded, CPU, BATCH)
    lesson = {"objective": Reconstruction(), **lesson}
    context = under_test.before_last(1).contexts[-1]
    return Pupil(recorded, recorded.source.num_blocks - 1, context, Lesson(**lesson), trainer, CPU), under_test


# The figures


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"epochs": 1, "lr": 0.01},
        {"lr": 0.02, "weight_lr": 0.1},
        {"blocks": 2, "lr": 0.01},
        {"batch_size": 3, "lr": 0.01},
        {"objective": BOTH, "lr": 0.01},
        {"objective": BOTH, "blocks": 2, "batch_size": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("mode", ["transductive", "prefix", "online"])
def test_perplexity_is_that_of_a_loop_by_hand(run: Path, text: Path, mode: Any, settings: dict[str, Any]) -> None:
    names = {"batch_size": "batch", "objective": "both"}
    slow = ByHand(run, text, **{names.get(name, name): value for name, value in settings.items()})
    expected = {
        "transductive": lambda: slow.ahead(WINDOWS),
        "prefix": lambda: slow.ahead(2, first=2),
        "online": slow.online,
    }[mode]()
    if "objective" in settings:
        settings = {**settings, "objective": Reconstruction(targets=BOTH)}
    with_it, without = adapted(run, text, mode=mode, prefix=2, **settings)
    assert with_it == pytest.approx(expected, rel=1e-6)
    assert with_it != pytest.approx(without, rel=1e-4)


@pytest.mark.parametrize("mode", ["transductive", "online"])
def test_a_model_with_shifts_of_its_own(opt_run: Path, text: Path, mode: Any) -> None:
    slow = ByHand(opt_run, text, lr=0.02)
    expected = slow.online() if mode == "online" else slow.ahead(WINDOWS)
    with_it, without = adapted(opt_run, text, mode=mode, lr=0.02)
    assert with_it == pytest.approx(expected, rel=1e-6)
    assert with_it != pytest.approx(without, rel=1e-4)


@pytest.mark.parametrize("mode", ["transductive", "prefix", "online"])
def test_what_learns_nothing_changes_nothing(run: Path, text: Path, mode: Any) -> None:
    with_it, without = adapted(run, text, mode=mode, prefix=2, lr=NOTHING, weight_lr=NOTHING)
    assert with_it == pytest.approx(without, rel=1e-6)


@pytest.mark.parametrize("mode", ["transductive", "online"])
def test_a_recipe_that_learns_nothing(tmp_path: Path, text: Path, mode: Any) -> None:
    with_it, without = adapted(fitted(tmp_path, method="rtn"), text, mode=mode)
    assert with_it == pytest.approx(without, rel=1e-6)


@pytest.mark.parametrize("blocks", [1, 2])
def test_what_makes_it_worse_is_not_kept(run: Path, text: Path, blocks: int) -> None:
    with_it, without = adapted(run, text, blocks=blocks, lr=5.0, weight_lr=5.0, epochs=2)
    assert with_it == pytest.approx(without, rel=1e-6)


def test_learning_lowers_the_loss_that_it_looks_at(run: Path, text: Path) -> None:
    block, under_test = pupil(run, text)
    standing = under_test.before_last(1)
    targets = block.targets(standing.fp, standing.quantised, BATCH)

    def loss() -> float:
        output = block.output(standing.quantised, block.weights(), 1)
        return sum(Reconstruction().terms(output, targets).values()).item()

    before = loss()
    block.learn(standing.quantised, targets)
    assert loss() < before


@pytest.mark.parametrize(
    ("rates", "moves", "stays"),
    [
        ({"lr": 0.01, "weight_lr": NOTHING}, "transforms", "quantizers"),
        ({"lr": NOTHING, "weight_lr": 0.01}, "quantizers", "transforms"),
    ],
)
def test_each_rate_is_of_its_own_learnables(
    run: Path, text: Path, rates: dict[str, float], moves: str, stays: str
) -> None:
    block, under_test = pupil(run, text, **rates)
    standing = under_test.before_last(1)
    before = {name: value.clone() for name, value in block.task.learnables().items()}
    block.repeat({"input": standing.quantised, **block.targets(standing.fp, standing.quantised, BATCH)})
    after = block.task.learnables()
    assert not any(torch.equal(after[name], before[name]) for name in before if name.startswith(moves))
    assert all(torch.equal(after[name], before[name]) for name in before if name.startswith(stays))


def test_the_recipes_rates_are_the_default(run: Path, text: Path) -> None:
    assert adapted(run, text) == adapted(run, text, lr=1e-3, weight_lr=1e-2)


# Where it begins


@pytest.mark.parametrize("name", ["run", "opt_run"])
def test_a_pupil_begins_as_the_packed_block(name: str, text: Path, request: pytest.FixtureRequest) -> None:
    directory = request.getfixturevalue(name)
    block, _ = pupil(directory, text)
    packed = weights_of(Checkpoint(directory / "model").block(1))
    found = block.weights()
    assert packed.keys() == found.keys()
    assert all(torch.equal(found[key], packed[key]) for key in packed)


def test_the_first_batch_is_measured_before_anything_is_learned(run: Path, text: Path) -> None:
    settings: dict[str, Any] = {"mode": "online", "batch_size": WINDOWS, "lr": 0.1}
    with_it, without = adapted(run, text, **settings)
    assert with_it == pytest.approx(without, rel=1e-6)
    with_it, without = adapted(run, text, **{**settings, "batch_size": 1})
    assert with_it != pytest.approx(without, rel=1e-3)


def test_later_windows_do_not_change_earlier_losses(run: Path, tmp_path: Path) -> None:
    """Two texts that differ in the last window: up to it, the losses are equal."""
    words = texts(tmp_path, "one", "other")
    start = words["one"].read_text().split()[: LENGTH * 3]
    callback = TestTimeAdaptation("online", lr=0.01)
    kept: list[Tensor] = []
    measured = callback.on_text_measured

    def noted(trainer: Any, text: TextUnderTest, found: Any) -> None:
        measured(trainer, text, found)
        kept.append(math.log(found["tta"]["online"]["ppl"][text.name]) * len(text.windows) * (LENGTH - 1))

    callback.on_text_measured = noted  # type: ignore[method-assign]
    totals = {}
    for name in ("one", "other"):
        text = tmp_path / "joined.txt"
        text.write_text(" ".join(start + words[name].read_text().split()[-LENGTH:]))
        for windows in (3, 4):
            evaluated(run, {"mine": text}, callback, windows=windows, out="out.json")
            totals[name, windows] = kept[-1]
    assert totals["one", 3] == totals["other", 3]
    assert totals["one", 4] != totals["other", 4]


# The prefix


def test_a_prefix_is_not_measured(run: Path, text: Path) -> None:
    found = evaluated(run, text, TestTimeAdaptation("prefix", prefix=3), out="out.json")["tta"]["prefix"]
    rest = windows_of(run, text)[3:]
    expected = perplexity(window_losses(Checkpoint(run / "model"), rest, CPU, BATCH), LENGTH)
    assert found["without"]["mine"] == pytest.approx(expected, rel=1e-6)
    assert found["details"]["mine"] == {"windows": WINDOWS - 3, "adapted_on": 3}


def test_what_is_measured_is_not_learned_on(run: Path, tmp_path: Path) -> None:
    """Windows after the prefix lose the same, whichever others come with them."""
    words = {name: path.read_text().split() for name, path in texts(tmp_path, "start", "one", "other").items()}
    logs = {}
    for rest in (("one",), ("other",), ("one", "other")):
        text = tmp_path / "joined.txt"
        text.write_text(" ".join(words["start"][: 2 * LENGTH] + [w for name in rest for w in words[name][:LENGTH]]))
        found = evaluated(run, {"mine": text}, TestTimeAdaptation("prefix", prefix=2, lr=0.01), out="out.json")
        logs[rest] = math.log(found["tta"]["prefix"]["ppl"]["mine"])
    assert logs["one", "other"] == pytest.approx((logs["one",] + logs["other",]) / 2, rel=1e-6)


# The original's code


@pytest.mark.parametrize("epochs", [1, 5])
def test_the_originals_way(run: Path, text: Path, epochs: int) -> None:
    slow = ByHand(run, text, rlq=True, epochs=epochs, lr=0.01)
    with_it, without = adapted(run, text, compat="rlq", epochs=epochs, lr=0.01)
    assert with_it == pytest.approx(slow.ahead(WINDOWS), rel=1e-6)
    assert with_it != pytest.approx(without, rel=1e-4)


def test_the_original_begins_anew(run: Path, text: Path) -> None:
    block, _ = pupil(run, text, compat="rlq")
    anew = {"scale": 1.0, "shift": 0.0, "lower": 4.0, "upper": 4.0}
    found = {name: value.unique().tolist() for name, value in block.task.learnables().items()}
    assert found == {name: [anew[name.rpartition(".")[2]]] for name in found}
    assert {name.rpartition(".")[2] for name in found} == set(anew)


@pytest.mark.parametrize("start", ["search", "search_on_inputs"])
def test_anew_clipping_begins_on_weights_that_nothing_has_smoothed(tmp_path: Path, start: str) -> None:
    run = fitted(tmp_path, settings={"model.weight_quantizer.initial": start})
    block, _ = pupil(run, tmp_path / "words.txt", compat="rlq")
    recorded = RecordedRun.open(run)
    last = recorded.source.num_blocks - 1
    ranges, weights = recorded.ranges(recorded.record(last), CPU), recorded.source.block(last)
    for name, quantizer in block.task.quantizers.items():
        linear = name.replace("/", ".")
        w, counts = weights.get_parameter(f"{linear}.weight"), ranges[linear].mean.square()[None]
        expected = best_share(w[:, None], 16, False, counts if start == "search_on_inputs" else None)
        torch.testing.assert_close(quantizer.lower.sigmoid(), expected)  # type: ignore[union-attr]


def test_the_original_learns_from_embeddings(run: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embeddings = RecordedRun.open(run).source.shell().embed(windows_of(run, text))[0]
    given: dict[str, Tensor] = {}
    targets, learn = Pupil.targets, Pupil.learn
    monkeypatch.setattr(Pupil, "targets", lambda self, fp, *more: given.update(teacher=fp) or targets(self, fp, *more))
    monkeypatch.setattr(Pupil, "learn", lambda self, x, *more: given.update(student=x) or learn(self, x, *more))
    adapted(run, text, compat="rlq")
    assert torch.equal(given["teacher"], embeddings)
    assert torch.equal(given["student"], embeddings)
    adapted(run, text)
    assert not torch.allclose(given["teacher"], embeddings)
    assert not torch.allclose(given["student"], given["teacher"])


@pytest.mark.parametrize(("compat", "places"), [("none", 7), ("rlq", 0)])
def test_only_the_original_leaves_activations_unrounded(
    run: Path, text: Path, monkeypatch: pytest.MonkeyPatch, compat: Any, places: int
) -> None:
    """Inputs of q/k/v, o, gate/up and down, and queries, keys and values."""
    block, under_test = pupil(run, text, compat=compat)
    standing, calls, rounded = under_test.before_last(1), [], TokenRounding.__call__
    targets = block.targets(standing.fp, standing.quantised, BATCH)
    monkeypatch.setattr(TokenRounding, "__call__", lambda self, x: calls.append(self.bits) or rounded(self, x))
    block.output(standing.quantised, block.weights(), WINDOWS)
    assert calls == [4] * places
    block.learn(standing.quantised, targets)
    assert len(calls) >= places * (1 + 5 * WINDOWS)
    assert not calls or places


@pytest.mark.parametrize("name", [None, "mine"])
def test_the_originals_results_bear_a_mark(
    run: Path, text: Path, capfd: pytest.CaptureFixture[str], name: str | None
) -> None:
    adapted(run, text, compat="rlq", name=name)
    name = name or "rlq"
    assert json.loads(Path("out.json").read_text())["tta"][name]["compat"] == "rlq"
    printed = capfd.readouterr().out
    assert f"{name} (compat: rlq)" in printed


def test_other_results_bear_none(run: Path, text: Path, capfd: pytest.CaptureFixture[str]) -> None:
    adapted(run, text)
    assert "compat" not in json.loads(Path("out.json").read_text())["tta"]["transductive"]
    assert "as the original code" not in capfd.readouterr().out


# Nothing leaks


def all_ways() -> list[TestTimeAdaptation]:
    own: dict[str, Any] = {"lr": 0.01, "epochs": 2}
    return [
        TestTimeAdaptation("transductive", **own),
        TestTimeAdaptation("prefix", prefix=2, blocks=2, **own),
        TestTimeAdaptation("online", batch_size=2, **own),
        TestTimeAdaptation(compat="rlq", **own),
        TestTimeAdaptation("online", blocks=2, name="deep", **own),
    ]


def test_neither_order_nor_company_changes_a_figure(run: Path, tmp_path: Path) -> None:
    words = texts(tmp_path, "one", "other")
    together = evaluated(run, words, *all_ways(), out="out.json")
    backwards = evaluated(run, dict(reversed(words.items())), *reversed(all_ways()), out="out.json")
    assert backwards == together
    for name, path in words.items():
        for callback in all_ways():
            alone = evaluated(run, {name: path}, callback, out="out.json")
            assert alone["ppl"][name] == together["ppl"][name]
            for part in ("ppl", "without", "details"):
                assert alone["tta"][callback.name][part] == {name: together["tta"][callback.name][part][name]}


def test_the_plain_figure_is_the_same_beside_adaptation(run: Path, text: Path) -> None:
    assert evaluated(run, text, *all_ways(), out="out.json")["ppl"] == evaluated(run, text, out="out.json")["ppl"]


def test_a_run_is_only_read(tmp_path: Path, text: Path) -> None:
    run = fitted(tmp_path)
    before = snapshot(run)
    evaluated(run, text, *all_ways())
    after = snapshot(run)
    assert after.keys() == before.keys()
    assert {name for name in after if after[name] != before[name]} == {"metrics.json", "report.html"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("callback", all_ways(), ids=lambda callback: callback.name)
def test_beside_a_gpu_the_place_of_streams_changes_no_bit(
    run: Path, text: Path, monkeypatch: pytest.MonkeyPatch, callback: TestTimeAdaptation
) -> None:
    found = []
    for place in (torch.device("cuda"), CPU):
        monkeypatch.setattr("ptql.evaluation.perplexity.resting_place", lambda *_, place=place: place)
        found.append(evaluated(run, text, callback, accelerator="gpu", out="out.json"))
    assert found[0] == found[1]


@pytest.mark.shared
def test_a_real_model_gets_better(stories_dir: Path, shared_dir: Path) -> None:
    data = shared_dir / "data/text"
    settings = {"data.samples": 8, "data.length": 128, "data.batch_size": 4, "trainer.max_epochs": 2}
    settings |= {"trainer.accelerator": "cpu", "trainer.logger": False}
    ptql.quantize(stories_dir, data=data / "tinystories-train.jsonl", out="RUN", settings=settings)
    given: dict[str, Any] = {"length": 128, "windows": 8, "accelerator": "cpu"}
    text = {"wikitext2": data / "wikitext2-test.txt"}
    found = ptql.evaluate("RUN", text=text, callbacks=[TestTimeAdaptation(), TestTimeAdaptation("online")], **given)
    tta, plain = found["tta"], found["ppl"]["wikitext2"]
    assert tta["transductive"]["without"]["wikitext2"] == tta["online"]["without"]["wikitext2"] == plain
    assert tta["transductive"]["ppl"]["wikitext2"] < plain
    assert tta["online"]["ppl"]["wikitext2"] < plain
