"""Grammars of calls and answers: what a format writes is accepted and read back, anything else is refused."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest

pytest.importorskip("llguidance", reason="the server needs the extra `serve`")

from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper  # noqa: E402

from amq.errors import AmqError  # noqa: E402
from amq.runtime.grammar import Grammar, GrammarCompiler  # noqa: E402
from amq.runtime.tokenizer import Tokenizer  # noqa: E402
from amq.serve.replies import (  # noqa: E402
    FORMATS,
    CallArguments,
    CallStart,
    ReplyParser,
    ToolFormat,
    response_grammar,
    tools_grammar,
)
from amq.serve.replies.describe import write_calls  # noqa: E402
from amq.serve.replies.grammars import MOST_CALLS  # noqa: E402

SPECIAL = {"[TOOL_CALLS]": 257, "[ARGS]": 258, "<|python_tag|>": 259, "[THINK]": 260, "[/THINK]": 261}
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "unit": {"type": "string", "enum": ["°C", "F"]},
        "days": {"type": "array", "items": {"$ref": "#/$defs/Day"}},
        "exact": {"type": "boolean"},
    },
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"Day": {"type": "integer", "minimum": 1, "maximum": 31}},
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": WEATHER, "strict": True}},
    {"type": "function", "function": {"name": "weather_all", "parameters": WEATHER, "strict": True}},
    {"type": "function", "function": {"name": "now"}},
]
BERN: tuple[str, dict[str, Any]] = ("weather", {"city": 'Bern\n"x"'})
FULL: tuple[str, dict[str, Any]] = ("weather_all", {"city": "B", "unit": "°C", "days": [1, 31], "exact": True})
NOW: tuple[str, dict[str, Any]] = ("now", {})
PERSON = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
PERSON_FORMAT = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}


class Bytes:
    """A token for each byte, one for the end, and special ones."""

    eos_token_id, bos_token_id, special_token_ids = 256, None, tuple(range(256, 262))
    tokens = (*(bytes([byte]) for byte in range(256)), b"<end>", *(text.encode() for text in SPECIAL))

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


TOKENIZER = LLTokenizer(TokenizerWrapper(Bytes()), slices=[])
PARTS = re.compile(f"({'|'.join(map(re.escape, SPECIAL))})")


def fits(grammar: Grammar | None, text: str, special: bool = True) -> bool:
    """Whether the grammar allows the text as a whole."""
    assert grammar is not None
    make = LLMatcher.grammar_from_lark if grammar.kind == "lark" else LLMatcher.grammar_from_json_schema
    matcher = LLMatcher(TOKENIZER, make(grammar.text), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    pieces = PARTS.split(text) if special else [text]
    tokens = [t for piece in pieces for t in ([SPECIAL[piece]] if piece in SPECIAL else piece.encode())]
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


def grammar_of(known: ToolFormat, choice: str = "required", parallel: bool = True, **more: Any) -> Grammar | None:
    return tools_grammar(known, TOOLS, choice, parallel, special=SPECIAL.get, **more)


def read(known: ToolFormat, text: str, tools: Any = TOOLS) -> list[tuple[str, Any]]:
    reader = ReplyParser(known, thinking=True, tools=tools)
    parts = reader.push(text) + reader.finish()
    names = [part.name for part in parts if isinstance(part, CallStart)]
    return list(zip(names, (json.loads(p.text) for p in parts if isinstance(p, CallArguments)), strict=True))


@pytest.fixture(params=FORMATS, ids=lambda known: known.name)
def known(request: pytest.FixtureRequest) -> ToolFormat:
    return request.param


@pytest.mark.parametrize("calls", [[BERN], [FULL], [NOW], [NOW, BERN, FULL]], ids=["one", "full", "none", "three"])
def test_written_calls_are_accepted_and_read_back(known, calls):
    text = write_calls(known, calls)
    assert read(known, text) == calls
    allowed = len(calls) == 1 or known.several
    assert fits(grammar_of(known), text) == allowed
    assert fits(grammar_of(known, "auto"), text) == (allowed or not known.call[0].startswith("{"))
    assert fits(grammar_of(known, "required", parallel=False), text) == (len(calls) == 1)
    for name in ("weather", "weather_all", "now"):
        assert fits(grammar_of(known, name), text) == ([name] == [one for one, _ in calls])


@pytest.mark.parametrize(
    "arguments",
    [{}, {"city": "B", "days": [0]}, {"city": "B", "days": "x"}, {"city": "B", "unit": "K"}, {"city": "B", "more": 1}],
)
def test_other_arguments_are_refused(known, arguments):
    text = write_calls(known, [("weather", arguments)])
    assert not fits(grammar_of(known), text)
    assert not fits(grammar_of(known, "auto"), text)


def test_what_is_no_call_is_refused(known):
    required = grammar_of(known)
    for text in ("", "Hello.", write_calls(known, [BERN])[:-1], write_calls(known, [("later", {})])):
        assert not fits(required, text)


def test_text_around_calls_is_free_where_the_model_chooses(known):
    auto = grammar_of(known, "auto")
    assert fits(auto, "Hello, {name}.\n") and fits(auto, "a <b> [c]")
    text = write_calls(known, [BERN])
    if not known.call[0].startswith("{"):
        assert fits(auto, f"Look:\n{text}")
        assert fits(auto, f"Look:\n{text}\n{text}") and not fits(auto, f"{text}{known.markers[0].opens}x")


def test_text_is_free_where_no_tool_is_strict_or_there_is_none(known):
    loose = [{"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}]
    assert tools_grammar(known, loose, "auto") is None
    assert tools_grammar(known, TOOLS, "none") is None
    assert tools_grammar(known, [], "required") is None


def test_schemas_of_tools_that_are_not_strict_are_kept_as_far_as_known(known):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "unevaluatedItems": True}
    tool = {"name": "f", "parameters": schema}
    grammar = tools_grammar(known, [{"type": "function", "function": tool}], "required", special=SPECIAL.get)
    assert fits(grammar, write_calls(known, [("f", {"a": 1})]))
    assert not fits(grammar, write_calls(known, [("f", {"a": "x"})]))


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_thoughts_may_come_first(known, choice):
    text = write_calls(known, [BERN])
    own = ("[THINK]", "[/THINK]")
    allowed = grammar_of(known, choice, thoughts="allowed")
    assert fits(allowed, text) and fits(allowed, f"{own[0]}so {{\n{own[1]}\n\n{text}")
    opened = grammar_of(known, choice, thoughts="open")
    assert fits(opened, f"so\n{own[1]}\n\n{text}") and not fits(opened, text)


def test_thoughts_may_come_before_an_answer():
    for thoughts, text in (("allowed", '{"age": 3}'), ("allowed", '<think>a{\n</think>\n\n{"age": 3}')):
        assert fits(response_grammar(PERSON_FORMAT, thoughts), text)
    assert fits(response_grammar(PERSON_FORMAT, "open"), 'a{\n</think>\n\n{"age":3}')
    assert not fits(response_grammar(PERSON_FORMAT, "open"), 'a</think>{"age": "x"}')
    special = response_grammar(PERSON_FORMAT, "allowed", SPECIAL.get)
    assert fits(special, '[THINK]hm[/THINK]{"age": 3}')
    assert not fits(special, '[THINK]hm[/THINK]{"age": 3}', special=False)


def test_answers():
    assert response_grammar(None) is None
    assert response_grammar({"type": "text"}) is None
    for text, anything, person in (
        ('{"age": 3}', True, True), ('{"a": [{}, null, 1.5]}', True, False), ("[1]", False, False), ("3", False, False),
    ):  # fmt: skip
        assert fits(response_grammar({"type": "json_object"}), text) == anything
        assert fits(response_grammar(PERSON_FORMAT), text) == person
        assert fits(response_grammar({"type": "json_object", "schema": PERSON}), text) == person, "llama.cpp's"


def test_keywords_that_are_not_known_are_refused_of_strict_schemas_alone():
    schema = {"type": "array", "items": {"type": "string", "format": "path"}, "uniqueItems": True}
    for strict in (None, False):
        asked = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": strict}}
        assert fits(response_grammar(asked), '["a"]') and not fits(response_grammar(asked), "[1]")
        assert fits(response_grammar(asked, "allowed"), '["a"]')
    asked = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    with pytest.raises(AssertionError, match="uniqueItems"):
        fits(response_grammar(asked), '["a"]')


def test_calls_have_the_tools_own_arguments(known):
    """Also where the schema does not say so, as those of most frameworks."""

    def accepts(schema: Any, arguments: Any) -> bool:
        tools = [
            {"type": "function", "function": {"name": "now", **({} if schema is None else {"parameters": schema})}}
        ]
        text = write_calls(known, [("now", arguments)])
        return fits(tools_grammar(known, tools, "now", special=SPECIAL.get), text)

    for schema in (None, {"type": "object", "properties": {}}, {"properties": {"a": {"type": "integer"}}}):
        assert accepts(schema, {}) and not accepts(schema, {"b": 1})
    if not known.xml:
        for free in ({"type": "object"}, {"properties": {}, "additionalProperties": {"type": "integer"}}):
            assert accepts(free, {"b": 1})


def test_an_answer_of_a_schema_or_calls(known):
    if known.call[0].startswith("{") and not known.opens:
        with pytest.raises(AmqError, match="response_format: not together with tools"):
            grammar_of(known, "auto", response_format=PERSON_FORMAT)
        return
    grammar = grammar_of(known, "auto", response_format=PERSON_FORMAT)
    assert fits(grammar, '{"age": 3}') and fits(grammar, write_calls(known, [BERN, NOW]))
    assert not fits(grammar, "Hello.") and not fits(grammar, '{"age": ""}')
    assert not fits(grammar_of(known, "required", response_format=PERSON_FORMAT), '{"age": 3}')


def test_spaces_behind_mistrals_marker_are_free():
    known = next(known for known in FORMATS if known.name == "mistral")
    for text in ("[TOOL_CALLS] [", "[TOOL_CALLS]["):
        assert fits(grammar_of(known), text + '{"name": "now", "arguments": {}}]')


def test_refusals():
    hermes = next(known for known in FORMATS if known.name == "hermes")
    with pytest.raises(AmqError, match="tool_choice: there is no tool 'later' in tools"):
        grammar_of(hermes, "later")
    with pytest.raises(AmqError, match="no chat template"):
        tools_grammar(None, TOOLS, "required")
    with pytest.raises(AmqError, match=r"tools: the name 'a\\nb'"):
        tools_grammar(hermes, [{"type": "function", "function": {"name": "a\nb"}}], "required")
    with pytest.raises(AmqError, match="response_format: the type 'xml'"):
        response_grammar({"type": "xml"})
    with pytest.raises(AmqError, match="must be an object"):
        response_grammar({"type": "json_schema", "json_schema": {"name": "x"}})


def test_one_call_where_the_client_wants_no_more(known):
    auto = grammar_of(known, "auto", parallel=False)
    text = write_calls(known, [BERN])
    assert fits(auto, text) and fits(auto, "Hello.")
    assert not fits(auto, text + known.between + text)


@pytest.mark.parametrize(
    "parameters",
    [[1], "x", 7, True, {"properties": [1]}, {"properties": {"a": 1}}, {"properties": {"a b": {}}}, {"required": 5},
     {"properties": {"a": {"enum": 5}}}, {"properties": {"a": {"type": [{}], "anyOf": [1]}}}, {"type": {}}],
    ids=str,
)  # fmt: skip
def test_tools_that_make_no_sense_are_refused_or_taken(known, parameters):
    """What is wrong in a schema, the compiler says; what has no place in a grammar at all is refused here."""
    tools: list[Any] = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    try:
        assert tools_grammar(known, tools, "required") is not None
    except AmqError as error:
        assert str(error).startswith("tools: ")
    assert [name for name, _ in read(known, write_calls(known, [("f", {})]), tools)] == ["f"]


def test_schemas_that_nest_too_deep_are_refused(known):
    deep: dict[str, Any] = {}
    for _ in range(100_000):
        deep = {"not": deep}
    tools: list[Any] = [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": deep}}}}]
    with pytest.raises(AmqError, match="nested too deeply"):
        tools_grammar(known, tools, "required")
    with pytest.raises(AmqError, match="nested too deeply"):
        response_grammar({"type": "json_schema", "json_schema": {"schema": deep}})


def test_the_compiler_takes_them_with_a_models_special_tokens(known):
    """By their numbers, which the process that checks grammars first does not have."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Inner

    letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Inner(models.BPE(letters, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(text, special=True) for text in ("<end>", *SPECIAL)])
    inner.add_tokens(["<tool_call>", "</tool_call>"])  # as of Qwen: added, and not special
    tokenizer = Tokenizer(inner, [inner.token_to_id("<end>")])
    grammar = tools_grammar(known, TOOLS, "required", special=tokenizer.added_named, thoughts="allowed")
    assert grammar is not None
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size, tokenizer.end_ids)
    try:
        constraint = compiler.constraint(grammar)
        for token in tokenizer.encode(write_calls(known, [BERN])):
            allowed = np.unpackbits(constraint.allowed().view(np.uint8), bitorder="little")
            assert allowed[token]
            constraint.accept(token)
        assert np.unpackbits(constraint.allowed().view(np.uint8), bitorder="little")[inner.token_to_id("<end>")]
    finally:
        compiler.close()


def test_a_reply_has_so_many_calls_at_most(known):
    if known.several:
        assert fits(grammar_of(known), write_calls(known, [NOW] * MOST_CALLS))
        assert not fits(grammar_of(known), write_calls(known, [NOW] * (MOST_CALLS + 1)))
