"""What can't be exported is told in one line, before anything is written; the remedy that is told works."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ptql.cli import main
from ptql.errors import InputError
from ptql.export.gptq import Gptq
from ptql.export.target import Loader
from tests.export.exported import CPU, RTN, SERVED, exported, fit, save_exact_source, weights
from tests.models import llama_config

pytestmark = pytest.mark.usefixtures("one_thread")
CT = "compressed-tensors"
W4A8 = (*RTN, "-c", "schemes/w4a8")
SYMMETRIC = ("--model.weight.symmetric", "true", "--model.activation.symmetric", "true")
ATTENTION = ("--model.activation_quantizer", "DynamicTokens", "--model.activation_quantizer.qkv", "false")
BF16 = ("--model.weight.scale_dtype", "bfloat16")
LRQUANT = ("-c", "methods/lrquant", "-c", "schemes/w4a8", *SERVED, "--trainer.max_epochs", "0")
PTQ161 = ("-c", "methods/ptq161", "-c", "schemes/w1.61a16", "--trainer.max_epochs", "0", "--trainer.callbacks", "null")
SITES = '[{"class_path": "ptql.parts.transforms.Permute", "init_args": {"sites": ["out", "fc2"]}}]'
CLUSTERED = ("-c", "methods/rptq", "-c", "schemes/w4a16", "--model.transforms", SITES)
Runs = Callable[..., Path]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    save_exact_source(folder)
    return folder


@pytest.fixture(scope="module")
def runs(home: Path) -> Runs:
    """A run with these options; one that was asked for before is there already."""
    made: dict[tuple[str, ...], Path] = {}

    def run(*options: str) -> Path:
        if options not in made:
            made[options] = fit(home, f"RUN{len(made)}", *options)
        return made[options]

    return run


@pytest.fixture(autouse=True)
def here(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)


def refused(home: Path, capfd: pytest.CaptureFixture[str], *args: str) -> str:
    """The one line; nothing else happens."""
    before = set(home.rglob("*"))
    capfd.readouterr()
    assert main(["export", *args, *CPU]) == 2
    said = capfd.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert set(home.rglob("*")) == before
    return line.removeprefix("ptql: error: ")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "give either --run RUN or --model.source DIR"),
        (["--run", "RUN", "--model.source", "DIR"], "give either --run RUN or --model.source DIR"),
        (["--run", "RUN", "--format", "onnx"], r"format=onnx: no such format; one of compressed-tensors, gptq,"),
        (["--run", "RUN"], "--out is missing"),
        (["--run", "RUN", "--out", "source"], "out=source: is there already; give another name"),
        (["--run", "RUN", "--out", "words.txt"], r"out=words\.txt: is there already; give another name"),
        (
            ["--run", "RUN", "--out", "words.txt/out"],
            r"out=words\.txt/out: can't be made in .*words\.txt; give a place",
        ),
        (["--run", "RUN", "--out", "."], r"out=\.: .*give a name, \./model"),
        (["--run", "RUN", "--out", ".."], r"out=\.\.: .*give a name, \./model"),
        (["--run", "RUN", "--out", "out"], "RUN: no finished model in this run"),
        (["--run", "source", "--out", "out"], "source: no finished model in this run; let `ptql fit` end first"),
        (["--model.source", "nowhere", "--out", "out"], "nowhere: no such model directory"),
        (["--model.source", "source", "--out", "out"], "source: in full precision, .*give a run of `ptql fit`"),
        (["--run", "RUN", "--out", "out", "--windows", "0"], "windows=0.*--check false"),
        (["--run", "RUN", "--out", "out", "--length", "1"], "length=1.*2 tokens"),
        (["--run", "RUN", "--out", "out", "--windows", "many"], "windows"),
        (["--run", "RUN", "--out", "out", "--check", "perhaps"], "check"),
        (["--run", "RUN", "--out", "out", "--colour", "red"], "colour"),
        (["--run", "RUN", "--out", "out", "--trainer.devices", "2"], "devices=2: export is one process"),
    ],
)
def test_options(home: Path, capfd: pytest.CaptureFixture[str], args: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        raise InputError(refused(home, capfd, *args))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "has no place for the biases"),
        (["--dtype", "int8"], "dtype=int8: one of auto, float16, bfloat16, float32 is needed"),
        (["--dtype", "float32"], "dtype=.*float32: compressed-tensors is served in float16 or bfloat16"),
        (["--python", "nowhere/python"], r"python=nowhere/python: can't be run \(No such file"),
        (["--python", "./source"], r"python=\./source: can't be run \(Permission denied"),
        (["--text", "nowhere.txt"], r"nowhere\.txt"),
        (["--text", "short.txt"], "short|text of 3 tokens"),
    ],
)
def test_options_of_a_run(
    home: Path, runs: Runs, capfd: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    run = runs(*(LRQUANT if not args else RTN))
    (home / "short.txt").write_text("w1 w2 w3")
    with pytest.raises(InputError, match=message):
        raise InputError(refused(home, capfd, str(run), "--out", "out", *args))


def test_a_loader_that_is_not_installed(
    home: Path, runs: Runs, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Gptq, "loaders", (Loader("by_gptqmodel.py", "no_such_package", "pip install it"),))
    said = refused(home, capfd, str(runs(*RTN, *weights(4, True))), "--out", "out", "--format", "gptq")
    assert said == (
        f"check=true: no_such_package, with which the export is read back, is not installed for {sys.executable}; "
        "pip install it (in an environment of its own, perhaps: --python says where), or write it unchecked with "
        "--check false"
    )


def test_an_empty_directory_may_be_there(home: Path, runs: Runs) -> None:
    (home / "empty").mkdir()
    exported(runs(*RTN), home / "empty")
    assert (home / "empty/README.md").is_file()


def test_transformers_reads_zero_points_of_one_format(
    home: Path, runs: Runs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = runs(*RTN, "--model.layers", '{"layers.0": 8}')
    said = refused(home, capfd, str(run), "--out", "out")
    assert "--model.weight.symmetric true, or write it unchecked, for other runtimes, with --check false" in said
    exported(run, tmp_path / "out")


SHIFT, GROUPS = ("--model.transforms.shift", "biased"), "--model.weight.group_size"


@pytest.mark.parametrize(
    ("target", "options", "message", "remedy"),
    [
        (CT, LRQUANT, f"learned shifts give to input_layernorm, .*; fit with {' '.join(SHIFT)}$", SHIFT),
        (CT, W4A8, "queries, keys or values are rounded .*-c presets/served", SERVED),
        (CT, W4A8, f"no kv_bits, and with {' '.join(ATTENTION)} or -c", (*ATTENTION, *SYMMETRIC)),
        (CT, (*RTN, "--model.activation.kv_bits", "4"), "to 16 and 4 bits.* no kv_bits",
         ("--model.activation.kv_bits", "null")),
        (CT, (*W4A8, *ATTENTION), f"no zero point .*0.self_attn.q_proj has.*{' '.join(SYMMETRIC)}", SYMMETRIC),
        (CT, (*W4A8, *ATTENTION, *SYMMETRIC[:2]), "activations have no zero point .*W8A8.*presets/served", SERVED),
        (CT, (*W4A8, *SERVED, "--model.activation.bits", "6"), "4 or 8 bits, not 6.*activation.bits 8",
         ("--model.activation.bits", "8")),
        (CT, (*RTN, "--model.weight_quantizer.factor_rank", "1"), "factor_rank=1.*factor_rank 0",
         ("--model.weight_quantizer.factor_rank", "0")),
        (CT, (*RTN, "-c", "schemes/w2ba16"), r"no codes of 5 levels \(0.self_attn.q_proj\).*w2a16g64",
         (*RTN, "-c", "schemes/w2a16g64", GROUPS, "32")),
        (CT, PTQ161, "no codes of signs and salient channels .*another method than ptq161",
         (*RTN, "-c", "schemes/w2a16")),
        (CT, CLUSTERED, r"no scales of clusters.*0\.self_attn\.q_proj.*; fit with --model.weight.clustered false",
         ("--model.weight.clustered", "false")),
        (CT, (*RTN, *weights(1)), "no runtime reads codes of 1 bit .*with 2 bits", ("--model.weight.bits", "2")),
        (CT, (*RTN, *weights(4, True, 48)), f"64 columns of .* no multiple of 48.*{GROUPS} 32 or -1$", (GROUPS, "32")),
        (CT, (*RTN, *weights(4, True, 128)), f"64 columns of .* no multiple of 128.*{GROUPS} 32 or -1$",
         (GROUPS, "-1")),
        (CT, (*RTN, "--model.layers", '{"q_proj": 8}'), "q_proj, .*are one layer in runtimes.*--model.layers",
         ("--model.layers", '{"q_proj": 8, "k_proj": 8, "v_proj": 8}')),
        (CT, (*RTN, *weights(16)), "weights of 16 bits, so there is nothing to export", ("--model.weight.bits", "8")),
        ("gptq", (*RTN, *weights(5, True)), r"2, 3, 4, 8 bits, not 5", ("--model.weight.bits", "4")),
        ("gptq", (*RTN, *weights(4, False, 2)), "can't say 0.*--model.weight.symmetric true",
         ("--model.weight.symmetric", "true")),
        ("gptq", LRQUANT, "gptq has no place for the biases", (*SHIFT, "--model.activation.bits", "16")),
        ("gptq", (*W4A8, *SERVED), "rounded to 8 bits.*activation.bits 16", ("--model.activation.bits", "16")),
        ("dense", (*W4A8, *SERVED), "rounded to 8 bits.*activation.bits 16", ("--model.activation.bits", "16")),
        ("dense", LRQUANT, "dense has no place for the biases", (*SHIFT, "--model.activation.bits", "16")),
    ],
)  # fmt: skip
def test_the_remedy_works(
    runs: Runs, tmp_path: Path, target: str, options: tuple[str, ...], message: str, remedy: tuple[str, ...]
) -> None:
    with pytest.raises(InputError, match=message) as told:
        exported(runs(*options), tmp_path / "out", target)
    assert "\n" not in str(told.value)
    assert not list(tmp_path.iterdir())
    replaces = remedy[0] == "-c" and remedy[1].startswith("methods/")
    exported(runs(*(remedy if replaces else (*options, *remedy))), tmp_path / "out", target)


@pytest.mark.parametrize(
    ("target", "options", "other"),
    [
        (CT, (*RTN, "--model.weight_quantizer.factor_rank", "1"), "dense"),
        (CT, (*RTN, "-c", "schemes/w2ba16"), "dense"),
        (CT, PTQ161, "dense"),
        (CT, CLUSTERED, "dense"),
        (CT, (*RTN, *weights(1)), "dense"),
        ("gptq", (*RTN, *weights(5, True)), CT),
        ("gptq", (*RTN, *weights(4, False, 2)), "gptq_v2"),
        ("auto-round", (*W4A8, *SERVED), CT),
    ],
)
def test_the_other_format_works(runs: Runs, tmp_path: Path, target: str, options: tuple[str, ...], other: str) -> None:
    with pytest.raises(InputError, match=f"or use --format {other}|use --format {other},"):
        exported(runs(*options), tmp_path / "out", target)
    exported(runs(*options), tmp_path / "out", other)


def test_bfloat16_needs_scales_that_were_made_for_it(runs: Runs, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"those of 0.self_attn.q_proj .*--dtype float16, .*scale_dtype bfloat16"):
        exported(runs(*RTN), tmp_path / "out", dtype="bfloat16")
    exported(runs(*RTN), tmp_path / "out", dtype="float16")
    exported(runs(*RTN, *BF16), tmp_path / "other", dtype="bfloat16")


def test_gptq_is_float16_and_packs_32_rows_and_columns(runs: Runs, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gptq has float16 scales and models; use --dtype float16"):
        exported(runs(*RTN, *weights(4, True)), tmp_path / "out", "gptq", "bfloat16")
    save_exact_source(tmp_path, llama_config())
    run = fit(tmp_path, "RUN", *RTN, *weights(4, True))
    with pytest.raises(InputError, match=r"0.self_attn.q_proj is 48 x 48; use --format compressed-tensors"):
        exported(run, tmp_path / "out", "gptq")
    exported(run, tmp_path / "out", CT)
