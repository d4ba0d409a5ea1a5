"""Makes `AutoModelForCausalLM.from_pretrained` load packed models: transformers' quantizer "ptql".

`import ptql` calls `register`, so this file imports no more of transformers than the registry; what is needed
to load a model is imported when one is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from ptql.families import BlockLayout

NAME = "ptql"


class PtqlConfig(QuantizationConfigMixin):
    """`PackedFormat` as transformers wants it; its keyword arguments are the keys of `quantization_config`.

    Raises:
        InputError: They don't make a format, see `PackedFormat.from_dict`.
    """

    def __init__(self, **stored: Any) -> None:
        from ptql.formats.ptql import PackedFormat

        self.quant_method = NAME  # pyright: ignore[reportAttributeAccessIssue]
        self.format = PackedFormat.from_dict(stored)

    def to_dict(self) -> dict[str, Any]:
        return self.format.to_dict()

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from self.to_dict().items()


class PtqlQuantizer(HfQuantizer):
    """Prepares the blocks of a model, still on the meta device, for packed tensors.

    Where queries, keys and values are rounded, the model's attention becomes "ptql", whatever was asked for:
    another one would leave the rounding out. So it does where SDPA would leave a cap on the scores out.
    """

    requires_calibration = True  # a full-precision model becomes a packed one by `ptql fit` only
    quantization_config: PtqlConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        from ptql.families import FAMILIES
        from ptql.formats.ptql import prepare_block
        from ptql.nn import attention

        fmt = self.quantization_config.format
        # Relative to the base model, so that `AutoModel`, which has no head around it, loads as well.
        blocks = model.base_model.get_submodule(fmt.blocks.removeprefix(model.base_model_prefix + "."))
        for index, block in enumerate(blocks.children()):
            prepare_block(block, fmt, index)
        if (family := FAMILIES.get(model.config.model_type)) is not None:
            _keep_offset_norms(model, family.layout(model.config))
        if fmt.rounds_attention or _loses_caps(model):
            attention.register()
            model.set_attn_implementation(attention.NAME)

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """`model.dequantize()`: the architecture's own model on unpacked weights, to merge with LoRA or to save.

        Raises:
            InputError: The model has what its architecture has no place for.
        """
        from torch import nn

        from ptql.errors import InputError
        from ptql.nn.packed_linear import Packed

        fmt = self.quantization_config.format
        rounded = fmt.activation.quantised or fmt.rounds_attention or fmt.static is not None
        if rounded or fmt.shifted_norms or fmt.added_biases or fmt.gathered_norms:
            raise InputError(
                "dequantize: rounded activations, biases of learned shifts and norms that reorder channels have no "
                "place in the model's own architecture; keep it packed, or unpack it in place: "
                "`ptql.formats.ptql.unpack_block(model)`"
            )
        for name, layer in list(model.named_modules()):
            if isinstance(layer, Packed):
                dense = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, "meta")
                dense.weight = nn.Parameter(layer.dense_weight().to(dtype))
                dense.bias = layer.bias
                model.set_submodule(name, dense)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """What stands beside the packed layers, LoRA say, can learn: gradients pass through them, and through rounding
        as through the identity. The codes have none."""
        return True


def _loses_caps(model: PreTrainedModel) -> bool:
    """Whether the model caps its attention scores and is about to run with SDPA, which ignores that.

    Earlier versions of transformers take SDPA for Gemma 2 by themselves, later ones refuse it.
    """
    capped = getattr(model.config, "attn_logit_softcapping", None) is not None
    return capped and model.config._attn_implementation == "sdpa"


def _keep_offset_norms(model: PreTrainedModel, layout: BlockLayout) -> None:
    """Load the weights of norms that multiply by 1 + weight in float32, whatever the dtype of the model.

    A large smoothing scale makes 1 + weight small: with weight close to -1, bfloat16 would leave it no digits.
    Such norms compute in float32 by themselves, and give their input's dtype back.
    """
    names = [f"{norm}{inner}.weight" for norm in layout.offset_norms for inner in ("", ".norm")]
    kept = set(model._keep_in_fp32_modules_strict or ()) | set(names)
    model._keep_in_fp32_modules_strict = kept


def register() -> None:
    """Make `quant_method: ptql` known to transformers. Calling it again is harmless."""
    if NAME not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(NAME)(PtqlConfig)
    if NAME not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(NAME)(PtqlQuantizer)
