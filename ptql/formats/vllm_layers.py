"""The layer by which vLLM 0.33 multiplies packed weights; see `ptql.formats.vllm`.

Nothing is computed here: vLLM's own `CompressedTensorsWNA16` makes the parameters, chooses the kernel and multiplies.
What is added is how a stored tensor becomes one of its parameters, on the way in.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import CompressedTensorsWNA16

from ptql.formats.vllm import Part, check_part, served_codes, served_scale, served_zero
from ptql.recipe import IntScheme


class Served(CompressedTensorsWNA16):
    """vLLM's layer of packed integers, loaded from ptql's tensors.

    Args:
        scheme: Format of the weight.
        name: What vLLM calls the layer.
    """

    def __init__(self, scheme: IntScheme, name: str) -> None:
        whole_row = scheme.group_size == -1
        super().__init__(
            strategy="channel" if whole_row else "group",
            num_bits=scheme.bits,
            group_size=None if whole_row else scheme.group_size,
            symmetric=scheme.symmetric,
            layer_name=name,
        )
        self.stored, self.name = scheme, name

    def create_weights(
        self,
        layer: nn.Module,
        output_size: int,
        input_size: int,
        output_partition_sizes: list[int],
        input_size_per_partition: int,
        params_dtype: torch.dtype,
        weight_loader: Callable[..., Any],
        **kwargs: Any,
    ) -> None:
        rows = tuple(output_partition_sizes)
        own = Part(self.name, input_size, input_size_per_partition, output_size, rows, params_dtype)
        check_part(own, self.stored)
        super().create_weights(
            layer=layer,
            output_size=output_size,
            input_size=input_size,
            output_partition_sizes=output_partition_sizes,
            input_size_per_partition=input_size_per_partition,
            params_dtype=params_dtype,
            weight_loader=weight_loader,
            **kwargs,
        )
        # Nothing reads it, ptql does not store it, and vLLM wants every parameter from the files.
        del layer.weight_shape
        zero = partial(served_zero, bits=self.stored.bits, groups=self.stored.groups(input_size))
        served = {"weight_packed": served_codes, "weight_scale": served_scale, "weight_zero_point": zero}
        for name, convert in served.items():
            if (parameter := getattr(layer, name, None)) is not None:
                parameter.weight_loader = _converting(parameter.weight_loader, convert)


def _converting(weight_loader: Callable[..., Any], convert: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """A loader that is given a stored tensor."""

    def load(parameter: nn.Parameter, stored: Tensor, *args: Any, **kwargs: Any) -> Any:
        return weight_loader(parameter, convert(stored), *args, **kwargs)

    return load
