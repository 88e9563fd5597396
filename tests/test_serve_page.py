"""The chat page in a real browser: sending, streaming, stopping, tools, thinking, JSON, what the server refuses, and
text that is no HTML.

The server is mostly a stand-in (helpers/chat_stand_in.py) that does what the user's message says, so that every fault
comes when it is wanted; the last tests are against amq's own.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator

import pytest
from helpers import chromium
from helpers.chat_stand_in import ARGUMENTS, JSON, MARKDOWN, StandIn

TOOLS = [{"name": "get_weather", "parameters": {"type": "object"}}, {"type": "function", "function": {"name": "add"}}]
SENT_TOOLS = [{"type": "function", "function": TOOLS[0]}, TOOLS[1]]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}

pytestmark = pytest.mark.skipif(chromium.EXECUTABLE is None, reason="needs a Chromium browser on PATH")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Page]:
    with chromium.Page(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def server(page: chromium.Page) -> Iterator[StandIn]:
    """A fresh one, opened in the page; its port makes the page's storage a new one too."""
    server = StandIn()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    page.messages.clear()
    page.open(server.url)
    page.wait("document.title.startsWith('tiny')")
    yield server
    server.half.set()
    server.go_on.set()
    server.shutdown()
    server.server_close()
    assert not [m for m in page.messages if "Uncaught" in m or "Security" in m], page.messages


def ask(page: chromium.Page, text: str) -> None:
    page.run("document.querySelector('#message').focus()")
    page.write(text)
    page.press("Enter")


def finished(page: chromium.Page) -> None:
    page.wait("document.querySelector('#stop').hidden")


def last(page: chromium.Page, selector: str) -> str | None:
    """What is visible of the last turn's first `selector`."""
    return page.run(f"document.querySelector('article:last-of-type {selector}')?.innerText.trim()")


def go_on(page: chromium.Page) -> None:
    page.run("[...document.querySelectorAll('.figures button')].find((b) => b.innerText === 'Continue').click()")
    finished(page)


def configure(page: chromium.Page, **settings: object) -> None:
    """As the settings' dialog does it."""
    page.run("openSettings()")
    for name, value in settings.items():
        kind = "checked" if isinstance(value, bool) else "value"
        page.run(f"fields[{json.dumps(name)}].{kind} = {json.dumps(value)}")
    page.run("document.querySelector('#save').click()")


def test_sends_streams_and_remembers(page, server):
    page.run("document.querySelector('#message').focus()")
    page.write("hello")
    page.press("Enter", shift=True)  # a new line, not yet sent
    page.write("there")
    assert server.requests == []
    page.press("Enter")
    page.wait("document.querySelector('.text')?.innerText.trim() === 'Good day to you all'")
    page.run("(now => { performance.now = () => now() + 300 })(performance.now.bind(performance))")  # enough for a rate
    server.half.set()
    page.wait("document.querySelector('.text').innerText.trim() === 'Good day to you all!'")
    assert page.run("document.querySelector('.rate').innerText").endswith("tokens/s")  # while it is written
    assert page.run("document.querySelector('#said').textContent") == ""  # a screen reader would read along
    server.go_on.set()
    finished(page)
    assert page.run("document.querySelector('.text').innerText.trim()") == "Good day to you all! She said."
    assert page.run("document.querySelector('#said').textContent") == "Good day to you all! She said."
    figures = page.run("document.querySelector('.figures').innerText")
    assert all(part in figures for part in ("123.4 tokens/s", "first token after 0.25 s", "12 tokens")), figures
    assert page.run("document.querySelector('#usage').innerText") == "32 of 2,048 tokens"
    assert page.run("document.activeElement.id") == "message"
    first = server.requests[0]
    assert first["messages"] == [{"role": "user", "content": "hello\nthere"}]
    assert first["model"] == "tiny" and first["stream"] and first["stream_options"] == {"include_usage": True}
    unset = {"temperature", "tools", "tool_choice", "response_format", "chat_template_kwargs", "continue_final_message"}
    assert not unset & first.keys()  # what is not set is the server's to choose

    page.open(server.url + "/?again")  # the conversation survives this
    ask(page, "hello again")
    finished(page)
    said = [("user", "hello\nthere"), ("assistant", "Good day to you all! She said."), ("user", "hello again")]
    assert [(m["role"], m["content"]) for m in server.requests[1]["messages"]] == said
    page.run("document.querySelector('#new').click()")
    assert page.run("document.querySelector('#log').childElementCount") == 0


def test_a_models_text_is_never_html(page, server):
    ask(page, "markdown")
    finished(page)
    assert page.run("document.querySelector('.text strong').innerText") == "bold"
    assert page.run("document.querySelector('.text p code').innerText") == "x < y"
    assert page.run("document.querySelector('.text pre').textContent") == 'print("<b>1 & 2</b>")'
    assert page.run("document.querySelector('.text ol > li:nth-child(2) > ul > li').innerText") == "inner"
    assert page.run("document.querySelectorAll('.text img, .text script, .text b').length") == 0
    assert MARKDOWN.rpartition("\n")[2] in page.run("document.querySelector('.text').innerText")
    assert page.run("document.title").startswith("tiny")
    refused = "try { document.body.innerHTML = '<p>'; 'written' } catch (error) { error.name }"
    assert page.run(refused) == "TypeError"  # the page's policy: scripts cannot write markup
    page.messages.clear()  # which the browser mentions


@pytest.mark.parametrize("way", ["escape", "button"])
def test_stopping_ends_the_request_and_keeps_the_text(page, server, way):
    ask(page, "endless")
    page.wait("document.querySelector('.text')?.innerText.includes('and so on')")
    if way == "escape":
        page.press("Escape")
    else:
        page.run("document.querySelector('#stop').click()")
    finished(page)
    assert server.left.wait(chromium.SECONDS)
    assert "stopped" in last(page, ".figures") and "Continue" in last(page, ".figures")
    assert "and so on" in last(page, ".text")


def test_a_busy_server_is_asked_again_when_it_says(page, server):
    ask(page, "busy")
    page.wait("document.querySelector('.problem')?.innerText.includes('Retry in')")
    assert "The server is busy: the queue is full" in last(page, ".problem")
    assert page.run("document.querySelector('.problem button').disabled")
    assert not page.run("document.querySelector('[role=alert]').contains(document.querySelector('.problem button'))")
    page.run("clock = Date.now, Date.now = () => clock() + 301e3, null")  # nobody waits five minutes here
    page.wait("!document.querySelector('.problem button').disabled")
    page.run("document.querySelector('.problem button').focus()")
    page.press("Enter")
    finished(page)
    assert page.run("document.querySelector('.problem')") is None
    assert page.run("document.activeElement.id") == "message"  # the button that had the focus is gone
    assert "bold" in last(page, ".text")
    assert [len(r["messages"]) for r in server.requests] == [1, 1]


@pytest.mark.parametrize(
    ("message", "said", "kept"),
    [
        ("closing", "not taking requests: the server is shutting down", ""),
        ("cut", "The answer was cut off", "It was a dark and stor"),
        ("failing", "the engine failed", "Half"),
        ("silent", "cannot be reached", ""),
        ("odd", "temperature is 9: at most 2\nparam: temperature · code: invalid_value · request: req-7", ""),
    ],
)
def test_failures_are_told(page, server, message, said, kept):
    ask(page, message)
    assert said in page.wait("document.querySelector('.problem span')?.innerText")
    assert page.run("document.querySelector('.problem button').innerText") == "Retry"
    assert page.run("document.querySelector('.text').innerText.trim()") == kept


def test_what_the_server_ignored_is_said(page, server):
    ask(page, "part")
    finished(page)
    assert "ignored: seed, logit_bias" in last(page, ".figures")


def test_key_and_settings(page, server):
    server.key = "secret"
    page.open(server.url + "/?locked")
    page.wait("document.querySelector('#dialog').open && document.activeElement.name === 'key'")
    page.write("secret")
    page.run("document.querySelector('[name=system]').value = 'Be brief.'")
    page.run("document.querySelector('[name=temperature]').value = '0.5'")
    page.run("document.querySelector('[name=max_tokens]').value = '64'")
    page.press("Enter")
    page.wait("document.title.startsWith('tiny')")
    server.half.set()
    server.go_on.set()
    ask(page, "hello")
    finished(page)
    sent = server.requests[0]
    assert sent["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (sent["temperature"], sent["max_tokens"]) == (0.5, 64) and "seed" not in sent
    assert "secret" not in page.run("JSON.stringify(localStorage)")


def test_calls_are_shown_and_their_results_sent_back(page, server):
    configure(page, tools=json.dumps(TOOLS), tool_choice="required")
    page.wait("document.querySelector('#usage').innerText.includes('2 tools')")
    ask(page, "call")
    page.wait("document.querySelectorAll('.call').length === 2")
    page.wait("document.querySelector('.call:last-of-type code').innerText.includes('25.50')")
    assert page.run("document.querySelector('.call textarea')") is None  # they may not be whole yet
    server.go_on.set()
    page.wait("document.activeElement === document.querySelector('.call textarea')")  # what is to be done next
    assert page.run("[...document.querySelectorAll('.call b')].map((b) => b.innerText)") == ["get_weather", "add"]
    assert page.run("[...document.querySelectorAll('.call code')].map((c) => c.innerText)") == list(ARGUMENTS)
    assert "Waiting for the result of get_weather, add" in page.run("document.querySelector('#said').textContent")
    first = server.requests[0]
    assert (first["tools"], first["tool_choice"]) == (SENT_TOOLS, "required") and "parallel_tool_calls" not in first
    page.run("settings.tool_choice = 'one'")

    page.write('{"sky":"clear"}')
    page.press("Enter")  # goes to the next that is empty
    page.write("42")
    page.press("Enter", shift=True)
    page.write(".5")
    page.press("Enter")
    page.wait("turns.length === 2 && !running")
    assert last(page, ".text") == "The tools have spoken." and last(page, ".question") is None
    results = "[...document.querySelectorAll('.call pre + figcaption + pre')].map((p) => p.innerText)"
    assert page.run(results) == ['{"sky": "clear"}', "42\n.5"]
    assert page.run("document.querySelectorAll('article textarea').length") == 0
    calls = [
        {"id": f"call_{name}", "type": "function", "function": {"name": name, "arguments": text}}
        for name, text in zip(("get_weather", "add"), ARGUMENTS, strict=True)
    ]
    conversation = [
        {"role": "user", "content": "call"},
        {"role": "assistant", "content": "I look it up.", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "call_get_weather", "content": '{"sky":"clear"}'},
        {"role": "tool", "tool_call_id": "call_add", "content": "42\n.5"},
    ]
    second = server.requests[1]
    assert second["messages"] == conversation
    assert (second["tool_choice"], second["parallel_tool_calls"]) == ("required", False)

    page.open(server.url + "/?again")
    ask(page, "markdown")
    finished(page)
    rest = [{"role": "assistant", "content": "The tools have spoken."}, {"role": "user", "content": "markdown"}]
    assert server.requests[2]["messages"] == conversation + rest


def test_calls_without_results_are_not_told(page, server):
    server.go_on.set()
    ask(page, "call")
    page.wait("!!document.querySelector('.call textarea')")
    ask(page, "markdown instead")
    finished(page)
    assert [m["content"] for m in server.requests[1]["messages"]] == ["markdown instead"]
    assert page.run("document.querySelector('.call textarea')") is None
    assert "not answered" in page.run("document.querySelector('article .answer > .figures').innerText")


def test_settings_that_are_not_understood_are_not_saved(page, server):
    for wrong in ("[", '[{"description": "no name"}]', "3"):
        configure(page, tools=wrong)
        assert page.run("document.querySelector('#dialog').open && fields.tools.validationMessage"), wrong
        page.run("document.querySelector('#cancel').click()")
    configure(page, schema="[]")  # not on show while no JSON is asked for
    assert not page.run("document.querySelector('#dialog').open")
    configure(page, json=True)
    assert page.run("fields.schema.validationMessage") == "Not understood: a schema is an object"
    page.press("Escape")
    page.wait("!document.querySelector('#dialog').open")
    assert page.run("settings.json") is False


def test_answers_as_json(page, server):
    configure(page, json=True)
    ask(page, "record")
    finished(page)
    assert server.requests[0]["response_format"] == {"type": "json_object"}
    configure(page, json=True, schema=json.dumps(SCHEMA))
    ask(page, "record")
    finished(page)
    wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
    assert server.requests[1]["response_format"] == wanted
    configure(page, json=False)
    ask(page, "record")  # a text that is JSON as a whole is shown as such too
    finished(page)
    assert "response_format" not in server.requests[2]
    shown = (
        '{\n  "city": "Paris",\n  "big": 12345678901234567890,\n  "none": [],\n'
        '  "list": [1, {"deep": "a, \\"b\\": {"}]\n}'
    )
    assert page.run("[...document.querySelectorAll('.text pre')].map((pre) => pre.innerText)") == [shown] * 3


def test_json_from_a_hostile_model_is_shown(page, server):
    configure(page, json=True)
    ask(page, "brackets")
    finished(page)
    assert len(last(page, ".text pre")) < 1_000_000
    assert (
        page.run("""indented('{"a": [1, {"b": "cut \\\\"off')""")
        == '{\n  "a": [\n    1,\n    {\n      "b": "cut \\"off'
    )


@pytest.mark.parametrize("way", ["think", "inline"])
def test_thinking_is_folded(page, server, way):
    configure(page, thinking="off")
    ask(page, way)
    if way == "think":
        page.wait("document.querySelector('.thought summary')?.innerText === 'Thinking …'")
    server.go_on.set()
    finished(page)
    assert last(page, ".text") == "So be it."
    assert page.run("/^Thought for [0-9.]+ s$/.test(document.querySelector('.thought summary').innerText)")
    assert page.run("document.querySelector('.thought').open") is False
    page.run("document.querySelector('.thought summary').click()")
    assert last(page, ".thought > div") == "First this, then that."
    assert page.run("document.querySelector('#said').textContent.trim()") == "So be it."
    ask(page, "markdown")
    finished(page)
    assert server.requests[0]["chat_template_kwargs"] == {"enable_thinking": False}
    told = server.requests[1]["messages"][1]
    assert told.get("reasoning_content") == ("First this, then that." if way == "think" else None)
    assert page.run("document.querySelector('.thought').open")  # as the reader left it


def test_an_answer_that_was_cut_goes_on(page, server):
    configure(page, tools=json.dumps(TOOLS), tool_choice="required", json=True)
    ask(page, "long")
    finished(page)
    assert "cut at the limit of tokens" in last(page, ".figures")
    go_on(page)
    assert page.run("turns[0].answer") == "It was a dark and stormy night."
    assert "24 tokens" in last(page, ".figures") and "Continue" not in last(page, ".figures")
    sent = server.requests[1]
    assert sent["messages"][-1] == {"role": "assistant", "content": "It was a dark and stor"}
    assert (sent["continue_final_message"], sent["add_generation_prompt"]) == (True, False)
    assert "response_format" not in sent and "tool_choice" not in sent  # they are of whole answers
    page.run("document.querySelector('#new').click()")
    ask(page, "muse")
    finished(page)
    assert "while thinking" in last(page, ".figures") and "Continue" not in last(page, ".figures")


def test_what_the_model_cannot_do_is_neither_offered_nor_sent(page, server):
    configure(page, tools=json.dumps(TOOLS), json=True, thinking="on")
    server.capabilities = {}
    page.open(server.url + "/?plain")
    page.wait("document.title.startsWith('tiny')")
    page.run("openSettings()")
    assert page.run("[...document.querySelectorAll('[data-needs]')].every((part) => !part.offsetParent)")
    page.press("Escape")
    ask(page, "markdown")
    finished(page)
    assert server.requests[0].keys() == {"model", "messages", "stream", "stream_options"}


def test_keyboard(page, server):
    page.run("document.querySelector('#settings').focus()")
    page.press("Enter")
    page.wait("document.querySelector('#dialog').open && document.activeElement.name === 'system'")
    page.press("Escape")
    page.wait("!document.querySelector('#dialog').open")
    assert page.run("document.activeElement.id") == "settings"
    page.press("Escape")
    assert page.run("document.activeElement.id") == "message"
    stops = []
    page.run("document.querySelector('#new').focus()")
    for _ in range(4):
        stops.append(page.run("document.activeElement.id"))
        page.press("Tab")
    assert stops == ["new", "settings", "scroll", "message"]


def test_right_to_left(page, server):
    ask(page, "arabic مرحبا")
    finished(page)
    blocks = "[...document.querySelectorAll('.text > *')].map((block) => getComputedStyle(block).direction)"
    assert page.run(blocks) == ["rtl", "ltr", "rtl"]


@pytest.mark.parametrize("width", (320, 360))
def test_a_phones_width(page, server, width):
    page.call("Emulation.setDeviceMetricsOverride", width=width, height=640, deviceScaleFactor=1, mobile=True)
    server.go_on.set()
    try:
        configure(page, tools=json.dumps(TOOLS))
        for message in ("markdown", "think", "record", "odd", "call"):
            ask(page, message)
            finished(page)
        assert page.run("document.documentElement.scrollWidth") <= width
        assert page.run("document.querySelector('#scroll').scrollWidth") <= width
        assert page.run("document.querySelector('#message').getBoundingClientRect().bottom") <= 640
        page.run("openSettings()")
        assert page.run("document.querySelector('#dialog').scrollWidth") <= width
        assert page.run("document.querySelector('#save').getBoundingClientRect().bottom") <= 640
        page.press("Escape")
    finally:
        page.call("Emulation.clearDeviceMetricsOverride")


def test_a_long_conversation_lays_out_only_what_is_on_show(page, server):
    turn = {"question": "markdown", "answer": MARKDOWN * 3, "figures": {"tokens": 500}}
    page.run(f"sessionStorage.setItem('amq.turns', JSON.stringify(Array(200).fill({json.dumps(turn)})))")
    page.open(server.url + "/?long")
    page.wait("server.model && turns.length === 200")
    at_end = "$('scroll').scrollHeight - $('scroll').scrollTop - $('scroll').clientHeight < 60"
    page.wait(at_end)
    on_show = "(text) => text.checkVisibility({contentVisibilityAuto: true})"
    laid_out = f"[...document.querySelectorAll('article .text')].filter({on_show}).length"
    assert 0 < page.run(laid_out) < 20
    ask(page, "markdown")
    page.wait(f"turns.length === 201 && !running && {at_end}")
    assert len(server.requests[0]["messages"]) == 401


def test_against_the_real_server(page):
    from helpers.serving import fake_runtime, serving, wait_for

    with serving(fake_runtime(delay=0.002, context=2000), max_new_tokens=1500, api_key=["secret"]) as real:
        page.open(real.url)
        page.wait("document.querySelector('#dialog').open && document.activeElement.name === 'key'")
        page.write("secret")
        page.press("Enter")
        page.wait("document.title.startsWith('fake')")
        assert page.run("document.querySelector('#usage').innerText").startswith("0 of 2,000 tokens")
        page.run("settings.max_tokens = '39'")
        ask(page, "guten Tag")
        finished(page)
        assert page.run("turns[0].answer") == "user: guten Tag|" * 2 + "user: g"  # what this engine says
        figures = page.run("document.querySelector('.figures').innerText")
        assert "tokens/s" in figures and "39 tokens" in figures and "cut at the limit of tokens" in figures
        go_on(page)
        said = page.run("turns[0].answer")
        assert len(said) == 2 * 39 and "78 tokens" in last(page, ".figures")
        assert real.service.runtime.tokenizer.decode(real.engine.prompts[-1]).endswith(f"|assistant: {said[:39]}")
        page.run("settings.max_tokens = '', settings.temperature = '9'")
        ask(page, "nonsense")
        assert "temperature" in page.wait("document.querySelector('.problem span')?.innerText")
        assert "param: temperature" in last(page, ".problem small")
        page.run("settings.temperature = ''")
        ask(page, "again")
        page.wait("turns[2].answer")
        assert len(real.engine.slots) == 1
        page.press("Escape")
        wait_for(lambda: not real.engine.slots)
        finished(page)
        real.worker.draining = True
        ask(page, "more")
        assert "not taking requests" in page.wait("document.querySelector('.problem span')?.innerText")


TEMPLATE = """{% for m in messages %}{{ m.role }}: {{ m.reasoning_content }}{{ m.content }}
{%- for c in m.tool_calls or [] %}<tool_call>{"name": "{{ c.function.name }}"}</tool_call>{% endfor %}|{% endfor %}
{{- tools | length if tools else "no" }} tools, {{ "<think>" if enable_thinking else "no thinking" }}"""


def test_thinking_and_tools_of_the_real_server(page):
    """The prompts that come out of what the page sends, and the page with what a model makes of them."""
    from helpers.serving import fake_runtime, scripted, serving

    call = '<tool_call>{"name": "get_weather", "arguments": {"city": "Paris"}}</tool_call>'
    answers = scripted(f"I have to look.</think>I look it up.{call}", "It is <b>clear</b>.", JSON)
    with serving(fake_runtime(template=TEMPLATE, following=answers, context=2000)) as real:
        page.open(real.url)
        page.wait("server.capabilities.tools && server.capabilities.thinking && server.capabilities.json")
        configure(page, tools=json.dumps(TOOLS), thinking="on")
        ask(page, "weather")
        page.wait("document.activeElement === document.querySelector('.call textarea')")
        assert last(page, ".thought summary").startswith("Thought for") and last(page, ".text") == "I look it up."
        assert page.run("turns[0].reasoning") == "I have to look."
        assert last(page, ".call pre") == '{"city": "Paris"}'
        page.run("settings.thinking = 'off'")
        page.write("clear")
        page.press("Enter")
        page.wait("turns.length === 2 && !running")
        assert last(page, ".text") == "It is <b>clear</b>."
        configure(page, tools="", json=True, thinking="off")
        ask(page, "record")
        finished(page)
        assert last(page, ".text pre").startswith('{\n  "city": "Paris",\n  "big": 12345678901234567890,')
        prompts = [real.service.runtime.tokenizer.decode(prompt) for prompt in real.engine.prompts]
    calls = 'user: weather|assistant: I have to look.I look it up.<tool_call>{"name": "get_weather"}</tool_call>|'
    answer = "tool: clear|assistant: It is <b>clear</b>.|user: record|"
    assert prompts == [
        "user: weather|2 tools, <think>",
        f"{calls}tool: clear|2 tools, no thinking",
        f"{calls}{answer}no tools, no thinking",
    ]
