"""Smoothing is an equivalence: float64 blocks and models of every family, every site, every kind of shift."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ptql.calibration.ranks import Ranks
from ptql.calibration.statistics import observe_inputs
from ptql.errors import InputError
from ptql.families import BlockLayout, family_of
from ptql.functional import smoothing
from ptql.functional.scaled import Scaled
from ptql.nn.quant_linear import ShiftedNorm
from ptql.nn.student import biased_linears, call_block, make_student, run_block, weights_of
from ptql.parts.activations import DynamicTokens
from ptql.parts.inputs import InputRange
from ptql.parts.transforms import BlockFacts, Smooth, TransformState, Weights
from ptql.parts.transforms.smooth import Shift, Site
from ptql.recipe import ActivationScheme, IntScheme
from tests.models import CONFIGS, FAMILIES, block_calls, blocks_of, exact, opt_config, random_model, some_ids

# With the norm after the residual only the attention can be folded: a test of its own.
FOLDED = [name for name in CONFIGS if name not in ("opt_post_norm", "opt_projected")]
SITES: dict[str, tuple[Site, ...]] = {**{site: (site,) for site in get_args(Site)}, "all": get_args(Site)}
NOTHING = [("opt", "fc2")]  # an MLP without a gate
LLAMA_QKV = ("self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj")
UNQUANTISED = ActivationScheme(16)


@cache
def exact_model(name: str) -> PreTrainedModel:
    return exact(random_model(CONFIGS[name]))


@cache
def reference(name: str) -> tuple[Tensor, dict[str, Any], Tensor]:
    """Input and output of block 1, and its context, which is that of one sample: it serves any number."""
    hidden, _, output = block_calls(exact_model(name), some_ids())[1]
    return hidden, block_calls(exact_model(name), some_ids()[:1])[1][1], output


def layout_of(name: str) -> BlockLayout:
    return family_of(CONFIGS[name].model_type).layout(CONFIGS[name])


def some_ranges(layout: BlockLayout, weights: dict[str, Tensor]) -> dict[str, InputRange]:
    """Random, the same for layers that share an input."""
    ranges = {}
    for group in layout.linears:
        columns = weights[f"{group[0]}.weight"].shape[1]
        middle, width = torch.randn(columns).double(), torch.rand(columns).double() + 0.1
        ranges |= dict.fromkeys(group, InputRange(middle - width, middle + width, middle, width))
    return ranges


def student_and_facts(block: nn.Module, layout: BlockLayout, smooth: Smooth) -> tuple[nn.Module, BlockFacts]:
    """What `QuantLM` makes of a block for a recipe of one transform, without rounding."""
    added = smooth.added_biases(layout, biased_linears(block, layout))
    student = make_student(copy.deepcopy(block), layout, added, DynamicTokens(), UNQUANTISED)
    weights = weights_of(student)
    return student, BlockFacts(layout, weights, some_ranges(layout, weights), 1, 2)


def prepared(name: str, **settings: Any) -> tuple[nn.Module, BlockFacts, TransformState]:
    smooth = Smooth(when="always", **settings)
    student, facts = student_and_facts(blocks_of(exact_model(name))[1], layout_of(name), smooth)
    return student, facts, smooth.for_block(facts)


@torch.no_grad()
def scatter(state: TransformState) -> TransformState:
    """Random learnables: scales of 0.2 to 5, shifts of both signs. Returns the state, in float64."""
    state.double()
    for name, p in state.named_parameters():
        if name.endswith("scale"):
            p.uniform_(0.2, 5.0)
        else:
            p.normal_(0.0, 2.0)
    return state


def error(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def sizes(state: TransformState) -> dict[str, int]:
    """Elements of each learnable, by kind of site."""
    names = {
        "SmoothNorm": "norm",
        "SmoothValue": "out",
        "SmoothQueryKey": "qkt",
        "SmoothHeadNorms": "qkt",
        "SmoothGated": "fc2",
    }
    found: dict[str, int] = {}
    for site in state.get_submodule("sites").children():
        kind = names[type(site).__name__]
        key = f"{kind}:{site.site.norm}" if kind == "norm" else kind
        found |= {f"{key}.{name}": p.numel() for name, p in site.named_parameters()}
    return found


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(3)


# The equivalence


@pytest.mark.parametrize("shift", get_args(Shift))
@pytest.mark.parametrize(
    ("name", "sites"),
    [
        (name, sites)
        for name in FOLDED
        for sites in SITES
        if (sites == "all" or name in FAMILIES) and (name, sites) not in NOTHING
    ],
)
def test_any_scales_and_shifts_leave_the_blocks_output(name: str, shift: Shift, sites: str) -> None:
    hidden, context, expected = reference(name)
    student, facts, state = prepared(name, shift=shift, sites=SITES[sites])
    folded = scatter(state)(facts.weights)
    output = run_block(student, hidden, context, 2, folded)
    assert output.dtype == torch.float64
    assert error(output, expected) < 1e-10
    changed = {k for k, w in folded.items() if not torch.equal(w, facts.weights[k])}
    assert len(changed) >= (1 if name.startswith("phi3") else 2)  # q and k, in one matrix there
    assert folded.keys() == facts.weights.keys()


def test_without_a_gate_there_is_nothing_to_smooth_after_it() -> None:
    _, facts, state = prepared("opt", sites=("fc2",))
    assert not list(state.parameters())
    assert state(facts.weights) is facts.weights


@pytest.mark.parametrize("name", [name for name in FOLDED if name != "opt"])
def test_the_product_with_the_gate_starts_from_its_own_activations(name: str) -> None:
    _, facts, state = prepared(name, sites=("fc2",), initial="log")
    (scale,) = state.parameters()
    absmax = facts.ranges[facts.layout.last].absmax
    torch.testing.assert_close(scale.double(), absmax / torch.log2(2 + absmax))


@pytest.mark.parametrize("shift", get_args(Shift))
@pytest.mark.parametrize("name", FOLDED)
def test_a_model_whose_every_block_is_folded_gives_the_same_logits(name: str, shift: Shift) -> None:
    model, ids = copy.deepcopy(exact_model(name)), some_ids()
    expected = exact_model(name)(ids, use_cache=False).logits
    blocks, smooth = blocks_of(model), Smooth(shift=shift, when="always")
    for index, block in enumerate(blocks):
        student, facts = student_and_facts(block, layout_of(name), smooth)
        folded = scatter(smooth.for_block(facts))(facts.weights)
        for parameter_name, p in student.named_parameters():
            p.data.copy_(folded[parameter_name].detach())
        blocks[index] = student
    assert error(model(ids, use_cache=False).logits, expected) < 1e-10


@pytest.mark.parametrize("name", FAMILIES)
def test_scales_are_equivalences_for_a_negative_sign_too(name: str) -> None:
    hidden, context, expected = reference(name)
    student, facts, state = prepared(name)
    scatter(state)
    with torch.no_grad():
        for parameter, p in state.named_parameters():
            if parameter.endswith("scale"):
                p[::3] *= -1
    assert error(run_block(student, hidden, context, 2, state(facts.weights)), expected) < 1e-10


@pytest.mark.parametrize("name", FAMILIES)
def test_untied_query_key_scales_are_an_equivalence_without_rope_only(name: str) -> None:
    hidden, context, expected = reference(name)
    student, facts, state = prepared(name, sites=("qkt",), faithful=True)
    difference = error(run_block(student, hidden, context, 2, scatter(state)(facts.weights)), expected)
    if name == "opt":
        assert difference < 1e-10
    else:
        assert difference > 1e-3


@pytest.mark.parametrize("name", FAMILIES)
def test_every_learnable_changes_the_folded_weights_and_none_the_output(name: str) -> None:
    hidden, context, _ = reference(name)
    student, facts, state = prepared(name, shift="all")
    scatter(state)
    parameters = dict(state.named_parameters())
    assert len(parameters) == 7  # two norms and v with scale and shift each, q against k
    folded = state(facts.weights)
    mixed = torch.stack([(w * torch.randn_like(w)).sum() for w in folded.values()]).sum()
    through_weights = torch.autograd.grad(mixed, parameters.values(), retain_graph=True)
    output = call_block(student, hidden, context, folded)
    through_output = torch.autograd.grad((output * torch.randn_like(output)).sum(), parameters.values())
    for wide, none in zip(through_weights, through_output, strict=True):
        assert (wide != 0).all()
        assert none.abs().max() < 1e-9 * output.norm()


def test_folding_leaves_the_given_weights_alone() -> None:
    _, facts, state = prepared("opt")
    before = {k: w.clone() for k, w in facts.weights.items()}
    names = list(facts.weights)
    scatter(state)(facts.weights)
    assert list(facts.weights) == names
    assert all(torch.equal(w, before[k]) for k, w in facts.weights.items())


def test_post_norm_opt_has_the_attention_sites_only() -> None:
    config = opt_config(do_layer_norm_before=False)
    model, layout = exact(random_model(config)), family_of("opt").layout(config)
    hidden, context, expected = block_calls(model, some_ids())[0]
    smooth = Smooth(shift="all", when="always")
    student, facts = student_and_facts(blocks_of(model)[0], layout, smooth)
    state = scatter(smooth.for_block(facts))
    assert set(sizes(state)) == {"out.scale", "out.shift", "qkt.scale"}
    assert error(run_block(student, hidden, context, 2, state(facts.weights)), expected) < 1e-10


# Matrices that are not multiplied out


def with_scaled(facts: BlockFacts) -> Weights:
    """The block's weights as a step has them: matrices of the linear layers stay as they are, and take factors."""
    matrices = {f"{name}.weight" for group in facts.layout.linears for name in group}
    return {name: Scaled(weight) if name in matrices else weight for name, weight in facts.weights.items()}


def densified(weights: Weights) -> dict[str, Tensor]:
    return {name: weight.dense() if isinstance(weight, Scaled) else weight for name, weight in weights.items()}


SETTINGS: dict[str, dict[str, Any]] = {
    **{f"shift {shift}": {"shift": shift} for shift in get_args(Shift)},
    **{f"{site} alone": {"sites": (site,)} for site in get_args(Site)},
    "faithful": {"faithful": True},
}


@pytest.mark.parametrize(
    ("name", "settings"), [(n, s) for n in FOLDED for s in SETTINGS if (n, s.removesuffix(" alone")) not in NOTHING]
)
def test_scaled_matrices_are_folded_to_the_same_weights_and_gradients(name: str, settings: str) -> None:
    _, facts, state = prepared(name, **SETTINGS[settings])
    scatter(state)
    dense, scaled = state(facts.weights), state(with_scaled(facts))
    assert list(scaled) == list(dense)
    for weight, given in with_scaled(facts).items():
        assert isinstance(scaled[weight], Scaled) == isinstance(given, Scaled), weight
        if isinstance(given, Scaled):
            assert scaled[weight].base is given.base  # as it is stored
    found = densified(scaled)
    for weight, expected in dense.items():
        torch.testing.assert_close(found[weight], expected, rtol=1e-12, atol=1e-12, msg=weight)
    mixed = {weight: torch.randn_like(expected) for weight, expected in dense.items()}
    gradients = [
        torch.autograd.grad(torch.stack([(w * mixed[k]).sum() for k, w in weights.items()]).sum(), state.parameters())
        for weights in (found, dense)
    ]
    for (parameter, _), ours, theirs in zip(state.named_parameters(), *gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9, msg=parameter)


def test_scaled_matrices_of_a_norm_after_the_residual_are_folded_too() -> None:
    config = opt_config(do_layer_norm_before=False)
    layout, smooth = family_of("opt").layout(config), Smooth(shift="all", when="always")
    _, facts = student_and_facts(blocks_of(exact(random_model(config)))[0], layout, smooth)
    state = scatter(smooth.for_block(facts))
    dense, scaled = state(facts.weights), densified(state(with_scaled(facts)))
    for weight, expected in dense.items():
        torch.testing.assert_close(scaled[weight], expected, rtol=1e-12, atol=1e-12, msg=weight)


# What is learned: 4 query heads on 2 key/value heads of 12 channels, hidden size 48


def test_llamas_learnables_are_sized_by_key_value_heads() -> None:
    _, _, state = prepared("llama", shift="all")
    assert sizes(state) == {
        "norm:input_layernorm.scale": 48,
        "norm:input_layernorm.shift": 48,
        "norm:post_attention_layernorm.scale": 48,
        "norm:post_attention_layernorm.shift": 48,
        "out.scale": 24,
        "out.shift": 24,
        "qkt.scale": 12,
    }
    assert sizes(prepared("llama", sites=("qkt",), faithful=True)[2]) == {"qkt.scale": 24}


@pytest.mark.parametrize(
    ("name", "tied", "free"),
    [
        ("llama", 2 * 6, 2 * 12),
        ("llama_head_dim", 2 * 10, 2 * 20),
        ("qwen3", 8, 16),  # one weight of the norm for all heads
        ("gemma2", 2 * 8, 2 * 16),
        ("gemma3", 8, 16),
        ("phi3", 2 * (3 + 6), 2 * 12),  # RoPE on half of the channels
        ("phi3_tied", 2 * 6, 2 * 12),
        ("opt", 4 * 12, 4 * 12),
    ],
)
def test_query_key_scales_tie_what_is_rotated(name: str, tied: int, free: int) -> None:
    assert sizes(prepared(name, sites=("qkt",))[2]) == {"qkt.scale": tied}
    assert sizes(prepared(name, sites=("qkt",), faithful=True)[2]) == {"qkt.scale": free}


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_scales_behind_a_norm_of_each_head_are_in_that_norm_only(name: str) -> None:
    _, facts, state = prepared(name, sites=("qkt",))
    folded = scatter(state)(facts.weights)
    changed = {k for k, w in folded.items() if not torch.equal(w, facts.weights[k])}
    assert changed == {"self_attn.q_norm.weight", "self_attn.k_norm.weight"}
    offset = int(name == "gemma3")
    old, new = (
        {side: weights[f"self_attn.{side}_norm.weight"] + offset for side in "qk"}
        for weights in (facts.weights, folded)
    )
    torch.testing.assert_close(new["q"] * new["k"], old["q"] * old["k"])
    ratio = (old["q"] / new["q"]).tolist()
    assert ratio[:8] == pytest.approx(ratio[8:])  # channels that are rotated into each other
    assert len({round(r, 6) for r in ratio}) == 8


def test_a_fused_matrix_is_folded_in_its_own_rows_only() -> None:
    rows = {"q": slice(0, 48), "k": slice(48, 72), "v": slice(72, 96)}
    for site, changed in (("qkt", "qk"), ("out", "v")):
        _, facts, state = prepared("phi3", sites=(site,))
        folded = scatter(state)(facts.weights)
        for name in ("self_attn.qkv_proj.weight", "self_attn.qkv_proj.bias"):
            if name in folded and (site == "out" or name.endswith("weight")):
                differs = {part for part, own in rows.items() if (folded[name][own] != facts.weights[name][own]).any()}
                assert differs == set(changed), name
        with torch.no_grad():
            for p in state.parameters():
                p.fill_(1.0)
        untouched = state(facts.weights)["self_attn.qkv_proj.weight"]
        assert torch.equal(untouched, facts.weights["self_attn.qkv_proj.weight"])


def test_a_norm_around_one_is_divided_with_its_one() -> None:
    _, facts, state = prepared("gemma2", sites=("qkv", "fc1"), shift="none")
    folded = scatter(state)(facts.weights)
    for norm in ("input_layernorm", "pre_feedforward_layernorm"):
        old, new = facts.weights[f"{norm}.weight"].tolist(), folded[f"{norm}.weight"].tolist()
        scales = norm_scale(state, norm).tolist()
        assert new == pytest.approx([(1 + w) / s - 1 for w, s in zip(old, scales, strict=True)])
    for norm in ("post_attention_layernorm", "post_feedforward_layernorm"):
        assert torch.equal(folded[f"{norm}.weight"], facts.weights[f"{norm}.weight"])


def test_opts_learnables() -> None:
    everything = {
        "norm:self_attn_layer_norm.scale": 48,
        "norm:self_attn_layer_norm.shift": 48,
        "norm:final_layer_norm.scale": 48,
        "norm:final_layer_norm.shift": 48,
        "out.scale": 48,
        "out.shift": 48,
        "qkt.scale": 48,
    }
    for shift in ("all", "biased"):
        assert sizes(prepared("opt", shift=shift)[2]) == everything
    scales = {k: v for k, v in everything.items() if k.endswith("scale")}
    assert sizes(prepared("opt", shift="none")[2]) == scales


@pytest.mark.parametrize(
    ("name", "shift", "shifted"),
    [
        ("llama", "none", set()),
        ("llama", "biased", set()),
        ("llama_biased", "none", set()),
        ("llama_biased", "biased", {"out.shift"}),
        ("qwen2", "biased", set()),  # o has no bias
        ("gemma2_uncapped", "biased", {"out.shift"}),
        (
            "llama_biased",
            "all",
            {"norm:input_layernorm.shift", "norm:post_attention_layernorm.shift", "out.shift"},
        ),
    ],
)
def test_shifts_are_learned_where_they_are_wanted(name: str, shift: Shift, shifted: set[str]) -> None:
    _, _, state = prepared(name, shift=shift)
    assert {key for key in sizes(state) if key.endswith("shift")} == shifted


@pytest.mark.parametrize(
    ("sites", "norms", "linears"),
    [
        (("qkv",), {"input_layernorm"}, set(LLAMA_QKV)),
        (("fc1",), {"post_attention_layernorm"}, {"mlp.gate_proj", "mlp.up_proj"}),
        (("out",), set(), {"self_attn.v_proj", "self_attn.o_proj"}),
        (("qkt",), set(), set()),
    ],
)
def test_only_the_biases_that_shifts_need_are_added(
    sites: tuple[Site, ...], norms: set[str], linears: set[str]
) -> None:
    block, layout = blocks_of(exact_model("llama"))[0], layout_of("llama")
    added = Smooth(shift="all", sites=sites).added_biases(layout, biased_linears(block, layout))
    assert (added.norms, added.linears) == (norms, linears)
    for shift in ("none", "biased"):
        none = Smooth(shift=shift, sites=sites).added_biases(layout, frozenset())
        assert (none.norms, none.linears) == (set(), set())
    own = frozenset({"self_attn.v_proj", "mlp.up_proj"})
    assert Smooth(shift="all", sites=sites).added_biases(layout, own).linears == linears - own


def test_nothing_is_added_to_opt() -> None:
    block, layout = blocks_of(exact_model("opt"))[0], layout_of("opt")
    added = Smooth(shift="all").added_biases(layout, biased_linears(block, layout))
    assert (added.norms, added.linears) == (set(), set())


def test_the_student_of_a_shifted_llama_has_zero_biases() -> None:
    student, facts, _ = prepared("llama", shift="all")
    biases = {name: w for name, w in facts.weights.items() if name.endswith("bias")}
    assert len(biases) == 2 + 3 + 1 + 2  # norms, q/k/v, o, gate and up; down_proj is not smoothed
    assert not any(b.any() for b in biases.values())
    assert isinstance(student.get_submodule("input_layernorm"), ShiftedNorm)
    hidden, context, expected = reference("llama")
    assert error(run_block(student, hidden, context, 2), expected) < 1e-12


# Where learning starts


def norm_scale(state: TransformState, norm: str) -> Tensor:
    sites = [s for s in state.get_submodule("sites") if getattr(s.site, "norm", None) == norm]
    return sites[0].scale.detach()


def value_site(state: TransformState) -> nn.Module:
    return next(s for s in state.get_submodule("sites") if type(s).__name__ == "SmoothValue")


def test_log_scales_come_from_activations() -> None:
    _, facts, state = prepared("llama", initial="log")
    absmax = facts.ranges["mlp.up_proj"].absmax
    assert torch.equal(norm_scale(state, "post_attention_layernorm"), smoothing.log_activation_scale(absmax))
    absmax = facts.ranges["self_attn.q_proj"].absmax
    assert torch.equal(norm_scale(state, "input_layernorm"), smoothing.log_activation_scale(absmax))


def test_ones_are_ones_and_query_key_scales_always_start_there() -> None:
    for initial in ("ones", "log", "balanced"):
        _, _, state = prepared("llama_biased", initial=initial)
        for site in state.get_submodule("sites"):
            if initial == "ones" or type(site).__name__ == "SmoothQueryKey":
                assert (site.scale == 1).all()


@pytest.mark.parametrize("faithful", [False, True])
def test_balanced_scales_weigh_all_consumers_or_as_the_originals_one(faithful: bool) -> None:
    _, facts, state = prepared("llama", initial="balanced", alpha=0.75, faithful=faithful)
    for norm, names in (
        ("input_layernorm", ("self_attn.q_proj",) if faithful else LLAMA_QKV),
        ("post_attention_layernorm", ("mlp.up_proj",) if faithful else ("mlp.gate_proj", "mlp.up_proj")),
    ):
        absmax = facts.ranges[names[-1]].absmax
        for c in range(48):
            column = [abs(v) for name in names for v in facts.weights[f"{name}.weight"][:, c].tolist()]
            expected = absmax[c].item() ** 0.75 / max(column) ** 0.25
            assert norm_scale(state, norm)[c].item() == pytest.approx(expected, rel=1e-9)


def test_one_consumer_and_all_of_them_differ() -> None:
    torch.manual_seed(0)
    one = norm_scale(prepared("llama", initial="balanced", faithful=True)[2], "input_layernorm")
    torch.manual_seed(0)
    every = norm_scale(prepared("llama", initial="balanced")[2], "input_layernorm")
    assert (every <= one).all()
    assert not torch.equal(one, every)


@pytest.mark.parametrize("initial", ["log", "balanced"])
@pytest.mark.parametrize("name", FAMILIES)
def test_value_scales_take_the_widest_query_head_of_each_key_value_head(name: str, initial: str) -> None:
    _, facts, state = prepared(name, initial=initial)
    attention = facts.layout.attention
    absmax = facts.ranges[attention.o].absmax.tolist()
    weight = facts.weights[f"{attention.o}.weight"].abs().amax(0).tolist()
    share, size = attention.heads // attention.kv_heads, attention.head_dim
    for kv in range(attention.kv_heads):
        for d in range(size):
            channels = [(kv * share + r) * size + d for r in range(share)]
            peak, column = max(absmax[c] for c in channels), max(weight[c] for c in channels)
            a = torch.tensor(peak, dtype=torch.float64)
            expected = a / torch.log2(2 + a) if initial == "log" else (a / column).sqrt()
            found = value_site(state).scale[kv * size + d].item()
            assert found == pytest.approx(expected.item(), rel=1e-9)


def running_middle(samples: Tensor) -> list[float]:
    """OmniQuant's activation shift: 0.99 old + 0.01 new of each sample's mid-range, per channel."""
    middle: list[float] | None = None
    for sample in samples.double():
        new = [(max(c) + min(c)) / 2 for c in sample.t().tolist()]
        middle = new if middle is None else [0.99 * m + 0.01 * n for m, n in zip(middle, new, strict=True)]
    assert middle is not None
    return middle


def test_opts_shifts_start_at_the_running_mid_range() -> None:
    model, layout = exact_model("opt"), layout_of("opt")
    hidden, context, _ = reference("opt")
    block = blocks_of(model)[1]
    inputs: dict[str, Tensor] = {}
    names = ("self_attn.q_proj", "self_attn.out_proj", "fc1")
    handles = [
        block.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: inputs.update({name: args[0].reshape(*hidden.shape)})
        )
        for name in names
    ]
    with observe_inputs(block, layout, hidden.shape[1], Ranks()) as ranges:
        run_block(block, hidden, context, len(hidden))
    for handle in handles:
        handle.remove()
    smooth = Smooth(shift="biased")
    _, facts = student_and_facts(block, layout, smooth)
    state = smooth.for_block(BlockFacts(layout, facts.weights, ranges(), 1, 2))
    shifts = [s.shift for s in state.get_submodule("sites") if getattr(s, "shift", None) is not None]
    assert len(shifts) == 3
    by_name = dict(zip(("self_attn.q_proj", "fc1", "self_attn.out_proj"), shifts, strict=True))
    for name in names:
        assert by_name[name].tolist() == pytest.approx(running_middle(inputs[name]), abs=1e-5)
        assert by_name[name].abs().max() > 0.01


def test_llamas_shifts_start_at_zero() -> None:
    _, _, state = prepared("llama", shift="all")
    shifts = [p for name, p in state.named_parameters() if name.endswith("shift")]
    assert len(shifts) == 3
    assert not any(p.any() for p in shifts)


def test_a_biased_value_shift_starts_at_the_mean_over_its_query_heads() -> None:
    _, facts, state = prepared("llama_biased", shift="biased")
    middle = facts.ranges["self_attn.o_proj"].middle.view(2, 2, 12)  # key/value heads, query heads of each, channels
    torch.testing.assert_close(value_site(state).shift.detach(), middle.mean(1).flatten())


# Between steps


def test_projection_pushes_scales_and_leaves_shifts() -> None:
    _, _, state = prepared("llama", shift="all")
    with torch.no_grad():
        for p in state.parameters():
            p[:5] = torch.tensor([0.0, 1e-3, -1e-3, -2.0, 5.0])
    state.project()
    expected = torch.tensor([0.01, 0.01, -0.01, -2.0, 5.0])
    for name, p in state.named_parameters():
        wanted = expected if name.endswith("scale") else torch.tensor([0.0, 1e-3, -1e-3, -2.0, 5.0])
        torch.testing.assert_close(p[:5].detach(), wanted.to(p.dtype))
        assert p.requires_grad


# Settings


@pytest.mark.parametrize(
    ("when", "bits", "applies"),
    [("activations", 16, False), ("activations", 4, True), ("always", 16, True), ("always", 4, True)],
)
def test_when_smoothing_applies(when: Any, bits: int, applies: bool) -> None:
    assert Smooth(when=when).applies(IntScheme(4), ActivationScheme(bits)) == applies


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"alpha": -0.1}, r"alpha=-0\.1: .*between 0 and 1; 0\.5"),
        ({"alpha": 1.5}, r"alpha=1\.5"),
        ({"alpha": float("nan")}, "alpha=nan"),
        ({"lr": 0.0}, r"lr=0\.0: .*above 0"),
        ({"lr": -1e-3}, r"lr=-0\.001"),
        ({"lr": float("nan")}, "lr=nan"),
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Smooth(**wrong)


def test_the_learning_rate_is_that_of_the_recipe() -> None:
    assert prepared("llama", lr=5e-3)[2].lr == 5e-3
