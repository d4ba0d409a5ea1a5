"""Whole runs of a real 1 MB model: what a run leaves on disk, and that it can be killed anywhere."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import Callback
from ptql.callbacks import BlockCallback
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import ptql  # noqa: F401  (registers the format)
from ptql.calibration.activations import Streams
from ptql.calibration.data import CalibrationData
from ptql.calibration.ledger import BlockRecord, Ledger
from ptql.calibration.quant_lm import QuantLM
from ptql.calibration.stopping import Stopped
from ptql.calibration.tokens import consecutive_windows, load_tokenizer, tokenize
from ptql.calibration.trainer import BlockTrainer
from ptql.checkpoint import SINGLE, Checkpoint
from ptql.cli import main
from ptql.errors import InputError
from ptql.parts.transforms import Smooth
from ptql.parts.weights import Affine
from ptql.recipe import ActivationScheme, IntScheme
from tests.models import VOCABULARY, blocks_of, llama_config, opt_config, random_model, save, some_ids

PTQL = Path(sys.executable).with_name("ptql")
BLOCKS, SAMPLES, EPOCHS, BATCHES = 5, 10, 8, 3  # the last batch of 4 holds 2
DATA = ("--data.length", "48", "--data.samples", str(SAMPLES), "--trainer.accelerator", "cpu")
DATA += ("--trainer.log_every_n_steps", "1")
IDS = torch.randint(3, 512, (3, 40), generator=torch.Generator().manual_seed(1))
Runs = Callable[..., Path]


@pytest.fixture(scope="module", autouse=True)
def quiet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One thread here and in every process started here, and a cache of tokens of our own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PTQL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def text(shared_dir: Path) -> Path:
    return shared_dir / "data/text/tinystories-train.jsonl"


def arguments(run: Path, source: Path, text: Path, method: str, scheme: str, *more: str) -> list[str]:
    recipe = ("-c", f"methods/{method}", "-c", f"schemes/{scheme}")
    epochs = () if method == "rtn" else ("--trainer.max_epochs", str(EPOCHS))
    places = ("--model.source", str(source), "--data.text", str(text), "--trainer.default_root_dir", str(run))
    return ["fit", *recipe, *places, *DATA, *epochs, *more]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, stories_dir: Path, text: Path) -> Runs:
    """The run of a method and a scheme, made once; tests that change it work on a copy."""
    made: dict[tuple[str, ...], Path] = {}

    def run(method: str, scheme: str, *more: str) -> Path:
        key = (method, scheme, *more)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("run") / "-".join((method, scheme))
            assert main(arguments(made[key], stories_dir, text, method, scheme, *more)) == 0
        return made[key]

    return run


def blocks_noted(run: Path) -> list[dict[str, Any]]:
    blocks = json.loads((run / "ledger/manifest.json").read_text())["blocks"]
    return [blocks[str(index)] for index in range(len(blocks))]


def files(model: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in model.iterdir()}


def metrics(run: Path) -> dict[str, Any]:
    return json.loads((run / "metrics.json").read_text())


ALL = [(m, s) for s in ("w4a4", "w2a16g64") for m in ("rtn", "omniquant", "lrquant")]


# What a run leaves


@pytest.mark.shared
@pytest.mark.parametrize(("method", "scheme"), ALL)
def test_what_a_run_leaves_on_disk(runs: Runs, stories_dir: Path, method: str, scheme: str) -> None:
    run = runs(method, scheme)
    assert sorted(os.listdir(run)) == ["config.yaml", "ledger", "metrics.json", "model", "report.html", "tensorboard"]
    assert len(list((run / "ledger").iterdir())) == BLOCKS + 1
    assert sorted(os.listdir(run / "model")) == sorted(os.listdir(stories_dir))
    found, noted = metrics(run), blocks_noted(run)
    assert found["weights"] == 226_560
    assert found["parameters"] == 260_032
    fit = found["fit"]
    assert (fit["method"], fit["source"], fit["blocks"], fit["device"]) == (method, str(stories_dir), BLOCKS, "cpu")
    assert fit["seconds"] == pytest.approx(sum(block["seconds"] for block in noted), abs=0.06)
    assert 0 <= fit["seconds_learning"] <= fit["seconds"]
    assert fit["skipped_steps"] == 0
    assert fit["fell_back"] == sum(block["fell_back"] for block in noted)
    assert fit["last_block_mse"] == noted[-1]["mse"]
    assert len(fit["checksum"]) == 16
    for block in noted:
        assert block["loss"] <= block["loss_start"]
        assert block["steps"] == (0 if method == "rtn" else EPOCHS * BATCHES)
        assert block["mse"] > 0


@pytest.mark.shared
@pytest.mark.parametrize(("method", "scheme"), ALL)
def test_bits_and_bytes_against_arithmetic(runs: Runs, method: str, scheme: str) -> None:
    run = runs(method, scheme)
    bits, group = (4, 0) if scheme == "w4a4" else (2, 64)
    shapes = {"q_proj": (64, 64), "k_proj": (32, 64), "v_proj": (32, 64), "o_proj": (64, 64)}
    shapes |= {"gate_proj": (172, 64), "up_proj": (172, 64), "down_proj": (64, 172)}
    stored = load_file(run / "model" / SINGLE)
    in_all = linear = 0
    for name, tensor in stored.items():
        size = tensor.numel() * tensor.element_size()
        in_all += size
        layer, _, part = name.rpartition(".")
        if (shape := shapes.get(layer.rpartition(".")[2])) is None:
            continue
        linear += size
        rows, columns = shape
        groups = -(-columns // group) if group else 1  # 172 columns: two groups of 64 and one of 44
        per_row = {"codes": -(-columns * bits // 8), "scale": 2 * groups, "zero": -(-groups * bits // 8), "bias": 2}
        assert size == rows * per_row[part]
        if part == "codes" and scheme == "w2a16g64":
            assert tensor.shape == (rows, columns // 4)  # two bits are a quarter of a byte
    shifted = method == "lrquant" and scheme == "w4a4"
    assert any(name.endswith("proj.bias") for name in stored) == shifted
    found = metrics(run)
    assert found["bits_per_weight"] == pytest.approx(8 * linear / 226_560, rel=1e-12)
    assert found["bits_per_weight_with_embeddings"] == pytest.approx(8 * in_all / 260_032, rel=1e-12)
    assert found["size_bytes"] == (run / "model" / SINGLE).stat().st_size
    header = int.from_bytes((run / "model" / SINGLE).read_bytes()[:8], "little")
    assert found["size_bytes"] == 8 + header + in_all
    if scheme == "w2a16g64":
        assert 2.25 < found["bits_per_weight"] < 2.5


@pytest.mark.shared
@pytest.mark.parametrize("scheme", ["w4a4", "w2a16g64"])
def test_learning_pays(runs: Runs, scheme: str) -> None:
    """Blocks end below where they began, and the last block's output is nearer than rounding to nearest."""
    nearest = blocks_noted(runs("rtn", scheme))
    for method in ("omniquant", "lrquant"):
        learned = blocks_noted(runs(method, scheme))
        better = [block["loss"] < block["loss_start"] for block in learned]
        assert sum(better) >= 3, better
        assert [block["fell_back"] for block in learned] == [not b for b in better]
        assert learned[-1]["mse"] < nearest[-1]["mse"]


@pytest.mark.shared
def test_the_stored_configuration_runs_again(runs: Runs, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = runs("lrquant", "w4a4")
    config = yaml.safe_load((run / "config.yaml").read_text())
    weight = {"bits": 4, "group_size": -1, "symmetric": False, "balanced": False, "salient_bits": 4}
    weight |= {"scale_dtype": "float16", "clustered": False}
    assert config["model"]["weight"] == weight
    assert config["data"]["samples"] == SAMPLES
    assert config["trainer"]["max_epochs"] == EPOCHS
    before = files(run / "model")
    capfd.readouterr()  # of the run itself, if it was made here
    assert main(["fit", "-c", str(run / "config.yaml")]) == 0
    assert capfd.readouterr().err == f"blocks 1-{BLOCKS} of {BLOCKS}: finished earlier\n"  # nothing is done again
    assert files(run / "model") == before
    elsewhere = ("--trainer.default_root_dir", str(tmp_path / "again"))
    assert main(["fit", "-c", str(run / "config.yaml"), *elsewhere]) == 0
    assert "finished earlier" not in capfd.readouterr().err
    assert files(tmp_path / "again/model") == before
    assert metrics(tmp_path / "again")["fit"]["checksum"] == metrics(run)["fit"]["checksum"]


@pytest.mark.shared
def test_the_same_seed_gives_the_same_bytes_and_another_one_does_not(
    runs: Runs, stories_dir: Path, text: Path, tmp_path: Path
) -> None:
    run = runs("omniquant", "w2a16g64")
    for seed in ("2", "3"):
        args = arguments(tmp_path / seed, stories_dir, text, "omniquant", "w2a16g64", "--data.seed", seed)
        assert main(args) == 0
    assert metrics(tmp_path / "2")["fit"]["checksum"] == metrics(run)["fit"]["checksum"]
    assert files(tmp_path / "2/model") == files(run / "model")
    assert metrics(tmp_path / "3")["fit"]["checksum"] != metrics(run)["fit"]["checksum"]


# TensorBoard


def logged(run: Path) -> dict[str, list[int]]:
    """Steps of every curve, file by file in the order in which they were written."""
    steps: dict[str, list[int]] = {}

    def age(path: Path) -> tuple[int, int]:  # events.out.tfevents.SECONDS.HOST.PROCESS.NUMBER
        parts = path.name.split(".")
        return int(parts[3]), int(parts[-1])

    for path in sorted((run / "tensorboard").glob("events*"), key=age):
        found = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
        for tag in found.Tags()["scalars"]:
            steps.setdefault(tag, []).extend(event.step for event in found.Scalars(tag))
    return steps


@pytest.mark.shared
@pytest.mark.parametrize("scheme", ["w4a4", "w2a16g64"])
def test_one_step_axis_over_all_blocks(runs: Runs, scheme: str) -> None:
    steps = logged(runs("lrquant", scheme))
    assert {"loss/total", "loss/mse_fp", "loss/nlc_fp"} <= steps.keys()
    for tag, found in steps.items():
        by_block = tag.startswith(("block/", "weight_error/"))
        assert found == list(range(BLOCKS if by_block else BLOCKS * EPOCHS * BATCHES)), tag


# The model, loaded by transformers


def dense_weights(run: Path) -> dict[str, Tensor]:
    """The weights of a run of w2a16g64 from its files alone: bits by numpy, arithmetic in plain sight."""
    stored = {name: tensor.numpy() for name, tensor in load_file(run / "model" / SINGLE).items()}
    dense: dict[str, Tensor] = {}
    for name, codes in stored.items():
        prefix, _, part = name.rpartition(".")
        if part in ("scale", "zero"):
            continue
        if part != "codes":
            dense[name] = torch.from_numpy(codes).float()
            continue

        def two_bits(stream: np.ndarray) -> np.ndarray:
            flat = np.unpackbits(stream, axis=1, bitorder="little")
            return flat[:, 0::2] + 2 * flat[:, 1::2]

        q, zero = two_bits(codes).astype(np.float64), two_bits(stored[f"{prefix}.zero"]).astype(np.float64)
        scale = stored[f"{prefix}.scale"].view(np.float16).astype(np.float64)
        columns = np.arange(q.shape[1]) // 64
        dense[f"{prefix}.weight"] = torch.from_numpy((q - zero[:, columns]) * scale[:, columns]).float()
    return dense


@pytest.mark.shared
@pytest.mark.parametrize("method", ["rtn", "omniquant", "lrquant"])
def test_the_model_is_an_ordinary_llama_of_the_stored_weights(runs: Runs, stories_dir: Path, method: str) -> None:
    run = runs(method, "w2a16g64")
    packed, info = AutoModelForCausalLM.from_pretrained(run / "model", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    reference = AutoModelForCausalLM.from_pretrained(stories_dir, dtype=torch.float32)
    original = reference(IDS).logits
    missing, unexpected = reference.load_state_dict(dense_weights(run), strict=False)
    assert set(missing) == {"lm_head.weight"}  # tied
    assert unexpected == []
    torch.testing.assert_close(packed(IDS).logits, reference(IDS).logits, rtol=1e-4, atol=1e-4)
    assert (packed(IDS).logits - original).abs().mean() > 0.05  # it is not the model that it was made of


@torch.no_grad()
def student_logits(run: Path, source: Path, recipe: QuantLM, ids: Tensor) -> Tensor:
    """The blocks as they were calibrated: the ledger's tensors through `BlockTask.decode`."""
    checkpoint = Checkpoint(source)
    ledger = Ledger(run, json.loads((run / "ledger/manifest.json").read_text())["identity"])
    shell = checkpoint.shell()
    streams = Streams(shell, ids, len(ids), torch.device("cpu"))
    for index in range(checkpoint.num_blocks):
        block = checkpoint.block(index)
        ranges = streams.teach(block, checkpoint.layout, ("fp",))
        student = recipe.student(block, checkpoint)
        task = recipe.block_task(index, student, checkpoint, ranges, streams.context, begin=False)
        found = ledger.read(index)
        assert found is not None
        streams.advance(streams.output(student, task.decode(found.stored)))
    return shell.logits(streams.quantised, ids)


def recipe_of(method: str, scheme: str) -> QuantLM:
    transforms = [Smooth(shift="all" if method == "lrquant" else "biased")] if method != "rtn" else []
    weight, activation = (IntScheme(4, -1), 4) if scheme == "w4a4" else (IntScheme(2, 64), 16)
    quantizer = Affine(clip=method != "rtn")
    return QuantLM(
        weight=weight,
        activation=ActivationScheme(activation),
        transforms=list(transforms),
        weight_quantizer=quantizer,
    )


@torch.no_grad()
def loaded_logits(run: Path, ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    model, info = AutoModelForCausalLM.from_pretrained(run / "model", dtype=dtype, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model(ids).logits


@pytest.mark.shared
@pytest.mark.parametrize(("method", "scheme"), ALL)
def test_the_model_computes_what_was_calibrated(runs: Runs, stories_dir: Path, method: str, scheme: str) -> None:
    run = runs(method, scheme)
    expected = student_logits(run, stories_dir, recipe_of(method, scheme), IDS)
    found = loaded_logits(run, IDS)
    if scheme == "w4a4":  # a difference in the last bit may move an activation to the next code
        assert ((found - expected).abs() < 1e-4).float().mean() > 0.99
    else:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.shared
@pytest.mark.parametrize(("method", "scheme"), [("rtn", "w2a16g64"), ("lrquant", "w4a4"), ("omniquant", "w4a4")])
def test_perplexity_is_that_of_the_loaded_model(
    runs: Runs, shared_dir: Path, tmp_path: Path, method: str, scheme: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs(method, scheme), run)
    before = metrics(run)
    text = shared_dir / "data/text/tinystories-test.jsonl"
    options = ("--length", "64", "--windows", "5", "--batch_size", "2", "--trainer.accelerator", "cpu")
    assert main(["eval", "--run", str(run), "--text.tiny", str(text), *options]) == 0
    found = metrics(run)
    story = "\n\n".join(json.loads(line)["text"] for line in text.read_text().splitlines() if line.strip())
    windows = consecutive_windows(tokenize(load_tokenizer(run / "model"), story), 64)[:5]
    model = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32)
    with torch.no_grad():
        losses = [model(window[None], labels=window[None]).loss.item() for window in windows]
    assert found["ppl"] == {"tiny": pytest.approx(math.exp(sum(losses) / 5), rel=1e-4 if scheme == "w4a4" else 1e-5)}
    assert {key: found[key] for key in before} == before  # what `fit` wrote is still there


# Runs that are killed


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.shared
def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(stories_dir: Path, text: Path, tmp_path: Path) -> None:
    epochs = 30

    def command(run: Path) -> list[str]:
        return arguments(run, stories_dir, text, "lrquant", "w4a4", "--trainer.max_epochs", str(epochs))

    killed = tmp_path / "killed"
    with subprocess.Popen([str(PTQL), *command(killed)], stderr=subprocess.PIPE, text=True) as first:
        wait_for(lambda: len(list((killed / "ledger").glob("*.safetensors"))) == 2)
        time.sleep(0.1)  # the third block learns
        first.send_signal(signal.SIGKILL)
        first.communicate()
    assert first.returncode == -signal.SIGKILL
    assert sorted(path.name for path in (killed / "ledger").glob("*.safetensors")) == [
        "block-00000.safetensors",
        "block-00001.safetensors",
    ]
    assert not (killed / "model").exists()
    steps_before = logged(killed)["loss/total"]

    second = subprocess.run([str(PTQL), *command(killed)], capture_output=True, text=True, check=True)
    said = [line for line in second.stderr.splitlines() if line.startswith("block")]
    assert said[0] == f"blocks 1-2 of {BLOCKS}: finished earlier"
    assert [line.split()[1] for line in said[1:]] == [f"{k}/{BLOCKS}" for k in (3, 4, 5)]

    assert main(command(tmp_path / "whole")) == 0
    assert files(killed / "model") == files(tmp_path / "whole/model")
    assert metrics(killed)["fit"]["checksum"] == metrics(tmp_path / "whole")["fit"]["checksum"]
    timeless = [
        [{k: v for k, v in block.items() if "seconds" not in k and "peak" not in k} for block in blocks_noted(run)]
        for run in (killed, tmp_path / "whole")
    ]
    assert timeless[0] == timeless[1]
    # The axis goes on where the third block began.
    steps = logged(killed)["loss/total"][len(steps_before) :]
    assert steps == list(range(2 * epochs * BATCHES, BLOCKS * epochs * BATCHES))


@pytest.mark.shared
def test_a_damaged_block_is_done_again(runs: Runs, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run, whole = tmp_path / "run", runs("lrquant", "w4a4")
    shutil.copytree(whole, run)
    damaged = run / "ledger/block-00002.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    capfd.readouterr()
    args = ["fit", "-c", str(run / "config.yaml"), "--trainer.default_root_dir", str(run)]
    assert main(args) == 0
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == f"ptql: {damaged}: missing or not what was written (checksum); this block is done again"
    assert [line.split("  ")[0] for line in lines[1:]] == [
        f"blocks 1-2 of {BLOCKS}: finished earlier",
        f"block 3/{BLOCKS}",
        f"blocks 4-5 of {BLOCKS}: finished earlier",
    ]
    assert files(run / "model") == files(whole / "model")
    assert damaged.read_bytes() == (whole / "ledger" / damaged.name).read_bytes()
    assert logged(run)["loss/total"][-1] == 3 * EPOCHS * BATCHES - 1


# Other models


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({f"w{k}": k for k in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0")


@pytest.fixture
def words(tmp_path: Path) -> Path:
    (tmp_path / "words.txt").write_text(" ".join(f"w{k}" for k in some_ids(1, 900)[0].tolist()))
    return tmp_path / "words.txt"


def fitted(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, text: Path, run: Path, recipe: str, **options: Any
) -> Path:
    """A run of a tiny random model."""
    source = save(model, run.with_name(f"{run.name}-source"), **options)
    tokenizer.save_pretrained(source)
    short = ("--data.length", "16", "--trainer.max_epochs", "0" if recipe.startswith("rtn") else "4")
    assert main(arguments(run, source, text, *recipe.split(), *short)) == 0
    return source


@pytest.mark.parametrize("norm_first", [True, False])
def test_an_opt_with_shifts(tokenizer: Any, words: Path, tmp_path: Path, norm_first: bool) -> None:
    config = opt_config(do_layer_norm_before=norm_first, word_embed_proj_dim=48 if norm_first else 32)
    run = tmp_path / "run"
    source = fitted(random_model(config), tokenizer, words, run, "lrquant w4a4")
    learned = load_file(run / "ledger/block-00001.safetensors")
    assert any("shift" in name and tensor.any() for name, tensor in learned.items() if name.startswith("learned."))
    assert any(block["loss"] < block["loss_start"] for block in blocks_noted(run))
    expected = student_logits(run, source, recipe_of("lrquant", "w4a4"), some_ids())
    assert ((loaded_logits(run, some_ids()) - expected).abs() < 1e-4).float().mean() > 0.99


def test_a_source_in_bfloat16(tokenizer: Any, words: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    source = fitted(random_model(llama_config()).bfloat16(), tokenizer, words, run, "omniquant w2a16g64")
    stored = load_file(run / "model" / SINGLE)
    assert stored["model.embed_tokens.weight"].dtype == torch.bfloat16
    expected = student_logits(run, source, recipe_of("omniquant", "w2a16g64"), some_ids())
    torch.testing.assert_close(loaded_logits(run, some_ids()), expected, rtol=1e-5, atol=1e-5)
    # The config says bfloat16, in which transformers then computes.
    rough = AutoModelForCausalLM.from_pretrained(run / "model")(some_ids()).logits
    assert rough.dtype == torch.bfloat16
    assert (rough.float() - expected).abs().mean() < 0.1 * expected.std()


def test_a_sharded_source_gives_the_same_model(tokenizer: Any, words: Path, tmp_path: Path) -> None:
    model = random_model(llama_config(tie_word_embeddings=False))
    shards = fitted(model, tokenizer, words, tmp_path / "shards", "lrquant w4a4", max_shard_size="40KB")
    assert len(list(shards.glob("*.safetensors"))) > 2
    fitted(model, tokenizer, words, tmp_path / "single", "lrquant w4a4")
    assert metrics(tmp_path / "shards")["fit"]["checksum"] == metrics(tmp_path / "single")["fit"]["checksum"]
    found, expected = (load_file(tmp_path / name / "model" / SINGLE) for name in ("shards", "single"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("batch_size", [1, 3, 10])
def test_any_batch_size_without_learning_gives_the_same_codes(
    tokenizer: Any, words: Path, tmp_path: Path, batch_size: int
) -> None:
    model = random_model(llama_config())
    fitted(model, tokenizer, words, tmp_path / "four", "rtn w3a16")
    source, run = tmp_path / "four-source", tmp_path / "other"
    args = arguments(run, source, words, "rtn", "w3a16", "--data.length", "16", "--data.batch_size", str(batch_size))
    assert main(args) == 0
    assert files(run / "model") == files(tmp_path / "four/model")
    for one, two in zip(blocks_noted(run), blocks_noted(tmp_path / "four"), strict=True):
        assert one["mse"] == pytest.approx(two["mse"], rel=1e-4)


# The hooks


class Hooks(BlockCallback):
    def __init__(self) -> None:
        self.calls: list[str] = []

    def on_model_start(self, trainer: BlockTrainer, model: QuantLM) -> None:
        assert (trainer.run_dir / "ledger/manifest.json").is_file()
        self.calls.append(f"model of {trainer.num_blocks}")

    def on_block_start(self, trainer: BlockTrainer, task: Any) -> None:
        assert task.initial.keys() == task.learnables().keys()
        self.calls.append(f"start {trainer.block}")

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.calls.append("learn")

    def on_block_end(self, trainer: BlockTrainer, record: BlockRecord) -> None:
        assert (trainer.run_dir / f"ledger/block-{trainer.block:05d}.safetensors").is_file()
        self.calls.append(f"end {trainer.block}{' again' if record.resumed else ''}")

    def on_model_end(self, trainer: BlockTrainer, model: QuantLM) -> None:
        assert (trainer.run_dir / "model/config.json").is_file()
        self.calls.append("done")


def by_hand(tokenizer: PreTrainedTokenizerFast, words: Path, run: Path, *callbacks: Callback) -> None:
    """`fit` without the command line."""
    source = run.with_name("source")
    if not source.exists():
        tokenizer.save_pretrained(save(random_model(llama_config()), source))
    trainer = BlockTrainer(
        accelerator="cpu",
        devices=1,
        max_epochs=2,
        default_root_dir=run,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(QuantLM(source=str(source)), CalibrationData(str(words), samples=3, length=16, batch_size=2))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_callbacks_see_every_block(tokenizer: Any, words: Path, tmp_path: Path) -> None:
    hooks, again = Hooks(), Hooks()
    by_hand(tokenizer, words, tmp_path / "run", hooks)
    blocks = ["start 0", "learn", "end 0", "start 1", "learn", "end 1"]
    assert hooks.calls == ["model of 2", *blocks, "done"]
    by_hand(tokenizer, words, tmp_path / "run", again)
    assert again.calls == ["model of 2", "end 0 again", "end 1 again", "done"]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_sigterm_at_the_very_end_of_a_block_is_not_lost(tokenizer: Any, words: Path, tmp_path: Path) -> None:
    class Late(Callback):
        def on_train_end(self, *_: Any) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped) as stopped:
        by_hand(tokenizer, words, tmp_path / "run", Late())
    assert stopped.value.code == 143
    assert not (tmp_path / "run/model").exists()
    assert blocks_noted(tmp_path / "run") == []
    by_hand(tokenizer, words, tmp_path / "run")
    assert (tmp_path / "run/model/config.json").is_file()


class SignalAt(Callback):
    """SIGTERM during one step of the first block."""

    def __init__(self, epoch: int, batch: int) -> None:
        self.at = epoch, batch

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.block == 0 and (trainer.current_epoch, batch_idx) == self.at:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_stop_at_any_step_changes_nothing(tokenizer: Any, words: Path, tmp_path: Path, accumulate: int) -> None:
    """The last step of an epoch and of a block are places of their own: Lightning leaves hooks out there."""
    source = tmp_path / "source"
    tokenizer.save_pretrained(save(random_model(llama_config()), source))

    def fit(run: Path, *callbacks: Callback) -> None:
        trainer = BlockTrainer(
            accelerator="cpu",
            devices=1,
            max_epochs=3,
            accumulate_grad_batches=accumulate,
            default_root_dir=run,
            callbacks=list(callbacks),
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        model = QuantLM(source=str(source), weight=IntScheme(2, -1), weight_quantizer=Affine(lr=0.2))
        trainer.fit(model, CalibrationData(str(words), samples=6, length=16, batch_size=2))

    fit(tmp_path / "clean")
    (first, *_) = blocks_noted(tmp_path / "clean")
    assert first["fell_back"] is False
    assert first["best_epoch"] == 2  # each epoch's end counts
    for epoch in range(3):
        for batch in range(3):
            run = tmp_path / f"stopped-{epoch}-{batch}"
            with pytest.raises(Stopped):
                fit(run, SignalAt(epoch, batch))
            assert len(list((run / "ledger").glob("partial-00000-*.ckpt"))) == 1
            fit(run)
            assert blocks_noted(run)[0]["best_epoch"] == 2, (epoch, batch)
            assert files(run / "model") == files(tmp_path / "clean/model"), (epoch, batch)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_callback_whose_state_can_not_be_read_back_is_told_of(tokenizer: Any, words: Path, tmp_path: Path) -> None:
    class Odd(SignalAt):
        def state_dict(self) -> dict[str, Any]:
            return {"where": tmp_path}

    with pytest.raises(InputError, match="the state of one can't be read back"):
        by_hand(tokenizer, words, tmp_path / "run", Odd(0, 0))
    assert not list((tmp_path / "run/ledger").glob("partial*"))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_numbers_that_are_not_finite_in_a_later_block_end_the_run(tokenizer: Any, words: Path, tmp_path: Path) -> None:
    model = random_model(llama_config())
    blocks_of(model)[1].get_submodule("mlp.down_proj").weight.data[3, 5] = float("nan")
    source = tmp_path / "source"
    tokenizer.save_pretrained(save(model, source))
    with pytest.raises(InputError, match="block 1 gives numbers that are not finite"):
        by_hand(tokenizer, words, tmp_path / "run")
    assert not (tmp_path / "run/model").exists()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_another_seed_is_another_run(
    tokenizer: Any, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")
    by_hand(tokenizer, words, tmp_path / "run")
    monkeypatch.setenv("PL_GLOBAL_SEED", "6")
    with pytest.raises(InputError, match="seed was 5 and is 6 now"):
        by_hand(tokenizer, words, tmp_path / "run")


@pytest.mark.shared
def test_the_configuration_that_is_kept_holds_the_files_it_named(stories_dir: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("bits: 5\ngroup_size: 32\n")
    run = tmp_path / "run"
    more = ("--model.weight", str(tmp_path / "config.yaml"))
    assert main(arguments(run, stories_dir, text, "rtn", "w4a16", *more)) == 0
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["weight"]["group_size"] == 32
    assert main(["fit", "-c", str(run / "config.yaml")]) == 0
