"""SearchSpace: sizes, ties, pins; and the configuration files made from it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from helpers.analytic import linears, space

from amq.configuration import Configuration, Details, compact, expand, parse_pins
from amq.errors import AmqError
from amq.formats import FORMATS
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


def test_configuration_file_round_trip_and_errors(tmp_path):
    of = space()
    configuration = Configuration(of.uniform(FORMATS["int3"]), 64, Details(model="m", loss=0.25))
    path = tmp_path / "configuration.json"
    configuration.save(path)
    loaded = Configuration.load(path)
    assert loaded == configuration and loaded.details.loss == 0.25
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
