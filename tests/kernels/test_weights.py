"""Folded and rounded weights against a loop over elements, the torch twin, and float64 autograd of the twin."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from ptql.functional import affine
from ptql.kernels.weights import fold_and_round, fold_and_round_reference

pytestmark = pytest.mark.usefixtures("kernels")

#   out, in, group: per channel (wider than a tile, in two stripes), groups, odd groups, a short last one
SHAPES = [(3, 1500, 1500), (37, 130, 130), (5, 96, 32), (2, 300, 128), (4, 200, 48), (3, 1300, 1200), (3, 7, 3)]
NAMES = ("rows", "columns", "lower", "upper")


def problem(
    shape: tuple[int, int, int], given: str, device: str = "cpu", dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """A weight and those of its factors and logits that `given` names by their first letters."""
    height, width, group = shape
    torch.manual_seed(sum(shape) + len(given))
    groups = -(-width // group)
    base = torch.randn(height, width).to(dtype)
    learnt = {
        "rows": (torch.randn(height) * 0.3).exp(),
        "columns": (torch.randn(width) * 0.3).exp() * torch.where(torch.rand(width) < 0.1, -1.0, 1.0),
        "lower": torch.randn(height, groups) + 2,
        "upper": torch.randn(height, groups) + 2,
    }
    return base.to(device), {
        name: t.to(device).requires_grad_() if name[0] in given else None for name, t in learnt.items()
    }


def reference(base: Tensor, learnt: dict[str, Tensor | None], grad: Tensor, **form) -> tuple[Tensor, list[Tensor]]:
    """The twin's result and gradients in float64."""
    wide = {k: None if t is None else t.detach().cpu().double().requires_grad_() for k, t in learnt.items()}
    out = fold_and_round_reference(base.cpu().double(), *wide.values(), **form, dtype=torch.float64)
    leaves = [t for t in wide.values() if t is not None]
    return out.detach(), list(torch.autograd.grad(out, leaves, grad.cpu().double()))


def assert_gradients(ours: tuple[Tensor, ...], theirs: list[Tensor]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == torch.float32
        atol = max(1e-5 * other.abs().max().item(), 1e-6)  # a small sum of large terms
        torch.testing.assert_close(mine.cpu().double(), other, rtol=1e-5, atol=atol)


def loop(base: Tensor, learnt: dict[str, Tensor | None], levels: int, group: int, symmetric: bool) -> list[list[float]]:
    """The definition, element by element, in Python's float64."""
    given = {name: None if t is None else t.tolist() for name, t in learnt.items()}
    result = []
    for i, line in enumerate(base.tolist()):
        w = [
            v * (given["rows"][i] if given["rows"] else 1) * (given["columns"][j] if given["columns"] else 1)
            for j, v in enumerate(line)
        ]
        rounded = []
        for k in range(0, len(w), group):
            part = w[k : k + group]
            low, high = min(*part, 0.0), max(*part, 0.0)
            if given["lower"]:
                low /= 1 + math.exp(-given["lower"][i][k // group])
                high /= 1 + math.exp(-given["upper"][i][k // group])
            if symmetric:
                scale, zero = max(-low, high) / ((levels - 1) // 2), levels // 2
            else:
                scale = (high - low) / (levels - 1)
                zero = min(max(round(-low / scale), 0), levels - 1)
            rounded += [(min(max(round(v / scale) + zero, 0), levels - 1) - zero) * scale for v in part]
        result.append(rounded)
    return result


@pytest.mark.parametrize("given", ["", "rclu"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("levels", [3, 4, 5, 8, 16, 256])
def test_values_are_a_loop_over_elements(levels: int, symmetric: bool, given: str, device: str) -> None:
    base, learnt = problem((4, 50, 16), given, device, torch.float32)
    form = {"levels": levels, "group": 16, "symmetric": symmetric}
    out = fold_and_round(base, *learnt.values(), **form, dtype=torch.float32)
    expected = torch.tensor(loop(base, learnt, **form), dtype=torch.float64)
    torch.testing.assert_close(out.detach().cpu().double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("levels", [3, 4, 5, 8, 16, 256])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_are_the_twins_in_float64(
    shape: tuple[int, int, int], levels: int, symmetric: bool, device: str
) -> None:
    form = {"levels": levels, "group": shape[2], "symmetric": symmetric}
    for given in ("rclu", "lu", "rc", "r", "c"):
        # In bfloat16 many weights lie right between two codes, and float64 chooses the other one.
        base, learnt = problem(shape, given, device, torch.float32)
        leaves = [t for t in learnt.values() if t is not None]
        grad = torch.randn(base.shape, device=device)
        ours = fold_and_round(base, *learnt.values(), **form, dtype=torch.float32)
        expected, gradients = reference(base, learnt, grad, **form)
        torch.testing.assert_close(ours.detach().cpu().double(), expected, rtol=1e-5, atol=1e-6)
        assert_gradients(torch.autograd.grad(ours, leaves, grad), gradients)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_without_clipping_values_are_the_twins_to_the_bit(
    shape: tuple[int, int, int], symmetric: bool, device: str
) -> None:
    base, learnt = problem(shape, "rc", device)
    for levels in (3, 4, 5, 8, 16, 256):
        form = {"levels": levels, "group": shape[2], "symmetric": symmetric, "dtype": torch.float32}
        ours = fold_and_round(base, *learnt.values(), **form)
        assert torch.equal(ours, fold_and_round_reference(base, *learnt.values(), **form))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_bfloat16_weights_are_the_twins(shape: tuple[int, int, int], symmetric: bool, device: str) -> None:
    for levels, given in ((3, "rc"), (4, "rc"), (5, "rc"), (8, "r"), (16, "c"), (256, "rc")):
        base, learnt = problem(shape, given, device)
        leaves = [t for t in learnt.values() if t is not None]
        form = {"levels": levels, "group": shape[2], "symmetric": symmetric, "dtype": torch.float32}
        grad = torch.randn(base.shape, device=device)
        ours = torch.autograd.grad(fold_and_round(base, *learnt.values(), **form), leaves, grad)
        theirs = torch.autograd.grad(fold_and_round_reference(base, *learnt.values(), **form), leaves, grad)
        assert_gradients(ours, [t.cpu().double() for t in theirs])


def test_clipped_codes_are_the_twins_but_for_a_few_ties(device: str) -> None:
    base, learnt = problem((64, 1024, 128), "rclu", device)
    form = {"levels": 16, "group": 128, "symmetric": False, "dtype": torch.float32}
    ours = fold_and_round(base, *learnt.values(), **form)
    theirs = fold_and_round_reference(base, *learnt.values(), **form)
    assert (~torch.isclose(ours, theirs, rtol=1e-5, atol=1e-6)).sum() <= 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes(stored: torch.dtype, dtype: torch.dtype, device: str) -> None:
    base, learnt = problem((6, 80, 32), "rclu", device, stored)
    form = {"levels": 16, "group": 32, "symmetric": False}
    out = fold_and_round(base, *learnt.values(), **form, dtype=dtype)
    wide = fold_and_round(base, *learnt.values(), **form, dtype=torch.float32)
    assert out.dtype == dtype
    assert torch.equal(out, wide.to(dtype))
    grad = torch.randn_like(out)
    leaves = list(learnt.values())
    gradients = torch.autograd.grad(wide, leaves, grad.float())
    for mine, other in zip(torch.autograd.grad(out, leaves, grad), gradients, strict=True):
        assert torch.equal(mine, other)


def test_the_result_may_be_rows_of_a_larger_buffer(device: str) -> None:
    base, learnt = problem((4, 40, 16), "rclu", device)
    form = {"levels": 8, "group": 16, "symmetric": False, "dtype": torch.bfloat16}
    buffer = torch.full((10, 40), 7.0, dtype=torch.bfloat16, device=device)
    out = fold_and_round(base, *learnt.values(), **form, out=buffer[3:7])
    alone = fold_and_round(base, *learnt.values(), **form)
    assert out.data_ptr() == buffer[3:7].data_ptr()
    assert torch.equal(buffer[3:7], alone)
    assert (buffer[:3] == 7).all()
    assert (buffer[7:] == 7).all()
    assert not buffer.requires_grad
    grad = torch.randn(10, 40, device=device).bfloat16()[3:7]
    ours = torch.autograd.grad(out, list(learnt.values()), grad)
    for mine, other in zip(ours, torch.autograd.grad(alone, list(learnt.values()), grad), strict=True):
        assert torch.equal(mine, other)


def test_a_buffer_written_again_is_refused_by_the_backward_pass_that_needs_it(device: str) -> None:
    base, learnt = problem((4, 40, 16), "lu", device)
    form = {"levels": 8, "group": 16, "symmetric": False, "dtype": torch.float32}
    buffer = torch.empty(4, 40, device=device)
    x = torch.randn(2, 40, device=device, requires_grad=True)
    y = x @ fold_and_round(base, *learnt.values(), **form, out=buffer).T
    fold_and_round(base, *learnt.values(), **form, out=buffer)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(
    "lines",
    [
        [[2.0, -2.0, 0.1, 0.4, -2.0, 2.0, 0.7, 0.2]],  # ends equally far from zero
        [[0.0] * 8, [0.5, 2.0, 0.0, 1.0, 0.0, 3.0, 0.7, 1.1]],  # zeros alone, and zero as an end
        [[-0.5, -2.0, -0.3, -1.0, -0.1, -3.0, -0.7, -1.1], [0.5, 2.0, 0.3, 1.0, 0.1, 3.0, 0.7, 1.1]],  # of one sign
        [[1e-8, -1e-8, 2e-8, 3e-8, 0.0, 1e-9, 1e-8, -2e-8]],  # the scale is at its smallest
        [[1e6, -1e6, 2.0, 3.0, 5e5, 1.0, 0.0, 2e6]],  # and at its largest
    ],
)
def test_ends_zeros_and_bounds_of_the_scale(lines: list[list[float]], symmetric: bool, device: str) -> None:
    base = torch.tensor(lines, device=device)
    for levels in (3, 4, 5, 16):
        for given in ("rclu", "rc"):
            _, learnt = problem((len(lines), 8, 8), given, device)
            with torch.no_grad():  # factors and shares by which float32 multiplies without error
                for name, t in learnt.items():
                    if t is not None:
                        t.copy_(torch.where(t > 1, 2, 1) if name in ("rows", "columns") else torch.zeros_like(t))
                learnt["columns"][4] = 0.0  # a weight at zero whose factor still has a gradient
            leaves = [t for t in learnt.values() if t is not None]
            form = {"levels": levels, "group": 8, "symmetric": symmetric, "dtype": torch.float32}
            out = fold_and_round(base, *learnt.values(), **form)
            twin = fold_and_round_reference(base, *learnt.values(), **form)
            assert torch.equal(out, twin)
            grad = torch.randn(out.shape, device=device)
            gradients = torch.autograd.grad(twin, leaves, grad)
            for mine, other in zip(torch.autograd.grad(out, leaves, grad), gradients, strict=True):
                torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6 * other.abs().max().item())


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_first_of_equal_extremes_has_the_ranges_gradient(symmetric: bool, device: str) -> None:
    """Also where the others lie in the same place of a later tile."""
    torch.manual_seed(0)
    base = torch.rand(2, 2500, dtype=torch.float64) - 0.5
    columns = torch.ones(2500, dtype=torch.float64)
    grad = torch.randn(2, 2500)
    form = {"levels": 16, "group": 2500, "symmetric": symmetric}
    base[:, [7, 20, 7 + 1024, 7 + 2048]] = 1.0
    base[:, [9, 30, 9 + 1024, 9 + 2048]] = -1.5
    almost = base.clone()  # later extremes a hair less extreme: their codes are the same
    almost[:, [20, 7 + 1024, 7 + 2048, 30, 9 + 1024, 9 + 2048]] *= 1 - 1e-9
    expected = reference(almost, {"rows": None, "columns": columns, "lower": None, "upper": None}, grad, **form)[1]
    leaf = columns.float().to(device).requires_grad_()
    out = fold_and_round(base.float().to(device), None, leaf, None, None, **form, dtype=torch.float32)
    assert_gradients(torch.autograd.grad(out, leaf, grad.to(device)), expected)


def test_only_what_is_learnt_gets_a_gradient(device: str) -> None:
    base, learnt = problem((4, 40, 16), "rclu", device)
    form = {"levels": 8, "group": 16, "symmetric": False, "dtype": torch.float32}
    everything = torch.autograd.grad(fold_and_round(base, *learnt.values(), **form).sum(), list(learnt.values()))
    for k, name in enumerate(NAMES):
        some = {n: t if n == name else t.detach() for n, t in learnt.items()}
        (alone,) = torch.autograd.grad(fold_and_round(base, *some.values(), **form).sum(), [some[name]])
        assert torch.equal(alone, everything[k])


def test_a_number_that_is_none_is_not_hidden(device: str) -> None:
    base, learnt = problem((4, 40, 40), "c", device)
    with torch.no_grad():
        learnt["columns"][5] = torch.nan
    out = fold_and_round(base, *learnt.values(), levels=16, group=40, symmetric=False, dtype=torch.float32)
    assert out[:, 5].isnan().all()


def test_what_the_kernel_can_not_do_is_refused(device: str) -> None:
    base, learnt = problem((4, 40, 16), "lu", device)
    form = {"levels": 8, "group": 16, "symmetric": False, "dtype": torch.float32}
    with pytest.raises(ValueError, match="both `lower` and `upper`"):
        fold_and_round(base, None, None, learnt["lower"], None, **form)
    with pytest.raises(ValueError, match="contiguous"):
        fold_and_round(base.T.contiguous().T, *learnt.values(), **form)
    with pytest.raises(ValueError, match="must be contiguous and of"):
        fold_and_round(base, *learnt.values(), **form, out=torch.empty_like(base))


def test_cpu_tensors_go_to_the_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # of the fixture that sends everything to the kernels
    base, learnt = problem((4, 40, 16), "rclu")
    buffer = torch.empty(4, 40)
    form = {"levels": 8, "group": 16, "symmetric": False, "dtype": torch.float32}
    out = fold_and_round(base, *learnt.values(), **form, out=buffer)
    assert torch.equal(out, fold_and_round_reference(base, *learnt.values(), **form))
    assert torch.equal(out, buffer)
    assert out.grad_fn is not None
    assert "FoldAndRound" not in out.grad_fn.name()


def test_the_twin_is_the_fake_quantised_weight() -> None:
    base, learnt = problem((4, 48, 16), "", dtype=torch.float32)
    groups = affine.grouped(base, 16)
    scale, zero = affine.scale_and_zero(*affine.weight_range(groups), 16, False)
    expected = affine.ungrouped(affine.fake_quantize(groups, scale, zero, 16), 48)
    out = fold_and_round_reference(base, *learnt.values(), levels=16, group=16, symmetric=False, dtype=torch.float32)
    assert torch.equal(out, expected)


def test_without_triton_the_modules_import_and_a_kernel_says_what_is_missing() -> None:
    code = """
import sys
sys.modules["triton"] = None
import torch
from ptql.kernels import matvec, tokens, weight_kernels, weights
weights.fold_and_round(
    torch.ones(2, 4), None, None, None, None, levels=16, group=4, symmetric=False, dtype=torch.float32
)
tokens.round_tokens(torch.ones(2, 4), 4, torch.float32)
matvec.matvec(torch.ones(2, 4), torch.ones(4))
try:
    weight_kernels.round_groups[(1,)]()
except ImportError as error:
    assert "pip install triton" in str(error)
else:
    raise SystemExit("no ImportError")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("shape", [(1024, 4096, 4096), (512, 11008, 128), (300, 1000, 96)])
def test_a_captured_step_repeats_itself(shape: tuple[int, int, int]) -> None:
    base, learnt = problem(shape, "rclu", "cuda")
    grad = torch.randn(base.shape, device="cuda").bfloat16()
    leaves = list(learnt.values())

    def step() -> tuple[Tensor, ...]:
        out = fold_and_round(base, *leaves, levels=16, group=shape[2], symmetric=False, dtype=torch.bfloat16)
        return (out, *torch.autograd.grad(out, leaves, grad))

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        eager = [t.detach().clone() for t in step()]
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        graph.replay()
        for a, b in zip(captured, eager, strict=True):
            assert torch.equal(a, b)
