"""Layers that read one input, as one matrix product: what they give one by one, gradients too."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ptql.families import family_of
from ptql.nn.quant_linear import MergedProduct, QuantLinear, Rounding, step_products
from ptql.nn.student import call_block, make_student, weights_of
from ptql.parts.activations import DynamicTokens, TokenRounding
from ptql.parts.transforms import AddedBiases, Weights
from ptql.recipe import ActivationScheme
from tests.models import FAMILIES, block_calls, blocks_of, exact, llama_config, random_model, some_ids

SIZES = (6, 3, 4)
COLUMNS = 8


class Three(nn.Module):
    """Three layers on one input, and a fourth one that is no part of their product."""

    def __init__(self, rounding: Rounding | None, bias: bool, order: tuple[int, ...] = (0, 1, 2)) -> None:
        super().__init__()
        biases = [torch.randn(rows) if bias else None for rows in SIZES]
        layers = [QuantLinear(torch.randn(rows, COLUMNS), b, rounding) for rows, b in zip(SIZES, biases, strict=True)]
        self.readers, self.layers = nn.ModuleList(layers), layers
        self.other = QuantLinear(torch.randn(5, COLUMNS), None, None)
        self.order = order
        self.product = MergedProduct(layers, rounding)
        for index, layer in enumerate(layers):
            layer.merged = (self.product, index)

    def forward(self, x: Tensor) -> Tensor:
        parts = {index: self.readers[index](x) for index in self.order}
        return torch.cat([*(parts[index] for index in range(3)), self.other(x)], -1)


def stacked_weights(module: Three) -> dict[str, Tensor]:
    """As a step gives them: the first layer has all."""
    layers = module.layers
    given = {"readers.0.weight": torch.cat([layer.weight for layer in layers])}
    if layers[0].bias is not None:
        given["readers.0.bias"] = torch.cat([layer.bias for layer in layers if layer.bias is not None])
    return given


def counting(rounding: Rounding) -> tuple[list[int], Rounding]:
    calls: list[int] = []

    def counted(x: Tensor) -> Tensor:
        calls.append(1)
        return rounding(x)

    return calls, counted


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("bits", [None, 4])
def test_one_product_is_three(bits: int | None, bias: bool, order: tuple[int, ...]) -> None:
    """In whatever order the layers are called."""
    module = Three(None if bits is None else TokenRounding(bits), bias, order)
    x = torch.randn(2, 5, COLUMNS, requires_grad=True)
    separate = module(x)
    with step_products(module):
        together = functional_call(module, stacked_weights(module), (x,))
    torch.testing.assert_close(together, separate)
    grad = torch.randn_like(separate)
    torch.testing.assert_close(
        *(torch.autograd.grad(y, x, grad)[0] for y in (together, separate)), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("bias", [False, True])
def test_gradients_of_the_whole_are_those_of_the_layers_one_below_the_other(bias: bool) -> None:
    module, x = Three(TokenRounding(4), bias), torch.randn(3, COLUMNS)
    own = {name: p.detach().clone().requires_grad_() for name, p in module.named_parameters()}
    given = {name: tensor.detach().requires_grad_() for name, tensor in stacked_weights(module).items()}
    separate = functional_call(module, own, (x,))
    with step_products(module):
        together = functional_call(module, given, (x,))
    grad = torch.randn_like(separate)
    separate.backward(grad)
    together.backward(grad)
    for kind in ("weight", "bias") if bias else ("weight",):
        expected = torch.cat([own[f"readers.{index}.{kind}"].grad for index in range(3)])  # type: ignore[misc]
        torch.testing.assert_close(given[f"readers.0.{kind}"].grad, expected)


def test_the_input_is_rounded_once_and_nothing_is_held_afterwards() -> None:
    calls, rounding = counting(TokenRounding(4))
    module = Three(rounding, False)
    with step_products(module), torch.no_grad():
        for count in (1, 2):
            functional_call(module, stacked_weights(module), (torch.randn(3, COLUMNS),))
            assert len(calls) == count
            assert module.product._input is None
            assert module.product._parts == ()


def test_another_input_between_is_multiplied_anew() -> None:
    """A layer was left out, or an input changed its place: no part of another input is given."""
    calls, rounding = counting(TokenRounding(4))
    module = Three(rounding, True)
    first, second = torch.randn(3, COLUMNS), torch.randn(3, COLUMNS)
    expected = [
        F.linear(TokenRounding(4)(x), layer.weight, layer.bias) for x in (first, second) for layer in module.layers
    ]
    given = stacked_weights(module)
    whole = QuantLinear(given["readers.0.weight"], given["readers.0.bias"])
    product = MergedProduct(module.layers, rounding)
    product._first = whole
    torch.testing.assert_close(product.part(0, first), expected[0])
    torch.testing.assert_close(product.part(1, second), expected[4])
    torch.testing.assert_close(product.part(2, first), expected[2])
    assert len(calls) == 3
    for index in range(3):
        torch.testing.assert_close(product.part(index, second), expected[3 + index])
    assert len(calls) == 4
    assert product._input is None


def test_it_is_on_while_open_only_and_off_after_an_error() -> None:
    module = Three(None, False)
    with step_products(module):
        assert module.product.on
    assert not module.product.on

    class StoppedError(Exception):
        pass

    with pytest.raises(StoppedError), step_products(module):
        raise StoppedError
    assert not module.product.on


# In a block


def student_of(name: str, added: AddedBiases = AddedBiases(), bits: int = 16) -> nn.Module:  # noqa: B008
    config = FAMILIES[name]
    block = blocks_of(exact(random_model(config)))[0]
    layout = family_of(config.model_type).layout(config)
    return make_student(block, layout, added, DynamicTokens(), ActivationScheme(bits))


def groups_of(student: nn.Module) -> list[set[str]]:
    """Names of the layers of each product."""
    found: dict[int, set[str]] = {}
    for name, module in student.named_modules():
        if isinstance(module, QuantLinear) and module.merged is not None:
            found.setdefault(id(module.merged[0]), set()).add(name.rpartition(".")[2])
    return sorted(found.values(), key=len)


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("llama", [{"gate_proj", "up_proj"}, {"q_proj", "k_proj", "v_proj"}]),
        ("qwen2", [{"gate_proj", "up_proj"}, {"q_proj", "k_proj", "v_proj"}]),
        ("opt", [{"q_proj", "k_proj", "v_proj"}]),
        ("phi3", []),  # they are one matrix already
    ],
)
def test_layers_that_read_one_input_are_one_product(name: str, groups: list[set[str]]) -> None:
    assert groups_of(student_of(name)) == groups


def test_layers_of_which_some_have_a_bias_are_not_merged() -> None:
    added = AddedBiases(frozenset(), frozenset({"self_attn.v_proj", "self_attn.o_proj"}))
    student = student_of("llama", added)
    assert groups_of(student) == [{"gate_proj", "up_proj"}]
    everyone = AddedBiases(frozenset(), added.linears | {"self_attn.q_proj", "self_attn.k_proj"})
    assert len(groups_of(student_of("llama", everyone))) == 2


def as_a_step_gives_them(student: nn.Module) -> Weights:
    """All weights, those of a product with its first layer."""
    weights = weights_of(student)
    products: dict[int, list[tuple[int, str]]] = {}
    for name, module in student.named_modules():
        if isinstance(module, QuantLinear) and module.merged is not None:
            products.setdefault(id(module.merged[0]), []).append((module.merged[1], name))
    for parts in products.values():
        names = [name for _, name in sorted(parts)]
        for kind in ("weight", "bias"):
            if f"{names[0]}.{kind}" in weights:
                weights[f"{names[0]}.{kind}"] = torch.cat([weights.pop(f"{name}.{kind}") for name in names])
    return weights


@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_block_gives_the_same_with_step_products(name: str, bits: int) -> None:
    """Of every family: its layers are called in another order than they are listed in."""
    student = student_of(name, bits=bits)
    hidden, context, _ = block_calls(exact(random_model(FAMILIES[name])), some_ids())[0]
    calls: Callable[..., Tensor] = call_block
    separate = calls(student, hidden, context, weights_of(student))
    with step_products(student):
        together = calls(student, hidden, context, as_a_step_gives_them(student))
    assert (together - separate).norm() < (1e-12 if bits == 16 else 1e-2) * separate.norm()


def test_a_product_of_a_block_has_the_biases_that_were_added() -> None:
    student = student_of("llama", AddedBiases(frozenset(), frozenset(f"self_attn.{x}_proj" for x in "qkv")))
    for x in "qkv":
        student.get_submodule(f"self_attn.{x}_proj").bias.data.normal_()  # type: ignore[union-attr]
    hidden, context, _ = block_calls(exact(random_model(llama_config())), some_ids())[0]
    separate = call_block(student, hidden, context, weights_of(student))
    with step_products(student):
        together = call_block(student, hidden, context, as_a_step_gives_them(student))
    torch.testing.assert_close(together, separate, rtol=1e-10, atol=1e-10)
