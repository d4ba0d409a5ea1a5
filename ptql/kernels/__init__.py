"""Fused GPU kernels (Triton) for the arithmetic that the fitting loop repeats most; each has a plain torch twin."""
