"""The server's API: what OpenAI's client and plain HTTP see. The queue's behaviour is in test_serve_queue.py."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

openai = pytest.importorskip("openai", reason="the real client is part of the test extra")
httpx = pytest.importorskip("httpx", reason="part of the test extra")
pytest.importorskip("starlette", reason="the server needs the extra `serve`")

from helpers.serving import SECONDS, byte_tokenizer, fake_runtime, serving  # noqa: E402

CHAT = {"model": "fake", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 12}
CHAT_TEXT = "user: hi|use"  # the fake engine repeats the prompt, here twelve tokens of it
COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"


@pytest.fixture(scope="module")
def server() -> Iterator[SimpleNamespace]:
    with serving(fake_runtime(context=300), max_new_tokens=100, max_body="4KiB") as running:
        yield running


@pytest.fixture(scope="module")
def client(server: SimpleNamespace) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def http(server: SimpleNamespace) -> Iterator[Any]:
    with httpx.Client(base_url=server.url) as client:
        yield client


def events(response: Any) -> list[dict[str, Any]]:
    """The events of a stream, which must end in [DONE]."""
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = response.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


def test_chat(client):
    answer = client.chat.completions.create(**CHAT)
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-") and answer.model == "fake"
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", CHAT_TEXT, "length")
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (9, 12, 21)
    assert usage.prompt_tokens_details.cached_tokens == 0
    assert answer.timings["tokens_per_second"] > 0 and answer.timings["first_token_seconds"] > 0


def test_chat_stream(client):
    chunks = list(client.chat.completions.create(**CHAT, stream=True, stream_options={"include_usage": True}))
    assert len({chunk.id for chunk in chunks}) == 1 and chunks[0].object == "chat.completion.chunk"
    *texts, last, usage = chunks
    assert texts[0].choices[0].delta.role == "assistant" and texts[1].choices[0].delta.role is None
    assert [chunk.choices[0].delta.content for chunk in texts] == ["", *CHAT_TEXT]  # a token each
    assert {chunk.choices[0].finish_reason for chunk in texts} == {None}
    assert last.choices[0].finish_reason == "length" and last.choices[0].delta.content is None
    assert set(last.timings) == {"prompt_tokens_per_second", "tokens_per_second", "first_token_seconds"}
    assert usage.choices == [] and usage.usage.total_tokens == 21 and last.usage is None


def test_a_stream_without_usage(http):
    chunks = events(http.post(CHATS, json={**CHAT, "stream": True}))
    assert not any("usage" in chunk for chunk in chunks)


def test_completion(client):
    answer = client.completions.create(model="fake", prompt="abc", max_tokens=5)
    assert answer.object == "text_completion" and answer.choices[0].text == "abcab"
    tokens = byte_tokenizer().encode("abc")
    for prompt in (["abc"], tokens, [tokens]):
        assert client.completions.create(model="fake", prompt=prompt, max_tokens=5).choices[0].text == "abcab"


def test_completion_stream_with_echo(client):
    chunks = list(client.completions.create(model="fake", prompt="abc", max_tokens=2, echo=True, stream=True))
    assert [chunk.choices[0].text for chunk in chunks] == ["abc", "a", "b", ""]
    assert chunks[-1].choices[0].finish_reason == "length"
    whole = client.completions.create(model="fake", prompt=byte_tokenizer().encode("abc"), max_tokens=2, echo=True)
    assert whole.choices[0].text == "abcab"


def test_end_token_and_ignoring_it(client):
    answer = client.completions.create(model="fake", prompt="ab\n", max_tokens=9)
    assert (answer.choices[0].text, answer.choices[0].finish_reason, answer.usage.completion_tokens) == (
        "ab",
        "stop",
        3,
    )
    answer = client.completions.create(model="fake", prompt="ab\n", max_tokens=5, extra_body={"ignore_eos": True})
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("ab\nab", "length")


@pytest.mark.parametrize("stop", ["cda", ["x", "cda"]])
def test_stop_text_is_left_out(client, stop):
    answer = client.completions.create(model="fake", prompt="abcd", stop=stop)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("ab", "stop")
    chunks = client.completions.create(model="fake", prompt="abcd", stop=stop, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == "ab"


def test_characters_are_never_cut(client):
    """Four tokens make one character of the answer."""
    chunks = list(client.completions.create(model="fake", prompt="a😀é", max_tokens=14, stream=True))
    assert [chunk.choices[0].text for chunk in chunks] == [*"a😀éa😀é", ""]


def test_chat_logprobs(client):
    content = client.chat.completions.create(**CHAT, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert "".join(entry.token for entry in content) == CHAT_TEXT
    assert content[0].bytes == [ord("u")] and -0.01 < content[0].logprob <= 0
    assert [len(entry.top_logprobs) for entry in content] == [2] * 12 and content[0].top_logprobs[0].token == "u"
    chunks = client.chat.completions.create(**CHAT, logprobs=True, stream=True)
    parts = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
    assert "".join(entry.token for part in parts for entry in part.content) == CHAT_TEXT
    assert parts[0].content[0].top_logprobs == []


def test_completion_logprobs(client):
    logprobs = client.completions.create(model="fake", prompt="abc", max_tokens=4, logprobs=1).choices[0].logprobs
    assert logprobs.tokens == [*"abca"] and logprobs.text_offset == [0, 1, 2, 3]
    assert len(logprobs.token_logprobs) == 4 and set(logprobs.top_logprobs[1]) == {"b"}
    chunks = client.completions.create(model="fake", prompt="abc", max_tokens=4, logprobs=0, stream=True)
    parts = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
    assert [offset for part in parts for offset in part.text_offset] == [0, 1, 2, 3]
    assert set(parts[0].top_logprobs[0]) == {"a"}


def sampled(kind: Any, **given: Any) -> Any:
    """The Sampling of a request to a server that allows 7 tokens."""
    from amq.serve.protocol import parse

    request, _ = parse(kind, json.dumps({"model": "m", **given}).encode(), 9)
    return request.sampling(7, 256, frozenset({3, 2}))


def test_the_sampling_is_what_was_asked_for():
    from amq.runtime.settings import Sampling
    from amq.serve.protocol import ChatRequest, CompletionRequest

    messages = [{"role": "user", "content": "x"}]
    assert sampled(ChatRequest, messages=messages) == Sampling(temperature=1.0, max_new_tokens=7)
    given = {
        **{"temperature": 0, "top_p": 0.5, "top_k": 3, "min_p": 0.25, "repetition_penalty": 1.5, "seed": -4},
        **{"presence_penalty": -1, "frequency_penalty": 2, "stop": "end", "max_tokens": 2, "max_completion_tokens": 5},
        **{"logprobs": True, "top_logprobs": 3, "ignore_eos": True, "min_tokens": 9, "stop_token_ids": [4]},
        **{"logit_bias": {"5": -100, "6": 0.5}, "skip_special_tokens": False},
    }
    assert sampled(ChatRequest, messages=messages, **given) == Sampling(
        *(0.0, 3, 0.5, 0.25, 1.5, -1.0, 2.0, -4, 5, ("end",), 3, True, (4,), 5, ((5, -100.0), (6, 0.5)), (2, 3), None)
    )
    plain = sampled(CompletionRequest, prompt="x", logprobs=0, seed=None, n=1, user="me", tools=[])
    assert sampled(CompletionRequest, prompt="x", seed=-1).seed is None
    assert plain.logprobs == 0 and plain.prompt_logprobs is None
    assert sampled(CompletionRequest, prompt="x", logprobs=2, echo=True).prompt_logprobs == 2


@pytest.mark.parametrize("limit", [None, -1, 7, 100, 10**30])
def test_the_servers_own_limit_of_tokens(limit):
    from amq.serve.protocol import ChatRequest, CompletionRequest

    for name in ("max_tokens", "max_completion_tokens"):
        given = {name: limit, "messages": [{"role": "user", "content": "x"}]}
        assert sampled(ChatRequest, **given).max_new_tokens == 7
    assert sampled(CompletionRequest, prompt="x", max_tokens=limit).max_new_tokens == 7


def test_seeds_repeat_draws(client):
    """Half the draws leave the fake engine's likeliest token at this temperature and penalty."""
    ask = {**CHAT, "max_tokens": 40, "temperature": 2, "extra_body": {"repetition_penalty": 8.0}}
    texts = [client.chat.completions.create(**ask, seed=seed).choices[0].message.content for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_models_health_and_page(client, http):
    assert [model.id for model in client.models.list()] == ["fake"]
    assert client.models.retrieve("fake").owned_by == "amq"
    with pytest.raises(openai.NotFoundError, match="nope"):
        client.models.retrieve("some/nope")
    assert http.get("/health").json() == {"status": "ok"}
    page = http.get("/")
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")


def error_of(response: Any, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert list(response.json()) == ["error"]
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return error


@pytest.mark.parametrize(
    "path, extra, param",
    [
        (CHATS, {"temperature": 2.5}, "temperature"),
        (CHATS, {"temperature": "1"}, "temperature"),
        (CHATS, {"temperature": True}, "temperature"),
        (CHATS, {"top_k": -2}, "top_k"),
        (CHATS, {"min_p": 2}, "min_p"),
        (CHATS, {"repetition_penalty": 0}, "repetition_penalty"),
        (CHATS, {"presence_penalty": 3}, "presence_penalty"),
        (CHATS, {"seed": 2**64}, "seed"),
        (CHATS, {"max_tokens": 0}, "max_tokens"),
        (CHATS, {"max_tokens": 1.5}, "max_tokens"),
        (CHATS, {"stop": ["a"] * 65}, "stop"),
        (CHATS, {"stop": ""}, "stop"),
        (CHATS, {"stop": ["a", 3]}, "stop.1"),
        (CHATS, {"n": 33}, "n"),
        (CHATS, {"stream": "yes"}, "stream"),
        (CHATS, {"stream_options": {"include_usage": True}}, "stream_options"),
        (CHATS, {"logprobs": 3}, "logprobs"),
        (CHATS, {"top_logprobs": 3}, "top_logprobs"),
        (CHATS, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        (CHATS, {"tools": [{"type": "function"}]}, "tools.0.function"),
        (CHATS, {"tool_choice": "required"}, "tool_choice"),
        (CHATS, {"tools": [], "tool_choice": "required"}, "tool_choice"),
        (CHATS, {"messages": []}, "messages"),
        (CHATS, {"messages": [{"role": "nobody", "content": "x"}]}, "messages.0.role"),
        (CHATS, {"messages": [{"role": "user"}]}, "messages.0.content"),
        (CHATS, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0"),
        (CHATS, {"messages": [{"role": "user", "content": "x" * 400}]}, "messages"),
        (COMPLETIONS, {"prompt": ""}, "prompt"),
        (COMPLETIONS, {"prompt": ["a"] * 33}, "prompt"),
        (COMPLETIONS, {"prompt": [256]}, "prompt"),
        (COMPLETIONS, {"prompt": [1, "a"]}, "prompt"),
        (COMPLETIONS, {"suffix": "x"}, "suffix"),
        (COMPLETIONS, {"best_of": 2}, "best_of"),
        (COMPLETIONS, {"logit_bias": {"256": 1}}, "logit_bias"),
    ],
    ids=str,
)
def test_bad_values_are_named(http, path, extra, param):
    base = CHAT if path == CHATS else {"model": "fake", "prompt": "abc", "max_tokens": 2}
    error = error_of(http.post(path, json={**base, **extra}), 400)
    assert error["param"] == param and error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "body",
    [
        *(b"{", b"", b"null", b"[]", b'"text"', b"\xff\xfe", b'{"model": "\xff"}', b"[" * 2000),
        b'{"model":"fake","messages":[{"role":"user","content":"\\ud800"}]}',
        b'{"model":"fake","temperature":NaN,"messages":[{"role":"user","content":"x"}]}',
        b'{"model":"fake","temperature":1e999,"messages":[{"role":"user","content":"x"}]}',
    ],
)
def test_bodies_that_are_not_json(http, body):
    error_of(http.post(CHATS, content=body, headers={"Content-Type": "application/json"}), 400)


def test_other_errors_have_openais_shape(http):
    assert error_of(http.post(CHATS, json={**CHAT, "model": "other"}), 404)["code"] == "model_not_found"
    assert error_of(http.get("/v1/nothing"), 404)["code"] == "not_found"
    wrong = http.get(CHATS)
    assert error_of(wrong, 405)["code"] == "method_not_allowed" and wrong.headers["allow"] == "POST"
    error_of(http.post(CHATS, content=json.dumps(CHAT), headers={"Content-Type": "text/plain"}), 400)
    long = http.post(COMPLETIONS, json={"model": "fake", "prompt": [1] * 300})
    assert error_of(long, 400)["code"] == "context_length_exceeded"


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large(http, chunked):
    content = (b"x" * 1024 for _ in range(200)) if chunked else b"x" * 200_000
    error = error_of(http.post(CHATS, content=content, headers={"Content-Type": "application/json"}), 413)
    assert "4096" in error["message"]
    assert http.get("/health").status_code == 200  # on the same connection


def test_the_answer_ends_with_the_context(client):
    answer = client.completions.create(model="fake", prompt="x" * 290, max_tokens=50)
    assert (answer.usage.total_tokens, answer.choices[0].finish_reason) == (300, "length")


def test_cached_tokens_are_reported(server, client):
    server.engine.shared = 4
    try:
        usage = client.completions.create(model="fake", prompt="abcdef", max_tokens=1).usage
    finally:
        server.engine.shared = 0
    assert usage.prompt_tokens_details.cached_tokens == 4


def test_metrics(server, client, http):
    def read() -> dict[str, float]:
        text = http.get("/metrics").text
        text = text.replace('engine="0",model_name="fake"', "").replace("{}", "")
        return {name: float(value) for name, value in re.findall(r"^((?:amq_|vllm:)\S+) (\S+)$", text, re.MULTILINE)}

    before = read()
    client.completions.create(model="fake", prompt="abcdef", max_tokens=10)
    http.post(COMPLETIONS, content=b"{")
    after = read()

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert (grown("vllm:prompt_tokens_total"), grown("vllm:generation_tokens_total")) == (6, 10)
    assert grown("vllm:time_to_first_token_seconds_count") == 1 and grown("vllm:inter_token_latency_seconds_count") == 9
    assert grown('amq_requests_total{endpoint="/v1/completions",status="200"}') == 1
    assert grown('amq_requests_total{endpoint="/v1/completions",status="400"}') == 1
    assert any('le="0.001"' in name for name in after) and after["amq_tokens_per_second"] > 0
    for nothing in ("vllm:num_requests_waiting", "vllm:num_requests_running", "amq_kv_positions_used"):
        assert after[nothing] == 0
    assert after["amq_kv_positions_total"] == server.engine.positions


def test_a_local_server_answers_to_local_names_only(http):
    """A web page whose own name was made to resolve to 127.0.0.1."""
    for host, status in (
        ("localhost:80", 200),
        ("[::1]:80", 200),
        ("evil.example", 403),
        ("localhost.evil.example", 403),
    ):
        assert http.get("/v1/models", headers={"Host": host}).status_code == status


def test_keys_and_cors():
    with serving(api_key=["one", "twö"], cors=["https://page.example"], model_name="my/model") as server:
        with httpx.Client(base_url=server.url) as http:
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "one"}):
                for path in ("/v1/models", "/v1/nothing", "/models", "/metrics", "/tokenize", "/detokenize"):
                    answer = http.get(path, headers=headers)
                    assert error_of(answer, 401)["code"] == "invalid_api_key"
                    assert answer.headers["www-authenticate"] == "Bearer"
            for key in ("one", "twö"):
                answer = http.get("/v1/models/my/model", headers={"Authorization": f"Bearer {key}".encode()})
                assert answer.json()["id"] == "my/model"
            assert http.get("/health").status_code == http.get("/").status_code == 200
            asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
            for origin, status in (("https://page.example", 200), ("https://other.example", 400)):
                answer = http.options(CHATS, headers={"Origin": origin, **asked})
                assert answer.status_code == status
                assert (answer.headers.get("access-control-allow-origin") == origin) == (status == 200)
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="bad", max_retries=0).models.list()


def test_a_quantized_checkpoint(tmp_path, one_thread):
    """Answers are those of `generate`, however many are made at once."""
    from concurrent.futures import ThreadPoolExecutor

    from helpers.checkpoints import tiny_checkpoint
    from helpers.tiny_models import tiny_llama

    from amq.runtime import Sampling, generate, load

    runtime = load(tiny_checkpoint(tiny_llama(), tmp_path / "tiny"), activations="fp32", max_sequences=3)
    prompts = ["hello", "a longer prompt than the others", "x"]
    expected = ["".join(generate(runtime, prompt, Sampling(max_new_tokens=20))) for prompt in prompts]
    with serving(runtime) as server, ThreadPoolExecutor(3) as pool:

        def ask(prompt: str) -> str:
            body = {"model": "tiny", "prompt": prompt, "max_tokens": 20, "temperature": 0}
            return httpx.post(server.url + COMPLETIONS, json=body, timeout=SECONDS).json()["choices"][0]["text"]

        assert [ask(prompt) for prompt in prompts] == expected
        assert list(pool.map(ask, prompts * 2)) == expected * 2


def test_no_cors_by_default(http):
    answer = http.get("/health", headers={"Origin": "https://page.example"})
    assert not any(name.startswith("access-control") for name in answer.headers)
