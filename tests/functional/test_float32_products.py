"""The precision of matrix products, while it is another and afterwards."""

from __future__ import annotations

import pytest
import torch

from ptql.functional.float32_products import float32_products


def test_the_precision_of_products_is_given_back() -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with float32_products():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
        with pytest.raises(ZeroDivisionError), float32_products():
            print(1 // 0)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
