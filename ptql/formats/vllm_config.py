"""What vLLM 0.33 registers for packed models; see `ptql.formats.vllm`, which imports it when vLLM asks.

It is registered in every process before a model is known, so nothing but vLLM's base class is imported with it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from ptql.formats.ptql import PackedFormat
from ptql.formats.vllm import RENAMED, scheme_of, served_format


class ServedConfig(QuantizationConfig):
    """`quantization_config` of a packed model, as vLLM wants it.

    Args:
        fmt: How the model is packed.
    """

    def __init__(self, fmt: PackedFormat) -> None:
        super().__init__()
        self.format = fmt

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ServedConfig:
        return cls(served_format(config))

    def get_name(self) -> str:
        return "ptql"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 75  # of `CompressedTensorsWNA16`

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []  # all is in config.json

    @staticmethod
    def get_checkpoint_weight_mapper() -> Any:
        from vllm.model_executor.models.utils import WeightsMapper

        return QuantizationConfig.get_checkpoint_weight_mapper() | WeightsMapper(orig_to_new_suffix=RENAMED)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
        from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
            CompressedTensorsLinearMethod,
        )

        from ptql.formats.vllm_layers import Served

        if not isinstance(layer, LinearBase):
            return None
        scheme = scheme_of(self.format, prefix, self.packed_modules_mapping)
        if scheme is None:
            return UnquantizedLinearMethod()
        layer.scheme = Served(scheme, prefix)
        # vLLM tells how to load a layer's tensors by the name of this class, so it is the class itself.
        return CompressedTensorsLinearMethod(self)
