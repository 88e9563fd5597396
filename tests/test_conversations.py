"""Conversations from a .jsonl file, by the model's own template; what is wrong with a line is named."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny_models import TEMPLATES, VOCABULARY, byte_tokenizer

from amq.errors import AmqError
from amq.model import conversations
from amq.model.conversations import conversations_text
from amq.model.text import WindowSampler, load_corpus

CHAT = (
    "{{ '<bos>' }}{% if tools %}[{{ tools[0].name }}]{% endif %}{% for m in messages %}<start>{{ m.role }}:"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}<eos>{% endfor %}"
)
HELLO = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]}


@pytest.fixture
def tokenizer() -> Any:
    made = byte_tokenizer(TEMPLATES["llama"])
    made.chat_template = CHAT
    return made


@pytest.fixture
def file(tmp_path: Path) -> Any:
    """Writes lines, JSON or text, into a file."""

    def write(*lines: Any) -> Path:
        path = tmp_path / "talks.jsonl"
        path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
        return path

    return write


def test_conversations_and_texts(tokenizer: Any, file: Any) -> None:
    thinking = {"role": "assistant", "content": "4", "reasoning_content": "2 + 2"}
    path = file(HELLO, "\n", {"text": "plain\n"}, {"messages": [thinking], "tools": [{"name": "sum"}], "id": 7})
    assert conversations_text(path, tokenizer, "<bos>") == (
        "<start>user:hello<eos><start>assistant:hi<eos>\nplain\n[sum]<start>assistant:<think>2 + 2</think>4<eos>\n"
    )


def test_special_tokens_are_tokens_and_windows_begin_once(tokenizer: Any, file: Any) -> None:
    corpus = load_corpus(str(file(HELLO, HELLO)), tokenizer, VOCABULARY + 3)
    ids = tokenizer("user:hello assistant:hi \n", add_special_tokens=False)["input_ids"]
    one = [258, *ids[:10], 257, 258, *ids[11:23], 257, ids[-1]]
    assert corpus.tokens.tolist() == one + one and corpus.prefix == (256,)
    windows = WindowSampler(corpus, 9, 0).take(3)
    assert windows[:, 0].tolist() == [256] * 3 and not bool((windows[:, 1:] == 256).any())


EXPECTED = r'talks.jsonl:2: .*expected an object with "messages" \(a list of {"role", "content"}\) or with "text"'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{oops}\n", r"talks.jsonl:2: not valid JSON \(.*\): expected an object with .*, got '{oops}'"),
        ("[" * 5000 + "\n", r"talks.jsonl:2: not valid JSON"),
        ([1], EXPECTED + r".*, got \[1\]"),
        ({"prompt": "x"}, EXPECTED + r".*, got an object with 'prompt'"),
        ({}, EXPECTED + ".*, got an object with nothing"),
        ({"messages": [], "text": "x"}, EXPECTED + ".*, one of the two, got an object with 'messages', 'text'"),
        ({"messages": []}, EXPECTED + ".*, got no messages"),
        ({"text": None}, EXPECTED + ".*, got no messages"),
        ({"text": 5}, r"talks.jsonl:2 at \$.text: expected .*str.*, got `?int"),
        ({"messages": "hello"}, r"talks.jsonl:2 at \$.messages: expected .*array.*, got .?str"),
        ({"messages": [{"content": "x"}]}, r"talks.jsonl:2 at \$.messages\[0\]: object missing required field `role`"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, r"talks.jsonl:2: it holds half a character"),
        ({"messages": [{"role": "u"}], "tools": [{}]}, None),
        ({"messages": [{"role": "u"}], "tools": "all"}, r"talks.jsonl:2 at \$.tools: expected"),
    ],
)
def test_bad_lines_are_named(line: Any, message: str | None, tokenizer: Any, file: Any) -> None:
    path = file(HELLO, line)
    if message is None:
        assert "[]" in conversations_text(path, tokenizer, "")
        return
    with pytest.raises(AmqError, match=message):
        conversations_text(path, tokenizer, "")


def test_what_a_template_refuses(tokenizer: Any, file: Any) -> None:
    tokenizer.chat_template = "{{ raise_exception('only the user may begin') }}"
    with pytest.raises(AmqError, match=r"talks.jsonl:1: the model's chat template does not take .*only the user may"):
        conversations_text(file(HELLO), tokenizer, "")
    tokenizer.chat_template = None
    with pytest.raises(
        AmqError, match=r'talks.jsonl:1: the model has no chat template for "messages": give lines with'
    ):
        conversations_text(file(HELLO), tokenizer, "")
    assert conversations_text(file({"text": "plain"}), tokenizer, "") == "plain\n"


def test_unusable_files(tokenizer: Any, file: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AmqError, match=r"no file .*missing.jsonl: expected one whose lines are conversations"):
        load_corpus(str(tmp_path / "missing.jsonl"), tokenizer, VOCABULARY + 3)
    with pytest.raises(AmqError, match=r"talks.jsonl holds no line: expected an object with"):
        conversations_text(file("\n\n"), tokenizer, "")
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes('{"text": "naïve"}'.encode("latin-1"))
    with pytest.raises(AmqError, match="latin.jsonl is not UTF-8 text"):
        conversations_text(latin, tokenizer, "")
    monkeypatch.setattr(conversations, "LINE", 20)
    with pytest.raises(AmqError, match=r"talks.jsonl:1: the line is longer than 20 characters: split it"):
        conversations_text(file(HELLO), tokenizer, "")


def test_a_long_file_is_cut_and_says_so(
    tokenizer: Any, file: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(conversations, "CHARACTERS", 8)
    with caplog.at_level(logging.WARNING, "amq.model.conversations"):
        text = conversations_text(file({"text": "12345"}, {"text": "6789"}, "not read"), tokenizer, "")
    assert text == "12345\n6789\n"
    assert caplog.messages[0].endswith("talks.jsonl: the text ends at line 2, which is 9 characters")
