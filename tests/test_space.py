"""SearchSpace: sizes, ties, pins; and the configuration files made from it."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from helpers.analytic import expert_linears, linears, settings, space, tied_head, untied_head

from amq.configuration import Configuration, Details, bytes_read, compact, expand, memory_items, parse_pins
from amq.errors import AmqError
from amq.formats import FORMATS, KEPT
from amq.model.inventory import Inventory, OtherWeight
from amq.search.choose import budget_from_memory
from amq.search.settings import PAPER
from amq.search.space import SearchSpace, tie_pattern


def test_decode_encode_and_bits_agree_with_the_configuration():
    of = space()
    rng = np.random.default_rng(0)
    points = rng.integers(0, 3, (20, len(of.variables)))
    for point, bits in zip(points, of.bits(points), strict=True):
        formats = of.decode(point)
        assert (of.encode(formats) == point).all()
        assert bits == pytest.approx(Configuration(formats, 64).bits_per_weight(of.weights))
        assert of.bits_of(formats) == pytest.approx(bits)
    assert of.bits_range == (pytest.approx(2.5), pytest.approx(4.5))  # every row fills its groups of 64


def test_pins_are_no_variables_and_bound_the_range():
    pinned = parse_pins([r"v_proj=int4", r"layers\.0\.attn\.v_proj=int6"], linears())
    of = space(pinned=pinned)
    assert len(of.variables) == 12
    formats = of.decode(np.zeros(12, dtype=int))
    assert formats["layers.0.attn.v_proj"] == "int6" and formats["layers.1.attn.v_proj"] == "int4"
    assert of.bits_range[0] == pytest.approx(of.bits_of(formats))
    assert of.bits_range[0] > 2.5
    assert of.uniform(FORMATS["int2"])["layers.0.attn.v_proj"] == "int2"


@pytest.mark.parametrize("pin", ["v_proj", "v_proj=int9", "(=int4", "nothing_here=int4"])
def test_bad_pins_name_themselves(pin):
    with pytest.raises(AmqError):
        parse_pins([pin], linears())


def test_everything_pinned_is_refused():
    with pytest.raises(AmqError, match="every linear is pinned"):
        space(pinned=parse_pins([".=int4"], linears()))


def test_ties_share_a_format_within_a_block():
    of = space(ties=["qv", "up_down"])
    assert len(of.variables) == 8
    formats = of.decode(np.arange(8) % 3)
    for block in range(4):
        assert formats[f"layers.{block}.attn.q_proj"] == formats[f"layers.{block}.attn.v_proj"]
        assert formats[f"layers.{block}.mlp.up_proj"] == formats[f"layers.{block}.mlp.down_proj"]
    with pytest.raises(AmqError, match="roles are"):
        space(ties=["xyz"])


def test_tie_pattern_reads_letters_or_names():
    assert tie_pattern("qkv").fullmatch("k_proj") and not tie_pattern("qkv").fullmatch("o_proj")
    assert tie_pattern("gate_up").fullmatch("gate_proj") and not tie_pattern("gate_up").fullmatch("gated")


def test_ragged_rows_cost_what_their_file_does():
    of = SearchSpace.build(linears(1), (FORMATS["int2"], FORMATS["int3"]), 128)
    # 64 inputs at group 128: one group of 64, so a scale and zero point per 64 weights
    assert of.bits_range[0] == pytest.approx((2.5 * (64 * 64 + 32 * 64 + 128 * 64) + 2.25 * 64 * 128) / of.numel)


def damaged_cache(cache):
    return json.dumps({"schema": "amq/configuration/1", "group_size": 64, "formats": {"a": "int2"}, "cache": cache})


def test_configuration_file_round_trip_and_errors(tmp_path):
    of = space()
    kinds = {f"layers.{n}": "int8" if n == 2 else "int4" for n in range(4)}
    configuration = Configuration(of.uniform(FORMATS["int3"]), 64, Details(model="m", loss=0.25), kinds)
    path = tmp_path / "configuration.json"
    configuration.save(path)
    loaded = Configuration.load(path)
    assert loaded == configuration and loaded.details.loss == 0.25
    assert json.loads(path.read_text())["cache"] == {"layers.0-1,3": "int4", "layers.2": "int8"}
    replace(configuration, cache={}).save(path)
    assert "cache" not in json.loads(path.read_text()) and Configuration.load(path).cache == {}
    loaded.check(of.weights)
    with pytest.raises(AmqError, match="another model"):
        loaded.check(of.weights[:3])
    with pytest.raises(AmqError, match=r"lacks 'layers\.4"):
        loaded.check(linears(5))
    for broken, message in [
        ("{", "not valid JSON"),
        ("[]", "not a configuration"),
        (json.dumps({"schema": "other"}), "not a configuration"),
        (json.dumps({"schema": "amq/configuration/1"}), "damaged"),
        (json.dumps({"schema": "amq/configuration/1", "group_size": 64, "formats": {"a": "int9"}}), "unknown format"),
        (json.dumps({"schema": "amq/configuration/1", "group_size": 7, "formats": {"a": "int2"}}), "group size 7"),
        (damaged_cache({"layers.0": "int9"}), "layers.0: expected one of float32, float16, int8, k8v4, int4, got '"),
        (damaged_cache({"layers.0-1": "int8", "layers.1": "int8"}), "named twice, the second time by 'layers.1'"),
    ]:
        path.write_text(broken)
        with pytest.raises(AmqError, match=message):
            Configuration.load(path)
    with pytest.raises(AmqError, match="does not exist"):
        Configuration.load(tmp_path / "absent.json")


def test_names_that_end_in_numbers_are_written_once():
    formats = {f"b.experts.up_proj.{i}": "int2" if i == 3 else "int3" for i in range(6)}
    formats = {"b.q_proj": "int4", **formats, "b.experts.down_proj.0": "int3", "b.experts.down_proj.1": "int3"}
    short = compact(formats)
    assert short == {
        "b.q_proj": "int4", "b.experts.up_proj.0-2,4-5": "int3", "b.experts.up_proj.3": "int2",
        "b.experts.down_proj.0-1": "int3",
    }  # fmt: skip
    assert expand(short) == formats and expand(formats) == formats
    assert compact({"a.0": [1, 2], "a.1": [1, 2]}) == {"a.0-1": [1, 2]}
    odd = {"0-1": "int2", "a.0x": "int2", "a.01": "int2", "a.": "int2", "head": "int2"}
    assert compact(odd) == expand(odd) == odd, "names of another kind stay as they are"


@pytest.mark.parametrize(
    ("key", "message"),
    [("a.3-1", "rising numbers"), ("a.0-9999999999999", "rising numbers"), ("a.0-2,2", "named twice")],
)
def test_damaged_sets_of_names_are_named(key, message):
    with pytest.raises(ValueError, match=message):
        expand({key: "int2"})
    with pytest.raises(ValueError, match="named twice"):
        expand({"a.1": "int2", "a.0-1": "int2"})


def test_the_head_chooses_among_wider_formats_and_its_own_16_bits():
    of = space(outer=tied_head())
    assert len(of.variables) == 17 and [f.name for f in of.choices[-1]] == [
        "int2", "int3", "int4", "int6", "int8", "16bit",
    ]  # fmt: skip
    assert of.counts.tolist() == [3] * 16 + [6]
    formats = of.decode(of.largest)
    assert formats["lm_head"] == "16bit" and formats["layers.0.attn.q_proj"] == "int4"
    assert (of.encode(formats) == of.largest).all()
    head = 256 * 64
    blocks = of.numel - head
    assert of.bits_range == (pytest.approx(2.5), pytest.approx((4.5 * blocks + 16 * head) / of.numel))
    assert of.front_range[1] == pytest.approx((4.5 * blocks + 8.5 * head) / of.numel)
    assert set(of.uniform(FORMATS["int3"]).values()) == {"int3"}
    with pytest.raises(ValueError, match="q_proj in 'int8': expected one of int2, int3, int4"):
        of.check({**formats, "layers.0.attn.q_proj": "int8"})


def test_what_the_head_may_be_is_the_users_choice():
    inventory = Inventory("layers", 4, linears(), (), False, untied_head())
    auto = SearchSpace.of(inventory, settings())
    assert len(auto.variables) == 18, "an untied embedding is an item of its own"
    fixed = SearchSpace.of(inventory, settings(head="int8", pin=["embed=int6"]))
    assert len(fixed.variables) == 16 and fixed.numel == auto.numel
    for formats in (fixed.decode(fixed.smallest), fixed.uniform(FORMATS["int3"])):
        assert formats["lm_head"] == "int8" and formats["embed"] == "int6"
    assert fixed.formats_of(inventory.outer[0]) == (FORMATS["int6"],)
    without = SearchSpace.of(inventory, settings(head="16bit"))
    assert without.weights == inventory.linears and without.bits_range == without.front_range
    with pytest.raises(AmqError, match="no linear matches"):
        SearchSpace.of(inventory, settings(head="16bit", pin=["lm_head=int8"]))
    assert settings(**PAPER).head == "16bit"


def test_experts_of_a_layer_and_role_share_a_format_unless_untied():
    weights = expert_linears()
    names = {"tied": 2 * (1 + 3), "untied": 2 * (1 + 12)}
    for how, count in names.items():
        inventory = Inventory("layers", 2, weights, (), False)
        of = SearchSpace.of(inventory, settings(untie="experts" if how == "untied" else ""))
        assert len(of.variables) == count
    tied = SearchSpace.of(inventory, settings(tie="experts,gate_up"))
    assert len(tied.variables) == 2 * (1 + 2), "gate and up of all experts are one variable"
    assert {len(v) for v in tied.variables} == {1, 4, 8}
    pairs = SearchSpace.of(inventory, settings(tie="gate_up", untie="experts"))
    assert len(pairs.variables) == 2 * (1 + 8), "gate and up of one expert"
    assert {len({s.expert for s in v}) for v in pairs.variables} == {1}
    with pytest.raises(AmqError, match="either tied or not"):
        settings(tie="experts", untie="experts")
    with pytest.raises(AmqError, match="expected experts"):
        settings(untie="qkv")


def test_costs_have_no_place_where_there_is_no_choice():
    of = space(outer=tied_head())
    table = {s.name: {f.name: 1.0 for f in of.formats_of(s) if f is not KEPT} for s in of.weights}
    costs = of.variable_costs(table)
    assert np.isinf(costs[:-1, 3:]).all() and costs[-1].tolist() == [1, 1, 1, 1, 1, 0]
    assert of.pinned_cost(table) == 0
    del table["lm_head"]["int8"]
    with pytest.raises(AmqError, match="lacks 'int8'"):
        of.variable_costs(table)


@pytest.mark.parametrize("head", ["auto", "int8", "16bit"])
def test_a_budget_that_only_fits_with_the_head_quantized_says_so(head):
    others = (OtherWeight("embed.weight", "embedding", 256 * 64, (256, 64)),)
    inventory = Inventory("layers", 4, linears(), others, True, tied_head())
    of = SearchSpace.of(inventory, settings(head=head))
    least = Configuration(of.decode(of.smallest), 64)
    needed = sum(item.bytes for item in memory_items(inventory, least))
    whole = SearchSpace.of(inventory, settings())
    bits = budget_from_memory(needed, 0, inventory, (), of)
    assert bits == pytest.approx(of.bits_range[0])
    smallest = sum(item.bytes for item in memory_items(inventory, Configuration(whole.decode(whole.smallest), 64)))
    expected = "give more memory" if head == "auto" else "only fits with lm_head quantized too, which takes"
    with pytest.raises(AmqError, match=expected):
        budget_from_memory(needed - 1, 0, inventory, (), of)
    if head != "auto":
        with pytest.raises(AmqError, match=rf"--head auto\) it would still take {smallest / 2**30:.3f} GiB"):
            budget_from_memory(smallest - 1, 0, inventory, (), of)


def test_what_a_token_reads():
    weights = expert_linears()
    others = (
        OtherWeight("embed.weight", "embedding", 256 * 64, (256, 64)),
        OtherWeight("lm_head.weight", "lm_head", 256 * 64, (256, 64)),
        OtherWeight("norm.weight", "norm_or_bias", 64, (64,)),
    )
    inventory = Inventory("layers", 2, weights, others, False, untied_head(2))
    blocks = {s.name: "int4" for s in weights}
    linear = 64 * 64 * 4.5 / 8
    rest = 2 * linear + 24 * linear / 2 + 2 * 64  # half of the experts, and the norm
    assert bytes_read(inventory, Configuration(blocks, 64)) == pytest.approx(rest + 2 * 256 * 64)
    packed = Configuration({**blocks, "lm_head": "int8", "embed": "int8"}, 64)
    row = 64 * 8.5 / 8
    assert bytes_read(inventory, packed) == pytest.approx(rest + 256 * row + row)
    tied = Inventory("layers", 2, weights, (others[0], others[2]), True, tied_head(2))
    assert bytes_read(tied, Configuration(blocks, 64)) == pytest.approx(rest + 2 * 256 * 64)
    assert bytes_read(tied, Configuration({**blocks, "lm_head": "int8"}, 64)) == pytest.approx(rest + 256 * row)
