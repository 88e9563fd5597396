"""What config.json says of a model's shape, and that the caches it predicts are those that transformers fills."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.tiny_models import ARCHITECTURES, COMMON, HIDDEN, byte_tokenizer, randomized
from torch import Tensor, nn

import amq
from amq.errors import AmqError
from amq.model.blocks import BlockRunner
from amq.model.shape import LayerCache, ModelShape, Rotary, said
from amq.search.records import KvEntry
from amq.search.select import select_from_run
from amq.util.records import parse_record, to_json

MLA = {
    "head_dim": 8, "num_key_value_heads": 4, "kv_lora_rank": 24, "q_lora_rank": 20, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12, "v_head_dim": 10, "n_group": 1, "topk_group": 1, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1,
}  # fmt: skip
DELTA = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 12,
    "linear_conv_kernel_dim": 4, "head_dim": 16,
}  # fmt: skip
EXPERTS = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
}  # fmt: skip
MAMBA = {"mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2}
MAMBA2 = {**MAMBA, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1}
LAYERS = {"num_hidden_layers": 4}
SLIDING = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"] * 2, "head_dim": 16}
EMBEDDED = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 256, "num_kv_shared_layers": 2}
LINEAR = {"layer_types": ["linear_attention", "full_attention"] * 2}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "gpt2": ("GPT2", {"num_key_value_heads": None}),
    "gpt-bigcode": ("GPTBigCode", {}),
    "falcon": ("Falcon", {}),
    "falcon-multi-head": ("Falcon", {"multi_query": False, "num_key_value_heads": None}),
    "falcon-grouped": ("Falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "mistral": ("Mistral", {"sliding_window": 6}),
    "gemma2": ("Gemma2", SLIDING),
    "llama4": ("Llama4Text", {
        **{k: v for k, v in EXPERTS.items() if k != "num_experts"}, "num_local_experts": 4, "intermediate_size_mlp": 96,
        "head_dim": 16, "attention_chunk_size": 6, "layer_types": ["chunked_attention", "full_attention"] * 2,
    }),
    "gemma3n": ("Gemma3nText", {**SLIDING, **EMBEDDED, "laurel_rank": 8}),
    "gemma4": ("Gemma4Text", {**SLIDING, **EMBEDDED, "global_head_dim": 32}),
    "deepseek-v2": ("DeepseekV2", MLA),
    "deepseek-v3": ("DeepseekV3", MLA),
    "deepseek-v32": ("DeepseekV32", {**MLA, "index_head_dim": 8, "index_n_heads": 2, "index_topk": 8}),
    "minicpm3": ("MiniCPM3", {k: v for k, v in MLA.items() if "expert" not in k and "group" not in k}),
    "qwen3-next": ("Qwen3Next", {**DELTA, **EXPERTS, **LINEAR}),
    "qwen3.5": ("Qwen3_5Text", {**DELTA, **LINEAR}),
    "olmo-hybrid": ("OlmoHybrid", {**DELTA, **LINEAR}),
    "kimi-linear": ("KimiLinear", {
        **MLA, **EXPERTS, "linear_num_heads": 3, "linear_head_dim": 8, "linear_conv_kernel_dim": 4,
        "layer_types": ["full_attention", "linear_attention"] * 2,
    }),
    "minimax": ("MiniMax", {
        "head_dim": 16, "num_local_experts": 4, "layer_types": ["linear_attention", "full_attention"] * 2,
    }),
    "mamba": ("Mamba", {"state_size": 8, "intermediate_size": 128, "time_step_rank": 4}),
    "mamba2": ("Mamba2", {"state_size": 8, "num_heads": 8, "head_dim": 16, "n_groups": 2}),
    "falcon-mamba": ("FalconMamba", {"state_size": 8, "intermediate_size": 128, "expand": 16, "time_step_rank": 4}),
    "jamba": ("Jamba", {**MAMBA, "num_experts": 4, "attn_layer_period": 2, "attn_layer_offset": 0,
                        "mamba_dt_rank": 4, "use_mamba_kernels": False}),
    "bamba": ("Bamba", {**MAMBA2, "attn_layer_indices": [0, 2]}),
    "granite-hybrid": ("GraniteMoeHybrid", {
        **MAMBA2, **LINEAR, "num_local_experts": 0, "num_experts_per_tok": 0, "shared_intermediate_size": 64,
    }),
    "falcon-h1": ("FalconH1", {**MAMBA2, "mamba_d_ssm": 128}),
    "zamba2": ("Zamba2", {
        **MAMBA, "n_mamba_heads": 8, "mamba_ngroups": 1, "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "use_mem_rope": True, "num_mem_blocks": 1, "num_key_value_heads": 4,
    }),
    "nemotron-h": ("NemotronH", {
        "ssm_state_size": 8, "mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 2, "head_dim": 16,
        "layers_block_type": ["linear_attention", "moe", "full_attention", "linear_attention"], "n_routed_experts": 4,
        "moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 32,
    }),
    "lfm2": ("Lfm2", {"conv_L_cache": 3, "layer_types": ["conv", "full_attention"] * 2}),
    "recurrent-gemma": ("RecurrentGemma", {"lru_width": HIDDEN, "attention_window_size": 6}),
}  # fmt: skip
"""{name: (its classes' prefix in transformers, config)}, a family for each way to fill a cache."""


def tiny_config(name: str, **changed: Any) -> Any:
    prefix, options = FAMILIES[name]
    kind = getattr(transformers, f"{prefix}Config", None)
    if kind is None:
        pytest.skip(f"transformers {transformers.__version__} has no {prefix}")
    return kind(**{**COMMON, **LAYERS, **options, **changed})


def tiny_model(name: str, **changed: Any) -> nn.Module:
    """In bfloat16: a state that a model keeps in float32 then shows."""
    config = tiny_config(name, **changed)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    return randomized(model, 0).to(torch.bfloat16)


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.ndim > 1:  # a number beside the cache is none of it
            yield value
    elif isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from tensors(inner)


def filled_cache(model: nn.Module, tokens: int) -> list[int]:
    """Bytes of each layer's cache after `tokens` tokens, the last of which came alone."""
    ids = torch.randint(256, (1, tokens), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        output = model(ids[:, :-1], use_cache=True)
        name = next(n for n in ("cache", "past_key_values", "cache_params") if getattr(output, n, None) is not None)
        cache = getattr(output, name)
        model(ids[:, -1:], use_cache=True, **{name: cache})
    found = [0] * model.config.num_hidden_layers  # a cache may leave out layers that hold nothing
    beside = getattr(cache, "linear_cache", ())  # MiniMax keeps its states there
    for number, held in (*enumerate(map(vars, cache.layers)), *enumerate(beside)):
        found[number] += sum(t.nbytes for t in tensors(held))
    return found


RECENT = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 20)
as_counted = pytest.mark.skipif(not RECENT, reason="caches are counted as transformers fills them from 5.20 on")


@as_counted
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "recurrent-gemma"])
def test_the_cache_is_the_one_that_transformers_fills(name: str) -> None:
    model = tiny_model(name)
    caches = ModelShape.of(model.config).caches
    for tokens in (5, 21):
        # transformers lets go of the oldest token of a window once it has been used
        expected = [c.bytes(min(tokens, c.window - 1) if c.window else tokens) for c in caches]
        assert filled_cache(model, tokens) == expected, (tokens, caches)


@as_counted
def test_recurrent_gemma_keeps_its_state_in_modules() -> None:
    model = tiny_model("recurrent-gemma")
    layers = ModelShape.of(model.config).layers
    with torch.inference_mode():
        model(torch.ones(1, 9, dtype=torch.int64), use_cache=True)
    for number, (block, layer) in enumerate(zip(model.model.layers, layers, strict=True)):
        states = [t for m in block.modules() for n in ("conv1d_state", "recurrent_states")
                  if isinstance(t := getattr(m, n, None), Tensor)]  # fmt: skip
        assert (layer.kind == "linear_attention") is bool(states) is (number != 2)
        assert sum(t.nbytes for t in states) == layer.cache().constant


@pytest.mark.parametrize(
    ("name", "context", "options", "expected"),
    [  # 2 (keys, values) · 2 bytes · kv heads · head_dim · tokens summed over 3 layers
        ("llama", 100, {}, 4 * 2 * 16 * 300),
        ("llama", 100, {"num_key_value_heads": 4}, 4 * 4 * 16 * 300),
        ("opt", 100, {"num_key_value_heads": None}, 4 * 4 * 16 * 300),
        ("qwen3", 100, {}, 4 * 2 * 32 * 300),  # head_dim is not hidden_size / heads
        ("mistral", 100, {}, 4 * 2 * 16 * 3 * 16),
        ("mistral", 10, {}, 4 * 2 * 16 * 3 * 10),
        ("mistral", 100, {"sliding_window": None}, 4 * 2 * 16 * 300),
        ("gemma3", 100, {}, 4 * 2 * 16 * (16 + 100 + 16)),
        ("gemma3", 10, {}, 4 * 2 * 16 * 30),
        ("qwen2", 100, {"sliding_window": 16, "use_sliding_window": False}, 4 * 2 * 16 * 300),
        ("qwen2", 100, {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 1}, 4 * 2 * 16 * 132),
    ],
)
def test_bytes_of_a_context(name: str, context: int, options: dict[str, Any], expected: int) -> None:
    config = ARCHITECTURES[name].config(**options)
    for form in (config, config.to_dict()):
        assert sum(cache.bytes(context) for cache in ModelShape.of(form).caches) == expected


class Raising:
    """A config with an attribute that raises instead of being absent."""

    num_hidden_layers, num_attention_heads, hidden_size = 2, 4, 64

    @property
    def head_dim(self) -> int:
        raise RuntimeError("'head_dim' is a per-layer attribute and may vary across layers")


def test_a_config_may_raise_nest_say_null_and_list() -> None:
    assert said(Raising(), "head_dim", "hidden_size") == 64
    assert [layer.head_dim for layer in ModelShape.of(Raising()).layers] == [16, 16]
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64, "head_dim": None}
    assert ModelShape.of({"text_config": sizes, "hidden_size": 9}).head_dim(1) == 16
    listed = ModelShape.of({**sizes, "num_key_value_heads": [4, 1], "sliding_window": [None, 8]})
    assert [layer.kv_heads for layer in listed.layers] == [4, 1]
    own = ModelShape.of({**sizes, "per_layer_config": {"1": {"head_dim": 32}}})
    assert [own.head_dim(layer) for layer in range(3)] == [16, 32, None]
    assert own.caches == (LayerCache(4 * 4 * 16, heads=4), LayerCache(4 * 4 * 32, heads=4))
    padded = {"num_hidden_layers": 12, "per_layer_config": {"05": {"head_dim": 32}, "11": {"head_dim": 64}}}
    assert [ModelShape.of({**sizes, **padded}).head_dim(layer) for layer in (4, 5, 11)] == [16, 32, 64]


def test_gemma_4_has_heads_of_two_sizes() -> None:
    config = tiny_config("gemma4")
    if RECENT:
        with pytest.raises(RuntimeError, match="per-layer attribute"):
            _ = config.head_dim
    raw = {"head_dim": 16, "global_head_dim": 32, "num_hidden_layers": 4, "layer_types": config.layer_types}
    assert [layer.head_dim for layer in ModelShape.of(raw).layers] == [16, 32, 16, 32]
    unshared = ModelShape.of(tiny_config("gemma4", num_kv_shared_layers=0))
    assert [layer.head_dim for layer in unshared.layers] == [16, 32, 16, 32]
    assert ModelShape.of(config).caches[2:] == (LayerCache(), LayerCache())  # shared


def test_windows_and_rotary_positions_under_all_keys() -> None:
    plain = {"num_hidden_layers": 1, "sliding_window": 16}
    assert ModelShape.of(plain).window == 16
    assert ModelShape.of({**plain, "use_sliding_window": False}).window is None
    assert ModelShape.of({**plain, "layer_types": ["full_attention"]}).window is None
    assert ModelShape.of({"rope_theta": 5.0}).rotary == {"": Rotary("default", 5.0, {})}
    old = {"rope_theta": 5.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    assert ModelShape.of(old).rotary == {"": Rotary("linear", 5.0, {"type": "linear", "factor": 2.0})}
    new = {"rope_parameters": {"a": {"rope_type": "llama3", "rope_theta": 7.0}, "b": {}}, "rope_theta": 1.0}
    found = {kind: (rotary.kind, rotary.theta) for kind, rotary in ModelShape.of(new).rotary.items()}
    assert found == {"a": ("llama3", 7.0), "b": ("default", 1.0)}


def test_what_cannot_be_sized_is_said(caplog: pytest.LogCaptureFixture) -> None:
    for config, message in (
        (object(), "a object: it names no number of layers"),
        ({"model_type": "odd", "num_hidden_layers": 2}, "a odd: it names no attention heads"),
        ({"num_hidden_layers": 1, "layer_types": ["linear_attention"]}, "does not say in a known way"),
        ({"num_hidden_layers": 1, "layer_types": ["conv"], "conv_L_cache": 3}, "it says no hidden_size"),
    ):
        with pytest.raises(AmqError, match=message):
            _ = ModelShape.of(config).caches
    with pytest.raises(AmqError, match="num_hidden_layers is 1099511627776, expected at most 65536"):
        ModelShape.of({"num_hidden_layers": 2**40})
    strange = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 64, "layer_types": ["new_attention"]}
    assert ModelShape.of(strange).caches == (LayerCache(4 * 64, heads=2),)
    assert "layers of type new_attention are counted as full attention" in caplog.text


@pytest.mark.parametrize("name", FAMILIES)
def test_run_json_holds_it(name: str) -> None:
    shape = ModelShape.of(tiny_config(name))
    entry = parse_record(to_json(KvEntry.of(shape)), KvEntry, "run.json")
    assert entry.caches() == shape.caches and entry.unknown is None


def test_run_json_says_why_it_does_not_hold_it() -> None:
    entry = parse_record(to_json(KvEntry.of(ModelShape.of({"model_type": "odd"}))), KvEntry, "run.json")
    with pytest.raises(AmqError, match="cannot size the KV cache of a odd"):
        entry.caches()


def test_runs_of_before_are_read() -> None:
    """They hold a few entries of the config; layers of other types counted as full attention."""
    old = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64}
    windowed = {**old, "head_dim": 8, "sliding_window": 6, "layer_types": ["sliding_attention", "linear_attention"] * 2}
    assert parse_record(old, KvEntry, "run.json").caches() == (LayerCache(4 * 2 * 16, heads=2),) * 3
    assert parse_record(windowed, KvEntry, "run.json").caches() == (
        LayerCache(4 * 2 * 8, window=6, heads=2), LayerCache(4 * 2 * 8, heads=2),
    ) * 2  # fmt: skip


@pytest.mark.parametrize(
    ("name", "changed"),
    [("gemma4", {}), ("gemma4", {"num_kv_shared_layers": 0}), ("qwen3.5", {})],
)
def test_a_search_of_such_a_model_ends(
    name: str, changed: dict[str, Any], tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the config to a budget of memory, to run.json, and to `select`, which reads only that."""
    monkeypatch.setattr("amq.report.write_report", lambda run: [])
    tiny_model(name, **changed).float().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    quick = {
        "formats": "int2,int4", "group_size": 32, "windows": 1, "confirm_windows": 1, "bank_windows": 1,
        "window_length": 32, "cost_passes": 1, "points": 1, "refine": 0, "proxy": "rtn",
    }  # fmt: skip
    result = amq.search(str(tmp_path / "model"), tmp_path / "run", memory="1GiB", context=1000, **quick)
    (item,) = (i for i in result.configuration.details.memory.items if i.name == "KV cache")
    assert item.bytes == sum(cache.bytes(1000) for cache in ModelShape.of(tiny_config(name, **changed)).caches)
    chosen = select_from_run(tmp_path / "run", memory="1GiB", context=1000)
    assert chosen.details.memory == result.configuration.details.memory
    assert chosen.cache == {}
    smaller = select_from_run(tmp_path / "run", memory="1GiB", context=1000, cache="int8")
    assert smaller.cache == dict.fromkeys(ModelShape.of(tiny_config(name, **changed)).keeping, "int8")
    (coded,) = (i for i in smaller.details.memory.items if i.name == "KV cache")
    assert 0.5 * item.bytes < coded.bytes < 0.8 * item.bytes and coded.note == "1000 tokens in int8"


def test_a_model_that_cannot_be_cut_is_refused_before_its_bank(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One whose blocks hand on something beside the hidden state and what is known of."""
    tiny_model("qwen3.5").float().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    monkeypatch.setattr(BlockRunner, "logits", lambda self, hidden: torch.zeros(len(hidden), 1))
    with pytest.raises(AmqError, match="cannot be run block by block"):
        amq.search(str(tmp_path / "model"), tmp_path / "run", proxy="rtn", window_length=32, target_bits=3.0)
    assert not [path for path in cache.rglob("*") if "bank" in path.name]
