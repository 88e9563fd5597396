"""amq.runtime.grammar: texts that keep to random schemas, what is refused and how, and grammars that never end."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.checkpoints import tiny_checkpoint
from helpers.engines import SECONDS, FakeEngine, FakeSlot, text
from helpers.tiny_models import ARCHITECTURES, byte_tokenizer

from amq.errors import AmqError
from amq.runtime.engine import Engine
from amq.runtime.grammar import Grammar, GrammarCompiler
from amq.runtime.sampling import Constraint
from amq.runtime.scheduler import Piece, Request, Scheduler
from amq.runtime.settings import Sampling
from amq.runtime.tokenizer import Tokenizer

pytest.importorskip("llguidance", reason="the server needs the extra `serve`")

END, ALSO_END, ROWS = 257, 258, 320
TOKENIZER = Tokenizer.from_transformers(byte_tokenizer("<bos> $A <eos>"), [END, ALSO_END])
OBJECT = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def compiler() -> Iterator[GrammarCompiler]:
    made = GrammarCompiler(TOKENIZER, ROWS, TOKENIZER.end_ids)
    yield made
    made.close()


def schema_of(value: Any) -> Grammar:
    return Grammar("json_schema", json.dumps(value))


def allowed(constraint: Constraint) -> list[int]:
    return np.flatnonzero(np.unpackbits(constraint.allowed().view(np.uint8), bitorder="little")).tolist()


def say(constraint: Constraint, words: str) -> list[int]:
    """What may come after these."""
    for token in TOKENIZER.encode(words, special=False):
        assert token in allowed(constraint), words
        constraint.accept(token)
    return allowed(constraint)


class RandomEngine(FakeEngine):
    """Logits that follow from all tokens before them, those of `likely` raised: random bytes would hardly ever end."""

    likely: Sequence[int] = (*TOKENIZER.encode('"]},', special=False), END)
    raised = 3.0

    def logits(self, slot: FakeSlot) -> torch.Tensor:
        seed = torch.Generator().manual_seed(hash(tuple(slot.tokens)) % 2**31)
        logits = torch.randn(self.vocab_size, generator=seed)
        logits[list(self.likely)] += self.raised
        return logits


class Text:
    """A request and what came of it."""

    def __init__(self, prompt: Sequence[int], constraint: Constraint | None, **sampling: Any) -> None:
        self.pieces: list[Piece] = []
        self.request = Request(prompt, Sampling(**sampling), self.pieces.append, constraint=constraint)

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    @property
    def finished(self) -> str | None:
        return self.pieces[-1].finished


def run(engine: Engine, *texts: Text) -> None:
    scheduler = Scheduler(engine, TOKENIZER)
    for one in texts:
        scheduler.submit(one.request)
    while scheduler.step():
        pass


def random_schema(draw: random.Random, depth: int = 0) -> dict[str, Any]:
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "const", "lengths", "range"]
    kind = draw.choice(kinds + ["object", "array", "anyOf"] * (4 - depth if depth < 3 else 0))
    if kind == "object":
        names = draw.sample(["a", "b", "some name", "é", 'quo"te', "x1"], draw.randint(1, 4))
        properties = {name: random_schema(draw, depth + 1) for name in names}
        required = [name for name in names if draw.random() < 0.6]
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    if kind == "array":
        least = draw.randint(0, 2)
        return {
            "type": "array",
            "items": random_schema(draw, depth + 1),
            "minItems": least,
            "maxItems": least + draw.randint(0, 3),
        }
    if kind == "anyOf":
        return {"anyOf": [random_schema(draw, depth + 1) for _ in range(draw.randint(2, 3))]}
    if kind == "enum":
        return {"enum": draw.sample(["red", "gr ün", 3, -1.5, None, True, ["x"], {"k": 1}], 3)}
    if kind == "const":
        return {"const": draw.choice(["fixed", 12, {"a": [1, "b"]}])}
    if kind == "lengths":
        least = draw.randint(0, 5)
        return {"type": "string", "minLength": least, "maxLength": least + draw.randint(0, 9)}
    if kind == "range":
        least = draw.randint(-50, 50)
        return {"type": "integer", "minimum": least, "exclusiveMaximum": least + draw.randint(2, 500)}
    return {"type": kind}


def test_texts_keep_to_random_schemas(compiler: GrammarCompiler) -> None:
    """60 of them, eight at a time beside a text that is free, from a model that says anything."""
    from jsonschema import Draft202012Validator

    draw = random.Random(0)
    schemas = [random_schema(draw) for _ in range(60)]
    prompt = TOKENIZER.encode("text: ", special=False)
    texts = [
        Text(prompt, compiler.constraint(schema_of(schema)), max_new_tokens=400, temperature=1.5, seed=seed)
        for seed, schema in enumerate(schemas)
    ]
    free = Text(prompt, None, max_new_tokens=400, temperature=1.5, seed=0)
    run(RandomEngine(context=512, max_sequences=9, vocab_size=ROWS), free, *texts)
    complete = [(one, schema) for one, schema in zip(texts, schemas, strict=True) if one.finished == "stop"]
    assert {one.finished for one in texts} <= {"stop", "length"} and len(complete) >= 50
    for one, schema in complete:
        Draft202012Validator(schema).validate(json.loads(one.text))
        assert one.pieces[-1].choices[0].token in (END, ALSO_END)
    assert len({json.dumps(schema) for _, schema in complete}) > 45 and len({one.text for one, _ in complete}) > 40
    with pytest.raises(ValueError):
        json.loads(free.text)


@pytest.mark.parametrize("kind", ["native", "torch"])
def test_both_engines_keep_to_a_schema_beside_others(compiler: GrammarCompiler, kind: str, tmp_path: Path) -> None:
    model = ARCHITECTURES["llama"].build(vocab_size=ROWS, num_hidden_layers=1)
    if kind == "native":
        from amq.runtime.native_engine import open_native

        engine: Engine = open_native(tiny_checkpoint(model, tmp_path / "model"), context=128, max_sequences=3)
    else:
        from amq.runtime.torch_engine import TorchEngine

        engine = TorchEngine(model, context=128, max_sequences=3)
    likely = tuple((token, 4.0) for token in RandomEngine.likely)

    def two(seed: int) -> tuple[Text, Text]:
        how: dict[str, Any] = {"max_new_tokens": 80, "temperature": 1.0, "seed": seed, "logit_bias": likely}
        return Text(text(9), compiler.constraint(schema_of(OBJECT)), **how), Text(text(20, 1), None, **how)

    constrained, free = two(3)
    run(engine, constrained)
    run(engine, free)
    found = json.loads(constrained.text)
    assert constrained.finished == "stop" and 0 <= found["age"] <= 99 and len(found["name"]) <= 8
    together = two(3)
    run(engine, *together)
    assert [one.text for one in together] == [constrained.text, free.text]


def test_ends_come_where_the_grammar_may_end(compiler: GrammarCompiler) -> None:
    constraint = compiler.constraint(schema_of(OBJECT))
    assert allowed(constraint) == TOKENIZER.encode("{", special=False)
    inside = say(constraint, '{"name":"')
    assert not {END, ALSO_END, 256} & set(inside) and max(inside) < 256  # no special token, no row without a token
    say(constraint, 'x","age":12')
    assert say(constraint, "}") == [END, ALSO_END]
    constraint.accept(ALSO_END)
    constraint = compiler.constraint(Grammar("regex", "[ab]{1,3}"))
    assert say(constraint, "a") == sorted([*TOKENIZER.encode("ab", special=False), END, ALSO_END])
    constraint = compiler.constraint(Grammar("lark", 'start: "yes" | "no" %json {"type": "boolean"}'))
    assert say(constraint, "notrue") == [END, ALSO_END]


def test_a_model_that_ignores_its_end_still_ends(compiler: GrammarCompiler) -> None:
    """`ignore_end` is for benchmarks; a grammar that is complete allows nothing but the end."""
    one = Text([1], compiler.constraint(schema_of({"const": "x"})), max_new_tokens=50, ignore_end=True)
    run(RandomEngine(vocab_size=ROWS), one)
    assert (one.text, one.finished) == ('"x"', "stop")
    two = Text([1], compiler.constraint(schema_of({"const": "x"})), max_new_tokens=50, min_tokens=20)
    run(RandomEngine(vocab_size=ROWS), two)
    assert (two.text, two.finished) == ('"x"', "stop")


def test_whitespace_has_an_end(compiler: GrammarCompiler) -> None:
    engine = RandomEngine(vocab_size=ROWS)
    engine.likely, engine.raised = TOKENIZER.encode(" \n\t\r", special=False), 50.0
    one = Text([1], compiler.constraint(schema_of({"type": "array", "items": {"type": "null"}, "minItems": 3})))
    run(engine, one)
    assert one.text.startswith("[ null , null , null ") and "  " not in one.text and "\n" not in one.text
    style = {"x-guidance": {"whitespace_flexible": True, "whitespace_pattern": r"\n{1,2}"}, "const": [1]}
    two = Text([1], compiler.constraint(schema_of(style)))
    run(engine, two)
    assert two.text == "[\n\n1\n\n]"


def test_texts_of_one_grammar_do_not_share_where_they_are(compiler: GrammarCompiler) -> None:
    grammar = schema_of(OBJECT)
    first, second = compiler.constraint(grammar), compiler.constraint(grammar)
    inside = say(first, '{"name":"')
    assert allowed(second) == TOKENIZER.encode("{", special=False)
    for number in range(20):  # more than stay built
        compiler.constraint(schema_of({"const": number}))
    assert say(compiler.constraint(grammar), '{"name":"') == say(second, '{"name":"') == inside == allowed(first)


def test_leaving_the_grammar_ends_the_request(compiler: GrammarCompiler) -> None:
    constraint = compiler.constraint(schema_of(OBJECT))
    with pytest.raises(AmqError, match="the text left its grammar: .*doesn't satisfy the grammar"):
        constraint.accept(TOKENIZER.encode("x", special=False)[0])


REFUSED = {
    '{"type": "array", "uniqueItems": true}': 'the JSON schema cannot be used: Unimplemented keys: ["uniqueItems"]',
    '{"properties": {"a": {"not": {"type": "string"}}}}': r'Unimplemented keys: \["not"\]',
    '{"type": "string", "format": "colour"}': "Unknown format: colour",
    '{"type": "string", "pattern": "(?=a)b"}': "look-around",
    '{"$ref": "https://example.com/schema.json"}': "not present in a registry",
    '{"$ref": "#/nowhere"}': "'/nowhere' does not exist",
    '{"oneOf": [{"type": "integer"}, {"type": "number"}]}': "oneOf constraints are not supported",
    '{"type": "strin"}': "Invalid type: strin",
    "[1]": "the JSON schema cannot be used",
    "{": "EOF while parsing",
    "[" * 5000: "recursion limit",
}


@pytest.mark.parametrize("given", REFUSED, ids=lambda text: text[:40])
def test_what_is_not_supported_is_named(compiler: GrammarCompiler, given: str) -> None:
    with pytest.raises(AmqError) as caught:
        compiler.constraint(Grammar("json_schema", given))
    assert REFUSED[given].replace("\\", "") in str(caught.value) and "\n" not in str(caught.value)
    assert "<non-verbose" not in str(caught.value)


def test_wrong_grammars_of_other_kinds_are_refused(compiler: GrammarCompiler) -> None:
    with pytest.raises(AmqError, match="the regular expression cannot be used: .*unclosed group"):
        compiler.constraint(Grammar("regex", "(("))
    with pytest.raises(AmqError, match='the grammar cannot be used: .*unknown name: "b"'):
        compiler.constraint(Grammar("lark", 'start: "a" b'))


ENDLESS = {
    "patterns": {"type": "string", "allOf": [{"pattern": f"a{{{i},}}.*b.*c"} for i in range(28)]},
    "multiples": {"type": "integer", "multipleOf": 999983},
    "chain": {
        "$defs": {
            **{f"d{i}": {"properties": {"a": {"$ref": f"#/$defs/d{i + 1}"}}} for i in range(3000)},
            "d3000": {"type": "null"},
        },
        "$ref": "#/$defs/d0",
    },
}
"""The first take 25 s or far more, the last overflows the stack."""
LARGE = {
    "properties": {"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(5000)}},
    "names": {"enum": [f"value {i * 7919}" for i in range(60_000)]},
    "alternatives": {"allOf": [{"anyOf": [{"required": [f"a{i}"]}, {"required": [f"b{i}"]}]} for i in range(16)]},
    "repetitions": {"type": "string", "pattern": "^((a{0,100}b{0,100}){0,100}c){0,100}$"},
    "distances": {"type": "string", "pattern": "(.*a.{30}){3}"},
    "letters": {"type": "string", "pattern": "^\\p{L}{1,2000}\\d{1,2000}$"},
    "lengths": {"type": "array", "minItems": 10**6, "items": {"type": "string", "maxLength": 10**6}},
    "doubling": {
        "$defs": {
            **{f"d{i}": {"properties": {n: {"$ref": f"#/$defs/d{i + 1}"} for n in "ab"}} for i in range(40)},
            "d40": {"type": "null"},
        },
        "$ref": "#/$defs/d0",
    },
    "itself": {"$ref": "#"},
}
"""These come to an end in some way: refused, or followed for a while."""


@pytest.mark.parametrize("name", ENDLESS)
def test_a_grammar_that_would_end_the_process_is_refused(compiler: GrammarCompiler, name: str) -> None:
    limit = r"1 MiB of stack" if name == "chain" else r"0\.4 s of a processor"
    with pytest.raises(AmqError, match=f"the JSON schema cannot be used: building it takes more than {limit}"):
        compiler.constraint(schema_of(ENDLESS[name]))
    assert say(compiler.constraint(schema_of({"const": 1})), "1") == [END, ALSO_END]  # the next one is made


@pytest.mark.parametrize("name", LARGE)
def test_a_large_grammar_is_refused_or_bounded(compiler: GrammarCompiler, name: str) -> None:
    try:
        one = Text([1], compiler.constraint(schema_of(LARGE[name])), max_new_tokens=60)
    except AmqError as error:
        assert "cannot be used" in str(error)
        return
    run(RandomEngine(vocab_size=ROWS), one)
    assert one.finished in ("stop", "length") or "by its grammar" in one.request.error


def test_a_grammar_whose_first_mask_fails_is_refused(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not the text that would have kept to it: with a model's tokens a mask may cost more than with bytes."""
    import llguidance

    class Matcher:
        grammar_from_json_schema = staticmethod(llguidance.LLMatcher.grammar_from_json_schema)
        failed = False

        def __init__(self, *given: Any, **more: Any) -> None: ...

        def deep_copy(self) -> Matcher:
            return Matcher()

        def compute_bitmask(self) -> None:
            self.failed = True

        def is_error(self) -> bool:
            return self.failed

        def get_error(self) -> str:
            return "too many items" * self.failed

    monkeypatch.setattr(llguidance, "LLMatcher", Matcher)
    with pytest.raises(AmqError, match="the JSON schema cannot be used: too many items"):
        compiler.constraint(schema_of({"const": "a text of no other test"}))


def test_constraints_are_made_by_any_thread() -> None:
    compiler = GrammarCompiler(TOKENIZER, ROWS, TOKENIZER.end_ids)
    start = threading.Barrier(4)

    def make(number: int) -> list[int]:
        start.wait(SECONDS)
        return say(compiler.constraint(schema_of({"const": number})), str(number))

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(make, range(4), timeout=SECONDS)) == [[END, ALSO_END]] * 4
    compiler.close()
    compiler.close()


def test_what_a_model_lacks_is_said() -> None:
    with pytest.raises(AmqError, match="the model has no end token"):
        GrammarCompiler(TOKENIZER, ROWS, []).constraint(schema_of(OBJECT))
