"""What clients send: tools, forms of the answer, thinking, several choices, parameters of other servers."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

openai = pytest.importorskip("openai", reason="the real client is part of the test extra")
httpx = pytest.importorskip("httpx", reason="part of the test extra")
pytest.importorskip("starlette", reason="the server needs the extra `serve`")

from helpers.serving import SECONDS, fake_runtime, scripted, serving, tokens_of  # noqa: E402

COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
USER = {"role": "user", "content": "hi"}
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "adds",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
        },
    },
}
CALL = '<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call>'
THINKER = "{% for m in messages %}{{ m.role }}: {{ m.content }}|{% endfor %}<think>"


@pytest.fixture(scope="module")
def server() -> Iterator[SimpleNamespace]:
    with serving(fake_runtime(context=4000), max_new_tokens=200) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: SimpleNamespace) -> Iterator[Any]:
    with client_of(server) as client:
        yield client


def client_of(server: SimpleNamespace) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=SECONDS)


def post(server: SimpleNamespace, path: str, **body: Any) -> Any:
    base = {"prompt": "abc"} if path == COMPLETIONS else {"messages": [USER]}
    return httpx.post(server.url + path, json={"model": "fake", "max_tokens": 4, **base, **body}, timeout=SECONDS)


def prompts(server: SimpleNamespace) -> list[str]:
    """What the engine was given to read."""
    return [server.service.runtime.tokenizer.decode(prompt) for prompt in server.engine.prompts]


def error(response: Any) -> tuple[str, str]:
    """The parameter and the message of a refusal."""
    assert response.status_code == 400, response.text
    return response.json()["error"]["param"], response.json()["error"]["message"]


def test_three_turns_with_a_tool():
    """With the client's own objects sent back."""
    following = scripted(CALL, "It is 3.", "As I said: 3.")
    with serving(fake_runtime(context=4000, following=following)) as server, client_of(server) as client:
        messages: list[Any] = [{"role": "user", "content": "1 + 2?"}]
        answer = client.chat.completions.create(model="fake", messages=messages, tools=[ADD])
        (choice,) = answer.choices
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
        (call,) = choice.message.tool_calls
        assert call.type == "function" and call.function.name == "add"
        assert json.loads(call.function.arguments) == {"a": 1, "b": 2}
        messages += [choice.message, {"role": "tool", "tool_call_id": call.id, "content": "3"}]
        answer = client.chat.completions.create(model="fake", messages=messages, tools=[ADD])
        assert (answer.choices[0].finish_reason, answer.choices[0].message.content) == ("stop", "It is 3.")
        assert answer.choices[0].message.tool_calls is None
        messages += [answer.choices[0].message, {"role": "user", "content": "Really?"}]
        last = client.chat.completions.create(model="fake", messages=messages, tools=[ADD], tool_choice="none")
        assert last.choices[0].message.content == "As I said: 3."
        first, second, third = prompts(server)
        assert '"name": "add"' in first and CALL.replace(" ", "") in second.replace(" ", "").replace("\n", "")
        assert "3" in second.rpartition("user: ")[2] and '"description": "adds"' not in third


def test_a_stream_with_a_tool():
    with serving(fake_runtime(context=4000, following=scripted(f"Let me see.{CALL}"))) as server:
        with client_of(server) as client:
            ask = {"model": "fake", "messages": [USER], "tools": [ADD], "stream": True}
            chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**ask)]
    calls = [call for chunk in chunks for call in chunk.delta.tool_calls or ()]
    assert {call.index for call in calls} == {0} and [call.id is None for call in calls].index(True) == 1
    assert calls[0].function.name == "add" and calls[0].type == "function"
    assert json.loads("".join(call.function.arguments for call in calls)) == {"a": 1, "b": 2}
    assert "".join(chunk.delta.content or "" for chunk in chunks) == "Let me see."
    assert chunks[-1].finish_reason == "tool_calls"


def test_the_older_form_of_tools():
    with serving(fake_runtime(context=4000, following=scripted(CALL, CALL, "3"))) as server:
        with client_of(server) as client:
            ask = {"model": "fake", "messages": [USER], "functions": [ADD["function"]]}
            (choice,) = client.chat.completions.create(**ask).choices
            assert choice.finish_reason == "function_call" and choice.message.function_call.name == "add"
            assert choice.message.tool_calls is None
            chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**ask, stream=True)]
            parts = [chunk.delta.function_call for chunk in chunks if chunk.delta.function_call]
            assert json.loads("".join(part.arguments for part in parts)) == {"a": 1, "b": 2}
            turns = [USER, choice.message, {"role": "function", "name": "add", "content": "3"}]
            assert client.chat.completions.create(**{**ask, "messages": turns}).choices[0].message.content == "3"
            assert CALL.replace(" ", "") in prompts(server)[2].replace(" ", "").replace("\n", "")


@pytest.mark.parametrize("stream", [False, True])
def test_the_older_form_has_one_call(stream):
    with serving(fake_runtime(context=4000, following=scripted(CALL + CALL))) as server, client_of(server) as client:
        ask = {"model": "fake", "messages": [USER], "functions": [ADD["function"]], "stream": stream}
        answer = client.chat.completions.create(**ask)
        parts = [chunk.choices[0].delta for chunk in answer] if stream else [answer.choices[0].message]
        calls = [part.function_call for part in parts if part.function_call]
        assert json.loads("".join(call.arguments for call in calls)) == {"a": 1, "b": 2}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add"}}])
def test_a_call_that_is_required(server, choice):
    """The engine would repeat the prompt, the grammar leaves it no way but to call. Its end token is a newline, which
    stands in the call's spelling, so what is seen is how the call begins."""
    answer = post(server, CHATS, tools=[ADD], tool_choice=choice, max_tokens=200, temperature=0).json()
    assert answer["choices"][0]["message"]["content"].startswith("<tool_call>")


def test_tools_that_do_not_fit(server):
    assert error(post(server, CHATS, tools=[ADD], tool_choice={"type": "function", "function": {"name": "sub"}})) == (
        "tool_choice",
        "tool_choice: 'sub' is not among the tools",
    )
    assert error(post(server, CHATS, tools=[{"type": "function"}]))[0] == "tools.0.function"
    assert error(post(server, CHATS, tools=[{"type": "code_interpreter"}]))[0] == "tools.0.type"


def test_answers_of_a_form(server):
    schema = {"type": "object", "properties": {"yes": {"type": "boolean"}}, "required": ["yes"]}
    schema["additionalProperties"] = False
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    forms: list[dict[str, Any]] = [{"response_format": form}, {"guided_json": schema}, {"json_schema": schema}]
    forms += [{"guided_json": json.dumps(schema)}, {"structured_outputs": {"json": schema}}]
    for how in forms:
        text = post(server, CHATS, **how, max_tokens=50, temperature=0).json()["choices"][0]["message"]["content"]
        assert type(json.loads(text)["yes"]) is bool, how
    for how in (
        {"guided_choice": ["yes", "no"]},
        {"structured_outputs": {"choice": ["yes", "no"]}},
        {"guided_regex": "yes|no"},
        {"regex": "yes|no"},
        {"guided_grammar": 'start: "yes" | "no"'},
        {"guided_grammar": 'root ::= "yes" | "no"'},
        {"grammar": '# llama.cpp\n  root ::= answer\nanswer ::= "yes" | "no"'},
        {"ebnf": 'root ::= "yes" | "no"'},
        {"structured_outputs": {"grammar": 'root ::= "yes" | "no"'}},
    ):
        answer = post(server, COMPLETIONS, **how, temperature=0).json()["choices"][0]
        assert answer["text"] in ("yes", "no") and answer["finish_reason"] == "stop"
    assert post(server, CHATS, response_format={"type": "text"}).status_code == 200


def test_forms_that_are_not_possible(server):
    nothing = {"type": "json_schema", "json_schema": {"name": "x"}}
    wrong = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}
    assert error(post(server, CHATS, response_format=nothing))[0] == "response_format"
    assert error(post(server, CHATS, response_format=wrong))[0] == "response_format"
    assert error(post(server, CHATS, response_format={"type": "xml"}))[0] == "response_format.type"
    assert error(post(server, COMPLETIONS, guided_regex="("))[0] == "structured_outputs"
    assert error(post(server, COMPLETIONS, guided_regex="a", guided_json={}))[0] == "structured_outputs"
    param, message = error(post(server, COMPLETIONS, grammar="root ::= ("))
    assert param == "structured_outputs" and "Expected ')'" in message
    assert "depth" in error(post(server, COMPLETIONS, grammar=f"root ::= {'(' * 5000}"))[1]
    assert "65536 are allowed" in error(post(server, COMPLETIONS, grammar="root ::= a" + "a" * 2**16))[1]
    form = {"type": "json_object"}
    assert error(post(server, CHATS, guided_regex="a", response_format=form))[0] == "structured_outputs"


@pytest.mark.parametrize("stream", [False, True])
def test_thinking_is_told_apart(stream):
    with serving(fake_runtime(template=THINKER, following=scripted("Hm.</think>Yes.", "Hm.</think>Yes."))) as server:
        with client_of(server) as client:
            answer = client.chat.completions.create(model="fake", messages=[USER], stream=stream)
            parts = [chunk.choices[0].delta for chunk in answer] if stream else [answer.choices[0].message]
        assert "".join(getattr(part, "reasoning_content", None) or "" for part in parts) == "Hm."
        assert "".join(part.content or "" for part in parts) == "Yes."
        turn = {"role": "assistant", "content": "Yes.", "reasoning_content": "Hm."}
        assert post(server, CHATS, messages=[USER, turn, USER]).status_code == 200
    with serving(fake_runtime(template=THINKER, following=scripted("Hm.</think>Yes.")), reasoning="none") as server:
        assert post(server, CHATS, max_tokens=50).json()["choices"][0]["message"]["content"] == "Hm.</think>Yes."


def test_what_a_client_may_leave_out(server):
    """The model, /v1, and logprobs beside `top_logprobs: 0`."""
    assert [model["id"] for model in httpx.get(f"{server.url}/models").json()["data"]] == ["fake"]
    for path, asked in ((COMPLETIONS, {"prompt": "ab"}), (CHATS, {"messages": [USER]})):
        for prefix in ("", "/v1"):
            answer = httpx.post(server.url + prefix + path.removeprefix("/v1"), json={**asked, "max_tokens": 1})
            assert answer.json()["usage"]["completion_tokens"] == 1, answer.text
    assert post(server, CHATS, top_logprobs=0).status_code == 200


def test_names_for_the_template():
    template = "{{ messages[-1].content }}{{ mood }}{{ enable_thinking }}{% if add_generation_prompt %}>{% endif %}"
    with serving(fake_runtime(template=template)) as server:
        post(server, CHATS, chat_template_kwargs={"mood": "!"}, enable_thinking=False)
        post(server, CHATS, chat_template_kwargs={"enable_thinking": 1}, add_generation_prompt=False)
        post(server, CHATS, continue_final_message=True)
        assert prompts(server) == ["hi!False>", "hi1", "hi"]
        assert error(post(server, CHATS, chat_template_kwargs={"messages": []}))[0] == "chat_template_kwargs"
        both = {"continue_final_message": True, "add_generation_prompt": True}
        assert error(post(server, CHATS, **both))[0] == "continue_final_message"


def test_a_template_that_does_not_end_is_one_requests_fault():
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    template = f"{{% if messages[0].content == 'loop' %}}{loops}{{% endif %}}ok"
    with serving(fake_runtime(template=template)) as server:
        param, message = error(post(server, CHATS, messages=[{"role": "user", "content": "loop"}]))
        assert param == "messages" and "template" in message
        assert post(server, CHATS).status_code == 200


def test_choices_of_several_prompts(client):
    answer = client.completions.create(model="fake", prompt=["ab", "cde"], n=2, max_tokens=4)
    texts = {choice.index: choice.text for choice in answer.choices}
    assert texts == {0: "abab", 1: "abab", 2: "cdec", 3: "cdec"}
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (5, 16)
    chunks = list(client.completions.create(model="fake", prompt=[[97, 98], [99]], n=2, max_tokens=4, stream=True))
    streamed = dict.fromkeys(range(4), "")
    for chunk in chunks:
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    tokenizer_texts = client.completions.create(model="fake", prompt=[[97, 98], [99]], max_tokens=4).choices
    assert [streamed[0], streamed[2]] == [choice.text for choice in tokenizer_texts] and streamed[0] == streamed[1]
    assert sorted(c.choices[0].index for c in chunks if c.choices[0].finish_reason == "length") == [0, 1, 2, 3]


def test_choices_draw_differently_and_can_be_repeated(client):
    ask = {"model": "fake", "messages": [USER], "max_tokens": 40, "temperature": 2, "n": 3}
    ask["extra_body"] = {"repetition_penalty": 8.0}  # half the draws leave the likeliest token
    one, two = ([c.message.content for c in client.chat.completions.create(**ask, seed=5).choices] for _ in range(2))
    assert one == two and len(set(one)) == 3
    alone = client.chat.completions.create(**{**ask, "n": 1}, seed=6).choices[0].message.content
    assert alone == one[1]  # choice k draws with seed + k


def test_one_choice_that_fails_ends_the_answer():
    with serving(fake_runtime()) as server:
        server.engine.failing = RuntimeError("no more")
        for stream in (False, True):
            assert post(server, COMPLETIONS, n=3, stream=stream).status_code == 500
        server.engine.failing = None
        assert post(server, COMPLETIONS, n=3).status_code == 200 and server.worker.idle


def test_what_is_wrong_with_a_text_alone_is_told():
    with serving(fake_runtime()) as server:
        server.engine.nan = True
        answer = post(server, COMPLETIONS)
        assert answer.status_code == 500 and "the model gave nan as a logit" in answer.json()["error"]["message"]
        server.engine.nan, server.engine.failing = False, RuntimeError("a secret")
        assert post(server, COMPLETIONS).json()["error"]["message"] == "the model failed on this request"


@pytest.mark.parametrize("stream", [False, True])
def test_an_echoed_prompt_with_logprobs(client, stream):
    """As lm-eval asks for it."""
    ask = {"model": "fake", "prompt": "abé", "max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0}
    choices = [chunk.choices[0] for chunk in client.completions.create(**ask, stream=True)] if stream else None
    choices = choices or client.completions.create(**ask).choices
    assert "".join(choice.text for choice in choices) == "abéa"
    parts = [choice.logprobs for choice in choices if choice.logprobs]
    tokens = [token for part in parts for token in part.tokens]
    logprobs = [logprob for part in parts for logprob in part.token_logprobs]
    top = [entry for part in parts for entry in part.top_logprobs]
    assert tokens == ["a", "b", "bytes:\\xc3", "bytes:\\xa9", "a"]
    assert logprobs[0] is top[0] is None and all(-0.01 < logprob <= 0 for logprob in logprobs[1:])
    assert [max(entry, key=entry.get) for entry in top[1:]] == tokens[1:]
    assert [offset for part in parts for offset in part.text_offset] == [0, 1, 2, 2, 3]


def test_echoed_prompts_that_are_read_one_after_another(client):
    """A long one is not told before it has been read, though a short one's answer has begun."""
    asked = ["ab", "c" * 2000]
    ask = {"model": "fake", "prompt": asked, "max_tokens": 2, "echo": True, "logprobs": 0, "temperature": 0}
    tokens: dict[int, list[str]] = {0: [], 1: []}
    for chunk in client.completions.create(**ask, stream=True):
        choice = chunk.choices[0]
        tokens[choice.index] += choice.logprobs.tokens if choice.logprobs else []
    assert ["".join(tokens[index]) for index in range(2)] == ["abab", "c" * 2002]


def test_nothing_but_the_prompt(client):
    ask = {"model": "fake", "prompt": "ab", "max_tokens": 0, "echo": True}
    choice = client.completions.create(**ask, logprobs=0).choices[0]
    assert (choice.text, choice.finish_reason, choice.logprobs.tokens) == ("ab", "length", ["a", "b"])
    assert client.completions.create(**ask).choices[0].text == "ab"


def test_the_likeliest_of_one_text_counts():
    """Two tokens may have one text; the chosen one is always told."""
    from amq.runtime.sampling import Choice
    from amq.serve.shapes import CompletionShape

    names = {1: b"a", 2: b"a", 3: b"b", 4: b"\xff"}
    tokenizer: Any = SimpleNamespace(token_bytes=names.get)
    shape = CompletionShape("id", "m", tokenizer, logprobs=True)
    assert shape._top(Choice(3, -3.0, ((1, -0.5), (2, -1.0)))) == {"a": -0.5, "b": -3.0}
    assert shape._top(Choice(2, -1.0, ((1, -0.5),))) == {"a": -0.5}
    assert shape._top(Choice(4, float("-inf"), ())) == {"bytes:\\xff": -9999.0}


def test_usage_in_every_event(server):
    options = {"include_usage": True, "continuous_usage_stats": True}
    lines = post(server, COMPLETIONS, stream=True, stream_options=options).text.split("\n\n")
    usages = [json.loads(line[6:])["usage"] for line in lines if line.startswith("data: {")]
    assert usages[-1] == usages[-2] and usages[-1]["completion_tokens"] == 4
    assert all(usage["prompt_tokens"] == 3 for usage in usages)


def test_what_is_ignored_is_named(server, caplog):
    caplog.set_level(logging.INFO, "amq.serve")
    turns = [{**USER, "id": "x", "mood": None}, {"role": "assistant", "content": None, "annotations": []}, USER]
    for _ in range(2):
        response = post(server, CHATS, messages=turns, user="me", my_client=1, seed=None, stream_options=None)
        assert response.status_code == 200 and response.headers["x-amq-ignored"] == "user, my_client, messages.id"
    assert sum("my_client" in record.message for record in caplog.records) == 1
    response = post(server, CHATS, **{"né\n,\x7f ": 1}, stream=True, stream_options={"include_usage": True, "odd": 1})
    assert response.headers["x-amq-ignored"] == "n?????, stream_options.odd"
    many = post(server, CHATS, **{str(n): 1 for n in range(100)}, **{"": 1}).headers["x-amq-ignored"]
    assert many.startswith("0, 1, ") and many.endswith(", 31, and 69 more")
    assert error(post(server, CHATS, **{str(n): 1 for n in range(300)}))[0] is None
    assert "x-amq-ignored" not in post(server, CHATS).headers


def test_every_parameter_is_in_the_table():
    from amq.serve.parameters import PARAMETERS
    from amq.serve.protocol import ChatRequest, CompletionRequest

    fields = set(ChatRequest.__struct_fields__) | set(CompletionRequest.__struct_fields__)
    assert fields == {name for name, parameter in PARAMETERS.items() if parameter.handling == "supported"}


def test_what_the_table_says_comes_true(server):
    from amq.serve.parameters import PARAMETERS

    for name, parameter in PARAMETERS.items():
        if parameter.handling == "ignored":
            assert post(server, CHATS, **{name: "x"}).headers["x-amq-ignored"] == name
        elif parameter.handling == "refused":
            assert error(post(server, CHATS, **{name: {"odd": 1}}))[0] == name
            assert all(post(server, CHATS, **{name: value}).status_code == 200 for value in (None, *parameter.nothing))
        assert parameter.why


def test_messages_of_every_role(server):
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "not JSON"}}
    turns = [
        {"role": "developer", "content": "be short", "name": None},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "me"},
        {"role": "assistant", "tool_calls": [call], "audio": None, "refusal": None},
        {"role": "tool", "tool_call_id": "c", "content": [{"type": "text", "text": "1"}]},
        {"role": "assistant", "content": None, "refusal": "no"},
        USER,
    ]
    assert post(server, CHATS, messages=turns).status_code == 200
    text = prompts(server)[-1]
    assert text.startswith("system: be short|user: ab|") and "assistant: no|user: hi|" in text
    call["function"]["arguments"] = "[" * 100_000
    deep = [USER, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "1"}]
    assert post(server, CHATS, messages=deep).status_code == 400
    for part, param in (
        ({"type": "image_url", "image_url": {"url": "file:///x"}}, "messages.0.content.0"),
        ({"type": "text"}, "messages.0.content.0.text"),
        ("x", "messages.0.content.0"),
    ):
        assert error(post(server, CHATS, messages=[{"role": "user", "content": [part]}]))[0] == param


def test_a_megabyte_of_wrong_messages_costs_little():
    """One error is made, however many there are."""
    import tracemalloc

    from amq.serve.errors import ApiError
    from amq.serve.protocol import ChatRequest, parse

    for inside in (b"0", b"{}", b"[]", b'{"role":"user"}', b'{"role":"user","content":[{}]}'):
        body = b'{"model":"x","messages":[' + inside + (b"," + inside) * (2**20 // (len(inside) + 1)) + b"]}"
        tracemalloc.start()
        with pytest.raises(ApiError) as caught:
            parse(ChatRequest, body, 100)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        why = f"{caught.value.param}: {caught.value}"
        assert (why.startswith("messages.0") or "lists and objects" in why) and peak < 32 * 2**20, inside


def test_openapi_is_what_the_server_does(server):
    from openapi_spec_validator import validate

    document = httpx.get(f"{server.url}/openapi.json").json()
    validate(document)
    titles = [schema["title"] for schema in document["components"]["schemas"].values()]
    assert len(titles) == len(set(titles)), "generators of clients name classes by them"
    routes = {route.path.replace("{name:path}", "{model}") for route in server.app.routes}
    assert set(document["paths"]) == routes - {"/", "/metrics", "/openapi.json"}
    schemas = document["components"]["schemas"]
    ranges = {name: kind["anyOf"][0] for name, kind in schemas["ChatRequest"]["properties"].items() if "anyOf" in kind}
    assert (ranges["temperature"]["minimum"], ranges["temperature"]["maximum"]) == (0, 2)
    assert ranges["top_k"]["minimum"] == -1 and ranges["top_p"]["maximum"] == 1
    assert "logit_bias" in ranges and "`mirostat`" in schemas["ChatRequest"]["description"]


def test_the_models_card(server):
    card = httpx.get(f"{server.url}/v1/models/fake").json()
    assert card["max_model_len"] == 4000 and card["engine"] == "a fake engine" and card["formats"] == {}
    assert card["capabilities"] == {"chat": True, "tools": "generic", "thinking": False, "json": True}


def test_tokens_and_text(server):
    def tokenize(**body: Any) -> Any:
        return httpx.post(f"{server.url}/tokenize", json=body)

    assert tokenize(prompt="ab", model="fake").json() == {"tokens": tokens_of("ab"), "count": 2, "max_model_len": 4000}
    assert tokenize(content="ab").json()["tokens"] == tokens_of("ab")
    assert tokenize(messages=[USER]).json()["tokens"] == tokens_of("user: hi|")
    post(server, CHATS, tools=[ADD])
    assert tokenize(messages=[USER], tools=[ADD]).json()["tokens"] == list(server.engine.prompts[-1])
    assert error(tokenize())[0] == "prompt" and error(tokenize(prompt="a", content="b"))[0] == "content"
    assert tokenize(prompt="a", model="other").status_code == 404
    answer = httpx.post(f"{server.url}/detokenize", json={"tokens": tokens_of("é")}).json()
    assert answer == {"prompt": "é", "content": "é"}
    assert error(httpx.post(f"{server.url}/detokenize", json={"tokens": [256]}))[0] == "tokens"


def test_a_body_of_brackets_is_refused(server):
    """Brackets in texts are none, and a text without an end costs no more."""
    from amq.serve.errors import ApiError
    from amq.serve.protocol import MOST_NESTED, CompletionRequest, parse

    tools = "[" + "[]," * MOST_NESTED + "[]]"
    body = f'{{"model": "fake", "messages": [], "tools": {tools}}}'
    answer = httpx.post(server.url + CHATS, content=body, headers={"Content-Type": "application/json"}, timeout=SECONDS)
    assert answer.status_code == 400 and "lists and objects" in answer.json()["error"]["message"]
    assert error(post(server, COMPLETIONS, prompt='["' * MOST_NESTED))[0] == "prompt"  # too long, but understood
    with pytest.raises(ApiError, match="not valid JSON"):
        parse(CompletionRequest, b'{"prompt": "' + b'[\\"' * MOST_NESTED, 9)
