"""Matrix times vector against float64."""

from __future__ import annotations

import pytest
import torch

from ptql.kernels.matvec import matvec, matvec_reference

pytestmark = pytest.mark.usefixtures("kernels")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(5, 7), (100, 1500), (64, 64), (1, 3), (40, 2050)])
def test_values_and_gradients_are_those_of_float64(shape: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    torch.manual_seed(sum(shape))
    base = torch.randn(shape).to(dtype).to(device)
    vector = torch.randn(shape[1], device=device, requires_grad=True)
    grad = torch.randn(shape[0], device=device)
    out = matvec(base, vector)
    assert out.dtype == torch.float32
    wide = base.double()
    torch.testing.assert_close(out.detach().double(), wide @ vector.detach().double(), rtol=1e-5, atol=1e-4)
    (ours,) = torch.autograd.grad(out, vector, grad)
    torch.testing.assert_close(ours.double(), grad.double() @ wide, rtol=1e-5, atol=1e-4)
    twin = matvec_reference(base, vector)
    torch.testing.assert_close(out, twin, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(ours, torch.autograd.grad(twin, vector, grad)[0], rtol=1e-5, atol=1e-4)


def test_views(device: str) -> None:
    base = torch.randn(6, 8, device=device)
    vector = torch.randn(16, device=device, requires_grad=True)
    out = matvec(base, vector[::2])
    (grad,) = torch.autograd.grad(out.sum(), vector)  # an expanded gradient
    torch.testing.assert_close(grad[::2], base.sum(0), rtol=1e-5, atol=1e-5)
    assert (grad[1::2] == 0).all()
    with pytest.raises(ValueError, match="contiguous"):
        matvec(base.T, vector[:6])


def test_cpu_tensors_go_to_the_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # of the fixture that sends everything to the kernels
    base, vector = torch.randn(4, 6), torch.randn(6)
    assert torch.equal(matvec(base, vector), matvec_reference(base, vector))
