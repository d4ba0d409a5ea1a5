"""Learnable smoothing: per-channel scales and shifts that move difficulty from activations into weights.

OmniQuant calls it the learnable equivalent transformation (LET), LRQuant learnable smoothing. The four sites of both
bear their names: `qkv` and `fc1` (norm to linear layers), `out` (v to output projection), `qkt` (q against k). ABQ-LLM
adds `fc2` (up to down projection of a gated MLP), which neither of them smooths.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ptql.errors import InputError, check_number
from ptql.families import AttentionSites, BlockLayout, MlpSite, NormSite, Rows
from ptql.functional import smoothing
from ptql.parts import check_learning_rate
from ptql.parts.transforms.base import AddedBiases, BlockFacts, Matrix, Transform, TransformState, Weights
from ptql.recipe import ActivationScheme, IntScheme

Site = Literal["qkv", "out", "qkt", "fc1", "fc2"]
USUAL: tuple[Site, ...] = ("qkv", "out", "qkt", "fc1")
Initial = Literal["log", "balanced", "ones"]
Shift = Literal["none", "biased", "all"]
When = Literal["activations", "always"]


class Smooth(Transform):
    """Learnable scales and shifts between neighbouring layers.

    Args:
        initial: Scales to start from: `log` of activations (LRQuant), `balanced` between activations and
            weights (SmoothQuant, OmniQuant), or `ones`.
        alpha: Share of the activations in `balanced`.
        shift: Learn shifts too: `none`; `biased`, only where the model has a bias to fold them into (OmniQuant);
            `all`, adding biases to norms and linear layers that have none (LRQuant; our own format only).
        lr: Learning rate of scales and shifts.
        sites: The pairs of layers that are smoothed; by default all but `fc2`. Where a model's MLP has no gate there
            is no `fc2`, and nothing is smoothed there.
        when: `activations`, only if activations are quantised (the originals' scripts), or `always`.
        faithful: As the originals: q/k scales that ignore RoPE's pairs (then not an equivalence), and `balanced`
            from the weights of one consumer instead of all.
    """

    def __init__(
        self,
        initial: Initial = "log",
        alpha: float = 0.5,
        shift: Shift = "all",
        lr: float = 1e-3,
        sites: Sequence[Site] = USUAL,
        when: When = "activations",
        faithful: bool = False,
    ) -> None:
        for name, value, kind in (
            ("initial", initial, Initial),
            ("shift", shift, Shift),
            ("when", when, When),
        ):
            if value not in get_args(kind):
                raise InputError(f"{name}={value!r}: one of {', '.join(get_args(kind))} is needed; see the docs")
        if not isinstance(sites, Sequence) or isinstance(sites, str) or any(s not in get_args(Site) for s in sites):
            named = ", ".join(get_args(Site))
            raise InputError(f"sites={sites!r}: a list of {named} is needed; leave out for all but fc2")
        check_number("alpha", alpha, 0, 1, "the activations' share is between 0 and 1; 0.5 is usual")
        check_learning_rate(lr, "take `transforms: []` to smooth nothing")
        self.initial: Initial = initial
        self.alpha = alpha
        self.shift: Shift = shift
        self.lr = lr
        self.sites = tuple(sites)
        self.when: When = when
        self.faithful = faithful

    def applies(self, weight: IntScheme, activation: ActivationScheme) -> bool:
        return self.when == "always" or activation.quantised

    def added_biases(self, layout: BlockLayout, biased: frozenset[str]) -> AddedBiases:
        if self.shift != "all":
            return AddedBiases()
        norms, linears = set(), set()
        for site in layout.norms:
            if site.name in self.sites:
                norms |= set() if site.has_bias else {site.norm}
                linears |= set(site.consumers)
        if "out" in self.sites:
            linears |= {layout.attention.v.linear, layout.attention.o}
        return AddedBiases(frozenset(norms), frozenset(linears) - biased)

    def for_block(self, facts: BlockFacts) -> TransformState:
        layout, attention = facts.layout, facts.layout.attention
        states: list[TransformState] = [
            SmoothNorm(site, self._scale(site, facts), self._norm_shift(site, facts))
            for site in layout.norms
            if site.name in self.sites
        ]
        if "out" in self.sites:
            states.append(SmoothValue(attention, self._value_scale(facts), self._value_shift(facts)))
        if "qkt" in self.sites:
            tied = 0 if self.faithful else attention.rotary
            kind = SmoothQueryKey if attention.head_norms is None else SmoothHeadNorms
            states.append(kind(attention, tied))
        if "fc2" in self.sites and layout.mlp is not None:
            states.append(SmoothGated(layout.mlp, self._gated_scale(layout.mlp, facts)))
        return SmoothBlock(states, self.lr)

    def _initial(self, absmax: Tensor, weight_peak: Tensor) -> Tensor:
        if self.initial == "log":
            return smoothing.log_activation_scale(absmax)
        if self.initial == "balanced":
            return smoothing.balanced_scale(absmax, weight_peak, self.alpha)
        return torch.ones_like(absmax)

    def _scale(self, site: NormSite, facts: BlockFacts) -> Tensor:
        consumers = site.consumers[-1:] if self.faithful else site.consumers
        peaks = [facts.weights[f"{name}.weight"].abs().amax(0) for name in consumers]
        return self._initial(facts.ranges[site.consumers[-1]].absmax, torch.stack(peaks).amax(0))

    def _value_scale(self, facts: BlockFacts) -> Tensor:
        site = facts.layout.attention
        # One value channel feeds several query heads: the widest of their activations counts.
        absmax = _by_value_channel(facts.ranges[site.o].absmax, site).amax(1).flatten()
        peak = _by_value_channel(facts.weights[f"{site.o}.weight"].abs().amax(0), site).amax(1).flatten()
        return self._initial(absmax, peak)

    def _gated_scale(self, site: MlpSite, facts: BlockFacts) -> Tensor:
        peak = facts.weights[f"{site.down}.weight"].abs().amax(0)
        return self._initial(facts.ranges[site.down].absmax, peak)

    def _norm_shift(self, site: NormSite, facts: BlockFacts) -> Tensor | None:
        middle = facts.ranges[site.consumers[-1]].middle
        if self.shift == "none" or any(f"{name}.bias" not in facts.weights for name in site.consumers):
            return None  # a shift goes into the consumers' biases
        if site.has_bias:
            return middle.clone()
        return torch.zeros_like(middle) if self.shift == "all" else None

    def _value_shift(self, facts: BlockFacts) -> Tensor | None:
        site = facts.layout.attention
        bias = facts.weights.get(f"{site.v.linear}.bias")
        if self.shift == "none" or bias is None or f"{site.o}.bias" not in facts.weights:
            return None
        middle = _by_value_channel(facts.ranges[site.o].middle, site).mean(1).flatten()
        own_bias = bool(bias[site.v.start : site.v.stop].any())
        return middle if own_bias else torch.zeros_like(middle)


def _by_value_channel(x: Tensor, site: AttentionSites) -> Tensor:
    """Channels of the output projection's input, [kv_heads, query heads of each, head_dim]."""
    return x.view(site.kv_heads, site.heads // site.kv_heads, site.head_dim)


class SmoothBlock(TransformState):
    """All sites of one block, one learning rate."""

    takes_scaled = True

    def __init__(self, sites: list[TransformState], lr: float) -> None:
        super().__init__()
        self.sites = nn.ModuleList(sites)
        self.lr = lr

    def forward(self, weights: Weights) -> Weights:
        for site in self.sites:
            weights = site(weights)
        return weights

    @torch.no_grad()
    def project(self) -> None:
        for name, parameter in self.named_parameters():
            if name.endswith("scale"):
                smoothing.keep_away_from_zero(parameter)


class SmoothNorm(TransformState):
    """A norm divided by `scale` and shifted by `shift`, each [hidden], and its consumers."""

    def __init__(self, site: NormSite, scale: Tensor, shift: Tensor | None) -> None:
        super().__init__()
        self.site = site
        self.scale = nn.Parameter(scale)
        self.shift = None if shift is None else nn.Parameter(shift)

    def forward(self, weights: Weights) -> Weights:
        norm = self.site.norm
        wrapped = f"{norm}.norm.weight"  # an RMSNorm inside a ShiftedNorm
        weight, bias = wrapped if wrapped in weights else f"{norm}.weight", f"{norm}.bias"
        folded = smoothing.fold_into_norm(weights[weight], weights.get(bias), self.scale, self.shift, self.site.offset)
        weights = _with(weights, weight, bias, folded)
        for name in self.site.consumers:
            weights = _fold(weights, name, smoothing.fold_into_consumer, self.scale, self.shift)
        return weights


class SmoothValue(TransformState):
    """v divided by `scale` and shifted by `shift`, each [kv_heads * head_dim], and the output projection."""

    name = "out"

    def __init__(self, site: AttentionSites, scale: Tensor, shift: Tensor | None) -> None:
        super().__init__()
        self.site = site
        self.scale = nn.Parameter(scale)
        self.shift = None if shift is None else nn.Parameter(shift)

    def forward(self, weights: Weights) -> Weights:
        s = self.site
        weights = _fold_rows(weights, s.v, self.scale, self.shift)
        scale = smoothing.repeat_heads(self.scale, s.kv_heads, s.heads)
        shift = None if self.shift is None else smoothing.repeat_heads(self.shift, s.kv_heads, s.heads)
        return _fold(weights, s.o, smoothing.fold_into_consumer, scale, shift)


class SmoothGated(TransformState):
    """The up projection of a gated MLP divided by `scale` [columns of the down projection], and the down projection.

    There is no shift: what is added to the product with the gate is not the same for all tokens.
    """

    name = "fc2"

    def __init__(self, site: MlpSite, scale: Tensor) -> None:
        super().__init__()
        self.site = site
        self.scale = nn.Parameter(scale)

    def forward(self, weights: Weights) -> Weights:
        weights = _fold_rows(weights, self.site.up, self.scale, None)
        return _fold(weights, self.site.down, smoothing.fold_into_consumer, self.scale, None)


class SmoothQueryKey(TransformState):
    """q divided and k multiplied by `scale`: [kv_heads * head_dim], less where RoPE ties pairs.

    Args:
        site: The projections.
        tied: Leading channels of each head that are tied in pairs; 0 for none.
    """

    name = "qkt"

    def __init__(self, site: AttentionSites, tied: int) -> None:
        super().__init__()
        self.site = site
        self.tied = tied
        self.scale = nn.Parameter(torch.ones(site.kv_heads * (site.head_dim - tied // 2)))

    def forward(self, weights: Weights) -> Weights:
        s = self.site
        scale = smoothing.both_of_each_pair(self.scale, s.kv_heads, self.tied)
        by_query = smoothing.repeat_heads(scale, s.kv_heads, s.heads)
        weights = _fold_rows(weights, s.q, by_query, None)
        return _fold_rows(weights, s.k, 1 / scale, None)


class SmoothHeadNorms(TransformState):
    """As `SmoothQueryKey` where a norm follows the projections and undoes what they are scaled by.

    The norms' weights take the scale, [head_dim] for all heads, less where RoPE ties pairs.
    """

    name = "qkt"

    def __init__(self, site: AttentionSites, tied: int) -> None:
        super().__init__()
        assert site.head_norms is not None
        self.site = site
        self.norms = site.head_norms
        self.tied = tied
        self.scale = nn.Parameter(torch.ones(site.head_dim - tied // 2))

    def forward(self, weights: Weights) -> Weights:
        scale = smoothing.both_of_each_pair(self.scale, 1, self.tied)
        for norm, by in ((self.norms.q, scale), (self.norms.k, 1 / scale)):
            weight, bias = f"{norm}.weight", f"{norm}.bias"
            folded = smoothing.fold_into_norm(weights[weight], weights.get(bias), by, None, self.norms.offset)
            weights = _with(weights, weight, bias, folded)
        return weights


def _with(weights: Weights, weight: str, bias: str, folded: tuple[Matrix | None, Tensor | None]) -> Weights:
    named = {weight: folded[0], bias: folded[1]}
    return {**weights, **{name: tensor for name, tensor in named.items() if tensor is not None}}


def _fold(weights: Weights, name: str, fold, scale: Tensor, shift: Tensor | None) -> Weights:
    weight, bias = f"{name}.weight", f"{name}.bias"
    return _with(weights, weight, bias, fold(weights[weight], weights.get(bias), scale, shift))


def _fold_rows(weights: Weights, rows: Rows, scale: Tensor, shift: Tensor | None) -> Weights:
    """Fold into the rows as a producer; the others of a fused matrix stay as they are: divided by 1, shifted by 0."""
    size = weights[f"{rows.linear}.weight"].shape[0]
    whole_shift = None if shift is None else _among(shift, rows, size, 0.0)
    return _fold(weights, rows.linear, smoothing.fold_into_producer, _among(scale, rows, size, 1.0), whole_shift)


def _among(values: Tensor, rows: Rows, size: int, others: float) -> Tensor:
    """[size] with `values` in the place of these rows and `others` elsewhere."""
    if len(values) == size:
        return values
    before, after = values.new_full((rows.start,), others), values.new_full((size - rows.start - len(values),), others)
    return torch.cat([before, values, after])
