"""TorchEngine against transformers: parts of prompts, sliding windows, captured steps, limits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from helpers.captures import Recorded
from helpers.families import FAMILIES
from helpers.tiny_models import ARCHITECTURES, dynamic_rope, longrope, random_tokens, randomized
from torch import Tensor, nn

from amq.errors import AmqError
from amq.runtime.engine import Segment
from amq.runtime.torch_engine import CACHE_ARGUMENTS, GRAPH_CONTEXT, TorchEngine, weight_bytes
from amq.runtime.trial import try_cache

pytestmark = pytest.mark.usefixtures("one_thread")


def logits_after(engine: TorchEngine, tokens: list[int], parts: list[int], slot: Any = None) -> Tensor:
    """The logits after each part of `tokens`, all of them computed."""
    slot = slot or engine.open(tokens, 1, reuse=False)
    rows, start = [], 0
    for part in parts:
        rows.append(engine.forward([Segment(slot, tokens[start : start + part])])[0].clone())
        start += part
    engine.close(slot)
    return torch.stack(rows)


GROWING, STATIC = ("llama", "gemma2", "mistral", "phi3"), ("llama", "gemma3", "mistral", "opt", "mixtral")
WINDOWS = ("gemma2", "gemma3", "mistral")


@pytest.mark.parametrize("name, static", [(n, False) for n in GROWING] + [(n, True) for n in STATIC])
def test_parts_of_a_prompt_and_steps_give_what_a_whole_forward_gives(name: str, static: bool) -> None:
    """60 tokens with a sliding window of 16, where the family has one. Captured steps want sdpa: eager attention of
    transformers 5.14 and 5.17 makes a tensor of a Python number in every call."""
    model = ARCHITECTURES[name].build(attn_implementation="sdpa" if static else "eager")
    recorded = Recorded() if static else None
    engine = TorchEngine(model, context=80, capture=recorded)
    tokens, parts = random_tokens(1, 60)[0].tolist(), [10, 1, 1, 20, 1, 1, 7, 9, *[1] * 10]
    with torch.no_grad():
        whole = model(torch.tensor([tokens])).logits[0]
    expected = whole[torch.tensor(parts).cumsum(0) - 1]
    for _ in range(2):  # the second sequence in the same place sees nothing of the first
        torch.testing.assert_close(logits_after(engine, tokens, parts), expected, atol=2e-4, rtol=1e-4)
    if recorded:
        assert (recorded.captured, recorded.replayed) == (1, 2 * 14)
    assert static == ("captured" in engine.banner)


def test_models_that_do_not_go_on_from_a_state_get_their_prompts_whole() -> None:
    options = {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 8, "vocab_size": 256, "eos_token_id": None}
    mamba = randomized(transformers.MambaForCausalLM(transformers.MambaConfig(**options)), 0)
    griffin = ARCHITECTURES["llama"].config().to_dict() | {"lru_width": 64, "attention_window_size": 16}
    griffin = {k: v for k, v in griffin.items() if k not in ("model_type", "rope_parameters", "head_dim")}
    griffin = randomized(transformers.RecurrentGemmaForCausalLM(transformers.RecurrentGemmaConfig(**griffin)), 0)
    tokens = random_tokens(1, 40)[0].tolist()
    for model in (mamba, griffin):
        with torch.no_grad():
            whole = model(torch.tensor([tokens])).logits[0]
        engine = TorchEngine(model, context=64, max_rows=20)
        for _ in range(2):
            slot = engine.open(tokens, 1, reuse=False)
            assert not len(engine.forward([Segment(slot, tokens[:20], False)]))
            rows = [engine.forward([Segment(slot, tokens[a:b])])[0] for a, b in ((20, 30), (30, 31), (31, 40))]
            torch.testing.assert_close(torch.stack(rows), whole[[29, 30, 39]], atol=2e-5, rtol=1e-5)
            engine.close(slot)
    with pytest.raises(AmqError, match="recurrent_gemma runs one sequence at a time"):
        TorchEngine(griffin, max_sequences=2)


BORDER = 64
LONGROPE, DYNAMIC = longrope(BORDER), dynamic_rope(BORDER)


@pytest.mark.parametrize("name", ["llama", "captured", "gemma2", "mamba", "longrope", "dynamic"])
def test_every_row_of_a_part_may_be_wanted(name: str) -> None:
    """Each row is that of one call over the text so far, also where a table changes in the middle of a part."""
    kind, options = {"longrope": ("phi3", LONGROPE), "dynamic": ("llama", DYNAMIC)}.get(name, (name, {}))

    def build() -> Any:
        if name == "mamba":
            sizes = {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 8, "vocab_size": 256}
            return randomized(transformers.MambaForCausalLM(transformers.MambaConfig(eos_token_id=None, **sizes)), 0)
        if name == "captured":  # wants sdpa: eager attention of older transformers makes tensors in every step
            return ARCHITECTURES["llama"].build(attn_implementation="sdpa")
        return ARCHITECTURES[kind].build(**options)

    engine = TorchEngine(build(), context=96, capture=Recorded() if name == "captured" else None, max_sequences=2)
    model, tokens = build(), random_tokens(1, 90)[0].tolist()
    slot, other = engine.open(tokens, 1), engine.open(tokens, 1)
    rows = [engine.forward([Segment(slot, tokens[:10], every=True), Segment(other, tokens[:20])])[:10].clone()]
    for start, end in ((10, 11), (11, 50), (50, 90)):
        rows.append(engine.forward([Segment(slot, tokens[start:end], every=True)]).clone())
    assert [len(part) for part in rows] == [10, 1, 39, 40]
    for place in (0, 9, 10, 11, 49, 62, 63, 64, 65, 89):
        with torch.no_grad():
            if name == "dynamic":
                model(torch.zeros(1, 1, dtype=torch.int64))  # a dynamic table would remember its longest text
            expected = model(torch.tensor([tokens[: place + 1]])).logits[0, -1]
        torch.testing.assert_close(torch.cat(rows)[place], expected, atol=1e-3, rtol=1e-3)
    with pytest.raises(AmqError, match="after each of 65 tokens are wanted, expected at most 64"):
        engine.forward([Segment(other, [1] * 65, every=True)])


def with_forward(model: nn.Module, forward: Callable[..., Any]) -> nn.Module:
    """`model` with another forward, which gets the old one as its first argument."""
    old = type(model).forward
    body = {"forward": lambda self, *args, **kwargs: forward(lambda *a, **k: old(self, *a, **k), *args, **kwargs)}
    model.__class__ = type(type(model).__name__, (type(model),), body)
    return model


@pytest.mark.parametrize("argument", CACHE_ARGUMENTS)
@pytest.mark.parametrize("rest", ["swallowed", "refused"])
def test_the_cache_is_found_under_every_name(argument: str, rest: str) -> None:
    """`cache` is transformers 5.24's, the others are of 5.23 and before. No signature shows any; a name that the model
    does not know is swallowed or refused, and so is `logits_to_keep`."""
    model = ARCHITECTURES["llama"].build()
    own, tokens = try_cache(model, CACHE_ARGUMENTS).argument, random_tokens(1, 12)[0].tolist()

    def renamed(forward: Callable[..., Any], **kwargs: Any) -> Any:
        known = {name: kwargs.pop(name) for name in ("input_ids", "use_cache") if name in kwargs}
        if argument in kwargs:
            known[own] = kwargs.pop(argument)
        if kwargs and rest == "refused":
            raise TypeError(f"unexpected keyword argument {next(iter(kwargs))}")
        return forward(**known)

    expected = logits_after(TorchEngine(model), tokens, [10, 1, 1])
    engine = TorchEngine(with_forward(model, renamed))
    torch.testing.assert_close(logits_after(engine, tokens, [10, 1, 1]), expected, atol=1e-5, rtol=1e-5)


def test_models_without_a_cache_are_refused() -> None:
    def forgetful(forward: Callable[..., Any], input_ids: Tensor, **kwargs: Any) -> Any:
        return forward(input_ids=input_ids)

    with pytest.raises(AmqError, match=r"LlamaForCausalLM takes no KV cache that amq knows \(cache: not filled; past"):
        TorchEngine(with_forward(ARCHITECTURES["llama"].build(), forgetful))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_cache_holds_is_found(dtype: torch.dtype) -> None:
    options = {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 8, "vocab_size": 256, "eos_token_id": None}
    mamba = randomized(transformers.MambaForCausalLM(transformers.MambaConfig(**options)), 0).to(dtype)
    use = try_cache(mamba, CACHE_ARGUMENTS)
    assert use.recurrent and not (use.plain or use.crops or use.continues)
    for name in {*GROWING, *STATIC}:
        use = try_cache(ARCHITECTURES[name].build().to(dtype), CACHE_ARGUMENTS)
        assert not use.recurrent and use.layers == 3 and use.options == {"logits_to_keep": 1}, name
        assert use.crops and use.continues and use.plain == (name not in WINDOWS), name


@pytest.mark.parametrize("name", ["qwen3_5", "lfm2", "granitemoehybrid"])
def test_states_that_a_model_goes_on_from_with_several_tokens(name: str) -> None:
    """Of transformers 5.24: older versions may go on from some of them token by token alone."""
    model, tokens = FAMILIES[name].build(), random_tokens(1, 40)[0].tolist()
    use = try_cache(model, CACHE_ARGUMENTS)
    assert use.recurrent and not (use.plain or use.crops)
    assert use.continues or tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 24)
    with torch.no_grad():
        whole = model(torch.tensor([tokens])).logits[0]
    rows = logits_after(TorchEngine(model, context=64, max_rows=20), tokens, [16, 1, 17, 1, 5])
    torch.testing.assert_close(rows, whole[[15, 16, 33, 34, 39]], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name, options", [("phi3", LONGROPE), ("llama", DYNAMIC)])
@pytest.mark.parametrize("parts", [[120], [40, 40, 40], [64, 1, 55], [60, *[1] * 60], [10, 100, 10]])
def test_rotary_tables_are_those_of_the_whole_text(name: str, options: dict[str, Any], parts: list[int]) -> None:
    """Every row is that of one call over the text so far, on both sides of the border, with short texts between."""
    model = ARCHITECTURES[name].build(**options)
    engine = TorchEngine(model, context=160, max_sequences=2)
    tokens, short = random_tokens(1, 120)[0].tolist(), random_tokens(1, BORDER, seed=1)[0].tolist()
    fresh = ARCHITECTURES[name].build(**options)  # a dynamic table would remember its longest text

    def whole(text: list[int]) -> Tensor:
        fresh(torch.zeros(1, 1, dtype=torch.int64))
        return fresh(torch.tensor([text])).logits[0, -1]

    long_slot, done = engine.open(tokens, 4), 0
    with torch.no_grad():
        for number, part in enumerate(parts):
            row = engine.forward([Segment(long_slot, tokens[done : done + part])])[0]
            done += part
            if number % 10 == 9 or part > 1:
                torch.testing.assert_close(row, whole(tokens[:done]), atol=1e-4, rtol=1e-4)
                slot = engine.open(short, 1, reuse=False)
                row = engine.forward([Segment(slot, short)])[0]
                engine.close(slot)
                torch.testing.assert_close(row, whole(short), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name, options", [("phi3", LONGROPE), ("llama", DYNAMIC)])
def test_prompts_beyond_a_change_of_tables_are_computed_once(name: str, options: dict[str, Any]) -> None:
    """Parts without logits wait for the change; behind it, longrope goes on in parts."""
    lengths = []

    def counted(forward: Callable[..., Any], input_ids: Tensor, **kwargs: Any) -> Any:
        lengths.append(input_ids.shape[1])
        return forward(input_ids=input_ids, **kwargs)

    model, tokens = ARCHITECTURES[name].build(**options), random_tokens(1, 120)[0].tolist()
    engine = TorchEngine(with_forward(model, counted), context=160)
    slot = engine.open(tokens, 4)
    lengths.clear()
    for start in range(0, 120, 30):
        engine.forward([Segment(slot, tokens[start : start + 30], logits=start == 90)])
    assert lengths == ([90, 30] if options is LONGROPE else [1, 120])  # the 1 takes an earlier text's table back


def test_captured_steps_cross_the_border_of_longrope() -> None:
    model = ARCHITECTURES["phi3"].build(**LONGROPE, attn_implementation="sdpa")
    engine = TorchEngine(model, context=160, capture=lambda step: step)
    tokens = random_tokens(1, 80)[0].tolist()
    assert "captured" in engine.banner
    with torch.no_grad():
        for length in (60, 80, 60):
            row = logits_after(engine, tokens[:length], [50, *[1] * (length - 50)])[-1]
            torch.testing.assert_close(row, model(torch.tensor([tokens[:length]])).logits[0, -1], atol=1e-4, rtol=1e-4)


def test_greedy_tokens_across_the_border_of_longrope() -> None:
    """transformers' own generate goes wrong at the border in 5.14 and 5.17; 5.24's gives these."""
    model, prompt = ARCHITECTURES["phi3"].build(**LONGROPE), random_tokens(1, 50)[0].tolist()
    expected = list(prompt)
    with torch.no_grad():
        for _ in range(40):
            expected.append(int(model(torch.tensor([expected])).logits[0, -1].argmax()))
    assert greedy(TorchEngine(model), prompt, 40) == expected[50:]


def greedy(engine: TorchEngine, prompt: list[int], count: int) -> list[int]:
    slot, tokens, found = engine.open(prompt, count), prompt, []
    for _ in range(count):
        found.append(int(engine.forward([Segment(slot, tokens)])[0].argmax()))
        tokens = found[-1:]
    return found


def test_greedy_tokens_are_those_of_generate() -> None:
    model, prompt = ARCHITECTURES["llama"].build(), random_tokens(1, 9)[0].tolist()
    theirs = model.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False, pad_token_id=0)[0, 9:].tolist()
    assert greedy(TorchEngine(model), prompt, 40) == theirs


@pytest.mark.parametrize("static", [False, True])
def test_sequences_do_not_see_each_other(static: bool) -> None:
    model = ARCHITECTURES["llama"].build(attn_implementation="sdpa")
    engine = TorchEngine(model, context=40, max_sequences=2, capture=Recorded() if static else None)
    texts = [t.tolist() for t in random_tokens(2, 20)]
    alone = [logits_after(engine, tokens, [15, 5])[1] for tokens in texts]
    a, b = (engine.open(tokens, 1, reuse=False) for tokens in texts)
    assert engine.open([1], 1) is None
    assert engine.forward([Segment(a, texts[0][:3], False), Segment(b, texts[1][:17], False)]).shape == (0, 256)
    assert engine.cached_tokens() == (20, 80)
    both = engine.forward([Segment(b, texts[1][17:]), Segment(a, texts[0][3:])])
    torch.testing.assert_close(both, torch.stack(alone[::-1]), atol=1e-4, rtol=1e-4)
    assert both.dtype == torch.float32
    engine.close(a)
    assert engine.open([1], 1) is not None


def test_limits_are_errors_that_say_so() -> None:
    model = ARCHITECTURES["llama"].build()
    engine = TorchEngine(model, context=100, max_rows=10)
    with pytest.raises(AmqError, match="do not fit the context of 100"):
        engine.open([1] * 90, 11)
    slot = engine.open([1] * 5, 3)
    for tokens, message in (
        ([1] * 11, "11 tokens, expected at most 10"),
        ([1] * 9, "9 tokens after 0 in a slot for 8"),
        ([], "0 tokens after 0"),
        ([256], "outside the model's vocabulary of 256"),
        ([-1], "outside the model's vocabulary"),
    ):
        with pytest.raises(AmqError, match=message):
            engine.forward([Segment(slot, tokens)])
    assert slot.length == 0
    engine.close(slot)
    with pytest.raises(AmqError, match="slot is closed"):
        engine.forward([Segment(slot, [1])])
    for options, message in (
        ({"context": 513}, "context must be from 2 to the model's 512, got 513"),
        ({"context": 1}, "context must be"),
        ({"max_sequences": 0}, "max_sequences must be from 1"),
    ):
        with pytest.raises(AmqError, match=message):
            TorchEngine(model, **options)


def test_contexts() -> None:
    model = ARCHITECTURES["llama"].build(max_position_embeddings=2 * GRAPH_CONTEXT, num_hidden_layers=1)
    assert TorchEngine(model).context == 2 * GRAPH_CONTEXT
    assert TorchEngine(model, capture=Recorded()).context == GRAPH_CONTEXT
    assert TorchEngine(model, context=64).context == 64
    dynamic = ARCHITECTURES["llama"].build(**DYNAMIC)
    assert TorchEngine(dynamic).context == BORDER and "anew" not in TorchEngine(dynamic).banner
    assert "context 160, whole texts anew beyond 64 (dynamic" in TorchEngine(dynamic, context=160).banner


def test_what_cannot_be_captured_runs_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    def refuse(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        raise RuntimeError("operation not permitted when stream is capturing\nmore lines")

    model, tokens = ARCHITECTURES["llama"].build(), random_tokens(1, 12)[0].tolist()
    engine = TorchEngine(model, context=64, capture=refuse, why="for a test")
    assert "no CUDA graphs (operation not permitted when stream is capturing)" in engine.banner
    assert engine.banner.endswith("context 64 (for a test)") and "slower" in caplog.text
    plain = logits_after(TorchEngine(model), tokens, [11, 1])
    torch.testing.assert_close(logits_after(engine, tokens, [11, 1]), plain, atol=0, rtol=0)


def test_weight_bytes_count_what_a_token_reads() -> None:
    tied, untied = (ARCHITECTURES["llama"].build(tie_word_embeddings=t) for t in (True, False))
    table = 256 * 64 * 4

    def total(model: nn.Module) -> int:
        return sum(p.nbytes for p in model.parameters())

    assert weight_bytes(tied) == total(tied) and weight_bytes(untied) == total(untied) - table == total(tied)
