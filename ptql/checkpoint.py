"""A Hugging Face model directory, read one transformer block at a time; the whole model is never built."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from ptql.errors import InputError
from ptql.families import family_for
from ptql.formats.ptql import QUANT_METHOD, PackedFormat, prepare_block, unpack_block
from ptql.nn import attention
from ptql.shell import Shell

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
BITS = {
    "F64": 64,
    "F32": 32,
    "F16": 16,
    "BF16": 16,
    "I64": 64,
    "I32": 32,
    "I16": 16,
    "I8": 8,
    "U8": 8,
    "BOOL": 8,
}
SAMPLES = 64  # places of 64 KiB that stand for a whole weight file in its fingerprint


class Checkpoint:
    """The configuration, the block layout and the tensors of a model directory.

    Args:
        directory: Holds config.json and safetensors files, full precision or packed by ptql.

    Raises:
        InputError: No such directory, not a model, unknown family, weights that aren't safetensors, or a model
            that another tool has quantised.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        settings = _read_config(self.directory)
        self.family = family_for(settings)
        self.packed = _packed_format(self.directory, settings)
        self.config = _config(self.directory)
        self.layout = self.family.layout(self.config)
        self.files = _tensor_files(self.directory)

    @property
    def num_blocks(self) -> int:
        return self.config.num_hidden_layers

    @property
    def context(self) -> int:
        """The longest window, in tokens, that the model was made for."""
        return self.config.max_position_embeddings

    @cached_property
    def _skeleton(self) -> PreTrainedModel:
        """The causal language model with every parameter on the meta device, buffers (RoPE's) real."""
        attention.register()
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(
                self.config, dtype=torch.float32, attn_implementation=attention.NAME
            )
        return model.eval().requires_grad_(False)

    def block(self, index: int, device: torch.device | str = "cpu") -> nn.Module:
        """Block `index` in float32 on `device`, its linear layers dense; packed ones are unpacked there."""
        return self.build_block(index, self.read_block(index), device)

    def block_names(self, index: int) -> list[str]:
        """Names of block `index`'s tensors in the model."""
        prefix = f"{self.family.blocks}.{index}."
        return [prefix + name for name in self.empty_block(index).state_dict()]

    def read_block(self, index: int) -> dict[str, Tensor]:
        """The tensors of block `index` as stored, by name in the model."""
        return dict(self.read(self.block_names(index)))

    def build_block(self, index: int, tensors: dict[str, Tensor], device: torch.device | str = "cpu") -> nn.Module:
        """Block `index` of the tensors that `read_block` gave; takes them out of `tensors`, one by one."""
        block = self.empty_block(index)
        prefix = f"{self.family.blocks}.{index}."
        loaded = {}
        while tensors:  # a block's tensors are not there twice
            name, tensor = tensors.popitem()
            loaded[name.removeprefix(prefix)] = _widen(tensor.to(device, non_blocking=True))
        self._assign(block, loaded)
        if self.packed is not None:
            unpack_block(block)
        return block.to(device).eval().requires_grad_(False)

    def empty_block(self, index: int) -> nn.Module:
        """Block `index` as its tensors are stored, parameters on the meta device."""
        block = copy.deepcopy(self._skeleton.get_submodule(f"{self.family.blocks}.{index}"))
        if self.packed is not None:
            prepare_block(block, self.packed, index)
        return block

    def check_blocks(self) -> None:
        """Raise `InputError` if a tensor of a block is missing: better now than when its turn comes."""
        for index in range(0 if self.packed else self.num_blocks):
            path = f"{self.family.blocks}.{index}"
            for name in self._skeleton.get_submodule(path).state_dict():
                self._must_have(f"{path}.{name}")

    def shell(self) -> Shell:
        """Everything but the blocks, in float32 on the CPU: embeddings, final norm, head."""
        outside = copy.deepcopy(_without_blocks(self._skeleton, self.family.blocks))
        names = [name for name, _ in outside.named_parameters()]
        tied = getattr(self.config, "tie_word_embeddings", False)
        head = "lm_head.weight"
        if tied and head in names and not self._stored(head):
            names.remove(head)
        loaded = {name: _widen(tensor) for name, tensor in self.read(names)}
        self._assign(outside, loaded, strict=False)
        if head not in loaded:
            outside.get_submodule("lm_head").weight = outside.get_input_embeddings().weight  # type: ignore[operator]
        blocks = self._skeleton.get_submodule(self.family.blocks)
        return Shell(outside.requires_grad_(False), self.family.blocks, list(blocks.children()))

    def _assign(self, module: nn.Module, tensors: dict[str, Tensor], strict: bool = True) -> None:
        try:
            module.load_state_dict(tensors, assign=True, strict=strict)
        except RuntimeError as error:
            detail = " ".join(str(error).split())
            raise InputError(f"{self.directory}: config.json and the weights do not fit together: {detail}") from None

    def outside_names(self) -> list[str]:
        """Names, as stored, of every tensor that belongs to no block."""
        blocks = (self.family.blocks + ".", self.family.blocks.removeprefix("model.") + ".")
        return [name for name in self.files if not name.startswith(blocks)]

    def _stored(self, name: str) -> str | None:
        """The name under which a tensor is stored: some OPT files leave the `model.` out."""
        short = name.removeprefix("model.")
        return name if name in self.files else short if short in self.files else None

    def _must_have(self, name: str) -> str:
        if (stored := self._stored(name)) is None:
            raise InputError(f"{self.directory}: tensor {name} is missing; the model directory is incomplete")
        return stored

    def read(self, names: list[str]) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor, as stored, one after the other; the pages of the files are let go at the end."""
        by_file: dict[Path, list[tuple[str, str]]] = {}
        for name in names:
            stored = self._must_have(name)
            by_file.setdefault(self.files[stored], []).append((name, stored))
        for file, pairs in by_file.items():
            try:
                with safe_open(file, "pt") as tensors:
                    for name, stored in pairs:
                        yield name, tensors.get_tensor(stored).clone()
            except SafetensorError as error:
                raise InputError(f"{file}: damaged ({error}); fetch the model again") from None

    def stored_bytes(self, names: list[str]) -> int:
        """What these tensors take on the disk; only the files' headers are read."""
        total = 0
        for file in sorted({self.files[name] for name in names}):
            with safe_open(file, "pt") as tensors:
                for name in names:
                    if self.files[name] == file:
                        part = tensors.get_slice(name)
                        total += math.prod(part.get_shape()) * BITS[part.get_dtype()] // 8
        return total

    @cached_property
    def parameters(self) -> int:
        """Parameters of the full-precision model; a head that is tied to the embeddings is not counted twice."""
        tied = getattr(self.config, "tie_word_embeddings", False)
        named = self._skeleton.named_parameters()
        return sum(parameter.numel() for name, parameter in named if not (tied and name == "lm_head.weight"))

    def dtype(self) -> torch.dtype:
        """The dtype in which the first block's first matrix is stored."""
        name = self._stored(f"{self.family.blocks}.0.{self.layout.names[0]}.weight")
        with safe_open(self.files[name or ""], "pt") as tensors:
            return tensors.get_slice(name)[:1].dtype

    def fingerprint(self) -> str:
        """A hash of config.json and of samples of every weight file: the same model, the same string."""
        digest = hashlib.sha256((self.directory / "config.json").read_bytes())
        for file in sorted(set(self.files.values())):
            size = file.stat().st_size
            digest.update(f"{file.name} {size}".encode())
            with open(file, "rb") as stream:
                for k in range(SAMPLES):
                    stream.seek(size * k // SAMPLES)
                    digest.update(stream.read(1 << 16))
        return digest.hexdigest()


def _widen(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _without_blocks(model: nn.Module, path: str) -> nn.Module:
    """A view of `model` whose list of blocks is empty; the original keeps its own."""
    parent, _, name = path.partition(".")
    view = copy.copy(model)
    view._modules = dict(model._modules)
    child = view._modules[parent]
    assert child is not None
    view._modules[parent] = _without_blocks(child, name) if name else nn.ModuleList()
    return view


def _read_config(directory: Path) -> dict:
    if not directory.is_dir():
        raise InputError(f"{directory}: no such model directory; give one that holds config.json and *.safetensors")
    try:
        return dict(json.loads((directory / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{directory}: config.json can't be read ({error}); give a Hugging Face directory") from None


def _config(directory: Path) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(directory, local_files_only=True)
    except (ValueError, TypeError, KeyError, StrictDataclassError) as error:  # its values are checked in many ways
        detail = " ".join(str(error).split())
        raise InputError(f"{directory}: transformers does not take its config.json ({detail}); restore it") from None


# Beside config.json, from before there was `quantization_config` in it or instead of it: AutoGPTQ, AutoAWQ, ModelOpt.
QUANTISED_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}


def _packed_format(directory: Path, settings: dict) -> PackedFormat | None:
    """How ptql packed the model; None if it is in full precision, `InputError` if another tool quantised it."""
    # compressed-tensors called it `compression_config` once
    quantization = settings.get("quantization_config", settings.get("compression_config"))
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        if method == QUANT_METHOD:
            return PackedFormat.from_dict(quantization)
        if method is None and {"load_in_4bit", "load_in_8bit"} & set(quantization):  # its early form
            method = "bitsandbytes"
        raise InputError(f"{directory}: quantised by {method!r} already; give the original model")
    for name, method in QUANTISED_FILES.items():
        if (directory / name).is_file():
            raise InputError(f"{directory}: quantised by {method!r} already, as {name} says; give the original model")
    return None


def _tensor_files(directory: Path) -> dict[str, Path]:
    if (directory / INDEX).is_file():
        try:
            names = json.loads((directory / INDEX).read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, LookupError, TypeError) as error:
            raise InputError(f"{directory / INDEX}: damaged ({error!r}); fetch the model again") from None
        files = {name: directory / file for name, file in names.items()}
    elif (directory / SINGLE).is_file():
        try:
            with safe_open(directory / SINGLE, "pt") as tensors:
                files = dict.fromkeys(tensors.keys(), directory / SINGLE)
        except SafetensorError as error:
            raise InputError(f"{directory / SINGLE}: damaged ({error}); fetch the model again") from None
    else:
        raise InputError(
            f"{directory}: no {SINGLE}; only safetensors are read (pickled .bin files can run code): convert first"
        )
    for file in set(files.values()):
        if not file.is_file():
            raise InputError(f"{file}: named by the index but missing; the model directory is incomplete")
    return files


def is_hub_id(source: str | Path) -> bool:
    """Whether `source` is the name of a model on the hub (`owner/name`), not a directory here."""
    named = str(source)
    return named.count("/") == 1 and not named.startswith((".", "/", "~")) and not Path(source).exists()


def resolve(source: str | Path) -> Path:
    """The directory of `source`: itself, or a hub id (`owner/name`), downloaded once into the hub's cache.

    Raises:
        InputError: Neither a directory nor a hub id that can be had.
    """
    if not is_hub_id(source):
        return Path(source)
    from huggingface_hub import snapshot_download

    wanted = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
    try:
        return Path(snapshot_download(str(source), allow_patterns=wanted))
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{source}: no such directory, and the hub did not give it ({reason}); give a model directory"
        ) from None
