"""As much of vLLM 0.33 as ptql's plug-in touches, after its source: names, signatures, shapes, sharding.

It multiplies by unpacking, where vLLM has kernels.
"""

from __future__ import annotations

import math
import sys
import types
from abc import ABC
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

REGISTERED: dict[str, type] = {}
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def register_quantization_config(name: str) -> Callable[[type], type]:
    def wrapper(config: type) -> type:
        assert issubclass(config, QuantizationConfig)
        REGISTERED[name] = config
        return config

    return wrapper


@dataclass
class WeightsMapper:
    orig_to_new_suffix: dict[str, str | None] = field(default_factory=dict)

    def __or__(self, other: WeightsMapper) -> WeightsMapper:
        return WeightsMapper({**self.orig_to_new_suffix, **other.orig_to_new_suffix})

    def map_name(self, key: str) -> str | None:
        for suffix, new in self.orig_to_new_suffix.items():
            if key.endswith(suffix):
                if new is None:
                    return None
                key = new.join(key.rsplit(suffix, 1))
        return key


class QuantizationConfig(ABC):  # noqa: B024
    def __init__(self) -> None:
        self.packed_modules_mapping: dict[str, list[str]] = {}

    @staticmethod
    def get_checkpoint_weight_mapper() -> WeightsMapper:
        return WeightsMapper({".g_idx": None})


class StandInParameter(nn.Parameter):
    """vLLM's `PackedvLLMParameter` and `GroupQuantScaleParameter` in one."""

    def __new__(cls, data: Tensor, **_: Any) -> StandInParameter:
        return super().__new__(cls, data, requires_grad=False)

    def __init__(self, data: Tensor, weight_loader: Callable, packed_dim: int = -1, factor: Fraction = Fraction(1)):
        self.weight_loader, self.packed_dim, self.factor = weight_loader, packed_dim, factor


class LinearBase(nn.Module):
    """A process's part of the matrices that are fused into one layer.

    Args:
        columns: Of the whole matrix.
        rows: Of each whole matrix.
        config: How it is quantised.
        prefix: Its name.
        rank: Of this process.
        size: How many share the layer.
        by_row: They share its columns, else the rows of each matrix.
    """

    def __init__(
        self,
        columns: int,
        rows: list[int],
        config: Any,
        prefix: str,
        dtype: torch.dtype,
        rank: int = 0,
        size: int = 1,
        by_row: bool = False,
    ) -> None:
        super().__init__()
        self.rank, self.size, self.by_row = rank, size, by_row
        self.own = [n if by_row else n // size for n in rows]
        self.quant_method = config.get_quant_method(self, prefix)
        self.quant_method.create_weights(
            layer=self,
            input_size_per_partition=columns // size if by_row else columns,
            output_partition_sizes=self.own,
            input_size=columns,
            output_size=sum(rows),
            params_dtype=dtype,
            weight_loader=self.weight_loader_v2,
        )

    def weight_loader_v2(self, param: StandInParameter, loaded: Tensor, shard: int = 0) -> None:
        if self.by_row:
            width = param.shape[1]
            loaded = loaded if loaded.shape[1] == width else loaded.narrow(1, self.rank * width, width)
            assert param.shape == loaded.shape
            param.data.copy_(loaded)
            return
        first, count = sum(self.own[:shard]), self.own[shard]
        if param.packed_dim == 0 and len(self.own) > 1:
            first, count = int(first / param.factor), int(count / param.factor)
        elif param.packed_dim == 0:
            count = param.shape[0]
        target = param.data.narrow(0, first, count)
        loaded = loaded.narrow(0, self.rank * count, count)
        assert target.shape == loaded.shape
        target.copy_(loaded)

    def forward(self, x: Tensor) -> Tensor:
        return self.quant_method.apply(self, x)


class UnquantizedLinearMethod:
    def create_weights(self, layer: LinearBase, input_size_per_partition: int, params_dtype: torch.dtype, **_: Any):
        data = torch.zeros(sum(layer.own), input_size_per_partition, dtype=params_dtype)
        layer.weight = StandInParameter(data, weight_loader=layer.weight_loader_v2)

    def apply(self, layer: LinearBase, x: Tensor) -> Tensor:
        return F.linear(x, layer.weight)


class CompressedTensorsLinearMethod:
    def __init__(self, quantization_config: Any) -> None:
        self.quantization_config = quantization_config

    def create_weights(self, layer: Any, weight_loader: Callable, **sizes: Any) -> None:
        layer.scheme.create_weights(layer=layer, weight_loader=weight_loader, **sizes)

    def apply(self, layer: Any, x: Tensor) -> Tensor:
        return layer.scheme.apply_weights(layer, x, None)


def words_to_codes(stream: Tensor, bits: int, n: int) -> Tensor:
    """Each row of int32 words as `n` codes, bit by bit."""
    wide = stream.long() & 0xFFFFFFFF
    one_by_one = (wide.unsqueeze(-1) >> torch.arange(32)) & 1
    return (one_by_one.flatten(1)[:, : n * bits].unflatten(1, (n, bits)) << torch.arange(bits)).sum(-1)


class CompressedTensorsWNA16:
    def __init__(
        self, strategy: str, num_bits: int, group_size: int | None, symmetric: bool, layer_name: str | None
    ) -> None:
        assert num_bits in range(2, 9)
        assert (strategy == "channel") == (group_size is None)
        self.num_bits, self.symmetric, self.pack_factor = num_bits, symmetric, Fraction(32, num_bits)
        self.group_size = -1 if group_size is None else group_size

    @classmethod
    def get_min_capability(cls) -> int:
        return 75

    def create_weights(
        self,
        layer: nn.Module,
        output_size: int,
        input_size: int,
        output_partition_sizes: list[int],
        input_size_per_partition: int,
        params_dtype: torch.dtype,
        weight_loader: Callable,
        **kwargs: Any,
    ) -> None:
        rows, columns, bits = sum(output_partition_sizes), input_size_per_partition, self.num_bits
        whole = self.group_size == -1
        groups = 1 if whole else columns // self.group_size
        packed = torch.empty(rows, math.ceil(columns * bits / 32), dtype=torch.int32)
        given = {"weight_loader": weight_loader}
        layer.weight_packed = StandInParameter(packed, packed_dim=1, factor=self.pack_factor, **given)
        layer.weight_scale = StandInParameter(torch.empty(rows, groups, dtype=params_dtype), **given)
        layer.weight_shape = StandInParameter(torch.empty(2, dtype=torch.int64), **given)
        if not self.symmetric:
            points = torch.zeros(math.ceil(rows * bits / 32), groups, dtype=torch.int32)
            layer.weight_zero_point = StandInParameter(points, packed_dim=0, factor=self.pack_factor, **given)
        self.shape, self.columns = (rows, columns), columns if whole else self.group_size

    def apply_weights(self, layer: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
        rows, columns = self.shape
        codes = words_to_codes(layer.weight_packed, self.num_bits, columns)
        zero: Any = 2 ** (self.num_bits - 1)
        if not self.symmetric:
            zero = words_to_codes(layer.weight_zero_point.T, self.num_bits, rows).T.repeat_interleave(self.columns, 1)
        return F.linear(x, (codes - zero) * layer.weight_scale.to(x.dtype).repeat_interleave(self.columns, 1), bias)


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the stand-in where vLLM would be imported from."""
    layers = "vllm.model_executor.layers"
    ct = f"{layers}.quantization.compressed_tensors"
    contents: dict[str, list[Any]] = {
        "vllm": [],
        "vllm.model_executor": [],
        layers: [],
        f"{layers}.linear": [LinearBase, UnquantizedLinearMethod],
        f"{layers}.quantization": [register_quantization_config],
        f"{layers}.quantization.base_config": [QuantizationConfig],
        ct: [],
        f"{ct}.compressed_tensors": [CompressedTensorsLinearMethod],
        f"{ct}.schemes": [CompressedTensorsWNA16],
        "vllm.model_executor.models": [],
        "vllm.model_executor.models.utils": [WeightsMapper],
    }
    REGISTERED.clear()
    for name, things in contents.items():
        module = types.ModuleType(name)
        for thing in things:
            setattr(module, thing.__name__, thing)
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("vllm_config", "vllm_layers"):
        monkeypatch.delitem(sys.modules, f"ptql.formats.{name}", raising=False)
