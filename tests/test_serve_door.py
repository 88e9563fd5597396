"""Who comes in: keys and where they are written, names of the server, proxies, whose turn it is, names of requests."""

from __future__ import annotations

import logging
import re
from types import SimpleNamespace
from typing import Any

import pytest

httpx = pytest.importorskip("httpx", reason="part of the test extra")
pytest.importorskip("starlette", reason="the server needs the extra `serve`")

from helpers.serving import fake_runtime, serving, wait_for  # noqa: E402

from amq.errors import AmqError  # noqa: E402
from amq.runtime.state_pool import StatePool  # noqa: E402
from amq.serve import ServeSettings  # noqa: E402
from amq.serve.door import Door, client_address  # noqa: E402


def headers(**values: str) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode()) for name, value in values.items()]


@pytest.mark.parametrize(
    ("address", "client"),
    [
        ("10.0.0.1", "10.0.0.1"),
        ("::ffff:10.0.0.1", "10.0.0.1"),  # as a socket for both families says it
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::9", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("testclient", "testclient"),
    ],
)
def test_addresses_of_one_client(address, client):
    assert client_address(address) == client


def test_a_client_is_its_key_however_it_spells_it():
    door = Door(ServeSettings(api_key=["one", "two"]))
    owners = [door.owner(headers(authorization=f"{scheme} one")) for scheme in ("Bearer", "bearer", "BEARER ")]
    assert owners[0] and len(set(owners)) == 1
    assert door.owner(headers(authorization="Bearer two")) != owners[0]
    assert door.owner(headers(authorization="Basic one")) is door.owner(headers()) is None
    assert door.client(owners[0], "10.0.0.1") == door.client(owners[0], "10.0.0.2")
    assert re.fullmatch("key:[0-9a-f]{8}", door.client(owners[0], ""))


def test_one_key_for_all_leaves_turns_to_addresses():
    door = Door(ServeSettings(api_key=["one"]))
    owner = door.owner(headers(authorization="Bearer one"))
    assert [door.client(owner, address) for address in ("10.0.0.1", "10.0.0.2")] == [
        "address:10.0.0.1", "address:10.0.0.2",
    ]  # fmt: skip


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "0.0.0.0", "::", "box.lan"])
def test_names_of_a_server_without_a_key(host):
    """A web page whose own name was made to resolve to the server's address cannot read the answers."""
    door = Door(ServeSettings(host=host, allow_host=["Chat.example"]))
    good = [
        "localhost:80",
        "LOCALHOST",
        "localhost.:1",
        "127.0.0.1:80",
        "10.1.2.3",
        "[::1]:80",
        "[::1]",
        "chat.example",
    ]
    for name in [*good, *(["box.lan:8000"] if host == "box.lan" else [])]:
        assert door.right_host(headers(host=name)), name
    bad = ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "", "0x7f.1", "chat.example.evil"]
    for name in bad:
        assert not door.right_host(headers(host=name)), name
    assert not door.right_host([])
    assert Door(ServeSettings(host=host, api_key=["k"])).right_host(headers(host="evil.example"))


def test_a_file_of_keys(tmp_path, caplog):
    path = tmp_path / "keys"
    path.write_text("# ours\none\n\n  two  \n")
    path.chmod(0o600)
    settings = ServeSettings(api_key_file=str(path))
    with caplog.at_level(logging.WARNING, "amq.serve"):
        door = Door(settings)
    assert not caplog.records
    assert len(door.keys) == 2 and all(door.owner(headers(authorization=f"Bearer {key}")) for key in ("one", "two"))
    assert door.owner(headers(authorization="Bearer # ours")) is None
    path.chmod(0o644)
    with caplog.at_level(logging.WARNING, "amq.serve"):
        Door(settings)
    assert "chmod 600" in caplog.text and "one" not in caplog.text
    path.write_text("# none\n")
    for wrong in (path, tmp_path / "absent", tmp_path):
        with pytest.raises(AmqError, match="--api-key-file"):
            Door(ServeSettings(api_key_file=str(wrong)))


def test_where_the_command_finds_keys(monkeypatch, caplog, tmp_path, capsys):
    from amq.serve.__main__ import main, settings_of
    from amq.util.settings import run_command

    for text, keys in (("", []), ("one", ["one"]), ("one, two\nthree\n,", ["one", "two", "three"])):
        monkeypatch.setenv("AMQ_API_KEY", text)
        assert settings_of({}).api_key == keys
    assert settings_of({"api_key_file": "keys"}).api_key == []  # flags come before the environment
    assert not caplog.records
    assert settings_of({"api_key": ["mine"]}).api_key == ["mine"]
    assert "everyone on this machine" in caplog.text and "mine" not in caplog.text
    assert run_command(main, ["no such model", "--port", "0", "--api-key-file", str(tmp_path / "absent")]) == 2
    assert "--api-key-file" in capsys.readouterr().err  # before the model is looked for


def ask(server: SimpleNamespace, **given: str) -> Any:
    names = {name.replace("_", "-"): value for name, value in given.items()}
    return httpx.get(f"{server.url}/v1/models", headers=names)


def test_every_answer_names_its_request():
    with serving(api_key=["k"]) as server:
        first, second = ask(server), ask(server, Authorization="Bearer k")
        assert (first.status_code, second.status_code) == (401, 200)
        names = {answer.headers["x-request-id"] for answer in (first, second)}
        assert len(names) == 2 and all(re.fullmatch("[0-9a-f]{32}", name) for name in names)
        assert ask(server, X_Request_Id="mine-1.2:3").headers["x-request-id"] == "mine-1.2:3"
        for bad in ("a b", "x" * 65, "é", ""):
            answer = httpx.get(f"{server.url}/health", headers={"X-Request-Id": bad.encode()})
            assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-request-id"])


@pytest.mark.parametrize(("trusted", "client"), [([], "127.0.0.1"), (["127.0.0.1"], "10.9.9.9")])
def test_only_a_trusted_proxy_says_who_comes(monkeypatch, trusted, client):
    with serving(trust_proxy=trusted) as server:
        seen = []
        real = server.service.door.client
        monkeypatch.setattr(server.service.door, "client", lambda *known: seen.append(real(*known)) or seen[-1])
        ask(server, X_Forwarded_For="10.9.9.9")
        assert seen == [f"address:{client}"]


def test_settings_of_the_door_that_do_not_fit():
    with pytest.raises(AmqError, match="--trust-proxy"):
        ServeSettings(trust_proxy=["my proxy"])


def test_the_command_says_what_it_will_do_with_a_model(tmp_path, monkeypatch):
    from amq.checkpoint.store import METHOD
    from amq.serve.plan import plan

    def say(model: object, **settings: Any) -> str:
        return plan(str(model), ServeSettings(**settings))

    for name, config in (("ours", f'{{"quantization_config": {{"quant_method": "{METHOD}"}}}}'), ("plain", "{}")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(config)
    assert "quantized by amq: loading" in say(tmp_path / "ours")
    text = say(tmp_path / "plain")
    assert "is not quantized" in text and "in 32 bits" in text
    assert f"amq quantize {tmp_path / 'plain'} --uniform int4" in text
    assert "in 16 bits" in say(tmp_path / "plain", dtype="bfloat16")
    assert "of its files" in say(tmp_path / "plain", device="cuda")
    assert "GGUF" in say("smollm2") and "GGUF" in say("there/model.gguf")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    assert "will be downloaded" in say("some/model")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: "/cache/config.json")
    assert "is in the local cache" in say("some/model") and "amq quantize some/model" in say("some/model")
    monkeypatch.undo()
    assert say("no such model") == ""
    (tmp_path / "file").write_text("")
    assert say(tmp_path / "file") == ""


def test_a_line_per_request(caplog):
    """Who, what, how many tokens and how it ended; no text, no key; off unless it is asked for."""
    with caplog.at_level(logging.INFO, "amq.serve"):
        for wanted in (False, True):
            with serving(api_key=["secret", "other"], log_requests=wanted) as server:
                body = {"model": "fake", "prompt": "hushhush", "max_tokens": 5}
                given = {"X-Request-Id": "mine", "Authorization": "Bearer secret"}
                assert httpx.post(f"{server.url}/v1/completions", json=body, headers=given).status_code == 200
                given["Authorization"] = "Bearer wrong"
                assert httpx.post(f"{server.url}/v1/completions?a=b", json=body, headers=given).status_code == 401
                tag = server.service.door.keys[0][:8]
            lines = [record.getMessage() for record in caplog.records if "request mine" in record.getMessage()]
            assert len(lines) == 2 * wanted
    done, refused = lines
    assert f"request mine of key:{tag}: /v1/completions 200, 8 prompt, 5 new, 0 cached tokens, " in done
    assert done.endswith(" s, length")
    assert "request mine of address:127.0.0.1: /v1/completions 401, 0 prompt, 0 new, 0 cached tokens" in refused
    assert not any(word in line for line in lines for word in ("hush", "secret", "wrong", "a=b"))


def test_metrics_by_the_names_of_vllm():
    """What its dashboards ask for is there, with their labels; and what is ours."""
    runtime = fake_runtime()
    runtime.engine.prompt_cache = SimpleNamespace(hits=3, misses=1, written=2, dropped=0, bytes=4096)
    runtime.engine.states = SimpleNamespace(pool=StatePool(1, 5))
    with serving(runtime) as server:
        body = {"model": "fake", "prompt": "abcdef", "max_tokens": 5}
        assert httpx.post(f"{server.url}/v1/completions", json=body).status_code == 200
        wait_for(lambda: server.worker.idle)
        text = httpx.get(f"{server.url}/metrics").text
    found = {name: float(value) for name, value in re.findall(r"^([\w:]+(?:{.*})?) (\S+)$", text, re.MULTILINE)}
    labels = 'engine="0",model_name="fake"'
    for name, value in {
        "num_requests_running": 0, "num_requests_waiting": 0, "kv_cache_usage_perc": 0, "prompt_tokens_total": 6,
        "generation_tokens_total": 5, "prefix_cache_queries_total": 6, "prefix_cache_hits_total": 0,
        "time_to_first_token_seconds_count": 1, "inter_token_latency_seconds_count": 4,
        "request_time_per_output_token_seconds_count": 1, "e2e_request_latency_seconds_count": 1,
        "request_queue_time_seconds_count": 1, "request_inference_time_seconds_count": 1,
        "request_prefill_time_seconds_count": 1, "request_decode_time_seconds_count": 1,
        "request_prompt_tokens_sum": 6, "request_generation_tokens_sum": 5,
    }.items():  # fmt: skip
        assert found[f"vllm:{name}{{{labels}}}"] == value, name
    for reason, value in (("length", 1), ("stop", 0), ("abort", 0), ("error", 0)):
        assert found[f'vllm:request_success_total{{engine="0",finished_reason="{reason}",model_name="fake"}}'] == value
    assert found['amq_prompt_cache_pages_total{event="hits"}'] == 3 and found["amq_prompt_cache_bytes"] == 4096
    assert found['amq_state_snapshots_total{event="taken"}'] == found["amq_state_snapshots_kept"] == 0
    assert found["amq_state_snapshots_room"] == 5
    assert found["amq_engine_failed"] == 0 and found["amq_connections"] >= 1


def test_sizes_of_the_command_are_bytes_for_the_engine():
    assert ServeSettings(prompt_cache="2MiB").loading["prompt_cache"] == 2**21
    assert ServeSettings(state_cache="1GiB").loading["state_cache"] == 2**30
    assert ServeSettings().loading["prompt_cache"] is ServeSettings().loading["state_cache"] is None
    with pytest.raises(AmqError, match="--prompt-cache"):
        ServeSettings(prompt_cache="big")
    with pytest.raises(AmqError, match="--state-cache"):
        ServeSettings(state_cache="big")
