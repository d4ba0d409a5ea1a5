"""Plans run and are recorded; tables and the plot hold what the records say; steps are taken apart."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from benchmarks import calibration, calibration_tables, step_profile
from benchmarks.calibration import BASE, PLANS, REAL, Run, pace, share, told
from benchmarks.calibration_tables import ORIGINALS, plot, points, tables
from benchmarks.shapes import SHAPES, Shape
from benchmarks.step_profile import Work, busy, group_of, on_gpu, summary, table
from ptql.checkpoint import Checkpoint

H100 = "NVIDIA H100 80GB HBM3"


def row(run: Run = BASE, seconds: float = 0.8, wall: float = 30.0, **other: Any) -> dict[str, Any]:
    """A line as `benchmarks/calibration.py` writes it."""
    shape = run.shape or Shape("SmolLM2", 576, 1536, 9, 3, 30)
    blocks = [{"seconds": seconds * run.epochs + 2.0, "seconds_learning": seconds * run.epochs} for _ in range(3)]
    figures = {"peak_gpu_bytes": 6 * 2**30, "peak_host_bytes": 5 * 2**30, "seconds_wall": wall, "engine_told": []}
    machine = {"machine": H100, "cpu": "Xeon, 16 threads", "torch": "2.11.0", "triton": "3.6.0", "lightning": "2.6.6"}
    figures |= pace(blocks, run.epochs, shape.blocks) | share(shape, run, blocks, 700e12)
    found = {"plan": "growth", "name": run.name, **asdict(run), "shape": asdict(shape), "jobs_at_once": 1}
    return {**found, **machine, "transformers": "5.23.0", "bf16_flops": 700e12, **figures, "each_block": [], **other}


def growth() -> list[dict[str, Any]]:
    """The rows of a plan whose seconds are in proportion to the tokens, and 20 s + 5 s a block in all."""
    rows = []
    for run in PLANS["growth"]:
        size = run.samples * run.length / (128 * 2048)
        rows.append(row(run, 0.8 * size, 20.0 + 5 * run.blocks))
    return rows


def cells(markdown: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines() if "|" in line]


# Plans


def test_runs_of_a_plan_have_different_names() -> None:
    for name, runs in PLANS.items():
        assert len({run.name for run in runs}) == len(runs), name


def test_a_command_names_what_was_asked_for_only() -> None:
    folder, model = Path("/w/run"), Path("/w/m")
    usual = Run(BASE.shape, "lrquant", "w4a4", None).fit(model, "pydoc", "bf16-mixed", folder)
    assert usual[:5] == ["fit", "-c", "methods/lrquant", "-c", "schemes/w4a4"]
    assert not {"--model.engine", "--data.memory", "--trainer.devices"} & set(usual)
    special = replace(BASE, memory="8GiB", processes=2).fit(model, "pydoc", "bf16-mixed", folder)
    pairs = dict(zip(special[1::2], special[2::2], strict=True))
    assert pairs["--model.engine"] == "auto"
    assert (pairs["-c"], pairs["--data.memory"], pairs["--trainer.devices"]) == ("strategies/ddp", "8GiB", "2")


def test_pace_is_of_the_blocks_after_the_first() -> None:
    blocks = [{"seconds": 30.0, "seconds_learning": 26.0}]
    blocks += [{"seconds": s + 2.0, "seconds_learning": s} for s in (9.0, 8.0, 12.0)]
    found = pace(blocks, 10, 32)
    assert found["seconds_per_block_epoch"] == 0.9
    assert found["first_block_seconds_per_block_epoch"] == 2.6
    assert found["seconds_of_block_beside_learning"] == 2.0
    # the first block took 30 s where another one would have taken 10 * 0.9 + 2
    assert found["extrapolated_seconds_of_model"] == pytest.approx(32 * (20 * 0.9 + 2.0) + 30.0 - 11.0)
    assert pace(blocks[:1], 10, 0).keys() == {
        "seconds_per_block_epoch",
        "first_block_seconds_per_block_epoch",
        "seconds_of_block_beside_learning",
    }


def test_share_is_of_all_gpus() -> None:
    shape = SHAPES["llama2-7b"]
    blocks = [{"seconds_learning": 3.0}] * 2
    one = share(shape, BASE, blocks, 700e12)
    assert one["share_of_bf16_rate"] == pytest.approx(shape.learning_flops(128, 2048) / 1.0 / 700e12)
    assert share(shape, replace(BASE, processes=2), blocks, 700e12)["share_of_bf16_rate"] == pytest.approx(
        one["share_of_bf16_rate"] / 2
    )
    assert share(shape, BASE, blocks, None).keys() == {"tflops_achieved"}


def test_what_the_engine_told_is_kept() -> None:
    log = "ptql: dry run: fine\nptql: engine: eager, as the step can't be captured (no)\nother\n"
    assert told(log) == ["engine: eager, as the step can't be captured (no)"]


@pytest.mark.shared
def test_the_tiny_plan_end_to_end(
    stories_dir: Path, shared_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    results, text = tmp_path / "r.jsonl", shared_dir / "data" / "text" / "tinystories-test.jsonl"
    command = ["tiny", "--tokenizer", str(stories_dir), "--model", str(stories_dir), "--calibration", str(text)]
    command += ["--work", str(tmp_path / "work"), "--results", str(results), "--text", f"tiny={text}", "--windows", "2"]
    assert calibration.main(command) == 0
    shown = capfd.readouterr().out
    rows = calibration_tables.read_rows([results])
    assert [found["shape"]["name"] for found in rows] == ["tiny", "stories260k"]
    assert [found["name"] in shown for found in rows] == [True, True]
    made, real = rows
    assert (made["blocks"], real["blocks"], real["shape"]["kv_heads"]) == (2, 5, 4)
    assert made["extrapolated_blocks"] == 5
    assert made["seconds_per_block_epoch"] == made["each_block"][1]["seconds_learning"] / 2
    assert "ppl" not in made
    assert 1 < real["ppl"]["tiny"] < 512
    assert all(block["loss_learned"] > 0 for found in rows for block in found["each_block"])
    assert str(tmp_path) not in made["command"] + real["command"]
    assert Checkpoint(tmp_path / "work" / "models" / "tiny-2").num_blocks == 2
    assert not (tmp_path / "work" / "runs" / made["name"]).exists()
    head, _, line = cells(tables(rows))
    found = dict(zip(head, line, strict=True))
    assert (found["model"], found["recipe"], found["epochs, batch"]) == ("stories260k", "lrquant w4a4", "1, 2")
    assert float(found["tiny ppl"]) == pytest.approx(real["ppl"]["tiny"], rel=1e-3)


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of runs that begin; the first one fails, the others come out as `row`."""
    begun: list[str] = []

    def execute(plan: str, run: Run, *others: Any) -> dict[str, Any]:
        begun.append(run.name)
        if len(begun) == 1:
            raise OSError("no room")
        return row(run)

    monkeypatch.setattr(calibration, "execute", execute)
    monkeypatch.setattr(calibration, "probed_apart", lambda: {"gpus": 1, "machine": H100})
    return begun


def test_a_failed_run_does_not_end_the_plan_and_a_finished_one_is_not_repeated(
    attempts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["weights", "--tokenizer", str(tmp_path), "--work", str(tmp_path), "--epochs", "7"]
    command += ["--results", str(tmp_path / "r.jsonl")]
    first, second = (replace(run, epochs=7).name for run in PLANS["weights"])
    assert calibration.main(command) == 1
    assert attempts == [first, second]
    assert "no room" in capsys.readouterr().err
    assert calibration.main(command) == 0
    assert attempts == [first, second, first]
    assert [found["name"] for found in calibration_tables.read_rows([tmp_path / "r.jsonl"])] == [second, first]


def test_no_run_begins_after_the_deadline(
    attempts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["growth", "--tokenizer", str(tmp_path), "--work", str(tmp_path), "--deadline", "0"]
    assert calibration.main([*command, "--results", str(tmp_path / "r.jsonl")]) == 1
    assert attempts == []
    assert capsys.readouterr().err.count("not begun, after the deadline") == len(PLANS["growth"])


def test_plans_need_what_they_run_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for plan, missing in (("smollm2", "give --model DIR"), ("weights", "give --tokenizer DIR")):
        with pytest.raises(SystemExit):
            calibration.main([plan, "--work", str(tmp_path), "--results", str(tmp_path / "r.jsonl")])
        assert missing in capsys.readouterr().err


# Tables


def test_our_rows_stand_before_the_originals() -> None:
    ours = [row(replace(BASE, blocks=3, epochs=20), 0.75), row(replace(BASE, engine="plain"), 3.0), row()]
    fell_back = row(replace(BASE, memory="8GiB"), 0.9, engine_told=["engine: eager, as the step can't be captured (x)"])
    lines = cells(calibration_tables.block_table([*ours, fell_back]))
    assert [line[0] for line in lines[2:5]] == ["ptql auto", "ptql plain", "ptql auto (fell back to eager)"]
    assert lines[2][1:] == ["lrquant w4a4, batch 4", "0.75", "9.1", "63 %", "6.0", "–", "5.0"]  # the longer of two
    assert lines[4][1] == "lrquant w4a4, batch 4, data in 8GiB"
    assert [line[0] for line in lines[5:]] == [old.system for old in ORIGINALS] + ["floor", "floor"]
    assert {len(line) for line in lines} == {8}
    assert lines[5] == ["OmniQuant", "w4a4, batch 1", "6.64", "72", "6 %", "13.0 GB", "–", "–"]


def test_originals_are_what_was_measured(shared_dir: Path) -> None:
    text = (shared_dir / "research" / "calibration_h100.md").read_text(encoding="utf-8")
    for old in ORIGINALS:
        line = next(
            line
            for line in text.splitlines()
            if line.startswith(f"| {old.system.partition(' ')[0]}")
            and (old.setting.upper() in line or "| `" in line)
            and f"{old.pace:.2f}" in line
        )
        assert {f"{old.pace:.2f}", f"{old.hours:.2f}", f"{old.gigabytes}"} <= set(re.findall(r"\d+\.\d+", line))
    for _, seconds in calibration_tables.FLOOR:
        assert f"**{seconds:.3f}**" in text


def test_gpus_are_compared_with_one() -> None:
    rows = [row(), row(replace(BASE, processes=2, batch_size=2), 0.5), row(replace(BASE, processes=2), 0.4)]
    lines = cells(calibration_tables.gpu_table([*rows, row(replace(BASE, batch_size=1), 2.0)]))
    assert [line[:5] for line in lines[2:]] == [
        ["1", "4", "4", "0.800", "1.00"],
        ["2", "2", "4", "0.500", "1.60"],
        ["2", "4", "8", "0.400", "2.00"],
    ]
    assert calibration_tables.gpu_table([row()]) == ""


def test_real_models_show_perplexity_and_loss() -> None:
    halved = [{"loss": 0.5, "loss_start": 1.0}, {"loss": 0.02, "loss_start": 0.04}]
    run = replace(REAL, real=True)
    shown = calibration_tables.real_table([row(run, 1.0, each_block=halved, ppl={"wikitext2": 108.7875})])
    assert cells(shown)[2] == ["SmolLM2", "lrquant w4a4", "ptql auto", "20, 4", "108.8", "0.5000", "1.000 (1)", "30"]


def test_loss_curves_of_two_engines_are_compared() -> None:
    curves = [
        [{"epoch_losses": [1.01, 0.495]}, {"epoch_losses": [2.0]}],
        [{"epoch_losses": [1.0, 0.5]}, {"epoch_losses": [2.0]}],
    ]
    runs = [replace(REAL, real=True, engine=engine) for engine in ("auto", "plain")]
    rows = [row(run, 1.0, each_block=curve) for run, curve in zip(runs, curves, strict=True)]
    shown = calibration_tables.real_table(rows)
    assert (
        "the losses of `auto` and `plain`, block by block and epoch by epoch, differ by 1 % in the median and 1 % at "
        "most in the first third of the blocks, by 1 % in the median and 1 % at most in all." in shown
    )
    assert calibration_tables.curve_words(row(), row()) == ""
    again = [row(run, 1.0, each_block=curves[0]) for run in (runs[0], replace(runs[0], preset="fast"))]
    assert "the losses of two runs of `auto`" in calibration_tables.real_table(again)


def test_a_single_block_is_not_made_into_a_model() -> None:
    lines = cells(calibration_tables.other_table([row(replace(PLANS["llama70b"][0], blocks=1))]))
    assert lines[2][3].endswith(" with compiling")
    assert lines[2][4:6] == ["–", "–"]


def test_where_blocks_were_not_varied_the_plot_shows_how_a_real_run_went_through_them() -> None:
    blocks = [{"seconds": 30.0}, *[{"seconds": 2.0}] * 29]
    real = row(replace(REAL, real=True, blocks=30), 1.0, each_block=blocks)
    words, found = calibration_tables.passing([real, *growth()])
    assert words == " of SmolLM2"
    assert [(at, part["seconds_wall"]) for at, part in found][:2] == [(1, 30.0), (5, 38.0)]
    assert found[-1][0] == 30
    assert calibration_tables.passing(growth()) == ("", [])


def test_other_shapes_have_a_table() -> None:
    runs = [*PLANS["llama70b"], *PLANS["huge"]]
    lines = cells(calibration_tables.other_table([row(run) for run in [*runs, BASE]]))
    assert [line[0] for line in lines[2:]] == ["llama2-70b", "llama3-405b", "llama3-405b"]
    assert lines[4][2] == "lrquant w4a4, batch 1, 16 × 2048"


def test_only_what_is_between_the_markers_is_replaced(tmp_path: Path) -> None:
    page, file, image = tmp_path / "speed.md", tmp_path / "r.jsonl", tmp_path / "images" / "growth.svg"
    file.write_text("".join(json.dumps(found) + "\n" for found in growth()), encoding="utf-8")
    text = "# A\n\n<!-- begin: calibration -->\n{}<!-- end: calibration -->\nafter\n"
    page.write_text(text.format("old\n"), encoding="utf-8")
    for _ in range(2):
        calibration_tables.main(["--docs", str(page), "--plot", str(image), str(file)])
        assert page.read_text(encoding="utf-8") == text.format(tables(growth()))
    assert image.read_text(encoding="utf-8").startswith("<svg")
    with pytest.raises(SystemExit, match="no line <!-- begin: calibration -->"):
        calibration_tables.fill("# A\n", "table")


@pytest.mark.parametrize("line", ["{", "[]", '{"name": "a"}', '{"machine": "a", "seconds_per_block_epoch": 0}'])
def test_a_foreign_line_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "r.jsonl").write_text(json.dumps(row()) + "\n" + line + "\n", encoding="utf-8")
    with pytest.raises(SystemExit, match=r"r\.jsonl:2: not a line of .*; remove it"):
        calibration_tables.read_rows([tmp_path / "r.jsonl"])


# The plot


def test_points_are_the_runs_that_differ_in_one_number() -> None:
    rows = growth()
    rows += [row(replace(BASE, samples=512, engine="plain")), row(replace(BASE, samples=16, epochs=20))]
    found = {axis: [at for at, _ in points(rows, axis)] for axis in calibration_tables.AXES}
    assert found == {
        "samples": [32, 64, 128, 256],
        "length": [512, 1024, 2048, 4096],
        "width": [2048, 4096, 8192],
        "blocks": [1, 2, 3, 4],
    }


def test_the_dashed_lines() -> None:
    line, words = calibration_tables.straight([(1, 25.0), (2, 30.0), (4, 40.0)])
    assert words == "20 s + 5.0 s a block"
    assert line == [(0.0, pytest.approx(20.0)), (4, pytest.approx(40.0))]
    assert calibration_tables.scaled("samples", [(64, 3.0), (128, 5.0)])[-1] == (128, pytest.approx(5.0))
    at, twice_as_wide = calibration_tables.scaled("width", [(4096, 1.0), (8192, 9.0)])[-1]
    assert at == 8192
    assert 3.8 < twice_as_wide < 4  # linear layers four times, attention twice


def test_the_plot_is_a_drawing_of_four_panels() -> None:
    drawing = ElementTree.fromstring(plot(growth()))
    names = {"s": "http://www.w3.org/2000/svg"}
    assert len(drawing.findall("s:g", names)) == 4
    assert len(drawing.findall(".//s:circle", names)) == 4 + 4 + 3 + 4
    texts = [text.text for text in drawing.iterfind(".//s:text", names)]
    assert "20 s + 5.0 s a block" in texts
    for axis in calibration_tables.AXES:
        assert any((text or "").endswith(f"over {axis}") for text in texts)
    nothing = ElementTree.fromstring(plot([row()]))
    assert [text.text for text in nothing.iterfind(".//s:text", names)].count("not measured") == 4


def test_the_plot_is_legible_in_light_and_dark(tmp_path: Path) -> None:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no browser is on the PATH: install one, e.g. apt-get install chromium")
    (tmp_path / "growth.svg").write_text(plot(growth()), encoding="utf-8")
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=700,560"]
    quiet += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'profile'}"]
    for name, options, paper in (("light", [], 255), ("dark", ["--blink-settings=preferredColorScheme=0"], 22)):
        shot = f"--screenshot={tmp_path / name}.png"
        command = [browser, *quiet, *options, shot, (tmp_path / "growth.svg").as_uri()]
        subprocess.run(command, capture_output=True, timeout=120, check=True)
        picture = np.asarray(Image.open(tmp_path / f"{name}.png").convert("L")).astype(int)[:500, :690]
        assert abs(picture[2, 2] - paper) <= 1
        assert (abs(picture - paper) > 100).mean() > 0.01  # ink that stands out


# Steps taken apart


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT", "matrix products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matrix products"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_s1688gemm_128x256>(...)", "matrix products"),
        ("triton_tem_fused_mm_3", "matrix products"),
        ("void flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128>>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob", "attention"),
        ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80", "attention"),
        ("_fold_forward", "weight folding and rounding"),
        ("_matvec", "weight folding and rounding"),
        ("_round_tokens_kernel", "activation rounding"),
        ("triton_red_fused_add_mul_7", "fused element-wise (compiled)"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor<float, 4>>", "optimiser and gradient norm"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("Memset (Device)", "copies"),
        ("void at::native::vectorized_elementwise_kernel<4, MulFunctor<float>>", "other element-wise"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("aten::addmm", "matrix products"),
        ("aten::mul", "other element-wise"),
    ],
)
def test_kernels_have_groups(name: str, group: str) -> None:
    assert group_of(name) == group


def test_own_kernels_are_known_by_their_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder := tmp_path / "ptql" / "kernels").mkdir(parents=True)
    (folder / "weight_kernels.py").write_text("@jit\ndef between(x):\n    ...\n\n\n@triton.jit\ndef spread(\n    w):\n")
    (folder / "token_kernels.py").write_text("def launch(x):\n    ...\n\n\n@jit\ndef code_rows(x):\n    ...\n")
    monkeypatch.setattr(step_profile, "ROOT", tmp_path)
    step_profile.own_kernels.cache_clear()
    assert [group_of(name) for name in ("spread", "code_rows", "launch")] == [
        "weight folding and rounding",
        "activation rounding",
        "other element-wise",
    ]
    step_profile.own_kernels.cache_clear()


def test_a_trace_becomes_a_table() -> None:
    kernels = [("nvjet_a", 1000, 400), ("triton_poi_b", 1300, 200), ("nvjet_a", 2000, 300)]
    events = [{"cat": "kernel", "name": name, "ts": ts, "dur": dur} for name, ts, dur in kernels]
    events += [{"cat": "gpu_memcpy", "name": "Memcpy DtoD", "ts": 2400, "dur": 100}]
    events += [{"cat": "cpu_op", "name": "aten::mm", "ts": 900, "dur": 5000}, {"ph": "M", "name": "process_name"}]
    work = on_gpu({"traceEvents": events})
    assert busy(work) == 500 + 300 + 100  # two of them overlap
    found = summary({"steps": 2, "seconds": 0.002, "work": [asdict(item) for item in work]})
    assert found["idle"] == pytest.approx(1 - 0.9 / 2)
    assert found["groups"]["matrix products"] == {"ms": 0.35, "launches": 1.0, "longest": {"nvjet_a": 0.35}}
    assert cells(table(found))[2:] == [
        ["matrix products", "0.350", "70 %", "1.0"],
        ["fused element-wise (compiled)", "0.100", "20 %", "0.5"],
        ["copies", "0.050", "10 %", "0.5"],
        ["all", "0.500", "100 %", "2.0"],
    ]
    assert "1.000 ms a step by the clock, the GPU idle for 55 % of it." in table(found)


def test_summed_operators_have_no_idle_time() -> None:
    assert summary({"steps": 1, "seconds": 1.0, "work": [asdict(Work("aten::mm", 0.0, 5.0, 3))]})["idle"] is None


@pytest.mark.shared
def test_a_step_is_taken_apart_on_a_cpu(stories_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "profile.json"
    command = [str(stories_dir), "--batch_size", "2", "--first", "1", "--steps", "3", "--set", "data.length=32"]
    assert step_profile.main([*command, "--json", str(out), "--set", "trainer.accelerator=cpu"]) == 0
    found = json.loads(out.read_text())
    groups = found["groups"]
    assert found["ms_per_step"] > 0
    # 7 linear layers: forward, and backward to weights and inputs, those of shared inputs one by one
    assert groups["matrix products"]["launches"] >= 21
    assert groups["attention"]["ms"] > 0
    assert table(found) in capsys.readouterr().out
    assert step_profile.main([*command, "--set", "data.samples=2"]) == 1
    assert "block 0 made fewer than 4 steps" in capsys.readouterr().err
