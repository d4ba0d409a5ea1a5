"""compressed-tensors, which vLLM, SGLang and transformers read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ptql.checkpoint import Checkpoint
from ptql.errors import InputError
from ptql.export.directory import LayerTarget
from ptql.export.layers import IntLayer
from ptql.export.refusals import (
    packed_format,
    refuse_additions,
    refuse_attention,
    refuse_inexact_scales,
    refuse_kinds,
    refuse_short_groups,
    schemes,
)
from ptql.export.target import Loader
from ptql.export.words import words
from ptql.formats.ptql import PackedFormat
from ptql.recipe import ActivationScheme, IntScheme

VERSION = "0.18.0"
"""Of the package that first packs codes densely, as here."""
PACKED, BYTES = "pack-quantized", "int-quantized"


class CompressedTensors(LayerTarget):
    """Packed codes of 2 to 8 bits; a byte for each weight where weights and activations have 8, as int8 kernels want.

    Zero points make the package's own loader fail (in 0.18.0 to 0.20.0) unless it multiplies the weights out, so the
    configuration asks for that; the products are rounded to the scales' dtype then. vLLM has a reader of its own.
    """

    name = "compressed-tensors"
    loaders = (Loader("by_transformers.py", "compressed_tensors", "pip install 'ptql[export]'"),)

    @classmethod
    def usual_dtype(cls, model: Checkpoint) -> torch.dtype:
        """bfloat16 where the scales were made for it, else float16, which has all their digits."""
        if model.packed is None:
            return torch.float16
        made_for_it = all(scheme.scale_dtype == "bfloat16" for _, scheme, _ in schemes(model) if scheme.quantised)
        if not made_for_it and model.layout.offset_norms:
            raise InputError(
                f"dtype=auto: {model.family.name} computes with numbers beyond float16, and the scales are not made "
                "for bfloat16; fit with --model.weight.scale_dtype bfloat16, or say --dtype float16"
            )
        return torch.bfloat16 if made_for_it else torch.float16

    def check(self, model: Checkpoint) -> None:
        fmt = packed_format(model)
        refuse_additions(model, self.name)
        refuse_attention(model, self.name)
        refuse_kinds(model, self.name)
        refuse_short_groups(model, self.name)
        refuse_inexact_scales(model, self.name, self.dtype)
        if self.dtype not in (torch.float16, torch.bfloat16):
            raise InputError(f"dtype={self.dtype}: {self.name} is served in float16 or bfloat16; use one of them")
        self.exact = all(scheme.symmetric for _, scheme, _ in schemes(model) if scheme.quantised)  # see the class
        for name, scheme, _ in schemes(model):
            if scheme.bits == 1:
                raise InputError(
                    f"{self.name}: no runtime reads codes of 1 bit ({name}); fit with 2 bits or more, or use "
                    "--format dense"
                )
            if scheme.quantised and fmt.activation.quantised:
                _check_products(name, scheme, fmt.activation)
        _check_merged(model, fmt)

    def check_readable(self, model: Checkpoint) -> None:
        kinds = {scheme for _, scheme, _ in schemes(model) if scheme.quantised}
        if len(kinds) > 1 and not all(scheme.symmetric for scheme in kinds):
            raise InputError(
                "check=true: transformers reads zero points of one format in a model only, and layers have several; "
                "fit with --model.weight.symmetric true, or write it unchecked, for other runtimes, with --check false"
            )

    def quantization(self, model: Checkpoint) -> dict[str, Any]:
        fmt = packed_format(model)
        members: dict[IntScheme, list[str]] = {}
        plain = ["lm_head"]
        for name, scheme, _ in schemes(model):
            full = f"{fmt.blocks}.{name}"
            if scheme.quantised:
                members.setdefault(scheme, []).append(full)
            else:
                plain.append(full)
        groups = {
            f"group_{k}": self._group(scheme, fmt.activation, ["Linear"] if len(members) == 1 else names)
            for k, (scheme, names) in enumerate(members.items())
        }
        formats = {group["format"] for group in groups.values()}
        config = {
            "quant_method": self.name,
            "version": VERSION,
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": plain,
            "kv_cache_scheme": None,
        }
        return config | ({} if all(scheme.symmetric for scheme in members) else {"dequantize": True})

    def _group(self, scheme: IntScheme, activation: ActivationScheme, targets: list[str]) -> dict[str, Any]:
        whole_row = scheme.group_size == -1
        return {
            "targets": targets,
            "format": BYTES if _in_bytes(scheme, activation) else PACKED,
            "weights": {
                "num_bits": scheme.bits,
                "type": "int",
                "symmetric": scheme.symmetric,
                "strategy": "channel" if whole_row else "group",
                "group_size": None if whole_row else scheme.group_size,
                "dynamic": False,
            },
            "input_activations": {
                "num_bits": activation.bits,
                "type": "int",
                "symmetric": activation.symmetric,
                "strategy": "token",
                "dynamic": True,
            }
            if activation.quantised
            else None,
            "output_activations": None,
        }

    def layer(self, layer: IntLayer, activation: ActivationScheme) -> dict[str, Tensor]:
        scheme = layer.scheme
        scale = {"weight_scale": layer.scale.to(self.dtype)}
        if _in_bytes(scheme, activation):
            return {"weight": (layer.codes.to(torch.int16) - 128).to(torch.int8), **scale}
        stored = {
            "weight_packed": words(layer.codes, scheme.bits),
            **scale,
            "weight_shape": torch.tensor(layer.codes.shape, dtype=torch.int64),
        }
        if not scheme.symmetric:
            stored["weight_zero_point"] = words(layer.zero.T.contiguous(), scheme.bits).T.contiguous()
        return stored


def _in_bytes(scheme: IntScheme, activation: ActivationScheme) -> bool:
    """Whether int8 kernels multiply it."""
    return scheme.bits == 8 and activation.bits == 8 and scheme.group_size == -1


def _check_products(name: str, scheme: IntScheme, activation: ActivationScheme) -> None:
    """Raise `InputError` unless runtimes multiply such weights and activations."""
    served = "--model.weight.symmetric true --model.activation.symmetric true, or -c presets/served"
    if activation.bits not in (4, 8):
        raise InputError(
            f"compressed-tensors: runtimes multiply with activations of 4 or 8 bits, not {activation.bits}; fit with "
            "--model.activation.bits 8"
        )
    if not scheme.symmetric:
        raise InputError(
            f"compressed-tensors: weights beside rounded activations have no zero point in runtimes ({name} has); fit "
            f"with {served}"
        )
    if not activation.symmetric and not _in_bytes(scheme, activation):
        raise InputError(
            f"compressed-tensors: rounded activations have no zero point in runtimes, but for W8A8; fit with {served}"
        )


def _check_merged(model: Checkpoint, fmt: PackedFormat) -> None:
    """Raise `InputError` unless layers that read the same input have the same format: runtimes make one of them."""
    for index in range(model.num_blocks):
        for group in model.layout.linears:
            if len({fmt.schemes.of(index, name) for name in group}) > 1:
                raise InputError(
                    f"compressed-tensors: {', '.join(group)} are one layer in runtimes, and have several formats in "
                    f"block {index}; let --model.layers name them together"
                )
