"""Tiny runs and their exports through the command line; how another runtime, and a plain model, see them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from ptql.checkpoint import Checkpoint
from ptql.cli import main
from ptql.export import command
from tests.models import VOCABULARY, llama_config
from tests.words import save_source, save_text

WHOLE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96}
"""Rows and columns that GPTQ packs: multiples of 32."""
IDS = torch.arange(40).view(2, 20) * 7 % (VOCABULARY - 3) + 3
CPU = ("--trainer.accelerator", "cpu")
SMALL = ("--data.samples", "2", "--data.length", "16", "--data.batch_size", "2", "--trainer.logger", "false", *CPU)
RTN = ("-c", "methods/rtn")
SERVED = ("-c", "presets/served")


def save_exact_source(folder: Path, config: PretrainedConfig | None = None) -> Path:
    """A model of numbers that float16 and bfloat16 both hold, and a text beside it: exports lose nothing of them."""
    source = save_source(folder / "source", config or llama_config(**WHOLE))
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(64).round_().clamp_(-255, 255).div_(64)
    model.save_pretrained(source)
    file = source / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "bos_token": "w62"}))  # Gemma's windows begin with it
    save_text(folder / "words.txt")
    return source


def fit(folder: Path, name: str, *options: str) -> Path:
    """A finished run of the model in `folder`."""
    run = folder / name
    places = ("--model.source", str(folder / "source"), "--data.text", str(folder / "words.txt"))
    assert main(["fit", *options, *SMALL, *places, "--trainer.default_root_dir", str(run)]) == 0
    return run


def weights(bits: int, symmetric: bool = False, group_size: int = -1) -> list[str]:
    """Options of a format of weights."""
    given = {"bits": bits, "symmetric": str(symmetric).lower(), "group_size": group_size}
    return [word for key, value in given.items() for word in (f"--model.weight.{key}", str(value))]


def export(run: Path, out: Path, *options: str) -> int:
    """The exit code."""
    return main(["export", "--run", str(run), "--out", str(out), *CPU, *options])


def exported(run: Path, out: Path, target: str = "compressed-tensors", dtype: str = "auto") -> Path:
    """An export that was not read back; not by the command line, which takes longer to read than this to write."""
    return command.export(str(run), None, target, str(out), dtype, None, torch.device("cpu"))


def loaded(folder: Path) -> PreTrainedModel:
    """By transformers, in float32, every tensor used and none made up."""
    found: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    model, said = found
    assert not any(said[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), said
    assert not any("ptql" in type(module).__module__ for module in model.modules())
    return model.eval()


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(IDS).logits


@torch.no_grad()
def plain_model(run: Path, multiplied_in: torch.dtype = torch.float32) -> PreTrainedModel:
    """The source's class with our dense weights in the place of its own, in float32; rounded before."""
    checkpoint = Checkpoint(run / "model")
    model = AutoModelForCausalLM.from_pretrained(run.parent / "source", dtype=torch.float32)
    for index, block in enumerate(model.get_submodule(checkpoint.family.blocks)):
        block.load_state_dict({k: t.to(multiplied_in).float() for k, t in checkpoint.block(index).state_dict().items()})
    return model.eval()


def tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a directory, by name."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def settings(folder: Path) -> dict[str, Any]:
    """`quantization_config`."""
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def left(folder: Path) -> set[str]:
    """Names of everything that lies in a directory."""
    return {path.name for path in folder.iterdir()}
