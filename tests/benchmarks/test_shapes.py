"""Models of real shapes open, run, and need the arithmetic that they say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from benchmarks import shapes
from benchmarks.shapes import SHAPES, Shape, first_blocks, write_shape
from ptql.checkpoint import Checkpoint

SMALL = Shape("small", 48, 80, 4, 2, 7)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shape(SMALL, tmp_path_factory.mktemp("shapes") / "small", blocks=3, vocab=100)


def test_opens_as_a_model_and_runs(small: Path) -> None:
    source = Checkpoint(small)
    source.check_blocks()
    assert (source.num_blocks, source.context, source.dtype()) == (3, shapes.CONTEXT, torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32)
    output = model(torch.arange(12).view(2, 6)).logits
    assert output.shape == (2, 6, 100)
    assert output.isfinite().all()


def test_weights_are_normal_numbers_and_differ_everywhere(small: Path) -> None:
    blocks = [Checkpoint(small).block(index) for index in range(2)]
    matrices = [module.weight for block in blocks for module in block.modules() if isinstance(module, torch.nn.Linear)]
    drawn = torch.cat([weight.flatten() for weight in matrices])
    assert drawn.std().item() == pytest.approx(0.02, rel=0.02)
    assert abs(drawn.mean().item()) < 0.001
    starts = {tuple(weight[0, :8].tolist()) for weight in matrices}
    assert len(starts) == len(matrices) == 14
    norms = [module.weight for block in blocks for name, module in block.named_modules() if name.endswith("layernorm")]
    assert len(norms) == 4
    assert all((weight == 1).all() for weight in norms)


def test_numbers_go_on_where_the_drawn_ones_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "DRAWN", 1021)
    block = Checkpoint(write_shape(SMALL, tmp_path / "m", 1, vocab=10)).block(0)
    drawn = block.mlp.down_proj.weight.flatten()
    assert torch.equal(drawn[:-1021], drawn[1021:])
    assert torch.linalg.matrix_rank(drawn.view(SMALL.hidden, SMALL.mlp).double()) == SMALL.hidden


def test_fewer_blocks_are_links_to_the_same_files(small: Path, tmp_path: Path) -> None:
    short = Checkpoint(first_blocks(small, tmp_path / "short", 2))
    short.check_blocks()
    assert short.num_blocks == 2
    assert {file.name for file in short.files.values()} == {
        "block-00000.safetensors",
        "block-00001.safetensors",
        "outside.safetensors",
    }
    assert all(file.is_symlink() for file in short.files.values())
    weights = [model.block(1).mlp.up_proj.weight for model in (short, Checkpoint(small))]
    assert torch.equal(*weights)


@pytest.mark.shared
def test_the_tokenizer_decides_the_vocabulary(stories_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "custom"
    command = ["custom", str(out), "--blocks", "1", "--tokenizer", str(stories_dir)]
    sizes = ["--hidden", "32", "--mlp", "48", "--heads", "2", "--kv_heads", "1"]
    assert shapes.main([*command, *sizes]) == 0
    assert Checkpoint(out).config.vocab_size == 512
    assert (out / "tokenizer.json").read_bytes() == (stories_dir / "tokenizer.json").read_bytes()
    with pytest.raises(ValueError, match="vocab=511: an embedding has a row for each of 512 tokens"):
        write_shape(SMALL, tmp_path / "other", 1, stories_dir, vocab=511)
    assert shapes.main([*command, *sizes]) == 1  # it is there already


@pytest.mark.parametrize("sizes", [(48, 80, 5, 5), (48, 80, 4, 3), (20, 80, 4, 4)])
def test_sizes_that_do_not_divide_are_refused(sizes: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="heads divide the width into even parts, and kv_heads divide heads"):
        Shape("odd", *sizes)


def test_custom_takes_all_sizes_and_others_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["custom", "--hidden", "64"], ["llama2-7b", "--heads", "2"]):
        with pytest.raises(SystemExit):
            shapes.main([command[0], str(tmp_path / "m"), *command[1:]])
        assert "custom takes all four sizes, others none" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "millions"),
    [("llama2-7b", 202.4), ("llama2-13b", 317.2), ("llama2-70b", 855.6), ("llama3-8b", 218.1), ("llama3-405b", 3187.7)],
)
def test_real_shapes_have_the_known_sizes(name: str, millions: float) -> None:
    """Weights of a block: (parameters of the model - embeddings - norms) / blocks, from the models' cards."""
    assert SHAPES[name].linear_parameters / 1e6 == pytest.approx(millions, abs=0.1)


def test_files_say_what_the_index_says(small: Path) -> None:
    index = json.loads((small / shapes.INDEX).read_text())["weight_map"]
    for file in set(index.values()):
        with safe_open(small / file, "pt") as tensors:
            assert set(tensors.keys()) == {name for name, at in index.items() if at == file}


@pytest.mark.parametrize(("samples", "length"), [(1, 16), (3, 7)])
def test_arithmetic_agrees_with_what_torch_counts(small: Path, samples: int, length: int) -> None:
    """Torch counts attention over all pairs, of which a causal one sees half and the diagonal."""
    source = Checkpoint(small)
    model = AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32, attn_implementation="eager").model
    model.layers = model.layers[:1].requires_grad_(True)
    hidden = torch.randn(samples, length, source.config.hidden_size, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        model(inputs_embeds=hidden).last_hidden_state.sum().backward()
    counted = counter.get_flop_counts()["Global"]
    linear, attention = counted[torch.ops.aten.mm], counted[torch.ops.aten.bmm]
    assert SMALL.learning_flops(samples, length) == linear + attention * (length + 1) / (2 * length)


def test_arithmetic_agrees_with_a_count_by_hand() -> None:
    samples, length = 2, 5
    multiplications = 0
    for _, shape in SMALL.tensors(0):
        if len(shape) == 2:
            multiplications += samples * length * shape[0] * shape[1]
    head = SMALL.hidden // SMALL.heads
    for token in range(length):
        for _seen in range(token + 1):
            multiplications += samples * SMALL.heads * 2 * head  # score, and share of the value
    assert SMALL.learning_flops(samples, length) == 2 * 3 * multiplications
