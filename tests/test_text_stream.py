"""amq.runtime.text_stream: what comes piece by piece is what tokenizers decodes at once, for every kind of decoder."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
from helpers.small_tokenizers import BYTES, KINDS, byte_level, fallback_metaspace, llama, unigram, wordpiece
from helpers.tiny_models import byte_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Inner

from amq.errors import AmqError
from amq.runtime.tokenizer import TextStream, Tokenizer

TEXTS = (
    "Hi 😀!",
    "naïve café",
    "中文 和 👩‍👩‍👧",
    " leading",
    "  two",
    "a\n\nb",
    "é",
    "𝄞𝄞",
    "end. ",
    "▁a▁ b",
    "hello lo.",
)
EXACT = set(KINDS) - {"wordpiece", "ends of words"}


def streamed(tokenizer: Tokenizer, tokens: Sequence[int], stop: Sequence[str] = ()) -> str:
    stream = TextStream(tokenizer, stop)
    return "".join([stream.push(token) for token in tokens]) + stream.finish()


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_join_to_the_whole(kind: str) -> None:
    inner = KINDS[kind]()
    ours = Tokenizer(inner, [])
    assert ours.decoding.exact == (kind in EXACT)
    for text in TEXTS:
        tokens = inner.encode(text, add_special_tokens=False).ids
        assert streamed(ours, tokens) == inner.decode(tokens)
    byte = [inner.token_to_id(name) for name in BYTES]
    others = [i for i in range(inner.get_vocab_size() + 1) if i not in byte]
    pieces = [i for i in others if i not in ours.special_ids and i < inner.get_vocab_size()]
    parts = [st.sampled_from(others).map(lambda i: [i])]
    if byte[0] is not None:
        # two bytes hold no character before one that is wrong, which tokenizers would take back, and a stream cannot
        wrong = st.lists(st.sampled_from(byte[0x80:]), min_size=1, max_size=2)
        piece = st.sampled_from(pieces)
        parts += [
            st.sampled_from(["é", "日", "😀", "▁", "a", "▁é"]).map(lambda text: [byte[b] for b in text.encode()]),
            st.tuples(piece, wrong, piece).map(lambda three: [three[0], *three[1], three[2]]),
        ]

    @settings(max_examples=100, deadline=None)
    @given(st.lists(st.one_of(parts), max_size=20))
    def any_tokens(groups: list[list[int]]) -> None:
        tokens = [token for group in groups for token in group]
        assert streamed(ours, tokens) == inner.decode(tokens, skip_special_tokens=True)

    any_tokens()


def test_characters_come_whole_and_wrong_bytes_come_at_once() -> None:
    ours = Tokenizer.from_transformers(byte_tokenizer(), [])
    byte = {ours.token_bytes(i): i for i in range(256)}
    assert sorted(byte) == [bytes([b]) for b in range(256)]

    def pieces(data: bytes) -> list[str]:
        stream = TextStream(ours)
        return [stream.push(byte[bytes([b])]) for b in data] + [stream.finish()]

    assert pieces("é🙂a".encode()) == ["", "é", "", "", "", "🙂", "a", ""]
    assert pieces(b"\xff\xffa") == ["�", "�", "a", ""]
    assert pieces(b"\xe6\x97a\xe6") == ["", "", "�a", "", "�"]
    assert ours.token_text(byte[b"\xe6"]) == "�" and ours.token_text(byte[b"a"]) == "a"
    assert ours.token_bytes(9999) == b"" and ours.decode([9999]) == "" and TextStream(ours).push(9999) == ""


@pytest.mark.parametrize("make", [llama, fallback_metaspace, unigram])
def test_sentencepiece_bytes_and_leading_space(make: type[Inner]) -> None:
    ours = Tokenizer(make(), [2])
    tokens = [1, *ours.encode("a b日🙂")]
    stream = TextStream(ours)
    pieces = [stream.push(t) for t in tokens]
    assert "".join(pieces[-7:]) == "日🙂" and pieces[-7:] == ["", "", "日", "", "", "", "🙂"]
    assert "".join(pieces) == "a b日🙂"
    assert [ours.token_text(t) for t in tokens[:2]] == ["<s>", " a"]
    assert b"".join([ours.token_bytes(t) for t in tokens[-7:]]).decode() == "日🙂"
    assert streamed(ours, [3 + 0xFF, 3 + 0x61]) == ours.decode([3 + 0xFF, 3 + 0x61]) == "��"
    stream = TextStream(ours)  # what is valid does not wait for the end of a run, though a wrong byte may follow
    assert [stream.push(3 + b) for b in "é".encode()] == ["", "é"] and stream.push(3 + 0xFF) == "�"


@pytest.mark.parametrize("make", [llama, byte_level, wordpiece])
def test_special_tokens_that_are_shown(make: type[Inner]) -> None:
    inner = make()
    inner.add_special_tokens(["<|call▁é|>", "<|x|>"])
    ours = Tokenizer(inner, [])
    shown, hidden = ours.special_named("<|call▁é|>"), ours.special_named("<|x|>")
    assert shown is not None and hidden is not None and ours.special_named("h") is None
    text = inner.encode("h", add_special_tokens=False).ids
    stream = TextStream(ours, ("<|call▁é|>h",), frozenset([shown]))
    assert "".join([stream.push(token) for token in [hidden, *text, shown]]) == "h" and not stream.stopped
    assert stream.push(hidden) == "" and stream.finish() == "<|call▁é|>"
    assert TextStream(ours, ("▁",), frozenset([shown])).push(shown) == "<|call"
    assert TextStream(ours).push(shown) == ""


def test_a_character_that_a_shown_token_cuts() -> None:
    ours = Tokenizer(byte_level(), [])
    end, byte = ours.special_named("</s>"), ours.encode("é")
    assert end is not None
    stream = TextStream(ours, (), frozenset([end]))
    assert [stream.push(byte[0]), stream.push(end), stream.push(byte[1]), stream.finish()] == ["", "�</s>", "�", ""]


def test_a_panic_while_decoding_is_an_error() -> None:
    """A pattern that gives up: tokenizers raises what is no Exception."""
    state = json.loads(byte_level().to_str())
    replace = {"type": "Replace", "pattern": {"Regex": "(-+-+)+y"}, "content": "z"}
    state["decoder"] = {"type": "Sequence", "decoders": [state["decoder"], replace]}
    ours = Tokenizer(Inner.from_str(json.dumps(state)), [])
    dash = ours.encode("-")
    with pytest.raises(AmqError, match="tokenizers gave up on these tokens"):
        ours.decode(dash * 80)
    assert not ours.decoding.exact and ours.token_bytes(dash[0]) == b"-"
    assert streamed(ours, dash * 80) == "-" * 80  # never as many at once


@settings(max_examples=150, deadline=None)
@given(
    st.text("abé", max_size=30),
    st.lists(st.text("abé", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_stop_texts_are_cut_off_and_never_shown_in_part(text: str, stop: list[str]) -> None:
    ours = Tokenizer.from_transformers(byte_tokenizer(), [])
    first = min(((place + len(s), place) for s in stop if (place := text.find(s)) >= 0), default=(0, None))[1]
    stream, shown = TextStream(ours, stop), ""
    for token in ours.encode(text):
        shown += stream.push(token)
        assert text[:first].startswith(shown)
    assert stream.stopped == (first is not None)
    assert shown + stream.finish() == text[:first]
    assert stream.push(0) == "" if first is not None else True


def test_a_stop_text_waits_only_as_long_as_it_may_come() -> None:
    ours = Tokenizer.from_transformers(byte_tokenizer(), [])
    stream = TextStream(ours, ("</end>", "\n\n"))
    assert [stream.push(t) for t in ours.encode("a</enx\nb\n\nc")] == [
        *("a", "", "", "", "", "</enx", "", "\nb", "", "", "")
    ]  # fmt: skip
    assert stream.stopped and stream.finish() == ""
