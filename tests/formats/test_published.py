"""Parameter files as the originals publish them: nothing in them is run, and they give the model they stand for."""

from __future__ import annotations

import json
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ptql.cli import main
from ptql.errors import InputError
from ptql.formats.published import Published
from tests.models import llama_config, opt_config
from tests.words import save_source, save_text

BITS = 3
LINEARS = {
    "llama": [*(f"self_attn.{p}_proj" for p in "qkvo"), *(f"mlp.{p}_proj" for p in ("gate", "up", "down"))],
    "opt": [*(f"self_attn.{p}_proj" for p in "qkv"), "self_attn.out_proj", "fc1", "fc2"],
}


def state_of(source: Path) -> dict[str, Tensor]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    return {name: tensor.double() for name, tensor in model.state_dict().items()}


def positive(size: int) -> Tensor:
    return torch.rand(size) + 0.5


def a_file(path: Path, family: str, config: Any, group: int = -1, fc2: bool = False) -> dict[int, dict[str, Tensor]]:
    """Random parameters of every block, under the originals' names and in their shapes; `fc2` is ABQ-LLM's alone."""
    torch.manual_seed(5)
    hidden, blocks = config.hidden_size, {}
    for index in range(config.num_hidden_layers):
        block: dict[str, Tensor] = OrderedDict()
        values = hidden if family == "opt" else hidden // config.num_attention_heads * config.num_key_value_heads
        for name, size in (("qkv", hidden), ("out", values), ("fc1", hidden)):
            block[f"{name}_smooth_scale"] = positive(size)
            block[f"{name}_smooth_shift"] = torch.randn(size) if family == "opt" else torch.zeros(size)
        block["qkt_smooth_scale"] = positive(values)
        if fc2:
            block["fc2_smooth_scale"] = positive(config.intermediate_size)
        for linear in LINEARS[family]:
            rows, columns = shape_of(config, linear)
            groups = 1 if group == -1 else columns // group
            for bound in ("upbound_factor", "lowbound_factor"):
                block[f"{linear}.weight_quantizer.{bound}"] = torch.randn(rows * groups, 1) + 2
        blocks[index] = block
    torch.save(blocks, path)
    return blocks


def shape_of(config: Any, linear: str) -> tuple[int, int]:
    """Rows and columns of a linear layer."""
    head = config.hidden_size // config.num_attention_heads
    mlp = getattr(config, "intermediate_size", None) or config.ffn_dim
    rows = {"k_proj": getattr(config, "num_key_value_heads", config.num_attention_heads) * head}
    rows["v_proj"] = rows["k_proj"]
    rows |= {"gate_proj": mlp, "up_proj": mlp, "fc1": mlp}
    name = linear.rpartition(".")[2]
    return rows.get(name, config.hidden_size), mlp if name in ("down_proj", "fc2") else config.hidden_size


def rounded(w: Tensor, upper: Tensor, lower: Tensor, group: int, levels: int = 2**BITS) -> Tensor:
    """One row and group after the other, in float64: the originals' clipping; ranges hold zero, scales are float16."""
    out = w.clone()
    groups = -(-w.shape[1] // group)
    for row in range(w.shape[0]):
        for g in range(groups):
            part = slice(g * group, (g + 1) * group)
            k = row * groups + g
            high = max((torch.sigmoid(upper.double()[k, 0]) * w[row, part].max()).item(), 0.0)
            low = min((torch.sigmoid(lower.double()[k, 0]) * w[row, part].min()).item(), 0.0)
            step = float(torch.tensor((high - low) / (levels - 1)).half())
            zero = round(-low / step)
            code = (w[row, part] / step).round() + zero
            out[row, part] = (code.clamp(0, levels - 1) - zero) * step
    return out


def llama_by_hand(state: dict[str, Tensor], block: dict[str, Tensor], prefix: str, config: Any) -> dict[str, Tensor]:
    """The folded matrices of a Llama block, written out."""
    b = {name: tensor.double() for name, tensor in block.items()}
    w = {name: state[f"{prefix}.{name}.weight"].clone() for name in LINEARS["llama"]}
    repeats = config.num_attention_heads // config.num_key_value_heads
    head = config.hidden_size // config.num_attention_heads
    for name in "qkv":
        w[f"self_attn.{name}_proj"] *= b["qkv_smooth_scale"]
    for name in ("gate", "up"):
        w[f"mlp.{name}_proj"] *= b["fc1_smooth_scale"]
    w["self_attn.v_proj"] /= b["out_smooth_scale"][:, None]
    w["self_attn.o_proj"] *= b["out_smooth_scale"].view(-1, 1, head).repeat(1, repeats, 1).flatten()
    w["self_attn.q_proj"] /= b["qkt_smooth_scale"].view(-1, 1, head).repeat(1, repeats, 1).flatten()[:, None]
    w["self_attn.k_proj"] *= b["qkt_smooth_scale"][:, None]
    if "fc2_smooth_scale" in b:
        w["mlp.up_proj"] /= b["fc2_smooth_scale"][:, None]
        w["mlp.down_proj"] *= b["fc2_smooth_scale"]
    return w


def fitted(tmp_path: Path, config: Any, file: Path, *extra: str, method: str = "omniquant") -> Path:
    source = save_source(tmp_path / "source", config)
    text = save_text(tmp_path / "words.txt")
    command = ["fit", "-c", f"methods/{method}", "--model.source", str(source), "--data.text", str(text)]
    command += ["--data.length", "16", "--data.samples", "3", "--data.batch_size", "2", "--trainer.accelerator", "cpu"]
    command += ["--trainer.max_epochs", "0", "--trainer.logger", "false", "--trainer.default_root_dir"]
    command += [str(tmp_path / "RUN"), "--model.published", str(file), "--model.weight.bits", str(BITS), *extra]
    assert main(command) == 0
    return tmp_path / "RUN"


FAITHFUL_PARTS = "[{class_path: ptql.parts.transforms.Smooth, init_args: {faithful: true}}, "
FAITHFUL_PARTS += "{class_path: ptql.parts.transforms.Compensate, init_args: {rank: 1}}]"
FAITHFUL = ("--model.activation.bits", "8", "--model.transforms.faithful", "true")


@pytest.mark.parametrize("group", [-1, 16])
def test_a_published_llama_comes_out_as_written_by_hand(tmp_path: Path, group: int) -> None:
    from ptql.checkpoint import Checkpoint

    config = llama_config()
    blocks = a_file(tmp_path / "omni_parameters.pth", "llama", config, group)
    extra = () if group == -1 else ("--model.weight.group_size", str(group))
    run = fitted(tmp_path, config, tmp_path / "omni_parameters.pth", *FAITHFUL, *extra)
    packed, state = Checkpoint(run / "model"), state_of(tmp_path / "source")
    for index, block in blocks.items():
        by_hand = llama_by_hand(state, block, f"model.layers.{index}", config)
        found = packed.block(index)
        for linear, w in by_hand.items():
            clip = [block[f"{linear}.weight_quantizer.{bound}"] for bound in ("upbound_factor", "lowbound_factor")]
            expected = rounded(w, *clip, group=w.shape[1] if group == -1 else group)
            got = found.get_parameter(f"{linear}.weight").double()
            differing = ((got - expected).abs() > 1e-3 * expected.abs().max()).double().mean()
            assert differing < 0.005  # a code on the border between two, in float32 and float64
    assert json.loads((run / "metrics.json").read_text())["fit"]["fell_back"] == 0


@pytest.mark.parametrize("balanced", [False, True])
def test_abqs_file_has_one_site_more_and_its_two_bits_are_five_levels(tmp_path: Path, balanced: bool) -> None:
    """Its compensation is in no file. Its five levels have a zero point: what it calls W2*, and never is 2 bits."""
    from ptql.checkpoint import Checkpoint

    config = llama_config()
    blocks = a_file(tmp_path / "abq_parameters.pth", "llama", config, fc2=True)
    weight = ("--model.weight", "{bits: 2, balanced: true}") if balanced else ()
    options = (*weight, "--model.activation.bits", "8", "--model.transforms", FAITHFUL_PARTS)
    run = fitted(tmp_path, config, tmp_path / "abq_parameters.pth", *options, method="abq")
    packed, state = Checkpoint(run / "model"), state_of(tmp_path / "source")
    for index, block in blocks.items():
        found = packed.block(index)
        for linear, w in llama_by_hand(state, block, f"model.layers.{index}", config).items():
            clip = [block[f"{linear}.weight_quantizer.{bound}"] for bound in ("upbound_factor", "lowbound_factor")]
            expected = rounded(w, *clip, group=w.shape[1], levels=5 if balanced else 2**BITS)
            got = found.get_parameter(f"{linear}.weight").double()
            differing = ((got - expected).abs() > 1e-3 * expected.abs().max()).double().mean()
            assert differing < 0.005
    assert json.loads((run / "metrics.json").read_text())["fit"]["fell_back"] == 0


def test_opt_with_shifts_learns_on_from_the_file(tmp_path: Path) -> None:
    config = opt_config()
    blocks = a_file(tmp_path / "p.pth", "opt", config)
    run = fitted(tmp_path, config, tmp_path / "p.pth", *FAITHFUL)
    from safetensors.torch import load_file

    learned = load_file(run / "ledger/block-00000.safetensors")
    shifts = {tuple(t.flatten().tolist()) for name, t in learned.items() if name.endswith("shift")}
    assert tuple(blocks[0]["qkv_smooth_shift"].tolist()) in shifts
    assert tuple(blocks[0]["out_smooth_shift"].tolist()) in shifts
    upper = next(t for n, t in learned.items() if n.startswith("learned.quantizers") and "fc2.upper" in n)
    assert torch.equal(upper.flatten(), blocks[0]["fc2.weight_quantizer.upbound_factor"].flatten())


class Evil:
    def __reduce__(self) -> Any:
        return print, ("it ran",)


@pytest.mark.parametrize("content", ["pickle", "text", "list", "empty"])
def test_what_is_no_such_file_is_refused(tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "p.pth"
    if content == "pickle":
        path.write_bytes(pickle.dumps({0: Evil()}))
    elif content == "text":
        path.write_text("no tensors")
    else:
        torch.save([torch.zeros(3)] if content == "list" else {}, path)
    with pytest.raises(InputError, match=r"p\.pth"):
        Published.read(path)
    assert "it ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda b: b.pop(1), "blocks"),
        (lambda b: b[1].pop("fc1_smooth_scale"), "other tensors"),
        (lambda b: [x.update(more=torch.ones(2)) for x in b.values()], "no place"),
        (lambda b: [x.pop("qkv_smooth_scale") for x in b.values()], "lacks qkv_smooth_scale"),
        (lambda b: [x.update(qkv_smooth_shift=torch.ones(1)) for x in b.values()], "no place"),
    ],
)
def test_files_of_other_models_or_recipes_are_one_line(
    tmp_path: Path, change: Any, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = llama_config()
    blocks = a_file(tmp_path / "p.pth", "llama", config)
    change(blocks)
    torch.save(blocks, tmp_path / "p.pth")
    with pytest.raises(AssertionError):
        fitted(tmp_path, config, tmp_path / "p.pth", *FAITHFUL)
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("ptql: error: ")
    assert said in line
    assert not (tmp_path / "RUN").exists()


def test_scales_by_channel_need_a_faithful_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = llama_config()
    a_file(tmp_path / "p.pth", "llama", config)
    with pytest.raises(AssertionError):
        fitted(tmp_path, config, tmp_path / "p.pth", "--model.activation.bits", "8")
    assert "--model.transforms.faithful true" in capsys.readouterr().err
