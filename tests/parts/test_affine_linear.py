"""The affine weight quantiser: what it learns, and that what is stored is what was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ptql.calibration.activations import Streams
from ptql.calibration.beginnings import begin_on_streams
from ptql.calibration.quant_lm import QuantLM
from ptql.checkpoint import Checkpoint
from ptql.errors import InputError
from ptql.functional import affine
from ptql.functional.clipping import best_share
from ptql.functional.scaled import Scaled
from ptql.kernels.weights import fold_and_round_reference
from ptql.nn.student import call_block
from ptql.parts.transforms import Permute, Smooth, Transform
from ptql.parts.weights import Affine, LinearQuantizer
from ptql.recipe import ActivationScheme, IntScheme
from tests.models import CONFIGS, some_ids
from tests.words import save_source

SHAPES = [(576, 128, 5), (172, 32, 6), (48, -1, 1), (48, 16, 3), (20, 64, 1)]  # row, group size, groups


def quantizer(
    w: Tensor, scheme: IntScheme, clip: bool = True, initial: float = 4.0, lr: float = 1e-2
) -> LinearQuantizer:
    return Affine(clip, initial, lr).for_linear("mlp.up_proj", w, scheme)


def some_weights(row: int) -> Tensor:
    torch.manual_seed(row)
    w = torch.randn(6, row) * 0.1
    w[0] = w[0].abs() + 0.1  # a row of one sign
    w[1] = -w[1].abs()
    w[2] = 0
    return w


def scatter(q: LinearQuantizer) -> LinearQuantizer:
    torch.manual_seed(1)
    with torch.no_grad():
        for p in q.parameters():
            p.normal_(2.0, 1.5)
    return q


@pytest.mark.parametrize(("row", "group_size", "groups"), SHAPES)
@pytest.mark.parametrize("symmetric", [False, True])
def test_two_logits_for_each_group(row: int, group_size: int, groups: int, symmetric: bool) -> None:
    q = quantizer(some_weights(row), IntScheme(3, group_size, symmetric), initial=2.5, lr=3e-3)
    assert {name: tuple(p.shape) for name, p in q.named_parameters()} == {
        "lower": (6, groups),
        "upper": (6, groups),
    }
    assert all((p == 2.5).all() and p.dtype == torch.float32 for p in q.parameters())
    assert q.lr == 3e-3


def test_the_default_is_omniquants() -> None:
    q = quantizer(some_weights(48), IntScheme())
    assert all(p.sigmoid().flatten().tolist() == pytest.approx([0.98201] * 6, abs=5e-6) for p in q.parameters())
    assert q.lr == 1e-2


def test_without_clipping_there_is_nothing_to_learn() -> None:
    w = some_weights(48)
    q = quantizer(w, IntScheme(4, 16), clip=False)
    assert list(q.parameters()) == []
    wide = quantizer(w, IntScheme(4, 16), initial=40.0)  # sigmoid(40) is 1 in float32
    assert torch.equal(q.fake(w), wide.fake(w))


@pytest.mark.parametrize(("row", "group_size", "groups"), SHAPES)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
def test_what_is_stored_is_what_was_trained(bits: int, symmetric: bool, row: int, group_size: int, groups: int) -> None:
    """Up to the scale's float16: one part in 2^11, and a code more or less where that tips one."""
    w, scheme = some_weights(row), IntScheme(bits, group_size, symmetric)
    q = scatter(quantizer(w, scheme))
    with torch.no_grad():
        fake, decoded = q.fake(w), q.decode(q.encode(w))
    assert (fake.dtype, decoded.dtype) == (torch.float32, torch.float32)
    columns = scheme.columns(row)
    with torch.no_grad():
        low, high = affine.weight_range(affine.grouped(w, columns), q.lower, q.upper)
        scale, _ = affine.scale_and_zero(low, high, 2**bits, symmetric)
    step = affine.ungrouped(scale.expand(-1, -1, columns), row)
    difference = (fake - decoded).abs()
    assert (difference <= step * 1.13 + 1e-7).all()  # a code, and 255 codes times 2^-11
    same = difference <= step * 2 ** (bits - 10) + 1e-7
    assert same.double().mean() > (0.97 if bits < 8 else 0.8)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
def test_they_agree_bit_by_bit_where_float16_holds_the_scale(bits: int, symmetric: bool) -> None:
    torch.manual_seed(bits)
    low, high = (
        (2 ** (bits - 1) - 1, 2 ** (bits - 1) - 1) if symmetric else (2 ** (bits - 2), 2**bits - 1 - 2 ** (bits - 2))
    )
    w = torch.empty(6, 40).uniform_(-low, high)
    w[:, ::8], w[:, 1::8] = -low, high  # every group of 16, and the short one, has the range -low .. high
    w *= torch.tensor([[2.0**-3], [2.0**-7], [0.0371], [0.5], [3.0], [0.011]]).half().float()
    q = quantizer(w, IntScheme(bits, 16, symmetric), clip=False)
    with torch.no_grad():
        fake, decoded = q.fake(w), q.decode(q.encode(w))
    assert torch.equal(fake[[0, 1, 3]], decoded[[0, 1, 3]])  # steps that are powers of two: no rounding anywhere
    torch.testing.assert_close(fake, decoded, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("symmetric", [False, True])
def test_stored_tensors_have_the_names_and_dtypes_of_the_format(symmetric: bool) -> None:
    w = some_weights(172)
    stored = quantizer(w, IntScheme(3, 32, symmetric)).encode(w)
    found = {name: (tuple(t.shape), t.dtype) for name, t in stored.items()}
    expected = {
        "codes": ((6, 65), torch.uint8),
        "scale": ((6, 6), torch.int16),
        "zero": ((6, 3), torch.uint8),
    }
    if symmetric:
        del expected["zero"]
    assert found == expected
    assert not any(t.requires_grad for t in stored.values())


def test_the_fake_weights_carry_gradients_to_weights_and_logits() -> None:
    w = some_weights(48).requires_grad_()
    q = scatter(quantizer(w, IntScheme(3, 16)))
    (q.fake(w) * torch.randn(6, 48)).sum().backward()
    for leaf in (w, q.lower, q.upper):
        assert leaf.grad.isfinite().all()
        assert leaf.grad.any()
    assert not q.lower.grad[0].any()  # a row above zero has no lower end to clip


# Factors


RANKS = [1, 2, 4]


def with_factor(w: Tensor, scheme: IntScheme, rank: int, clip: bool = True) -> LinearQuantizer:
    return Affine(clip, factor_rank=rank).for_linear("mlp.up_proj", w, scheme)


def turned(q: LinearQuantizer) -> LinearQuantizer:
    """Logits and factors as after some learning."""
    scatter(q)
    torch.manual_seed(2)
    with torch.no_grad():
        for p in (q.left, q.right):
            p.normal_(1.0, 0.3)
    return q


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("clip", [False, True])
def test_a_factor_begins_as_one(rank: int, clip: bool) -> None:
    w, scheme = some_weights(172), IntScheme(3, 32)
    q = with_factor(w, scheme, rank, clip)
    shapes = {name: tuple(p.shape) for name, p in q.named_parameters()}
    assert shapes == {"left": (6, rank), "right": (rank, 172)} | ({"lower": (6, 6), "upper": (6, 6)} if clip else {})
    assert torch.equal(q.left @ q.right, torch.ones(6, 172))
    without = quantizer(w, scheme, clip)
    assert torch.equal(q.fake(w), without.fake(w))
    assert torch.equal(q.decode(q.encode(w)), without.decode(without.encode(w)))
    assert torch.equal(with_factor(w, scheme, rank).left, q.left)  # the same whenever it is made


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("rank", RANKS)
def test_the_factor_multiplies_rounded_weights(rank: int, symmetric: bool) -> None:
    w, scheme = some_weights(48), IntScheme(3, 16, symmetric)
    q, without = turned(with_factor(w, scheme, rank)), scatter(quantizer(w, scheme))
    with torch.no_grad():
        without.lower.copy_(q.lower)
        without.upper.copy_(q.upper)
        fake, rounded = q.fake(w), without.fake(w)
    for i in range(6):
        for j in range(48):
            by_hand = rounded[i, j].item() * sum(q.left[i, k].item() * q.right[k, j].item() for k in range(rank))
            assert fake[i, j].item() == pytest.approx(by_hand, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("rank", [0, *RANKS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_what_is_written_for_a_step_has_the_gradients_of_float64(rank: int, dtype: torch.dtype) -> None:
    """Of a matrix that folding has scaled, into rows of a larger buffer."""
    torch.manual_seed(4)
    scheme = IntScheme(3, 16)
    base, rows, columns = torch.randn(6, 40), torch.rand(6) + 0.5, torch.rand(40) + 0.5
    q = turned(with_factor(base, scheme, rank)) if rank else scatter(quantizer(base, scheme))
    named = {"rows": rows.requires_grad_(), "columns": columns.requires_grad_(), **dict(q.named_parameters())}
    buffer = torch.full((10, 40), float("nan"), dtype=dtype)
    out = q.fake_into(Scaled(base, rows, columns), buffer[2:8])
    assert (out.dtype, out.data_ptr()) == (dtype, buffer[2:8].data_ptr())
    torch.testing.assert_close(out, q.fake(Scaled(base, rows, columns).dense()).to(dtype), rtol=1e-2, atol=1e-4)
    assert buffer[[0, 1, 8, 9]].isnan().all()

    wide = {name: p.detach().double().requires_grad_() for name, p in named.items()}
    form = {"levels": 8, "group": 16, "symmetric": False, "dtype": torch.float64}
    logits = (wide["lower"], wide["upper"])
    slow = fold_and_round_reference(base.double(), wide["rows"], wide["columns"], *logits, **form)
    slow = slow * (wide["left"] @ wide["right"]) if rank else slow
    torch.testing.assert_close(out.double(), slow, rtol=1e-5 if dtype != torch.bfloat16 else 1e-2, atol=1e-6)
    grad = torch.randn(6, 40).to(dtype)
    found = torch.autograd.grad(out, list(named.values()), grad)
    expected = torch.autograd.grad(slow, list(wide.values()), grad.double())
    for name, mine, theirs in zip(named, found, expected, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("rank", RANKS)
def test_learning_reaches_every_component(rank: int) -> None:
    """Those of `right` in the first step, those of `left` in the second at the latest."""
    w = some_weights(48)
    q = with_factor(w, IntScheme(3, 16), rank)
    target = torch.randn(6, 48)
    optimizer = torch.optim.AdamW(q.parameters(), lr=1e-2, weight_decay=0.0)
    for step in range(2):
        optimizer.zero_grad()
        (q.fake(w) - target).square().sum().backward()
        assert (q.right.grad.abs().amax(1) > 1e-6).all()
        assert (q.left.grad[:, : None if step else 1].abs().amax(0) > 1e-6).all()
        optimizer.step()
    factors = torch.stack([torch.outer(q.left[:, k], q.right[k]).flatten() for k in range(rank)])
    assert torch.linalg.matrix_rank(factors) == rank  # no two are alike


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("rank", RANKS)
def test_what_is_stored_holds_the_factor_in_float16(rank: int, symmetric: bool) -> None:
    w, scheme = some_weights(172), IntScheme(4, 32, symmetric)
    q, without = turned(with_factor(w, scheme, rank)), quantizer(w, scheme)
    with torch.no_grad():
        without.lower.copy_(q.lower)
        without.upper.copy_(q.upper)
    stored, plain = q.encode(w), without.encode(w)
    assert stored.keys() - plain.keys() == {"left", "right"}
    assert all(torch.equal(stored[name], tensor) for name, tensor in plain.items())  # of the weights without it
    assert torch.equal(stored["left"].view(torch.float16), q.left.half())
    assert torch.equal(stored["right"].view(torch.float16), q.right.half())
    assert not any(t.requires_grad for t in stored.values())
    with torch.no_grad():
        decoded, exactly = q.decode(stored), without.decode(plain) * (q.left @ q.right)
        summands = without.decode(plain).abs() * (q.left.abs() @ q.right.abs())
    assert ((decoded - exactly).abs() <= summands * 2**-10 + 1e-7).all()


@pytest.mark.parametrize("rank", [-1, 65, True])
def test_a_rank_is_a_whole_number(rank: int) -> None:
    with pytest.raises(InputError, match=rf"factor_rank={rank}: .*0 to 64; take 1, or 0 for none"):
        Affine(factor_rank=rank)


@pytest.mark.parametrize("lr", [0.0, -1.0, float("nan")])
def test_a_learning_rate_is_above_zero(lr: float) -> None:
    with pytest.raises(InputError, match=r"lr=.*above 0; take `clip: false`"):
        Affine(lr=lr)


@pytest.mark.parametrize("bits", [0, 9, 15, 17, -4, True])
def test_widths_that_no_code_has_are_refused(bits: int) -> None:
    with pytest.raises(InputError, match=rf"bits={bits}: .*1 to 8 .*use 16"):
        IntScheme(bits)


@pytest.mark.parametrize("group_size", [0, -2])
def test_a_group_holds_a_column(group_size: int) -> None:
    with pytest.raises(InputError, match=rf"group_size={group_size}: .*use -1"):
        IntScheme(4, group_size)


# Clipping that is searched for


@pytest.mark.parametrize(("group_size", "left"), [(-1, 0.8), (16, 0.95)])
def test_clipping_can_begin_where_rounding_loses_the_least(group_size: int, left: float) -> None:
    w, scheme = some_weights(48) ** 3, IntScheme(2, group_size)
    usual, searched = (Affine(initial=start).for_linear("any", w, scheme) for start in (4.0, "search"))
    searched.begin_on(w)
    error, least = ((q.decode(q.encode(w)) - w).square().sum().item() for q in (usual, searched))
    assert least < left * error
    shares = affine.grouped(w, scheme.columns(48))
    torch.testing.assert_close(searched.lower.sigmoid(), best_share(shares, 4, False))  # type: ignore[union-attr]
    assert torch.equal(searched.lower, searched.upper)  # type: ignore[arg-type]


def test_it_begins_on_the_weights_as_they_are_folded(tmp_path: Path) -> None:
    source = Checkpoint(save_source(tmp_path / "model"))
    streams = Streams(source.shell(), some_ids(), 2, torch.device("cpu"))
    model = QuantLM(weight=IntScheme(2), weight_quantizer=Affine(initial="search"), transforms=[Smooth(when="always")])
    block = source.block(0)
    ranges = streams.teach(block, source.layout, ("fp",))
    task = model.block_task(0, model.student(block, source), source, ranges, streams.context)
    weights = task.folded_weights()
    for name in source.layout.names:
        folded = weights[f"{name}.weight"]
        expected = best_share(affine.grouped(folded, folded.shape[1]), 4, False).logit()
        assert torch.equal(task.quantizer(name).upper, expected)  # type: ignore[union-attr]
        assert torch.equal(task.initial[f"quantizers.{name.replace('.', '/')}.upper"], expected)


@pytest.mark.parametrize("transforms", [[], [Smooth(when="always")], [Permute(), Smooth(when="always")]])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_it_begins_on_what_the_folded_weights_read(tmp_path: Path, family: str, transforms: list[Transform]) -> None:
    """Inputs as the block makes them of the quantised stream: each token, and each weight, by itself."""
    source = Checkpoint(save_source(tmp_path / "model", CONFIGS[family]))
    streams = Streams(source.shell(), some_ids(), 2, torch.device("cpu"))
    streams.quantised += torch.randn(streams.quantised.shape, generator=torch.Generator().manual_seed(1)) * 0.1
    model = QuantLM(
        weight=IntScheme(2, 16),
        activation=ActivationScheme(8),
        weight_quantizer=Affine(initial="search_on_inputs"),
        transforms=transforms,
    )
    block = source.block(1)
    ranges = streams.teach(block, source.layout, ("fp",))
    sites = streams.watch(block, source.layout) if model.watches else None
    task = model.block_task(1, model.student(block, source), source, ranges, streams.context, sites=sites)
    assert all(torch.equal(q.lower, torch.full_like(q.lower, 4.0)) for q in task.quantizers.values())  # type: ignore
    begin_on_streams(task, streams, source.layout, model)
    weights, seen = task.folded_weights(), {name: [] for name in source.layout.names}
    for name in source.layout.names:
        look = lambda module, given, name=name: seen[name].append(given[0].reshape(-1, given[0].shape[-1]))  # noqa: E731
        task.student.get_submodule(name).register_forward_pre_hook(look)
    for sample in streams.quantised:
        call_block(task.student, sample[None], streams.context, weights)
    for name in source.layout.names:
        folded, columns = weights[f"{name}.weight"].double(), 16
        importance = torch.cat(seen[name]).double().abs().mean(0).square()
        counts = affine.grouped(importance[None], columns)[0]
        expected = best_share(affine.grouped(folded, columns), 4, False, counts).float()
        found = task.quantizer(name).upper.sigmoid()  # type: ignore[union-attr]
        assert (found - expected).abs().gt(1e-4).float().mean() < 0.01, name  # two shares may be as good
        assert torch.equal(task.initial[f"quantizers.{name.replace('.', '/')}.upper"], task.quantizer(name).upper)


@pytest.mark.parametrize("start", ["search", "search_on_inputs"])
def test_a_search_needs_clipping_and_no_published_file(tmp_path: Path, start: Any) -> None:
    with pytest.raises(InputError, match=rf"initial={start} with clip=false: .*use clip: true"):
        Affine(clip=False, initial=start)
    torch.save({0: {"a": torch.ones(1)}}, tmp_path / "p.pth")
    with pytest.raises(InputError, match=r"published=.*p\.pth: .*a search would look for another; leave it or"):
        QuantLM(published=str(tmp_path / "p.pth"), weight_quantizer=Affine(initial=start))
