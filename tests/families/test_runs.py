"""Whole runs of a tiny model of each family: what transformers loads computes what was calibrated and measured."""

from __future__ import annotations

import json
import math
import string
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import ptql  # noqa: F401  (registers the format)
from ptql.calibration.activations import Streams
from ptql.calibration.ledger import Ledger
from ptql.calibration.quant_lm import QuantLM
from ptql.calibration.tokens import consecutive_windows
from ptql.checkpoint import SINGLE, Checkpoint
from ptql.cli import main
from ptql.families import family_of
from ptql.formats.hf import PtqlConfig, PtqlQuantizer
from ptql.nn.quant_linear import ShiftedNorm
from ptql.parts.transforms import Smooth
from ptql.parts.weights import Affine
from ptql.recipe import ActivationScheme, IntScheme
from tests.models import CONFIGS, FAMILIES, VOCABULARY, blocks_of, random_model, save, some_ids

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = [name for name in FAMILIES if name not in ("llama", "opt")]  # which other tests run
RECIPES = [("rtn", "w4a16"), ("lrquant", "w4a4")]
LENGTH = 16  # twice the window of attention that slides
CHARACTERS = (string.ascii_letters + string.digits)[: VOCABULARY - 3]
BOS = 1
Runs = Callable[[str, str, str], Path]


def save_tokenizer(directory: Path, **special: str) -> None:
    """One token a character; a byte-level BPE, as transformers makes one of whatever a Qwen2 directory holds."""
    vocabulary = {token: k for k, token in enumerate(("<unk>", "<s>", "</s>", *CHARACTERS))}
    characters = Tokenizer(BPE(vocabulary, [], unk_token="<unk>"))
    characters.pre_tokenizer = ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=characters, unk_token="<unk>", **special).save_pretrained(directory)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    ids = torch.randint(3, VOCABULARY, (400,), generator=torch.Generator().manual_seed(0)).tolist()
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(CHARACTERS[k - 3] for k in ids))
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Runs:
    """The run of a model and a recipe, made once: RUN/source is the model, RUN/run what `fit` left."""
    made: dict[tuple[str, str, str], Path] = {}

    def run(name: str, method: str, scheme: str) -> Path:
        key = (name, method, scheme)
        if key not in made:
            folder = made[key] = tmp_path_factory.mktemp("run")
            save(random_model(CONFIGS[name]), folder / "source")
            save_tokenizer(folder / "source", bos_token="<s>")
            recipe = ("-c", f"methods/{method}", "-c", f"schemes/{scheme}", "--trainer.accelerator", "cpu")
            epochs = ("--trainer.max_epochs", "0" if method == "rtn" else "2", "--trainer.log_every_n_steps", "1")
            data = ("--data.text", str(text), "--data.length", str(LENGTH), "--data.samples", "4")
            places = ("--model.source", str(folder / "source"), "--trainer.default_root_dir", str(folder / "run"))
            with torch.enable_grad():
                assert main(["fit", *recipe, *epochs, *data, "--data.batch_size", "2", *places]) == 0
        return made[key]

    return run


def recipe_of(method: str) -> QuantLM:
    learned = method != "rtn"
    return QuantLM(
        weight=IntScheme(4, -1),
        activation=ActivationScheme(4 if learned else 16),
        transforms=[Smooth()] if learned else [],
        weight_quantizer=Affine(clip=learned),
    )


@torch.no_grad()
def student_logits(folder: Path, method: str, ids: Tensor) -> Tensor:
    """The blocks as they were calibrated: the ledger's tensors through `BlockTask.decode`."""
    source, recipe = Checkpoint(folder / "source"), recipe_of(method)
    identity = json.loads((folder / "run/ledger/manifest.json").read_text())["identity"]
    ledger, shell = Ledger(folder / "run", identity), source.shell()
    streams = Streams(shell, ids, len(ids), torch.device("cpu"))
    for index in range(source.num_blocks):
        block = source.block(index)
        ranges = streams.teach(block, source.layout, ("fp",))
        student = recipe.student(block, source)
        task = recipe.block_task(index, student, source, ranges, streams.context)
        record = ledger.read(index)
        assert record is not None
        streams.advance(streams.output(student, task.decode(record.stored)))
    return shell.logits(streams.quantised, ids)


def loaded(folder: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    model, info = AutoModelForCausalLM.from_pretrained(folder / "run/model", dtype=dtype, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model.eval()


@pytest.mark.parametrize("recipe", RECIPES, ids="-".join)
@pytest.mark.parametrize("name", [*NAMES, "phi3_longrope"])
@torch.no_grad()
def test_transformers_loads_what_was_calibrated(runs: Runs, name: str, recipe: tuple[str, str]) -> None:
    folder, ids = runs(name, *recipe), some_ids(tokens=20)
    expected, model = student_logits(folder, recipe[0], ids), loaded(folder)
    found = model(ids, use_cache=False).logits
    if recipe[0] == "lrquant":  # a difference in the last bit may move an activation to the next code
        assert ((found - expected).abs() < 1e-4).float().mean() > 0.95
        norms = {n for n, module in blocks_of(model)[1].named_modules() if isinstance(module, ShiftedNorm)}
        sites = family_of(CONFIGS[name].model_type).layout(CONFIGS[name]).norms
        assert norms == {site.norm for site in sites if not site.has_bias}
    else:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    original = random_model(CONFIGS[name])(ids, use_cache=False).logits
    assert 0.02 < (found - original).std() / original.std() < 1.5
    torch.testing.assert_close(model(ids).logits, found, rtol=1e-3, atol=1e-3)  # with a cache, as when generating


@pytest.mark.parametrize("recipe", RECIPES, ids="-".join)
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_perplexity_is_that_of_the_loaded_model(
    runs: Runs, text: Path, tmp_path: Path, name: str, recipe: tuple[str, str]
) -> None:
    folder, file = runs(name, *recipe), tmp_path / "metrics.json"
    options = ("--length", str(LENGTH), "--windows", "5", "--batch_size", "2", "--trainer.accelerator", "cpu")
    assert main(["eval", "--run", str(folder / "run"), "--text.tiny", str(text), *options, "--json", str(file)]) == 0
    tokens = torch.tensor([CHARACTERS.index(c) + 3 for c in text.read_text()])
    if "gemma" in name:  # each window is <bos> and one token of text less
        cuts = tokens[: 5 * (LENGTH - 1)].view(5, LENGTH - 1)
        windows = torch.cat([torch.full((5, 1), BOS), cuts], dim=1)
    else:
        windows = consecutive_windows(tokens, LENGTH)[:5]
    model = loaded(folder)
    losses = [model(window[None], labels=window[None]).loss.item() for window in windows]
    tolerance = 5e-3 if recipe[0] == "lrquant" else 1e-4
    found = json.loads(file.read_text())["ppl"]["tiny"]
    assert found == pytest.approx(math.exp(sum(losses) / 5), rel=tolerance)


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
@torch.no_grad()
def test_folded_norms_around_one_stay_float32_in_a_bfloat16_model(runs: Runs, name: str) -> None:
    folder = runs(name, "lrquant", "w4a4")
    model, stored = loaded(folder, torch.bfloat16), load_file(folder / "run/model" / SINGLE)
    kept = {key for key, p in model.named_parameters() if p.dtype == torch.float32}
    layout = family_of(model.config.model_type).layout(model.config)
    shifted = {site.norm for site in layout.norms}
    names = [f"{norm}.norm" if norm in shifted else norm for norm in layout.offset_norms]
    assert kept == {f"model.layers.{index}.{norm}.weight" for index in range(2) for norm in names}
    assert all(torch.equal(model.get_parameter(key), stored[key]) for key in kept)
    logits = model(some_ids()).logits
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()


@pytest.mark.parametrize(
    ("name", "asked", "taken"),
    [("gemma2", "sdpa", "ptql"), ("gemma2", "eager", "eager"), ("gemma2_uncapped", "sdpa", "sdpa")],
)
@torch.no_grad()
def test_scores_stay_capped_where_sdpa_would_leave_that_out(runs: Runs, name: str, asked: str, taken: str) -> None:
    """Earlier versions of transformers run Gemma 2 with SDPA unless told otherwise; this one may refuse to."""
    folder, model = runs(name, "rtn", "w4a16"), random_model(CONFIGS[name])
    packed = PtqlConfig(**json.loads((folder / "run/model/config.json").read_text())["quantization_config"])
    model.config._attn_implementation = asked
    PtqlQuantizer(packed, pre_quantized=True)._process_model_before_weight_loading(model)
    assert model.config._attn_implementation == taken


@pytest.mark.parametrize("name", ["mistral", "gemma3", "phi3"])
@torch.no_grad()
def test_generating_beyond_the_window_is_the_forward_pass(runs: Runs, name: str) -> None:
    model, prompt = loaded(runs(name, "rtn", "w4a16")), some_ids(samples=1, tokens=12)
    ids = model.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert ids.shape == (1, 24)
    assert torch.equal(model(ids).logits.argmax(-1)[:, 11:-1], ids[:, 12:])


@pytest.mark.parametrize("name", ["gemma2", "qwen3"])
def test_a_missing_bos_token_is_refused_where_it_is_needed(
    runs: Runs, text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    source = save(random_model(CONFIGS[name]), tmp_path / "source")
    save_tokenizer(source)
    options = ("--text.tiny", str(text), "--length", str(LENGTH), "--windows", "2", "--trainer.accelerator", "cpu")
    code = main(["eval", "--model.source", str(source), *options])
    assert code == (2 if name == "gemma2" else 0)
    err = capfd.readouterr().err
    if name == "gemma2":
        assert "it has no bos_token, with which every window of this model must begin; put the model's own" in err
