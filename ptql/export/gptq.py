"""GPTQ's format, in its two versions, and as auto-round names it: 2, 3, 4 and 8 bits."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ptql import __version__
from ptql.checkpoint import Checkpoint
from ptql.errors import InputError
from ptql.export.directory import LayerTarget
from ptql.export.layers import IntLayer
from ptql.export.refusals import (
    packed_format,
    refuse_activations,
    refuse_additions,
    refuse_kinds,
    refuse_short_groups,
    schemes,
)
from ptql.export.target import Loader
from ptql.export.words import words
from ptql.recipe import ActivationScheme, IntScheme

BITS = (2, 3, 4, 8)
WHOLE = 32  # rows and columns come in words of so many codes, whatever the bits


class Gptq(LayerTarget):
    """Version 1, without zero points: the middle code is stored less one. Scales are float16."""

    name = "gptq"
    loaders = (Loader("by_gptqmodel.py", "gptqmodel", "pip install gptqmodel", exact=False),)
    less = 1
    """What is taken off a zero point when it is stored."""

    def check(self, model: Checkpoint) -> None:
        refuse_additions(model, self.name)
        refuse_activations(model, self.name)
        refuse_kinds(model, self.name)
        refuse_short_groups(model, self.name)
        if self.dtype != torch.float16:
            raise InputError(f"dtype={self.dtype}: {self.name} has float16 scales and models; use --dtype float16")
        block = model.empty_block(0)
        for name, scheme, columns in schemes(model):
            if not scheme.quantised:
                continue
            rows = block.get_submodule(name.partition(".")[2]).out_features
            if scheme.bits not in BITS:
                raise InputError(
                    f"{self.name} has codes of {', '.join(map(str, BITS))} bits, not {scheme.bits} ({name}); fit with "
                    "such a width, or use --format compressed-tensors"
                )
            if columns % WHOLE or int(rows) % WHOLE:  # type: ignore[arg-type]
                raise InputError(
                    f"{self.name} packs {WHOLE} rows and columns at a time, and {name} is {rows} x {columns}; use "
                    "--format compressed-tensors"
                )
            if self.less and not scheme.symmetric:
                raise InputError(
                    f"{self.name} stores zero points less one, which can't say 0, and its readers refuse them "
                    f"({name} has some); use --format gptq_v2, or fit with --model.weight.symmetric true"
                )

    def layer(self, layer: IntLayer, activation: ActivationScheme) -> dict[str, Tensor]:
        bits, columns = layer.scheme.bits, layer.codes.shape[1]
        zeros = layer.zero.T.contiguous()
        return {
            "qweight": words(layer.codes, bits).T.contiguous(),
            "qzeros": words(zeros - self.less, bits),
            "scales": layer.scale.T.contiguous(),
            "g_idx": torch.arange(columns, dtype=torch.int32) // layer.columns,
        }

    def quantization(self, model: Checkpoint) -> dict[str, Any]:
        usual, others = _schemes(model)
        dynamic: dict[str, Any] = {}
        for name, scheme in others.items():
            if scheme.quantised:
                settings = {"bits": scheme.bits, "group_size": scheme.group_size, "sym": scheme.symmetric}
                dynamic[f"+:^{re.escape(name)}$"] = settings
            else:
                dynamic[f"-:^{re.escape(name)}$"] = {}
        return {
            "quant_method": "gptq",
            "bits": usual.bits,
            "group_size": usual.group_size,
            "desc_act": False,
            "sym": usual.symmetric,
            "lm_head": False,
            "checkpoint_format": self.name,
            "pack_dtype": "int32",
            "meta": {"quantizer": [f"ptql:{__version__}"]},
        } | ({"dynamic": dynamic} if dynamic else {})

    def add_files(self, model: Checkpoint, folder: Path) -> None:
        (folder / "quantize_config.json").write_text(json.dumps(self.quantization(model), indent=2) + "\n")


class GptqV2(Gptq):
    """Version 2, in which zero points are stored as they are."""

    name = "gptq_v2"
    less = 0


class AutoRound(Gptq):
    """Version 1's tensors under auto-round's name, by which vLLM and SGLang read 2 and 3 bits, too."""

    name = "auto-round"
    loaders = (Loader("by_auto_round.py", "auto_round", "pip install auto-round", exact=False),)

    def quantization(self, model: Checkpoint) -> dict[str, Any]:
        usual, others = _schemes(model)
        extra = {
            name: {"bits": scheme.bits, "group_size": scheme.group_size, "sym": scheme.symmetric, "data_type": "int"}
            if scheme.quantised
            else {"bits": 16, "data_type": "float"}
            for name, scheme in others.items()
        }
        return {
            "quant_method": "auto-round",
            "packing_format": "auto_round:auto_gptq",
            "bits": usual.bits,
            "group_size": usual.group_size,
            "sym": usual.symmetric,
            "data_type": "int",
            "block_name_to_quantize": packed_format(model).blocks,
            "autoround_version": "0.12.0",
        } | ({"extra_config": extra} if extra else {})

    def add_files(self, model: Checkpoint, folder: Path) -> None:
        return None


def _schemes(model: Checkpoint) -> tuple[IntScheme, dict[str, IntScheme]]:
    """The format of most layers, and those of others by their names in the model."""
    fmt = packed_format(model)
    found = {f"{fmt.blocks}.{name}": scheme for name, scheme, _ in schemes(model)}
    kinds = list(found.values())
    usual = max((kind for kind in kinds if kind.quantised), key=kinds.count)
    return usual, {name: scheme for name, scheme in found.items() if scheme != usual}
