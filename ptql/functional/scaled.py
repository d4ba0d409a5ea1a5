"""A matrix that folding has scaled, row by row and column by column, and that nobody has multiplied out yet."""

# axes: out, in = weight rows, columns

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from ptql.kernels.matvec import matvec


@dataclass(frozen=True)
class Scaled:
    """`base[i, j] * rows[i] * columns[j]`: all that smoothing does to a matrix, in two vectors.

    The matrix itself stays as the model stores it, so that a step reads it once, in its own dtype, where it is
    scaled, clipped and rounded in one go (`ptql.kernels.weights`).

    Args:
        base: Frozen matrix [out, in] of any floating dtype.
        rows: Factor of each row [out], float32; None for ones.
        columns: Factor of each column [in], float32; None for ones.
    """

    base: Tensor
    rows: Tensor | None = None
    columns: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        return self.base.shape

    @property
    def is_learned(self) -> bool:
        """Whether a gradient would go anywhere."""
        return any(factor is not None and factor.requires_grad for factor in (self.rows, self.columns))

    def divide_rows(self, by: Float[Tensor, " out"]) -> Scaled:
        return replace(self, rows=1 / by if self.rows is None else self.rows / by)

    def scale_columns(self, by: Float[Tensor, " in"]) -> Scaled:
        return replace(self, columns=by if self.columns is None else self.columns * by)

    def times(self, vector: Float[Tensor, " in"]) -> Float[Tensor, " out"]:
        """The product with a vector, float32."""
        product = matvec(self.base, vector if self.columns is None else vector * self.columns)
        return product if self.rows is None else product * self.rows

    def dense(self) -> Float[Tensor, "out in"]:
        """The matrix multiplied out, in float32 (float64 of a float64 base)."""
        matrix = self.base if self.base.dtype == torch.float64 else self.base.float()
        matrix = matrix if self.rows is None else matrix * self.rows[:, None]
        return matrix if self.columns is None else matrix * self.columns


def multiplied_out(matrix: Tensor | Scaled) -> Tensor:
    """The matrix as a tensor."""
    return matrix.dense() if isinstance(matrix, Scaled) else matrix
