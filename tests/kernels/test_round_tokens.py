"""Fused rounding of activations against a loop, the torch twin and plain float64 autograd; as an operator too."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor

from ptql.functional import affine
from ptql.kernels.tokens import round_tokens, round_tokens_reference

pytestmark = pytest.mark.usefixtures("kernels")
SHAPES = [(5,), (7, 33), (2, 3, 64), (2, 2, 1500), (3, 5, 2, 24), (2, 1, 2, 2, 2, 7)]


def some_tokens(shape: tuple[int, ...], device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(sum(shape))
    return (torch.randn(shape) * 3).to(dtype).to(device).requires_grad_()


def autograd_round_tokens(x: Tensor, bits: int) -> Tensor:
    """Plain autograd, straight through the rounding."""
    low, high = x.min(-1, keepdim=True).values, x.max(-1, keepdim=True).values
    scale = ((high - low) / (2**bits - 1)).clamp(affine.SMALLEST_SCALE, affine.LARGEST_SCALE)
    zero = (-low / scale).round().detach()
    ratio = x / scale
    code = (ratio + (ratio.round() - ratio).detach() + zero).clamp(0, 2**bits - 1)
    return (code - zero) * scale


def autograd_symmetric(x: Tensor, bits: int) -> Tensor:
    """The same without a zero point."""
    top = 2 ** (bits - 1) - 1
    scale = x.abs().max(-1, keepdim=True).values / top
    ratio = x / scale
    code = ratio + (ratio.round() - ratio).detach()
    return code.clamp(-top, top) * scale


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_values_are_a_loop_over_elements(bits: int, device: str) -> None:
    x = some_tokens((6, 20), device).detach()
    x[0] += 100  # zero lies outside of these tokens' range
    x[1] -= 100
    out = round_tokens(x, bits, torch.float32)
    for token, rounded in zip(x.tolist(), out.tolist(), strict=True):
        scale = (max(token) - min(token)) / (2**bits - 1)
        zero = round(-min(token) / scale)
        expected = [(min(max(round(v / scale) + zero, 0), 2**bits - 1) - zero) * scale for v in token]
        assert rounded == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_values_without_a_zero_point_are_a_loop_over_elements(bits: int, device: str) -> None:
    x = some_tokens((6, 20), device).detach()
    x[0] += 100
    x[1] -= 100
    out = round_tokens(x, bits, torch.float32, symmetric=True)
    most = 2 ** (bits - 1)
    for token, rounded in zip(x.tolist(), out.tolist(), strict=True):
        scale = max(abs(v) for v in token) / (2 ** (bits - 1) - 1)
        expected = [min(max(round(v / scale), -most), most - 1) * scale for v in token]
        assert rounded == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_values_are_the_twins_to_the_bit(
    shape: tuple[int, ...], bits: int, dtype: torch.dtype, symmetric: bool, device: str
) -> None:
    x = some_tokens(shape, device, dtype)
    for result in (torch.float32, torch.bfloat16):
        out = round_tokens(x, bits, result, symmetric)
        assert out.dtype == result
        assert torch.equal(out, round_tokens_reference(x, bits, result, symmetric))
    assert torch.equal(round_tokens(x, bits, dtype, symmetric), affine.fake_quantize_tokens(x, bits, symmetric))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gradients_are_those_of_float64_autograd(
    shape: tuple[int, ...], bits: int, symmetric: bool, device: str
) -> None:
    x = some_tokens(shape, device)
    grad = torch.randn(shape, device=device)
    (ours,) = torch.autograd.grad(round_tokens(x, bits, torch.float32, symmetric), x, grad)
    (twins,) = torch.autograd.grad(round_tokens_reference(x, bits, torch.float32, symmetric), x, grad)
    torch.testing.assert_close(ours, twins, rtol=1e-5, atol=1e-5 * twins.abs().max().item())
    wide = x.detach().cpu().double().requires_grad_()
    plain = autograd_symmetric if symmetric else autograd_round_tokens
    (theirs,) = torch.autograd.grad(plain(wide, bits), wide, grad.cpu().double())
    torch.testing.assert_close(ours.cpu().double(), theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_come_in_any_dtype_and_leave_in_that_of_the_input(dtype: torch.dtype, device: str) -> None:
    x = some_tokens((4, 40), device, dtype)
    for result in (torch.float32, torch.bfloat16):
        grad = torch.randn(4, 40, device=device).to(result)
        (ours,) = torch.autograd.grad(round_tokens(x, 4, result), x, grad)
        wide = x.detach().float().requires_grad_()
        (theirs,) = torch.autograd.grad(round_tokens(wide, 4, torch.float32), wide, grad.float())
        assert torch.equal(ours, theirs.to(dtype))


def test_permuted_views_are_read_and_written_where_they_lie(device: str) -> None:
    x = some_tokens((2, 5, 3, 16), device)
    heads = x.transpose(1, 2)
    out = round_tokens(heads, 4, torch.bfloat16)
    assert out.stride() == heads.stride()
    assert torch.equal(out, round_tokens(heads.contiguous(), 4, torch.bfloat16))
    for grad in (
        torch.randn(2, 3, 5, 16),
        torch.randn(2, 5, 3, 16).transpose(1, 2),
        torch.randn(3, 5, 16).expand(2, -1, -1, -1),
    ):
        grad = grad.to(device)
        (ours,) = torch.autograd.grad(round_tokens(heads, 4, torch.float32), x, grad)
        (theirs,) = torch.autograd.grad(round_tokens_reference(heads, 4, torch.float32), x, grad)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "view", [lambda x: x.mT, lambda x: x[..., ::2], lambda x: x[:, 1:3, :8], lambda x: x[:1].expand(4, -1, -1)]
)
def test_other_views(view, device: str) -> None:
    x = some_tokens((3, 4, 16), device)
    out, twin = round_tokens(view(x), 3, torch.float32), round_tokens_reference(view(x), 3, torch.float32)
    assert torch.equal(out, twin)
    grad = torch.randn(out.shape, device=device)
    torch.testing.assert_close(
        torch.autograd.grad(out, x, grad), torch.autograd.grad(twin, x, grad), rtol=1e-5, atol=1e-5
    )


def test_tokens_without_a_range_with_a_huge_one_and_with_large_codes(device: str) -> None:
    lines = [
        [0.0, 0.0, 0.0, 0.0],
        [100.0, 100.0, 100.0, 100.0],  # codes of eight digits
        [-1e6, 0.0, 1e6, 3.0],
        [0.0, 1e-9, 2e-9, 0.0],
        [5.0, 5.0000005, 5.000001, 5.0000015],  # codes between 2^22 and 2^23, some right between two whole numbers
    ]
    x = torch.tensor(lines, device=device, requires_grad=True)
    grad = torch.randn(x.shape, device=device)
    for bits in (2, 4, 8):
        out, twin = round_tokens(x, bits, torch.float32), round_tokens_reference(x, bits, torch.float32)
        assert torch.equal(out, twin)
        (ours,), (theirs,) = torch.autograd.grad(out, x, grad), torch.autograd.grad(twin, x, grad)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_the_first_of_equal_extremes_has_the_ranges_gradient(device: str) -> None:
    """Also where the others lie in the same place of a later tile."""
    torch.manual_seed(0)
    x = torch.rand(3, 2500, dtype=torch.float64) - 0.5
    x[:, [7, 20, 7 + 1024, 7 + 2048]] = 1.0
    x[:, [9, 30, 9 + 1024, 9 + 2048]] = -1.5
    almost = x.clone()  # later extremes a hair less extreme: their codes are the same
    almost[:, [20, 7 + 1024, 7 + 2048, 30, 9 + 1024, 9 + 2048]] *= 1 - 1e-9
    almost.requires_grad_()
    grad = torch.randn(3, 2500)
    leaf = x.float().to(device).requires_grad_()
    (ours,) = torch.autograd.grad(round_tokens(leaf, 4, torch.float32), leaf, grad.to(device))
    (theirs,) = torch.autograd.grad(autograd_round_tokens(almost, 4), almost, grad.double())
    torch.testing.assert_close(ours.cpu().double(), theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())


def test_sixteen_bits_only_change_the_dtype(device: str) -> None:
    x = some_tokens((3, 8), device, torch.bfloat16)
    assert torch.equal(round_tokens(x, 16, torch.float32), x.float())
    assert round_tokens(x, 16, torch.bfloat16) is x


def test_no_tokens_at_all(device: str) -> None:
    x = torch.empty(0, 8, device=device, requires_grad=True)
    out = round_tokens(x, 4, torch.bfloat16)
    assert out.shape == (0, 8)
    assert torch.autograd.grad(out, x, torch.empty_like(out))[0].shape == (0, 8)


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_operators_keep_torchs_rules(symmetric: bool, device: str) -> None:
    x = torch.randn(2, 3, 4, 16, device=device).transpose(1, 2).requires_grad_()
    torch.library.opcheck(torch.ops.ptql.round_tokens.default, (x, 4, torch.bfloat16, symmetric))
    grad = torch.randn(2, 4, 3, 16, device=device)
    torch.library.opcheck(torch.ops.ptql.round_tokens_backward.default, (grad, x.detach(), 4, symmetric))


def test_a_compiled_function_has_no_break(device: str) -> None:
    rounded = inspect.unwrap(round_tokens)  # torch.compile can not look through the shape checks of the test run

    def function(x: Tensor) -> Tensor:
        return rounded(x * 2, 4, torch.float32).sin()

    x = some_tokens((2, 3, 32), device)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    out, plain = compiled(x), function(x)
    assert torch.equal(out, plain)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), x), torch.autograd.grad(plain.sum(), x))


def test_cpu_tensors_go_to_the_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # of the fixture that sends everything to the kernels
    x = some_tokens((3, 8), "cpu")
    out = round_tokens(x, 4, torch.bfloat16)
    assert torch.equal(out, affine.fake_quantize_tokens(x, 4).bfloat16())
    assert out.grad_fn is not None
    assert "ptql" not in out.grad_fn.name()
