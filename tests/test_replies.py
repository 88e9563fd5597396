"""Texts of models read as thoughts, content and calls: every format, in any pieces, broken and hostile."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amq.errors import AmqError
from amq.serve.replies import (
    FORMATS,
    CallArguments,
    CallStart,
    Content,
    Part,
    Reasoning,
    ReplyParser,
    describe_tools,
    format_of,
    thinking_shown,
    thinks_open,
)
from amq.serve.replies.describe import write_calls
from amq.serve.replies.parser import _joined
from amq.serve.replies.reading import MAX_DEPTH, Reading

KNOWN = {known.name: known for known in FORMATS}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "days": {"type": "integer"},
                    "exact": {"type": "boolean"},
                    "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                    "where": {"type": "object"},
                },
            },
        },
    }
    for name in ("weather", "time")
]
CALLS = [
    ("weather", {"city": 'Zürich "West"\n{[,', "days": 3, "exact": True, "note": None, "where": {"at": [1.5, {}]}}),
    ("time", {}),
]


def parser(name: str | None, thinking: bool = False, think_open: bool = False, tools: Any = TOOLS) -> ReplyParser:
    numbers = itertools.count()
    return ReplyParser(KNOWN[name] if name else None, thinking, think_open, lambda: f"id{next(numbers)}", tools)


def read(reader: ReplyParser, text: str, cuts: Any = ()) -> list[Part]:
    """The parts of the text, cut at these places; neighbours joined."""
    places = [0, *sorted(cuts), len(text)]
    parts = [part for a, b in itertools.pairwise(places) for part in reader.push(text[a:b])]
    return _joined(parts + reader.finish())


def content(parts: list[Part]) -> str:
    return "".join(part.text for part in parts if isinstance(part, Content))


def calls_in(parts: list[Part]) -> list[tuple[str, Any]]:
    """Name and arguments of each call. Its arguments come right behind its start."""
    found = []
    for start, arguments in zip(parts, parts[1:], strict=False):
        if isinstance(start, CallStart):
            assert isinstance(arguments, CallArguments) and arguments.index == start.index == len(found)
            found.append((start.name, json.loads(arguments.text)))
    return found


def start(index: int, name: str) -> CallStart:
    return CallStart(index, f"id{index}", name)


ONE = [start(0, "weather"), CallArguments(0, '{"city": "Bern"}')]
TWO = [*ONE, start(1, "time"), CallArguments(1, "{}")]
BERN = '{"name": "weather", "arguments": {"city": "Bern"}}'
LLAMA = '{"name": "weather", "parameters": {"city": "Bern"}}'
XML = "<tool_call>\n<function=weather>\n<parameter=city>\nBern\n</parameter>\n</function>\n</tool_call>"

SAMPLES: list[tuple[str | None, str, list[Part]]] = [
    ("hermes", f"<tool_call>\n{BERN}\n</tool_call>", ONE),
    ("hermes", f"Let me look.\n\n<tool_call>\n{BERN}\n</tool_call>\n", [Content("Let me look."), *ONE]),
    ("hermes", f'<tool_call>{BERN}</tool_call>\n<tool_call>{{"name":"time","arguments":{{}}}}</tool_call>', TWO),
    ("hermes", '<tool_call>{"arguments": {"city": "Bern"}, "name": "weather"}</tool_call>', ONE),
    ("hermes", '<tool_call>{"id": "1", "function": "weather", "arguments": {"city": "Bern"}}', ONE),
    ("hermes", '<tool_call>{"name": "weather", "arguments": "{\\"city\\": \\"Bern\\"}"}</tool_call>', ONE),
    ("hermes", f'<tool_call>\n{BERN}\n{{"name": "time"}}\n</tool_call>', TWO),
    ("hermes", f'<tool_call>[{BERN}, {{"name": "time", "arguments": null}}]</tool_call>', TWO),
    ("hermes", "<tool_call>[]</tool_call> Hello.", [Content("Hello.")]),
    ("hermes", f"```json\n{BERN}\n```", ONE),
    ("hermes", f"<tools>\n{BERN}\n</tools>", ONE),
    ("hermes", f"{BERN}\nThere.", [*ONE, Content("There.")]),
    ("hermes", f"1 < 2 <tool_call>{BERN}</tool_call> and <b>\n", [Content("1 < 2"), *ONE, Content("and <b>")]),
    ("hermes", '<tool_call>{"name": "own", "arguments": {"a": "x\ny"}}</tool_call>', [
        start(0, "own"), CallArguments(0, '{"a": "x\\ny"}')]),
    ("generic", f"<tool_call>\n{BERN}\n</tool_call>", ONE),
    ("smollm2", f'<tool_call>[{BERN}, {{"name": "time", "arguments": {{}}}}]</tool_call>', TWO),
    ("smollm2", "<tool_call>[]</tool_call>", []),
    ("llama3", LLAMA, ONE),
    ("llama3", f"<|python_tag|>{LLAMA}", ONE),
    ("llama3", f'{LLAMA}; {{"type": "function", "name": "time", "parameters": {{}}}}', TWO),
    ("llama3", "The answer is {42}.", [Content("The answer is {42}.")]),
    ("mistral", f"[TOOL_CALLS] [{BERN}]", ONE),
    ("mistral", f'Sure.[TOOL_CALLS][{BERN}, {{"name": "time", "arguments": {{}}, "id": "abcdefghi"}}]', [
        Content("Sure."), *TWO]),
    ("mistral-args", '[TOOL_CALLS]weather[ARGS]{"city": "Bern"}[TOOL_CALLS]time{}', TWO),
    ("mistral-args", '[TOOL_CALLS]weather[CALL_ID]abcdefghi[ARGS]{"city": "Bern"}', ONE),
    ("qwen3-coder", XML, ONE),
    ("qwen3-coder", f"Yes:\n\n{XML}\n<function=time>\n</function>", [Content("Yes:"), *TWO]),
    (None, f"<tool_call>{BERN}</tool_call>\n", [Content(f"<tool_call>{BERN}</tool_call>\n")]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "parts"), SAMPLES, ids=itertools.count())
def test_a_reply_is_read_the_same_however_it_is_cut(name, text, parts):
    assert read(parser(name), text) == parts
    for cut in range(len(text)):
        assert read(parser(name), text, [cut]) == parts
    assert read(parser(name), text, range(len(text))) == parts


BROKEN = [
    ("hermes", '<tool_call>\n{"name": "weather", "argume'),
    ("hermes", "<tool_call>\nnothing\n</tool_call>"),
    ("hermes", '<tool_call>{"arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "", "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "a\\ud800", "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "weather", "arguments": [1]}</tool_call>'),
    ("hermes", '<tool_call>{"name": "weather", "arguments": "text"}</tool_call>'),
    ("hermes", '<tool_call>{"name": "weather", "other": tru}</tool_call>'),
    ("hermes", '<tool_call>{"name": "weather", "other": "\\q"}</tool_call>'),
    ("hermes", '<tool_call>{"name": "weather", "other": "\\u12x4"}</tool_call>'),
    ("hermes", '<tool_call>{"name": "weather", "other": 01}</tool_call>'),
    ("hermes", "text <tool_ca"),
    ("hermes", '{"name": "Ann", "age": 3}\n'),
    ("hermes", '{"name": "Ann", "arguments": {"no": "such tool"}}'),
    ("hermes", '```json\n{"name": "Ann", "children": []}\n```\n'),
    ("hermes", "```python\nprint()\n```"),
    ("hermes", "   \n"),
    ("llama3", '{"city": "Bern"}'),
    ("llama3", '<|python_tag|>search.call(query="x")'),
    ("mistral", "[TOOL_CALLS] soon"),
    ("mistral-args", "[TOOL_CALLS]weather[ARGS]"),
    ("qwen3-coder", "<tool_call>\n<function=weather>\n<parameter=city>\nBern\n</function>"),
    ("qwen3-coder", "<tool_call>\n<function=we ather>\n</function>\n</tool_call>"),
]


@pytest.mark.parametrize(("name", "text"), BROKEN, ids=itertools.count())
def test_what_is_no_call_is_content_in_full(name, text):
    for cuts in ((), range(len(text))):
        reader = parser(name)
        assert read(reader, text, cuts) == [Content(text)] and not reader.has_calls


@pytest.mark.parametrize(
    ("name", "text", "arguments", "rest"),
    [
        ("hermes", '<tool_call>{"name": "time", "arguments": {"a": Tru', '{"a": Tru', ""),
        ("hermes", '<tool_call>{"name": "time", "arguments": {"a": "b', '{"a": "b', ""),
        ("hermes", '<tool_call>{"name": "time", "arguments": {"a": x}}</tool_call>Hm', '{"a": x}}', "Hm"),
        ("mistral", '[TOOL_CALLS] [{"name": "time", "arguments": {a: 1}}]', "{a: 1}}]", ""),
    ],
)
def test_arguments_that_have_gone_out_stay_arguments(name, text, arguments, rest):
    for cuts in ((), range(len(text))):
        parts = read(parser(name), text, cuts)
        assert parts[:2] == [start(0, "time"), CallArguments(0, arguments)] and content(parts[2:]) == rest


def test_a_list_that_breaks_off_keeps_its_complete_calls():
    text = f"[TOOL_CALLS] [{BERN}, and more"
    assert read(parser("mistral"), text, range(len(text))) == [*ONE, Content(", and more")]


@pytest.mark.parametrize("known", FORMATS, ids=lambda known: known.name)
def test_every_format_reads_what_it_writes(known):
    calls = CALLS if known.several else CALLS[:1]
    text = f"Wait: \n{write_calls(known, calls)}" if not known.call[0].startswith("{") or known.opens else None
    text = text or write_calls(known, calls)
    parts = read(parser(known.name), text)
    assert calls_in(parts) == calls
    assert content(parts) in ("Wait:", "")
    for cuts in (range(len(text)), range(0, len(text), 3)):
        assert read(parser(known.name), text, cuts) == parts


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_mixture_of_pieces_is_read_the_same_however_it_is_cut(data):
    known = data.draw(st.sampled_from(FORMATS))
    fragments = [*known.spellings, BERN, LLAMA, XML, '{"name": "', '", "arguments": {', "}", "]", "[", "\n", " ", "ab"]
    fragments += ["<think>", "</think>", "<function=", "```", ";", "weather"]
    text = "".join(data.draw(st.lists(st.sampled_from(fragments), max_size=12)))
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=8))
    whole = read(parser(known.name, thinking=True), text)
    assert read(parser(known.name, thinking=True), text, cuts) == whole
    assert read(parser(known.name, thinking=True), text, range(len(text))) == whole


def test_content_and_arguments_go_out_as_they_come():
    reader = parser("hermes")
    assert reader.push("Hello") == [Content("Hello")]
    assert reader.push(" <tool") == []  # may become a call
    assert reader.push("box> x") == [Content(" <toolbox> x")]
    assert reader.push('<tool_call>{"name": "time", "arguments": ') == []
    assert reader.push('{"a"') == [start(0, "time"), CallArguments(0, '{"a"')]
    assert reader.push(': "b') == [CallArguments(0, ': "b')]
    assert reader.has_calls


@pytest.mark.parametrize(
    "text",
    ["<tool_call>", "<tool_call>{", '<tool_call>{"name":"', '{"name":', "<tools>", "```json\n", "<tool_call>[", " \n",
     "<tool_call><function=f><parameter=a>", '<tool_call>{"name":"f","arguments":{"a":[', '<tool_call>{"name":"f",'],
)  # fmt: skip
@pytest.mark.parametrize("name", ["hermes", "qwen3-coder"])
def test_a_hostile_text_is_read_once_and_not_kept_waiting(name, text, monkeypatch):
    """Each character is taken once, and the text that waits to be looked at again stays shorter than a marker."""
    taken, take = [0], Reading.take

    def counted(self: Reading, count: int = 1) -> str:
        found = take(self, count)
        taken[0] += len(found)
        return found

    monkeypatch.setattr(Reading, "take", counted)
    reader, whole = parser(name), text * (20_000 // len(text))
    for place in range(0, len(whole), 5):
        reader.push(whole[place : place + 5])
        assert len(reader._reading._text) < 64
    reader.finish()
    assert taken[0] == len(whole)


def test_arguments_nest_only_so_deep():
    deep = '{"a": ' * MAX_DEPTH + "1" + "}" * MAX_DEPTH
    calls = calls_in(read(parser("hermes"), f'<tool_call>{{"name": "time", "arguments": {deep}}}</tool_call>'))
    assert calls == [("time", json.loads(deep))]
    text = f'<tool_call>{{"arguments": {{"a": {deep}}}, "name": "time"}}</tool_call>'
    assert content(read(parser("hermes"), text)) == text


@pytest.mark.parametrize(
    ("text", "open", "parts"),
    [
        ("<think>\nhm.\n</think>\n\nYes.", False, [Reasoning("hm."), Content("Yes.")]),
        ("hm.\n</think>\n\nYes.", True, [Reasoning("hm."), Content("Yes.")]),
        ("<think>\n\n</think>\n\nYes.", False, [Content("Yes.")]),
        ("\n[THINK]hm.[/THINK]Yes.", False, [Reasoning("hm."), Content("Yes.")]),
        ("<think>\nhm. </thin", False, [Reasoning("hm. </thin")]),
        ("hm. ", True, [Reasoning("hm.")]),
        ("<thinking", False, [Content("<thinking")]),
        (" \nYes. <think>no</think> ", False, [Content(" \nYes. <think>no</think> ")]),
        (f"<think><tool_call></think><tool_call>{BERN}</tool_call>", False, [Reasoning("<tool_call>"), *ONE]),
    ],
)
def test_thoughts_are_parted_from_the_answer(text, open, parts):
    for name in ("hermes", None) if "{" not in text else ("hermes",):
        for cuts in ((), range(len(text)), *([cut] for cut in range(len(text)))):
            assert read(parser(name, True, open), text, cuts) == parts


def test_thoughts_stay_content_where_they_are_not_parted():
    assert read(parser("hermes"), "<think>a</think> b") == [Content("<think>a</think> b")]


def test_the_arguments_of_xml_are_what_the_tool_says():
    def arguments(key: str, text: str) -> Any:
        call = f"<tool_call><function=weather><parameter={key}>\n{text}\n</parameter></function></tool_call>"
        return calls_in(read(parser("qwen3-coder"), call))[0][1][key]

    assert arguments("city", "8001") == "8001"
    assert arguments("city", "null") == "null"
    assert arguments("days", "8001") == 8001
    assert arguments("days", "many") == "many"
    assert arguments("days", "NaN") == "NaN"
    assert arguments("exact", "True") is True
    assert arguments("note", "null") is None
    assert arguments("note", "[1]") == "[1]"
    assert arguments("where", '{"at": [1]}\n') == {"at": [1]}
    assert arguments("where", "[" * 10_000) == "[" * 10_000
    assert arguments("unknown", "1\n2") == "1\n2"


def test_ids_are_as_the_format_wants_them():
    for known in FORMATS:
        text = write_calls(known, [("time", {})])
        ids = [p.id for _ in range(2) for p in read(ReplyParser(known, tools=TOOLS), text) if isinstance(p, CallStart)]
        assert len(set(ids)) == 2
        for one in ids:
            assert (
                (len(one) == 9 and one.isalnum()) if known.short_ids else (one.startswith("call_") and len(one) == 29)
            )


# what real templates spell, abridged
TEMPLATES = {
    "hermes": """{%- if tools %}{{- "\\n<tool_call>\\n{\\"name\\": <function-name>, \\"arguments\\": <args-json>}" }}
        {{- '\\n<tool_call>\\n{"name": "' }}""",
    "qwen3-coder": "{% if tools %}...<tool_call>\\n<function=example_function_name>\\n<parameter=example_parameter_1>",
    "mistral": """{{- "[AVAILABLE_TOOLS] [" }}{{- "[TOOL_CALLS] [" }}{%- set out = tool_call.function|tojson %}""",
    "mistral-args": "{{- '[TOOL_CALLS]' + tool['function']['name'] + '[ARGS]' + arguments }}",
    "llama3": """{{- "<|start_header_id|>system" }}{%- if tools is not none %}{{- 'Respond in the format
        {"name": function name, "parameters": dictionary of argument name and its value}.' }}{{- '"parameters": ' }}""",
    "smollm2": "{{ '<|im_start|>system\\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face'}}",
    "generic": "{% for message in messages %}{{ message['content'] }}{% endfor %}",
}


def test_the_format_is_what_the_template_spells():
    assert set(TEMPLATES) == set(KNOWN)
    for name, template in TEMPLATES.items():
        found = format_of(template)
        assert found is not None and found.name == name
    assert format_of(None) is None


def test_special_tokens_that_have_to_be_seen():
    tokens = {"[TOOL_CALLS]": 9, "[ARGS]": 32, "[CALL_ID]": 30, "<|python_tag|>": 7, "[THINK]": 34, "[/THINK]": 35}
    tokenizer: Any = SimpleNamespace(special_named=tokens.get)
    assert KNOWN["hermes"].shown(tokenizer) == ()
    assert KNOWN["llama3"].shown(tokenizer) == (7,)
    assert KNOWN["mistral-args"].shown(tokenizer) == (9, 30, 32)
    assert thinking_shown(tokenizer) == (34, 35)


def test_a_prompt_may_end_inside_thoughts():
    assert thinks_open("<|im_start|>assistant\n<think>\n")
    assert not thinks_open("<|im_start|>assistant\n<think>\n\n</think>\n\n")


def call(name: str, arguments: str, id: str) -> dict[str, Any]:
    return {"type": "function", "id": id, "function": {"name": name, "arguments": arguments}}


TURNS = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": [{"type": "text", "text": "Weather and time?"}]},
    {"role": "assistant", "content": None,
     "tool_calls": [call("weather", '{"city": "Bern"}', "a"), call("time", "", "b")]},
    {"role": "tool", "tool_call_id": "b", "content": "noon"},
    {"role": "tool", "tool_call_id": "a", "content": [{"type": "text", "text": "rain"}]},
    {"role": "user", "content": "Thanks."},
]  # fmt: skip


def test_templates_that_know_tools_get_the_arguments_as_objects():
    told = describe_tools(KNOWN["hermes"], TURNS, TOOLS)
    assert [c["function"]["arguments"] for c in told[2]["tool_calls"]] == [{"city": "Bern"}, {}]
    assert told[:2] + told[3:] == TURNS[:2] + TURNS[3:]
    odd = [{"role": "assistant", "tool_calls": [call("time", "{broken", "a"), call("time", "[1]", "b")]}]
    assert describe_tools(KNOWN["hermes"], odd, TOOLS) == odd


def test_templates_of_single_calls_get_one_answer_each():
    told = describe_tools(KNOWN["llama3"], TURNS, TOOLS)
    assert [(m["role"], m.get("tool_call_id"), len(m.get("tool_calls", ()))) for m in told[2:6]] == [
        ("assistant", None, 1), ("tool", "a", 0), ("assistant", None, 1), ("tool", "b", 0)]  # fmt: skip
    assert told[6:] == TURNS[5:]


@pytest.mark.parametrize("name", [known.name for known in FORMATS if known.described])
def test_templates_that_know_no_tools_get_them_as_text(name):
    told = describe_tools(KNOWN[name], TURNS, TOOLS)
    assert [message["role"] for message in told] == ["system", "user", "assistant", "user", "user"]
    assert told[0]["content"].startswith("Be short.\n\n")
    for tool in TOOLS:
        assert json.dumps(tool) in told[0]["content"]
    assert calls_in(read(parser(name), told[2]["content"])) == [("weather", {"city": "Bern"}), ("time", {})]
    assert told[3]["content"] == "<tool_response>\nnoon\n</tool_response>\n<tool_response>\nrain\n</tool_response>"
    assert told[1] == TURNS[1] and told[4] == TURNS[5]
    assert describe_tools(KNOWN[name], TURNS[1:2], TOOLS)[0]["role"] == "system"
    assert describe_tools(KNOWN[name], TURNS, None)[0] == TURNS[0]  # earlier calls, and none now


def test_arguments_that_nest_too_deep_are_refused():
    deep = '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"
    with pytest.raises(AmqError, match="nested too deeply"):
        describe_tools(KNOWN["hermes"], [{"role": "assistant", "tool_calls": [call("time", deep, "a")]}], TOOLS)
