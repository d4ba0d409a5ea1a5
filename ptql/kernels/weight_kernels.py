"""The Triton kernels behind `weights.fold_and_round`: round, gradients of the range, gradients of the columns.

All arithmetic is float32, in the order of the torch code; launched without fused multiply-adds it chooses the
same codes. Sums have a fixed order: no atomics. height, width = the weight's rows, columns; group = columns of a
full group; groups = how many a row has, the last of which may be shorter.
"""

# Tiles are [R rows, G groups, C columns of a group]; a group wider than C is walked through in steps of C.

from __future__ import annotations

from ptql.functional import affine
from ptql.kernels.available import constant, constexpr, jit, libdevice, tl

SMALLEST_SCALE = constant(affine.SMALLEST_SCALE)
LARGEST_SCALE = constant(affine.LARGEST_SCALE)
ROUNDING = constant(1.5 * 2**23)  # x + this - this rounds halves to even below 2^22; no code that counts lies above
NOWHERE = constant(2**31 - 1)  # no column


@jit
def _between(x, smallest, largest):
    x = tl.maximum(x, smallest, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(x, largest, propagate_nan=tl.PropagateNan.ALL)


@jit
def _weights(base, rows, columns, row, column, mask, height, width):
    w = tl.load(base + row.to(tl.int64) * width + column, mask=mask, other=0.0).to(tl.float32)
    if rows is not None:
        w *= tl.load(rows + row, mask=row < height, other=0.0)
    if columns is not None:
        w *= tl.load(columns + column, mask=column < width, other=0.0)
    return w


@jit
def _share(logits, at, mask, cuda: constexpr):
    """Sigmoid of clipping logits, to the bit as torch computes it on the GPU."""
    x = -tl.load(logits + at, mask=mask, other=0.0)
    return tl.math.div_rn(1.0, 1.0 + (libdevice.exp(x) if cuda else tl.exp(x)))


@jit
def _raw_scale(low, high, levels: constexpr, symmetric: constexpr, cuda: constexpr):
    spread = tl.maximum(-low, high) if symmetric else high - low
    steps = (levels - 1) // 2 if symmetric else levels - 1
    # On the GPU torch divides by a number as it multiplies by the inverse.
    return spread * (1.0 / steps) if cuda else tl.math.div_rn(spread, 1.0 * steps)


@jit
def _code(w, scale, zero):
    """Quotient and code, not clamped."""
    ratio = tl.math.div_rn(w, scale)
    return ratio, (ratio + ROUNDING) - ROUNDING + zero


@jit
def round_groups(
    base, rows, columns, lower, upper, out, scales, zeros, height, width, group, groups,
    levels: constexpr, symmetric: constexpr, cuda: constexpr,
    R: constexpr, G: constexpr, C: constexpr,
):  # fmt: skip
    across = tl.cdiv(groups, G)
    row = (tl.program_id(0) // across) * R + tl.arange(0, R)[:, None, None]
    k = (tl.program_id(0) % across) * G + tl.arange(0, G)[None, :, None]
    lane = tl.arange(0, C)[None, None, :]
    exists, at = (row < height) & (k < groups), row * groups + k
    low = tl.zeros([R, G, C], tl.float32)
    high = tl.zeros([R, G, C], tl.float32)
    for start in range(0, group, C):
        column = k * group + start + lane
        mask = exists & (start + lane < group) & (column < width)
        w = _weights(base, rows, columns, row, column, mask, height, width)
        low, high = tl.minimum(low, w), tl.maximum(high, w)
    low, high = tl.min(low, axis=2, keep_dims=True), tl.max(high, axis=2, keep_dims=True)
    if lower is not None:
        low, high = low * _share(lower, at, exists, cuda), high * _share(upper, at, exists, cuda)
    scale = _between(_raw_scale(low, high, levels, symmetric, cuda), SMALLEST_SCALE, LARGEST_SCALE)
    if symmetric:
        zero = tl.full([R, G, 1], levels // 2, tl.float32)
    else:
        zero = _between(_code(-low, scale, 0.0)[1], 0.0, levels - 1.0)
    tl.store(scales + at, scale, mask=exists)
    tl.store(zeros + at, zero, mask=exists)
    for start in range(0, group, C):
        column = k * group + start + lane
        mask = exists & (start + lane < group) & (column < width)
        w = _weights(base, rows, columns, row, column, mask, height, width)
        _, code = _code(w, scale, zero)
        rounded = (_between(code, 0.0, levels - 1.0) - zero) * scale
        tl.store(out + row.to(tl.int64) * width + column, rounded.to(out.dtype.element_ty), mask=mask)


@jit
def range_gradients(
    grad, base, rows, columns, lower, upper, scales, zeros, to_rows, to_lower, to_upper,
    to_low, to_high, at_low, at_high, height, width, group, groups,
    levels: constexpr, symmetric: constexpr, cuda: constexpr, fold: constexpr,
    R: constexpr, G: constexpr, C: constexpr,
):  # fmt: skip
    """The scale's gradient, handed on to the logits, the rows' factors and the group's two extreme weights."""
    across = tl.cdiv(groups, G)
    row = (tl.program_id(0) // across) * R + tl.arange(0, R)[:, None, None]
    k = (tl.program_id(0) % across) * G + tl.arange(0, G)[None, :, None]
    lane = tl.arange(0, C)[None, None, :]
    exists, at = (row < height) & (k < groups), row * groups + k
    scale, zero = tl.load(scales + at, mask=exists, other=1.0), tl.load(zeros + at, mask=exists, other=0.0)
    low = tl.zeros([R, G, C], tl.float32)
    high = tl.zeros([R, G, C], tl.float32)
    first_low = tl.full([R, G, C], NOWHERE, tl.int32)
    first_high = tl.full([R, G, C], NOWHERE, tl.int32)
    by_scale = tl.zeros([R, G, C], tl.float32)
    by_row = tl.zeros([R, G, C], tl.float32)
    for start in range(0, group, C):
        column = k * group + start + lane
        mask = exists & (start + lane < group) & (column < width)
        w = _weights(base, rows, columns, row, column, mask, height, width)
        g = tl.load(grad + row.to(tl.int64) * width + column, mask=mask, other=0.0).to(tl.float32)
        ratio, code = _code(w, scale, zero)
        kept = (code >= 0) & (code <= levels - 1)
        by_scale += g * (_between(code, 0.0, levels - 1.0) - zero - tl.where(kept, ratio, 0.0))
        if fold:
            # Zero is in the range anyway, so an extreme has a place only if it is at or beyond zero.
            first_low = tl.where(mask & ((w < low) | ((w == low) & (first_low == NOWHERE))), column, first_low)
            first_high = tl.where(mask & ((w > high) | ((w == high) & (first_high == NOWHERE))), column, first_high)
        if to_rows is not None:
            plain = _weights(base, None, columns, row, column, mask, height, width)
            by_row += tl.where(kept, g, 0.0) * plain
        low, high = tl.minimum(low, w), tl.maximum(high, w)
    lowest, highest = tl.min(low, axis=2, keep_dims=True), tl.max(high, axis=2, keep_dims=True)
    clipped_low, clipped_high = lowest, highest
    if lower is not None:
        share_low, share_high = _share(lower, at, exists, cuda), _share(upper, at, exists, cuda)
        clipped_low, clipped_high = lowest * share_low, highest * share_high
    raw = _raw_scale(clipped_low, clipped_high, levels, symmetric, cuda)
    to_raw = tl.sum(by_scale, axis=2, keep_dims=True)
    to_raw = tl.where((raw >= SMALLEST_SCALE) & (raw <= LARGEST_SCALE), to_raw, 0.0)
    if symmetric:  # the larger end sets the scale; equal ends share the gradient, as torch.maximum has it
        part = tl.where(-clipped_low > clipped_high, 1.0, tl.where(-clipped_low == clipped_high, 0.5, 0.0))
        d_high = to_raw / ((levels - 1) // 2) * (1.0 - part)
        d_low = -(to_raw / ((levels - 1) // 2)) * part
    else:
        d_high = to_raw / (levels - 1)
        d_low = -d_high
    if to_lower is not None:
        tl.store(to_lower + at, d_low * lowest * share_low * (1.0 - share_low), mask=exists)
    if to_upper is not None:
        tl.store(to_upper + at, d_high * highest * share_high * (1.0 - share_high), mask=exists)
    if fold:
        if lower is not None:
            d_low, d_high = d_low * share_low, d_high * share_high
        place_low = tl.min(tl.where(low == lowest, first_low, NOWHERE), axis=2, keep_dims=True)
        place_high = tl.min(tl.where(high == highest, first_high, NOWHERE), axis=2, keep_dims=True)
        if to_low is not None:
            tl.store(to_low + at, d_low, mask=exists)
            tl.store(to_high + at, d_high, mask=exists)
            tl.store(at_low + at, place_low, mask=exists)
            tl.store(at_high + at, place_high, mask=exists)
        if to_rows is not None:
            there_low, there_high = exists & (place_low != NOWHERE), exists & (place_high != NOWHERE)
            of_row = tl.sum(by_row, axis=2, keep_dims=True)
            of_row += d_low * _weights(base, None, columns, row, place_low, there_low, height, width)
            of_row += d_high * _weights(base, None, columns, row, place_high, there_high, height, width)
            tl.store(to_rows + at, of_row, mask=exists)


@jit
def column_gradients(
    grad, base, rows, columns, scales, zeros, to_low, to_high, at_low, at_high, partial,
    height, width, group, groups, stripe,
    levels: constexpr, R: constexpr, G: constexpr, C: constexpr,
):  # fmt: skip
    """For a stripe of rows, the sum over its rows of what belongs to the columns' factors."""
    across = tl.cdiv(groups, G)
    k = (tl.program_id(0) % across) * G + tl.arange(0, G)[None, :, None]
    lane = (tl.program_id(0) // across) * C + tl.arange(0, C)[None, None, :]
    column = k * group + lane
    in_row = (k < groups) & (lane < group) & (column < width)
    first = tl.program_id(1) * stripe
    total = tl.zeros([R, G, C], tl.float32)
    for start in range(0, stripe, R):
        row = first + start + tl.arange(0, R)[:, None, None]
        exists, at = (row < height) & (k < groups), row * groups + k
        mask = (row < height) & in_row
        scale, zero = tl.load(scales + at, mask=exists, other=1.0), tl.load(zeros + at, mask=exists, other=0.0)
        w = _weights(base, rows, columns, row, column, mask, height, width)
        g = tl.load(grad + row.to(tl.int64) * width + column, mask=mask, other=0.0).to(tl.float32)
        _, code = _code(w, scale, zero)
        g = tl.where((code >= 0) & (code <= levels - 1), g, 0.0)
        is_low = column == tl.load(at_low + at, mask=exists, other=NOWHERE)
        is_high = column == tl.load(at_high + at, mask=exists, other=NOWHERE)
        g += tl.where(is_low, tl.load(to_low + at, mask=exists, other=0.0), 0.0)
        g += tl.where(is_high, tl.load(to_high + at, mask=exists, other=0.0), 0.0)
        total += g * _weights(base, rows, None, row, column, mask, height, width)
    at = tl.program_id(1).to(tl.int64) * width + column
    tl.store(partial + at, tl.sum(total, axis=0, keep_dims=True), mask=in_row)
