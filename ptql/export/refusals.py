"""What other formats have no place for, told before anything is written."""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd

import torch

from ptql.checkpoint import Checkpoint
from ptql.errors import InputError
from ptql.formats.ptql import PackedFormat
from ptql.recipe import UNQUANTISED, IntScheme


def packed_format(model: Checkpoint | PackedFormat) -> PackedFormat:
    """How the model is packed; `InputError` if it isn't."""
    if isinstance(model, PackedFormat):
        return model
    if model.packed is None:
        raise InputError(
            f"{model.directory}: in full precision, so nothing is there to export; give a run of `ptql fit`"
        )
    if not model.packed.schemes.any_quantised:
        raise InputError(f"{model.directory}: weights of 16 bits, so there is nothing to export; fit with fewer")
    return model.packed


def kinds(model: Checkpoint | PackedFormat) -> Iterator[tuple[str, IntScheme]]:
    """The formats of weights, and where each is: `INDEX.LINEAR`, or `all layers` where no more is known."""
    if isinstance(model, PackedFormat):
        yield "all layers", model.weight
        yield from model.layers.items()
    else:
        yield from ((name, scheme) for name, scheme, _ in schemes(model))


def schemes(model: Checkpoint) -> Iterator[tuple[str, IntScheme, int]]:
    """Each matrix: `INDEX.LINEAR`, its format, its columns."""
    fmt = packed_format(model)
    block = model.empty_block(0)
    columns = {name: block.get_submodule(name).in_features for name in fmt.linears}
    for index in range(model.num_blocks):
        for name in fmt.linears:
            size = columns[name]
            assert isinstance(size, int)
            yield f"{index}.{name}", fmt.schemes.of(index, name), size


def refuse_additions(model: Checkpoint | PackedFormat, target: str) -> None:
    """Biases that the family does not have."""
    fmt = packed_format(model)
    if added := [*fmt.shifted_norms, *fmt.added_biases]:
        raise InputError(
            f"{target} has no place for the biases that learned shifts give to {', '.join(added)}; fit with "
            "--model.transforms.shift biased"
        )


def refuse_attention(model: Checkpoint | PackedFormat, target: str) -> None:
    """Rounded queries, keys and values, fixed grids, and norms that reorder channels."""
    fmt = packed_format(model)
    if fmt.static is not None:
        raise InputError(
            f"{target} can't say that activations are on fixed grids of clusters; fit with -c presets/served after the "
            "method, which rounds each token by its own range"
        )
    if fmt.gathered_norms:
        raise InputError(
            f"{target} has no norms that reorder channels, as {fmt.gathered_norms[0]} does; fit without the transform "
            "Permute, or with its sites [qkt, out, fc2] alone"
        )
    if fmt.rounds_attention:
        raise InputError(
            f"{target} can't say that queries, keys or values are rounded (to {fmt.query_bits} and {fmt.cache_bits} "
            "bits), so other logits would be served than were measured; fit with no kv_bits, and with "
            "--model.activation_quantizer DynamicTokens --model.activation_quantizer.qkv false or -c presets/served"
        )


def refuse_activations(model: Checkpoint | PackedFormat, target: str) -> None:
    """Rounded activations."""
    refuse_attention(model, target)
    bits = packed_format(model).activation.bits
    if bits < UNQUANTISED:
        raise InputError(
            f"{target} can't say that activations are rounded to {bits} bits, so other logits would be served than "
            "were measured; use --format compressed-tensors, or fit with --model.activation.bits 16"
        )


def refuse_factors(model: Checkpoint | PackedFormat, target: str) -> None:
    """Factors beside the codes."""
    fmt = packed_format(model)
    if fmt.factor_rank:
        raise InputError(
            f"{target} has no place for factors (factor_rank={fmt.factor_rank}); fit with --model.weight_quantizer."
            "factor_rank 0, or use --format dense"
        )


def refuse_clusters(model: Checkpoint | PackedFormat, target: str) -> None:
    """Scales of clusters of columns."""
    for name, scheme in kinds(model):
        if scheme.by_cluster:
            raise InputError(
                f"{target} has no scales of clusters, which are of any columns and any size ({name}); fit with "
                "--model.weight.clustered false, with a group_size perhaps, or use --format dense"
            )


def refuse_kinds(model: Checkpoint | PackedFormat, target: str) -> None:
    """Codes that are not plain integers, scales of clusters, and factors beside them."""
    refuse_factors(model, target)
    refuse_clusters(model, target)
    for name, scheme in kinds(model):
        if scheme.salient is not None or scheme.balanced:
            what, method = f"{scheme.levels} levels", ""
            if scheme.salient is not None:
                what, method = "signs and salient channels", "another method than ptq161 and "
            raise InputError(
                f"{target} has no codes of {what} ({name}); fit with {method}-c schemes/w2a16g64 or wider, or use "
                "--format dense"
            )


def refuse_inexact_scales(model: Checkpoint, target: str, dtype: torch.dtype) -> None:
    """Scales that the served dtype does not hold."""
    if dtype != torch.bfloat16:
        return
    for name, scheme, _ in schemes(model):
        if scheme.quantised and scheme.scale_dtype != "bfloat16":
            raise InputError(
                f"dtype=bfloat16: {target} has scales in it, and those of {name} are float16 numbers, of which it "
                "would keep 8 of 11 digits; use --dtype float16, or fit with --model.weight.scale_dtype bfloat16"
            )


def refuse_short_groups(model: Checkpoint, target: str) -> None:
    """Rows whose last group, or only one, is shorter."""
    common = gcd(*(columns for _, _, columns in schemes(model)))
    usual = [str(size) for size in (128, 64, 32, 16) if common % size == 0][:1]
    for name, scheme, columns in schemes(model):
        if scheme.quantised and scheme.group_size != -1 and columns % scheme.group_size:
            raise InputError(
                f"{target} has groups of one size, and {columns} columns of {name} are no multiple of "
                f"{scheme.group_size}; fit with --model.weight.group_size {' or '.join([*usual, '-1'])}"
            )
