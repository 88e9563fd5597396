"""Experts that agree are one entry of quantization_config: written, read back, and damage named."""

from __future__ import annotations

import json
from typing import Any

import pytest

from amq.checkpoint.record import QuantizationRecord
from amq.errors import AmqError

ROLES = ("gate_proj", "up_proj", "down_proj")


def linear(layer: int, role: str, expert: int) -> str:
    return f"model.layers.{layer}.mlp.experts.{role}.{expert}"


def record(experts: int = 4, layers: int = 2, **changes: Any) -> QuantizationRecord:
    names = [linear(i, role, e) for i in range(layers) for role in ROLES for e in range(experts)]
    formats = dict.fromkeys(["model.layers.0.self_attn.q_proj", *names], "int3")
    shapes = {name: (16, 32) if "down" in name else (32, 64) for name in formats}
    return QuantizationRecord(**{"formats": formats, "shapes": shapes, "group_size": 32} | changes)


def reread(written: QuantizationRecord) -> QuantizationRecord:
    return QuantizationRecord.parse(json.loads(json.dumps(written.json())), "config.json")


def test_experts_that_agree_are_one_entry() -> None:
    written = record().json()
    gate = "model.layers.1.mlp.experts.gate_proj.0-3"
    assert written["version"] == 3 and len(written["formats"]) == len(written["shapes"]) == 1 + 2 * 3
    assert written["formats"][gate] == "int3" and written["shapes"][gate] == [32, 64]
    assert reread(record()) == record() and list(reread(record()).formats) == list(record().formats)


def test_experts_that_differ_are_listed() -> None:
    one = linear(0, "up_proj", 2)
    mixed = record(formats={**record().formats, one: "int8"})
    written = mixed.json()
    assert written["formats"][one] == "int8"
    assert written["formats"]["model.layers.0.mlp.experts.up_proj.0-1,3"] == "int3"
    assert written["shapes"]["model.layers.0.mlp.experts.up_proj.0-3"] == [32, 64]
    assert reread(mixed) == mixed


def test_kept_experts() -> None:
    whole = record()
    some = [linear(0, "up_proj", e) for e in (0, 1)]
    every = [linear(1, "down_proj", e) for e in range(4)]
    left = [name for name in whole.formats if name not in {*some, *every}]
    kept = record(
        formats={n: whole.formats[n] for n in left}, shapes={n: whole.shapes[n] for n in left},
        kept={n: whole.shapes[n] for n in (*some, *every)},
    )  # fmt: skip
    written = kept.json()
    experts = "model.layers.{}.mlp.experts.{}"
    assert written["kept"] == {
        experts.format(0, "up_proj.0-1"): [32, 64], experts.format(1, "down_proj.0-3"): [16, 32]
    }  # fmt: skip
    assert experts.format(0, "up_proj.2-3") in written["shapes"] and reread(kept) == kept
    assert kept.configuration.formats[some[0]] == "16bit"


def test_a_record_of_a_large_mixture_is_small() -> None:
    large = record(experts=128, layers=48)
    text = json.dumps(large.json())
    assert len(text) < 50_000 and len(large.formats) == 1 + 128 * 48 * 3
    assert reread(large) == large


def test_versions_and_what_is_packed() -> None:
    shapes = {"a.q": (8, 32), "lm_head": (9, 32), "embed": (9, 32)}
    formats = {"a.q": "int3", "lm_head": "int4", "embed": "int8"}
    own = QuantizationRecord(formats, shapes, 32, head="lm_head", embedding={"embed": "embed"})
    assert own.version == 3 and own.own_embeddings == ("embed",) and own.multiplied == ("int3", "int4")
    assert set(own.block_shapes) == {"a.q"} and set(own.configuration.formats) == set(formats)
    assert reread(own) == own
    bits = 8 * (8 * (12 + 4) + 9 * (16 + 4) + 9 * (32 + 4)) / (32 * (8 + 9 + 9))
    assert own.bits_per_weight == pytest.approx(bits)
    tied = QuantizationRecord(
        {"a.q": "int3", "h": "int4"}, {"a.q": (8, 32), "h": (9, 32)}, 32, head="h", embedding={"e": "h"}
    )
    assert tied.version == 2 and tied.own_embeddings == ()
    plain = QuantizationRecord({"a.q": "int3"}, {"a.q": (8, 32)}, 32)
    assert plain.version == 1 and not plain.has_experts


def test_names_of_earlier_versions_are_not_compacted() -> None:
    """A reader of version 1 or 2 looks for every linear by its own name: here two of an nn.Sequential."""
    shapes = {"h.0.mlp.0": (8, 32), "h.0.mlp.1": (8, 32)}
    sequential = QuantizationRecord(dict.fromkeys(shapes, "int3"), shapes, 32)
    written = sequential.json()
    assert written["version"] == 1 and set(written["formats"]) == set(written["shapes"]) == set(shapes)
    assert reread(sequential) == sequential


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shapes": {"e.up_proj.0-1": [2, 3, 4]}}, r"shapes.*expected `array` of length 2"),
        ({"shapes": {"e.up_proj.0-99999999": [2, 3]}}, "expected rising numbers below"),
        ({"shapes": {"e.up_proj.0-1": [3, 3], "e.up_proj.1": [3, 3]}}, "named twice"),
        ({"shapes": {"e.up_proj.0-1": [0, 3]}}, "expected a shape of e.up_proj.0-1 from 1 to"),
        ({"formats": {"e.up_proj.0-1": "int3", "e.up_proj.1": "int4"}}, "named twice"),
        ({"formats": {"e.up_proj.0": "int3"}}, "'e.up_proj.1' has a format or a shape, but not both"),
        ({"version": 2}, "version 2 has no experts"),
        ({"embedding": {"x": "y"}}, "embedding names 'y', which has no format"),
        ({"head": "e.up_proj.1", "embedding": {"e.up_proj.1": "e.up_proj.1"}}, "is the head and an embedding"),
    ],
)
def test_damage_is_named(changes: dict[str, Any], message: str) -> None:
    names = ("e.up_proj.0", "e.up_proj.1")
    good = QuantizationRecord(dict.fromkeys(names, "int3"), dict.fromkeys(names, (3, 32)), 32)
    data = json.loads(json.dumps(good.json()))
    assert data["shapes"] == {"e.up_proj.0-1": [3, 32]}
    with pytest.raises(AmqError, match=f"config.json.*{message}"):
        QuantizationRecord.parse({**data, **changes}, "config.json")
