"""Number formats: what is refused, and which layer has which."""

from __future__ import annotations

import pytest

from ptql.calibration.ledger import difference
from ptql.calibration.quant_lm import QuantLM
from ptql.errors import InputError
from ptql.recipe import ActivationScheme, IntScheme, LayerFormat, LayerSchemes, may_have_clusters, schemes_by_pattern

LINEARS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
NAMES = {f"model.layers.{index}.{name}": f"{index}.{name}" for index in range(12) for name in LINEARS}
DEFAULT = IntScheme(3, 64)


def chosen(patterns: dict[str, LayerFormat]) -> dict[str, IntScheme]:
    return dict(schemes_by_pattern(DEFAULT, patterns, NAMES).exceptions)


def test_a_pattern_is_whole_words_of_a_name() -> None:
    eight = IntScheme(8, 64)
    assert chosen({"down_proj": 8}) == {f"{index}.mlp.down_proj": eight for index in range(12)}
    assert chosen({"layers.1": 8}) == {f"1.{name}": eight for name in LINEARS}  # and not 10 and 11
    assert chosen({"layers.1*": 8}) == {f"{index}.{name}": eight for index in (1, 10, 11) for name in LINEARS}
    assert chosen({"layers.*.self_attn": 8}).keys() == {k for k in NAMES.values() if "self_attn" in k}
    assert chosen({"model.layers.3.mlp.down_proj": 8}) == {"3.mlp.down_proj": eight}


def test_a_later_pattern_wins_and_what_it_says_is_all_that_differs() -> None:
    found = chosen({"layers.0": {"bits": 4, "group_size": -1}, "down_proj": {"symmetric": True}, "layers.2": 3})
    assert found["0.self_attn.q_proj"] == IntScheme(4, -1)
    assert found["0.mlp.down_proj"] == IntScheme(3, 64, symmetric=True)  # of the default, not of the pattern before
    assert found["2.self_attn.q_proj"] == DEFAULT  # it is named, so that no budget changes it


def test_bits_alone_are_plain_bits() -> None:
    default = IntScheme(2, symmetric=True, balanced=True)
    schemes = schemes_by_pattern(default, {"down_proj": 4, "o_proj": 2}, NAMES)
    assert schemes.of(0, "mlp.down_proj") == IntScheme(4, symmetric=True)
    assert schemes.of(0, "self_attn.o_proj") == IntScheme(2, symmetric=True)
    assert schemes.of(0, "self_attn.q_proj") == default
    ternary = schemes_by_pattern(DEFAULT, {"down_proj": {"bits": 1, "balanced": True, "symmetric": True}}, NAMES)
    assert ternary.of(0, "mlp.down_proj") == IntScheme(1, 64, symmetric=True, balanced=True)


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ({"down": 8}, "layers: down: names no layer .*model.layers.0.self_attn.q_proj"),
        ({"down_proj": 9}, "layers: down_proj: weight bits=9: .*1 to 8"),
        ({"down_proj": {"width": 4}}, "layers: down_proj: width is no setting"),
        ({"down_proj": {"balanced": True}}, "balanced=true with bits=3: .*use bits: 2 .*bits: 1"),
    ],
)
def test_what_names_nothing_or_is_no_format_is_refused(patterns: dict[str, LayerFormat], message: str) -> None:
    with pytest.raises(InputError, match=message):
        chosen(patterns)


def test_one_bit_needs_a_zero_point() -> None:
    assert IntScheme(1).levels == 2
    with pytest.raises(InputError, match=r"bits=1, symmetric=true: .*balanced: true"):
        IntScheme(1, symmetric=True)


def test_a_sign_is_no_three_levels() -> None:
    for bits in (1, 2):
        with pytest.raises(InputError, match=r"salient=0\.2 with balanced=true: .*balanced: false, or salient: null"):
            IntScheme(bits, balanced=True, salient=0.2)


@pytest.mark.parametrize("symmetric", [True, False])
def test_only_one_and_two_bits_have_a_level_more(symmetric: bool) -> None:
    for bits in (3, 8, 16):
        with pytest.raises(InputError, match=f"balanced=true with bits={bits}: .*of 1 or 2 bits"):
            IntScheme(bits, symmetric=symmetric, balanced=True)
    assert IntScheme(1, 16, symmetric, balanced=True).to_dict() == {
        "bits": 1,
        "group_size": 16,
        "symmetric": symmetric,
        "balanced": True,
    }


@pytest.mark.parametrize(
    ("scheme", "name", "levels"),
    [
        (IntScheme(1), "1", 2),
        (IntScheme(3), "3", 8),
        (IntScheme(2, balanced=True), "2b", 5),
        (IntScheme(1, symmetric=True, balanced=True), "1b", 3),
    ],
    ids=["1", "3", "2b", "1b"],
)
def test_three_and_five_levels_are_one_and_two_bits_in_name_only(scheme: IntScheme, name: str, levels: int) -> None:
    assert (scheme.name, scheme.levels) == (name, levels)


def test_the_caches_bits_are_those_of_activations_unless_they_are_given() -> None:
    assert ActivationScheme(4).cache_bits == 4
    assert ActivationScheme(16, kv_bits=4).cache_bits == 4
    assert ActivationScheme(4, kv_bits=16).cache_bits == 16
    assert not ActivationScheme(16, kv_bits=4).quantised
    for bits in (1, 9, 0):
        with pytest.raises(InputError, match=f"kv_bits: .*bits={bits}: .*2 to 8"):
            ActivationScheme(4, kv_bits=bits)


def test_a_run_is_known_by_its_patterns_and_their_order() -> None:
    """A later pattern wins, so that the same patterns in another order are another run."""
    one, other = QuantLM(layers={"down_proj": 4, "layers.0": 8}), QuantLM(layers={"layers.0": 8, "down_proj": 4})
    assert difference(one.identity(), other.identity()) is not None
    assert difference(one.identity(), QuantLM(layers={"down_proj": 4, "layers.0": 8}).identity()) is None


def test_settings_that_are_left_out_are_not_part_of_a_runs_identity() -> None:
    """Runs from before there were these settings go on."""
    identity = QuantLM(weight=IntScheme(4), activation=ActivationScheme(4)).identity()
    assert identity["weight"] == {"bits": 4, "group_size": -1, "symmetric": False}
    assert identity["activation"] == {"bits": 4}
    assert "layers" not in identity


def test_forms_that_runtimes_serve_are_settings_like_others() -> None:
    activation = ActivationScheme(4, symmetric=True)
    assert activation.to_dict() == {"bits": 4, "symmetric": True}
    assert activation.cache_bits == 4
    assert ActivationScheme(4, symmetric=False).to_dict() == ActivationScheme(4).to_dict() == {"bits": 4}
    weight = IntScheme(4, scale_dtype="bfloat16")
    assert weight.to_dict()["scale_dtype"] == "bfloat16"
    assert "scale_dtype" not in IntScheme(4).to_dict()
    for dtype in ("float32", "half", ""):
        with pytest.raises(InputError, match=f"scale_dtype={dtype}: one of float16, bfloat16 is needed"):
            IntScheme(4, scale_dtype=dtype)
    with pytest.raises(InputError, match=r"salient=0\.2 with scale_dtype=bfloat16: .*leave scale_dtype out"):
        IntScheme(1, salient=0.2, scale_dtype="bfloat16")


# Scales of clusters


def test_clusters_are_neither_groups_nor_signs() -> None:
    with pytest.raises(InputError, match=r"clustered=true with group_size=64: .*weight.clustered false\), or .*: -1"):
        IntScheme(4, 64, clustered=True)
    with pytest.raises(InputError, match=r"salient=0\.2 with clustered=true: .*clustered: false, or salient: null"):
        IntScheme(1, salient=0.2, clustered=True)
    assert IntScheme(4, clustered=True).to_dict() == {
        "bits": 4,
        "group_size": -1,
        "symmetric": False,
        "clustered": True,
    }
    assert "clustered" not in IntScheme(4).to_dict()
    for bits, balanced in ((1, True), (2, True), (3, False), (8, False)):
        assert IntScheme(bits, symmetric=True, balanced=balanced, clustered=True).by_cluster
    assert not IntScheme(16, clustered=True).by_cluster


def test_layers_may_differ_in_clusters() -> None:
    default = IntScheme(4, clustered=True)
    found = schemes_by_pattern(default, {"down_proj": 8, "o_proj": {"clustered": False, "group_size": 16}}, NAMES)
    assert found.of(0, "mlp.down_proj") == IntScheme(8, clustered=True)
    assert found.of(0, "self_attn.o_proj") == IntScheme(4, 16)
    with pytest.raises(InputError, match="layers: o_proj: clustered=true with group_size=16"):
        schemes_by_pattern(default, {"o_proj": {"group_size": 16}}, NAMES)


@pytest.mark.parametrize(
    ("default", "patterns", "expected"),
    [
        (IntScheme(4), {}, False),
        (IntScheme(4, clustered=True), {}, True),
        (IntScheme(16, clustered=True), {}, False),
        (IntScheme(16, clustered=True), {"down_proj": 4}, True),
        (IntScheme(4), {"down_proj": {"clustered": True}}, True),
        (IntScheme(16), {"down_proj": {"clustered": True}}, False),
        (IntScheme(16), {"down_proj": {"clustered": True, "bits": 3}}, True),
        (IntScheme(4), {"down_proj": 8}, False),
    ],
)
def test_whether_clusters_are_wanted_is_known_before_layers_have_names(
    default: IntScheme, patterns: dict[str, LayerFormat], expected: bool
) -> None:
    assert may_have_clusters(default, patterns) is expected
    if not patterns:
        assert LayerSchemes(default).any_by_cluster is expected
