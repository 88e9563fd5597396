"""The native engine: equal to transformers for its whole family, whatever shares a pass, on every instruction set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoints import tiny_checkpoint
from helpers.engines import last_rows, text, transformers_logits
from helpers.tiny_models import ARCHITECTURES, VOCABULARY, byte_tokenizer

from amq.errors import AmqError
from amq.kernels.cpu import cpu_module
from amq.runtime.engine import MAX_SCORED, Segment
from amq.runtime.families import Unsupported
from amq.runtime.native_engine import NativeEngine, open_native
from amq.runtime.sampling import Choice
from amq.runtime.scheduler import Request, Scheduler
from amq.runtime.settings import Sampling
from amq.runtime.tokenizer import Tokenizer

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-biased": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
    "llama-wide": ("llama", {"hidden_size": 80, "head_dim": 48, "num_key_value_heads": 1, "intermediate_size": 72}),
    "llama3-rope": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "qwen2-windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}),
    "qwen3": ("qwen3", {}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("engine")
    made = {}
    for name, (kind, options) in MODELS.items():
        options = {"num_hidden_layers": 2, **options}
        made[name] = tiny_checkpoint(ARCHITECTURES[kind].build(**options), base / name)
    return made


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(folders: dict[str, Path], name: str) -> None:
    tokens = text(300)  # more than a span of 256 positions, and than any window
    expected = transformers_logits(folders[name], tokens)
    engine = open_native(folders[name], "fp32", context=512)
    found = engine.all_logits(tokens)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def test_int8_activations_are_those_of_the_linears(folders: dict[str, Path]) -> None:
    tokens = text(40)
    expected = transformers_logits(folders["llama"], tokens, "int8")
    found = open_native(folders["llama"], "int8", cache="float32").all_logits(tokens)
    # Sums in another order put an activation now and then on the other side of a rounding boundary.
    assert (found - expected).abs().mean() < 3e-3 * expected.abs().mean()


def test_a_cache_of_fp16_is_nearly_exact(folders: dict[str, Path]) -> None:
    tokens = text(300)
    exact = open_native(folders["llama"], "fp32").all_logits(tokens)
    found = open_native(folders["llama"], "fp32", cache="float16").all_logits(tokens)
    assert 0 < (found - exact).abs().max() < 1e-3 * exact.abs().max()


@pytest.mark.parametrize("activations", ["fp32", "int8"])
def test_a_sequence_does_not_depend_on_what_shares_its_passes(folders: dict[str, Path], activations: str) -> None:
    engine = open_native(folders["llama"], activations, context=512, max_sequences=24)
    texts = {seed: text(length, seed) for seed, length in ((0, 300), (1, 21), (2, 5), (3, 70))}
    alone = {seed: engine.all_logits(tokens)[-1] for seed, tokens in texts.items()}
    slots = {seed: engine.open([-1, *tokens], 0) for seed, tokens in texts.items()}
    # the long one in pieces of many sizes, the others beside it, one or several tokens at a time
    found = last_rows(engine, slots, texts, ((256, 1), (1, 1), (1, 2), (17, 1), (2, 2), (22, 0), (1, 64)))
    assert found.keys() == texts.keys()
    for seed in texts:
        assert torch.equal(found[seed], alone[seed]), seed


def test_every_row_of_a_part_may_be_wanted(folders: dict[str, Path]) -> None:
    tokens, other = text(150), text(9, seed=5)
    engine = open_native(folders["llama"], context=512, max_sequences=3)
    expected, beside = engine.all_logits(tokens), engine.all_logits(other)
    slots = [engine.open([-1, *tokens], 0), engine.open([-1, *other], 0), engine.open([-1], 5)]
    found = []
    for start, more in ((0, 60), (60, 1), (61, 64), (125, 25)):
        segments = [Segment(slots[0], tokens[start : start + more], every=True)]
        if not start:
            segments = [Segment(slots[2], [7, 8], logits=False), *segments, Segment(slots[1], other)]
        rows = engine.forward(segments)
        assert len(rows) == more + (not start)
        if not start:
            assert torch.equal(rows[-1], beside[-1])
        found.append(rows[:more].clone())
    assert torch.equal(torch.cat(found), expected)
    for slot in slots:
        engine.close(slot)
    slot = engine.open([-1], 200)
    with pytest.raises(AmqError, match=f"logits of 0 segments and {MAX_SCORED + 1} single tokens are wanted"):
        engine.forward([Segment(slot, text(MAX_SCORED + 1), every=True)])
    assert slot.length == 0


@pytest.mark.parametrize("engine", ["native", "torch"])
def test_a_scored_prompt_has_the_log_probabilities_of_its_logits(folders: dict[str, Path], engine: str) -> None:
    """As lm-eval asks for them over HTTP: summed, they are those of one pass of transformers over the text."""
    tokens, others = text(200), [text(30, seed) for seed in (1, 2)]
    if engine == "native":
        made = open_native(folders["llama"], "fp32", context=512, max_sequences=3)
        logits = made.all_logits(tokens)
    else:
        from amq.runtime.torch_engine import TorchEngine

        model = ARCHITECTURES["llama"].build(num_hidden_layers=2)
        made = TorchEngine(model, max_sequences=3)
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[0]
    own = logits.double().log_softmax(-1)
    scheduler = Scheduler(made, Tokenizer.from_transformers(byte_tokenizer(), []))
    requests = [Request(other, Sampling(max_new_tokens=9), lambda piece: None) for other in others]
    requests.append(Request(tokens, Sampling(max_new_tokens=1, prompt_logprobs=2), lambda piece: None))
    for request in requests:
        scheduler.submit(request)
    while scheduler.step():
        pass
    choices: list[Choice] = requests[-1].prompt_choices
    assert [choice.token for choice in choices] == tokens[1:]
    expected = own[torch.arange(199), tokens[1:]]
    assert [choice.logprob for choice in choices] == pytest.approx(expected.tolist(), abs=1e-4)
    assert [choice.top[0][1] for choice in choices] == pytest.approx(own[:-1].amax(-1).tolist(), abs=1e-4)


def test_threads_and_repetition_change_nothing(folders: dict[str, Path]) -> None:
    tokens = text(290)
    one = open_native(folders["qwen3"], threads=1).all_logits(tokens)
    engine = open_native(folders["qwen3"], threads=3)
    assert torch.equal(engine.all_logits(tokens), one)
    assert torch.equal(engine.all_logits(tokens), one)  # stale pages of the cache are not seen


@pytest.mark.parametrize("activations", ["fp32", "int8"])
def test_every_instruction_set_agrees(folders: dict[str, Path], activations: str) -> None:
    tokens, results = text(70), {}
    engine = open_native(folders["qwen3"], activations)
    for isa in cpu_module().isas():
        engine.isa = isa
        results[isa] = engine.all_logits(tokens)
    for isa, found in results.items():
        allowed = (2e-6 if activations == "fp32" else 2e-2) * results["portable"].abs().mean()
        assert (found - results["portable"]).abs().mean() < allowed, isa


def test_what_earlier_sequences_computed_is_used_again(folders: dict[str, Path]) -> None:
    engine = open_native(folders["llama"], context=512, max_sequences=2)
    first, second = text(200), text(200)[:150] + text(50, seed=9)
    expected = open_native(folders["llama"]).all_logits(second)[-1]
    slot = engine.open(first, 20)
    assert slot.length == 0
    engine.forward([Segment(slot, first)])
    used, total = engine.cached_tokens()
    assert 220 <= used < 220 + 64 and total == 1024
    engine.close(slot)
    assert engine.cached_tokens()[0] == 0
    slot = engine.open(second, 0)
    assert slot.length == 128  # two pages of 64 are common
    assert torch.equal(engine.forward([Segment(slot, second[128:])])[0], expected)
    with pytest.raises(AmqError, match="room for 256 positions"):
        engine.forward([Segment(slot, first)])
    engine.close(slot)
    with pytest.raises(AmqError, match="closed already"):
        engine.close(slot)


def test_room_runs_out_and_comes_back(folders: dict[str, Path]) -> None:
    engine = open_native(folders["llama"], context=128, max_sequences=2)
    slots = [engine.open(text(10), 100), engine.open(text(10), 1)]
    assert engine.open(text(10), 1) is None
    engine.close(slots[0])
    assert engine.open(text(10), 118) is not None
    with pytest.raises(AmqError, match="1 to 128 positions, this one wants 200"):
        engine.open(text(100), 100)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("opt", {}, "runs llama, mistral, qwen2, .*, not opt"),
        ("llama", {"hidden_act": "gelu"}, "no activation gelu"),
        ("llama", {"head_dim": 8}, "multiple of 16 features up to 512, these have 8"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "kind dynamic"),
    ],
)
def test_what_it_cannot_run_is_refused(kind: str, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = tiny_checkpoint(ARCHITECTURES[kind].build(num_hidden_layers=1, **options), tmp_path / "other")
    with pytest.raises(Unsupported, match=message):
        open_native(folder)


def test_wrong_tokens_and_passes_are_refused(folders: dict[str, Path]) -> None:
    engine = open_native(folders["llama"], context=128)
    slot = engine.open(text(20), 10)
    for tokens, message in (([VOCABULARY], "token: expected below 256, got 256"), ([], "at least 1")):
        with pytest.raises(AmqError, match=message):
            engine.forward([Segment(slot, tokens)])
    assert slot.length == 0
    with pytest.raises(AmqError, match="context must be 1 to 512"):
        open_native(folders["llama"], context=513)


def test_the_interface(folders: dict[str, Path]) -> None:
    engine: NativeEngine = open_native(folders["llama"], context=100)
    assert (engine.vocab_size, engine.context, engine.max_sequences) == (VOCABULARY, 100, 1)
    assert "native engine (llama)" in engine.banner and engine.weight_bytes > 0
