"""The inventory of tiny models of nine architectures: every parameter once, the right linears, the right bytes."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny_models import ARCHITECTURES, HIDDEN, VOCABULARY, Architecture, tiny_llama
from torch import nn

from amq.configuration import Configuration, Memory, memory_items
from amq.errors import AmqError
from amq.formats import FORMATS
from amq.model.inventory import LinearSpec, check_weights, get_linear, match_linears, take_inventory
from amq.model.shape import ModelShape

by_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES)
BLOCKS = 3


@by_architecture
def test_linears_of_every_block(architecture: Architecture) -> None:
    model = architecture.build()
    found = take_inventory(model)
    assert (found.blocks_path, found.n_blocks) == (architecture.blocks_path, BLOCKS)
    names = [f"{architecture.blocks_path}.{b}.{role}" for b in range(BLOCKS) for role in architecture.roles]
    assert sorted(s.name for s in found.linears) == sorted(names)
    for spec in found.linears:
        module = get_linear(model, spec.name)
        assert (spec.out_features, spec.in_features) == tuple(module.weight.shape)
        assert spec.name == f"{found.blocks_path}.{spec.block}.{spec.role}"
    for block in range(BLOCKS):
        assert {s.role for s in found.in_block(block)} == set(architecture.roles)


@by_architecture
def test_every_parameter_is_counted_once(architecture: Architecture) -> None:
    model = architecture.build()
    found = take_inventory(model)
    assert found.numel == sum(p.numel() for p in model.parameters())
    names = [f"{s.name}.weight" for s in found.linears] + [o.name for o in found.others]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())


@by_architecture
def test_embeddings_and_head(architecture: Architecture) -> None:
    model = architecture.build()
    found = take_inventory(model)
    sizes = {kind: sum(o.numel for o in found.others if o.kind == kind) for kind in ("embedding", "lm_head")}
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert found.head_is_tied is tied
    assert sizes == {"embedding": VOCABULARY * HIDDEN, "lm_head": 0 if tied else VOCABULARY * HIDDEN}
    assert not {"lm_head", "embed"} & {part for s in found.linears for part in s.name.split(".")}


def test_tying_is_seen_both_ways() -> None:
    assert take_inventory(tiny_llama(tie_word_embeddings=True)).head_is_tied
    assert not take_inventory(tiny_llama(tie_word_embeddings=False)).head_is_tied


def test_experts_are_listed_with_a_reason() -> None:
    model = ARCHITECTURES["mixtral"].build()
    found = take_inventory(model)
    rest = [o for o in found.others if o.kind == "not quantized"]
    experts = [o for o in rest if len(o.shape) == 3]
    assert len(experts) == 2 * BLOCKS and all("3-D parameter of MixtralExperts" in o.reason for o in experts)
    assert sum(o.numel for o in experts) == BLOCKS * 4 * 3 * 96 * HIDDEN  # 4 experts of gate, up and down
    items = memory_items(found, Configuration.uniform(found.linears, FORMATS["int4"], 64))
    item = next(i for i in items if i.name == "not quantized")
    assert item.bytes == 2 * sum(o.numel for o in rest) and "MixtralExperts" in item.note


def test_weights_outside_the_blocks_say_so() -> None:
    rest = [o for o in take_inventory(ARCHITECTURES["opt"].build()).others if o.kind == "not quantized"]
    assert [o.name for o in rest] == ["model.decoder.embed_positions.weight"]
    assert rest[0].reason == "OPTLearnedPositionalEmbedding outside the decoder blocks"


def test_linear_used_in_two_blocks_is_one_linear() -> None:
    model = tiny_llama()
    model.model.layers[1].mlp = model.model.layers[0].mlp
    found = take_inventory(model)
    assert found.numel == sum(p.numel() for p in model.parameters())
    assert [s.block for s in found.linears if "mlp" in s.role] == [0, 0, 0]


def test_models_without_linear_blocks_are_refused() -> None:
    with pytest.raises(AmqError, match="Embedding has no list of decoder blocks"):
        take_inventory(nn.Embedding(4, 4))
    with pytest.raises(AmqError, match="ModuleList has no list of decoder blocks"):
        take_inventory(nn.ModuleList([nn.LayerNorm(4)]))


@by_architecture
def test_memory_items_add_up(architecture: Architecture) -> None:
    """Quantized linears from the formula, everything else at two bytes, and the KV cache: nothing twice."""
    model = architecture.build()
    found = take_inventory(model)
    configuration = Configuration.uniform(found.linears, FORMATS["int3"], 32)
    caches = ModelShape.of(model.config).caches
    items = memory_items(found, configuration, caches, context=100)
    # 64, 96 and 128 fill their groups of 32: 3 bits per code and 4 bytes per group
    linears = sum(s.numel * 3 // 8 + 4 * s.numel // 32 for s in found.linears)
    others = 2 * (sum(p.numel() for p in model.parameters()) - sum(s.numel for s in found.linears))
    assert Memory.of(items).total == linears + others + sum(cache.bytes(100) for cache in caches)
    by_name = {i.name: i for i in items}
    assert by_name["linears: codes"].bytes == sum(s.numel * 3 // 8 for s in found.linears)
    assert ("tied" in by_name["lm_head"].note) is found.head_is_tied
    assert [i.name for i in memory_items(found, configuration)] == [i.name for i in items if i.name != "KV cache"]


def test_match_linears(tiny_llama: nn.Module) -> None:
    linears = take_inventory(tiny_llama).linears
    assert [s.name for s in match_linears(linears, r"layers\.1\..*k_proj$")] == ["model.layers.1.self_attn.k_proj"]
    assert len(match_linears(linears, "mlp")) == 6
    with pytest.raises(AmqError, match="no linear matches 'lm_head'; names look like model.layers.0.self_attn.q_proj"):
        match_linears(linears, "lm_head")
    with pytest.raises(AmqError, match=r"'\(q' is not a regular expression"):
        match_linears(linears, "(q")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(a|aa)+$", r"'\(a\|aa\)\+\$' takes longer than .* write it without repetitions"),
        ("(?:(?:a{1000}){1000}){1000}", "is too large: expected at most 1000"),  # 10^9 nodes if compiled
        ("x" * 5000, "is too large"),
        ("(" * 490 + "x" + ")" * 490, "is not a regular expression"),
    ],
)
def test_a_pattern_can_neither_hang_nor_exhaust_the_memory(
    pattern: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("amq.model.inventory.MATCH_SECONDS", 0.1)
    linears = tuple(LinearSpec(f"layers.{i}." + "a" * 80 + "!", i, "x", 8, 8) for i in range(30))
    with pytest.raises(AmqError, match=message) as raised:
        match_linears(linears, pattern)
    assert len(str(raised.value)) < 300


def test_get_linear_errors(tiny_llama: nn.Module) -> None:
    with pytest.raises(AmqError, match="linear 'model.layers.9.q' is not in this LlamaForCausalLM"):
        get_linear(tiny_llama, "model.layers.9.q")
    with pytest.raises(AmqError, match="'model.layers.0.mlp' is a LlamaMLP, expected an nn.Linear"):
        get_linear(tiny_llama, "model.layers.0.mlp")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights_are_refused(tiny_llama: nn.Module, value: float) -> None:
    linears = take_inventory(tiny_llama).linears
    check_weights(tiny_llama, linears)
    get_linear(tiny_llama, "model.layers.1.mlp.up_proj").weight[3, 4:6] = value
    with pytest.raises(AmqError, match="linear model.layers.1.mlp.up_proj holds 2 non-finite weights"):
        check_weights(tiny_llama, linears)


def test_empty_linears_are_refused(tiny_llama: nn.Module) -> None:
    tiny_llama.model.layers[0].mlp.up_proj = nn.utils.skip_init(nn.Linear, 8, 0)
    with pytest.raises(AmqError, match=r"linear model.layers.0.mlp.up_proj is empty \(0 x 8\)"):
        check_weights(tiny_llama, take_inventory(tiny_llama).linears)


def test_inventory_needs_no_weights() -> None:
    architecture = ARCHITECTURES["phi3"]
    real = architecture.build()
    with torch.device("meta"):
        meta = type(real)(architecture.config())
    assert take_inventory(meta) == take_inventory(real)
