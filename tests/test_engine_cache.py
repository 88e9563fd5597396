"""Keys and values in codes: what transformers computes with keys and values that were rounded alike."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import caches
import pytest
import torch
from helpers.checkpoints import advise, tiny_checkpoint
from helpers.engines import text
from helpers.tiny_models import ARCHITECTURES
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

from amq.errors import AmqError
from amq.kernels.cpu import cpu_module
from amq.model.shape import CACHES as BITS
from amq.model.shape import PAGE, SPARE_PAGES, LayerCache, ModelShape, kept_as
from amq.proxy.caches import CODED, cached, rounded
from amq.runtime.engine import MAX_SCORED, Segment
from amq.runtime.loading import load
from amq.runtime.native_engine import NativeEngine, open_native
from amq.runtime.paged_engine import PagedSlot

HEAD_DIM, KV_HEADS, LAYERS, CONTEXT = 48, 2, 2, 512
MIXED = [("int4", "int8"), ("float16", "int4"), ("k8v4", "float32")]
"""A kind for each layer."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = {"head_dim": HEAD_DIM, "num_key_value_heads": KV_HEADS, "num_hidden_layers": LAYERS}
    return tiny_checkpoint(ARCHITECTURES["llama"].build(**shape), tmp_path_factory.mktemp("cache") / "llama")


class RoundedCache(DynamicCache):
    """Keys and values as `amq.proxy.caches` rounds them, but for the keys of the page that what came last is in, which
    is to come by itself: where keys are rounded by the page those are in 16 bits yet, behind the first page."""

    def __init__(self, kinds: Sequence[str]) -> None:
        super().__init__()
        self._kinds = kinds

    def update(self, key: Tensor, value: Tensor, layer: int, *where: Any, **more: Any) -> tuple[Tensor, Tensor]:
        key, value = super().update(key, value, layer, *where, **more)
        kept, values = cached(self._kinds[layer], key, value)
        if BITS[self._kinds[layer]][0] < 8:
            own = max(PAGE, (key.shape[-2] - 1) // PAGE * PAGE)
            kept = torch.cat([kept[..., :own, :], rounded(key[..., own:, :], 16)], -2)
        return kept, values


@torch.no_grad()
def expected_logits(folder: Path, tokens: Sequence[int], kinds: Sequence[str]) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    cache = RoundedCache(kinds)
    pages = torch.tensor([tokens]).split(PAGE, 1)
    return torch.cat([model(page, past_key_values=cache, use_cache=True).logits[0] for page in pages])


def test_the_kinds_are_those_of_the_module() -> None:
    assert cpu_module().CACHES == tuple(BITS)
    assert cpu_module().PAGE == PAGE


def test_a_grid_holds_all_of_its_row() -> None:
    """So that the reference below is one: nothing is farther off than half a step, at any size of numbers."""
    random = torch.Generator().manual_seed(0)
    for factor in (1e-4, 1.0, 300.0):
        x = factor * (torch.randn(500, 64, generator=random) + 3 * torch.randn(500, 1, generator=random))
        for bits in (8, 4):
            range_ = (x.amax(-1) - x.amin(-1)) * (1 + 2**-10) + 2**-10 * x.abs().amax(-1)
            step = range_ / (2**bits - 1) + 2.0**-24  # and no step is finer than its smallest number
            assert ((rounded(x, bits) - x).abs().amax(-1) <= 0.501 * step + 2.0**-25).all(), (factor, bits)


def of_layers(kind: str | Sequence[str]) -> Sequence[str]:
    return [kind] * LAYERS if isinstance(kind, str) else kind


@pytest.mark.parametrize("kind", [*CODED, *MIXED])
def test_logits_are_those_of_a_rounded_cache(folder: Path, kind: str | Sequence[str]) -> None:
    """On every instruction set. A number now and then lies on the other side of a rounding boundary: hence the mean,
    and a bound that a cache of other codes would miss by far."""
    tokens = text(300)  # more than a span of positions, with pages that are not full
    expected, exact = (expected_logits(folder, tokens, of_layers(kinds)) for kinds in (kind, "float32"))
    rounding = (expected - exact).abs().mean()
    engine = open_native(folder, "fp32", context=CONTEXT, cache=kind)
    for isa in cpu_module().isas():
        engine.isa = isa
        found = engine.all_logits(tokens)
        assert (found - expected).abs().mean() < 0.1 * rounding, isa


@pytest.mark.parametrize("kind", CODED)
def test_large_biases_of_keys_cost_no_accuracy(tmp_path: Path, kind: str) -> None:
    """As Qwen 2.5 has them, on the features that turn slowest: about what coded keys cost without them."""
    errors = []
    for bias in (0.0, 100.0):
        rope = {"rope_type": "default", "rope_theta": 1e6}
        model = ARCHITECTURES["qwen2"].build(num_hidden_layers=LAYERS, rope_parameters=rope)
        for layer in model.model.layers:
            keys = layer.self_attn.k_proj
            with torch.no_grad():
                keys.bias.view(-1, layer.self_attn.head_dim)[:, [-1, layer.self_attn.head_dim // 2 - 1]] = bias
        made = tiny_checkpoint(model, tmp_path / f"biased-{bias:.0f}")
        exact, coded = (open_native(made, "fp32", cache=k).all_logits(text(200)) for k in ("float32", kind))
        errors.append((coded - exact).abs().mean())
    assert errors[1] < 2 * errors[0]


def layer_bytes(kind: str) -> int:
    """Of a page's part."""
    grids = [PAGE] * sum(part < 16 for part in BITS[kind])  # scale and least value in fp16
    if BITS[kind][0] < 8:
        grids[0] = HEAD_DIM
    return KV_HEADS * (PAGE * HEAD_DIM * sum(BITS[kind]) // 8 + 4 * sum(grids))


@pytest.mark.parametrize("kind", [*BITS, *MIXED])
def test_a_page_takes_the_bits_that_it_says(folder: Path, kind: str | Sequence[str]) -> None:
    """The spare pages are of all layers where one rounds pages."""
    by_page = any(BITS[each][0] < 8 for each in of_layers(kind))
    page_bytes = sum(map(layer_bytes, of_layers(kind)))
    engine = open_native(folder, context=CONTEXT, max_sequences=3, cache=kind)
    assert engine.cache_bytes == 3 * page_bytes * (CONTEXT // PAGE + by_page * SPARE_PAGES)
    assert f", {'+'.join(sorted(set(of_layers(kind))))} cache" in engine.banner
    assert engine.cached_tokens() == (0, 3 * CONTEXT)
    slots = [engine.open(text(100), 30) for _ in range(3)]
    assert engine.cached_tokens() == (9 * PAGE, 3 * CONTEXT)
    assert all(slot is not None and slot.capacity == 3 * PAGE for slot in slots)
    shape = ModelShape.of(json.loads((folder / "config.json").read_text()))
    assert 3 * sum(cache.bytes(CONTEXT) for cache in kept_as(shape.caches, kind)) == engine.cache_bytes


def test_what_holds_more_than_keys_and_values_has_no_size_in_codes() -> None:
    """A latent cache, or an entry of an older run, is counted in 16 bits alone."""
    caches = LayerCache(constant=9), LayerCache(per_token=1152), LayerCache(per_token=256, heads=1)
    assert kept_as(caches, "float16") == caches and kept_as(caches[:1], "int8") == caches[:1]
    with pytest.raises(AmqError, match="a cache in int8 has no size that is known"):
        kept_as(caches, "int8")
    assert kept_as(caches, ("float16", "int8")) == (*caches[:2], LayerCache(per_token=136, heads=1))
    with pytest.raises(AmqError, match="each of 2 layers with keys and values, got 3"):
        kept_as(caches, ("float16",) * 3)


@pytest.mark.parametrize("kind", [*CODED, *MIXED])
def test_a_number_that_is_none_spoils_its_own_text_alone(folder: Path, kind: str | Sequence[str]) -> None:
    """A page whose grids hold NaN is used again by another text, which never sees them."""
    engine = open_native(folder, "fp32", context=CONTEXT, cache=kind)
    clean = engine.all_logits(text(100))
    engine._cache.fill_(0xFF)  # every fp16 a NaN, every code the largest
    assert torch.equal(engine.all_logits(text(100)), clean)


def read(engine: NativeEngine, slot: PagedSlot, tokens: Sequence[int], sizes: Sequence[int]) -> list[Tensor]:
    """Logits after every token that the slot has not computed, in passes of `sizes` tokens and then of 64."""
    logits: list[Tensor] = []
    for size in (*sizes, *[MAX_SCORED] * len(tokens)):
        part = tokens[slot.length : slot.length + size]
        if part:
            logits += engine.forward([Segment(slot, part, every=True)]).clone()
    return logits


@pytest.mark.parametrize("kind", [*BITS, *MIXED])
def test_what_was_read_before_is_gone_on_from(folder: Path, tmp_path: Path, kind: str | Sequence[str]) -> None:
    """Pages of an earlier text and pages from disk, from wherever the texts part: what comes behind them is,
    to the bit, what the text gives in one piece."""
    tokens, other = text(300), [*text(150), *reversed(text(100))]
    expected = open_native(folder, context=CONTEXT, cache=kind).all_logits(tokens)
    how = {"context": CONTEXT, "cache": kind, "prompt_cache": 1 << 24, "prompt_cache_folder": tmp_path / "prompts"}
    for restarted in (False, True):
        engine = open_native(folder, max_sequences=2, **how)
        first = engine.open(other if not restarted else tokens, 10)
        assert first is not None and first.length == restarted * 4 * PAGE
        if not restarted:
            read(engine, first, other, (3, 61, 7))
        second = engine.open(tokens, 10)
        assert second is not None and second.length == (4 if restarted else 2) * PAGE
        found = read(engine, second, tokens, (1, 40, 50))
        assert torch.equal(torch.stack(found), expected[len(tokens) - len(found) :])
        engine.close(second)
        engine.close(first)
        engine.shutdown()


@pytest.mark.parametrize("kind", MIXED)
def test_sequences_do_not_disturb_each_other(folder: Path, kind: Sequence[str]) -> None:
    """Read and decoded side by side in uneven parts, to the bit what each gives alone."""
    texts = text(200), list(reversed(text(170)))
    expected = [open_native(folder, context=CONTEXT, cache=kind).all_logits(tokens) for tokens in texts]
    engine = open_native(folder, context=CONTEXT, max_sequences=2, cache=kind)
    slots = [engine.open(tokens[:1], len(tokens) - 1) for tokens in texts]
    for turn in range(200):
        sizes = (1, 1 + turn % 40) if turn % 2 else (1 + 7 * turn % 31, 1)
        parts = [
            Segment(slot, tokens[slot.length : slot.length + size])
            for slot, tokens, size in zip(slots, texts, sizes, strict=True)
            if slot is not None and slot.length < len(tokens)
        ]
        for part, logits in zip(parts, engine.forward(parts) if parts else (), strict=True):
            assert torch.equal(logits, expected[slots.index(part.slot)][part.slot.length - 1])
    assert [slot.length for slot in slots if slot] == [200, 170]


def test_a_cache_that_there_is_not_is_refused(folder: Path) -> None:
    with pytest.raises(AmqError, match="keeps keys and values as float32, float16, int8, k8v4, int4, not as int3"):
        open_native(folder, cache="int3")
    for kinds in (["int4"], ["int4"] * 3):
        with pytest.raises(AmqError, match=f"llama has 2 layers that keep keys and values .* got {len(kinds)} kinds"):
            open_native(folder, cache=kinds)


def test_a_checkpoint_says_how_its_layers_are_kept(folder: Path, tmp_path: Path) -> None:
    """It is advice: a kind that is given goes before it, and what it says has to fit the model."""
    place = shutil.copytree(folder, tmp_path / "model")
    assert "float16 cache" in open_native(place).banner and "float32 cache" in open_native(place, "fp32").banner
    advise(place, {"layers.0": "int8", "layers.1": "int4"})
    expected, plain = (open_native(folder, cache=kind).all_logits(text(100)) for kind in (("int8", "int4"), "float16"))
    assert not torch.equal(expected, plain)
    for cache, logits in (("auto", expected), ("float16", plain)):
        assert torch.equal(load(place, cache=cache).engine.all_logits(text(100)), logits)
    assert "int4+int8 cache" in open_native(place, "fp32").banner
    for said, error in (
        ({"layers.1": "int4"}, "each of the 2 layers of a llama .* got none for 'layers.0'; it was edited: correct it"),
        ({"layers.0-2": "int4"}, "which are not 'layers.2'"),
        ({"layers.0-1": "int9"}, "not as int9, which .*model asks for: give one of these as --cache"),
        ({"layers.0-1": 4}, "config.json: quantization_config at .*cache.*expected `str`, got `int`"),
    ):
        advise(place, said)
        with pytest.raises(AmqError, match=error):
            load(place)
        if isinstance(next(iter(said.values())), str):
            assert torch.equal(load(place, cache="float16").engine.all_logits(text(100)), plain)


def test_what_runs_in_transformers_says_that_it_takes_no_advice(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Heads of 24 features are for no engine of ours, whatever the cache."""
    place = tiny_checkpoint(ARCHITECTURES["llama"].build(head_dim=24), tmp_path / "odd")
    advise(place, {"layers.0-1": "int4"})
    load(place)
    assert "odd asks for keys and values in int4, which transformers does not have" in caplog.text
    with pytest.raises(AmqError, match="is for engines of our own, .* multiple of 16 features .* these have 24"):
        load(place, cache="int4")


def test_the_benchmark_runs(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("the heather on the other thorn " * 20)
    small = ["--lengths", "16,32", "--max-tokens", "64", "--depth", "40", "--turns", "3"]
    caches.main([str(folder), "--text", str(tmp_path / "text.txt"), *small, "--json", str(tmp_path / "found.json")])
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert rows["float16"]["perplexity_32"] == pytest.approx(rows["float32"]["perplexity_32"], rel=1e-3)
    assert rows["k8v4"]["perplexity_16"] == pytest.approx(rows["float32"]["perplexity_16"], rel=0.05)
    assert rows["int8"]["bytes_per_token"] < 0.6 * rows["float16"]["bytes_per_token"]
    assert rows["mixed"]["bytes_per_token"] == rows["int8"]["bytes_per_token"]  # both layers are at an end
    assert rows["int4"]["bytes_per_token"] < 0.31 * rows["float16"]["bytes_per_token"]
    assert rows["float16"]["decode_40"]["speedup"] == 1 and "| k8v4 |" in capsys.readouterr().out
