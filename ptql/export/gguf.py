"""GGUF, the format of llama.cpp and of what is built on it: one file with weights, settings and tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Ggml
from torch import Tensor

from ptql.calibration.tokens import load_tokenizer
from ptql.checkpoint import Checkpoint
from ptql.errors import InputError
from ptql.export.ggml_types import BlockType, block_type, nearest
from ptql.export.gguf_architectures import (
    architecture_of,
    interleaving,
    reorder,
    rope_divisors,
    rope_parameters,
)
from ptql.export.gguf_fields import add_general, add_hyperparameters
from ptql.export.gguf_tokenizer import Vocabulary, vocabulary
from ptql.export.layers import IntLayer, block_parts
from ptql.export.refusals import packed_format, refuse_activations, refuse_clusters, refuse_factors, schemes
from ptql.export.target import Loader, Target
from ptql.nn.packed_linear import LARGEST_HALF

FILE = "model.gguf"
FLOATS = {torch.float32: Ggml.F32, torch.float16: Ggml.F16, torch.bfloat16: Ggml.BF16}


class Gguf(Target):
    """One file `model.gguf`. Each matrix has a type of blocks of its own; norms and biases are float32.

    Args:
        dtype: Of embeddings, the head and matrices that are not quantised. Scales are float16 whatever it is.
        widen: Formats for which there is no type of blocks are stored with wider codes: as exact, but larger.
    """

    name = "gguf"
    loaders = (
        Loader("by_llama_cpp.py", "llama_cpp", "pip install llama-cpp-python", exact=False),
        Loader("by_gguf.py", "gguf", "pip install gguf"),
    )

    def __init__(self, dtype: torch.dtype = torch.float16, widen: bool = False) -> None:
        super().__init__(dtype)
        self.widen = widen
        self._vocabulary: Vocabulary | None = None
        """From `check`, as SentencePiece's scores take a while."""

    def check(self, model: Checkpoint) -> None:
        refuse_activations(model, self.name)
        fmt = packed_format(model)
        if fmt.shifted_norms:
            raise InputError(
                f"gguf has no place for the biases that learned shifts give to {', '.join(fmt.shifted_norms)}; fit "
                "with --model.transforms.shift biased"
            )
        refuse_factors(model, self.name)
        refuse_clusters(model, self.name)
        architecture_of(model)
        rope_parameters(model.config)
        for name, scheme, columns in schemes(model):
            if scheme.quantised and block_type(scheme, columns, self.widen) is None:
                raise InputError(f"gguf has no type of blocks for {name}: {nearest(scheme, columns, self.widen)}")
        self._vocabulary = vocabulary(load_tokenizer(model.directory), model.config.vocab_size)
        self._check_minima(model)

    def _check_minima(self, model: Checkpoint) -> None:
        """Minima are float16, too, and scales reach 10000. Where there are any, logits are a little off."""
        for name, scheme, columns in schemes(model):
            kind = block_type(scheme, columns, self.widen)
            if kind is not None and kind.has_minimum:
                self.exact = False
                ((_, stored),) = model.read([f"{model.family.blocks}.{name}.scale"])
                largest = stored.view(torch.float16).max().item() * (scheme.levels - 1)
                if largest > LARGEST_HALF:
                    raise InputError(
                        f"{kind.ggml.name} blocks have a float16 minimum, and {name} has weights of {largest:.3g}; fit "
                        "with --model.weight.symmetric true"
                    )

    def write(self, model: Checkpoint, folder: Path) -> None:
        architecture = architecture_of(model)
        names = gguf.get_tensor_name_map(architecture.arch, model.num_blocks)
        writer = gguf.GGUFWriter(folder / FILE, architecture.name)
        plans = [self._block(model, index) for index in range(model.num_blocks)]
        add_general(writer, model, [kind.ggml for plan in plans for _, kind in plan.values() if kind is not None])
        add_hyperparameters(writer, model)
        assert self._vocabulary is not None, "checked first"
        self._vocabulary.add_to(writer)

        # names, shapes and types of all tensors come first, then their bytes, in the same order
        outside, divisors = _outside(model), rope_divisors(model)
        for name, shape in outside.items():
            self._announce(writer, _place(names, name), shape)
        if divisors is not None:
            self._announce(writer, "rope_freqs.weight", divisors.shape)
        for index, plan in enumerate(plans):
            for name, (shape, kind) in plan.items():
                self._announce(writer, _place(names, f"model.layers.{index}.{name}"), shape, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name in outside:
            ((_, tensor),) = model.read([name])
            writer.write_tensor_data(self._floats(name, tensor))
        if divisors is not None:
            writer.write_tensor_data(divisors.numpy())
        for index, plan in enumerate(plans):
            parts = dict(block_parts(model, index))
            for name, (_, kind) in plan.items():
                part = parts.pop(name)
                if architecture.interleaved and name.startswith(("self_attn.q_proj", "self_attn.k_proj")):
                    part = reorder(part, interleaving(plan[name][0][0], model.layout.attention.head_dim))
                data = kind.rows(part) if kind is not None else self._floats(name, part)
                writer.write_tensor_data(data)
        writer.close()

    def _block(self, model: Checkpoint, index: int) -> dict[str, tuple[Sequence[int], BlockType | None]]:
        """Shape and type of each part of a block, by name as in `block_parts`; no type for floats."""
        fmt, empty = packed_format(model), model.empty_block(index)
        plan: dict[str, tuple[Sequence[int], BlockType | None]] = {}
        packed: set[str] = set()
        for name in fmt.linears:
            scheme, linear = fmt.schemes.of(index, name), empty.get_submodule(name)
            if scheme.quantised:
                rows, columns = linear.out_features, linear.in_features
                assert isinstance(rows, int)
                assert isinstance(columns, int)
                plan[name] = (rows, columns), block_type(scheme, columns, self.widen)
                packed |= {f"{name}.{key}" for key in ("codes", "scale", "zero")}
        for name, tensor in empty.state_dict().items():
            if name not in packed:
                plan[name] = tensor.shape, None
        return plan

    def _announce(
        self, writer: gguf.GGUFWriter, name: str, shape: Sequence[int], kind: BlockType | None = None
    ) -> None:
        ggml = kind.ggml if kind is not None else Ggml.F32 if len(shape) == 1 else FLOATS[self.dtype]
        size = int(np.prod(gguf.quant_shape_to_byte_shape(shape, ggml)))
        writer.add_tensor_info(name, shape, np.dtype(np.float32), size, raw_dtype=ggml)

    def _floats(self, name: str, tensor: Tensor | IntLayer) -> np.ndarray:
        """A vector in float32, a matrix in `dtype`."""
        assert isinstance(tensor, Tensor)
        if tensor.ndim == 1:
            return tensor.float().numpy()
        narrow = tensor.to(self.dtype)
        if not narrow.isfinite().all():
            raise InputError(f"dtype={self.dtype}: {name} has values beyond it; use --dtype bfloat16")
        return narrow.view(torch.int16).numpy() if self.dtype == torch.bfloat16 else narrow.numpy()


def _outside(model: Checkpoint) -> dict[str, Sequence[int]]:
    """Names and shapes of the tensors around the blocks; a tied head is left out."""
    width, words = model.config.hidden_size, model.config.vocab_size
    shapes: dict[str, Sequence[int]] = {}
    for name in model.outside_names():
        if not (name == "lm_head.weight" and model.config.tie_word_embeddings):
            shapes[name] = (width,) if name.endswith("norm.weight") else (words, width)
    return shapes


def _place(names: gguf.TensorNameMap, name: str) -> str:
    """The name in the file of a tensor, or of a quantised layer's weight."""
    found = names.get_name(name, try_suffixes=(".weight", ".bias")) or names.get_name(name)
    assert found is not None, name
    return found if found.endswith((".weight", ".bias")) else f"{found}.weight"
