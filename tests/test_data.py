"""Texts and token windows: disjoint, seeded, and clear about what cannot be used."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny_models import TEMPLATES, VOCABULARY, byte_tokenizer, family_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from amq.errors import AmqError
from amq.model.text import BUILTIN, Corpus, WindowSampler, fixed_windows, load_corpus, load_text, tokenize

ROWS = VOCABULARY + 3
PREFIXES = {"llama": ["<bos>"], "gemma": ["<bos>"], "glm": ["<start>", "<bos>"], "eos": [], "qwen": []}
"""What each of `TEMPLATES` puts before a text."""


def counted(tokens: int, prefix: tuple[int, ...] = ()) -> Corpus:
    """Tokens 0, 1, 2, …: a token is its position."""
    return Corpus(torch.arange(tokens), "counted", "", prefix, tuple(f"<{-p}>" for p in prefix))


@settings(max_examples=30, deadline=None)
@given(
    slots=st.integers(1, 30), length=st.integers(1, 9), rest=st.integers(0, 8), seed=st.integers(0, 9), data=st.data()
)
def test_takes_are_disjoint_windows(slots: int, length: int, rest: int, seed: int, data: st.DataObject) -> None:
    sampler = WindowSampler(counted(slots * length + min(rest, length - 1)), length, seed)
    taken: list[torch.Tensor] = []
    while sum(map(len, taken)) < slots:
        taken.append(sampler.take(data.draw(st.integers(1, slots - sum(map(len, taken))))))
    windows = torch.cat(taken)
    assert windows.shape == (slots, length) and windows.dtype == torch.int64
    assert torch.equal(windows.flatten().sort().values, torch.arange(slots * length))  # each slot exactly once
    assert torch.equal(windows - windows[:, :1], torch.arange(length).expand(slots, -1))  # each a run of the text
    assert not bool((windows[:, 0] % length).any())


def test_seed_decides_the_order() -> None:
    def deal(seed: int, parts: tuple[int, ...]) -> list[int]:
        sampler = WindowSampler(counted(100), 5, seed)
        return [int(w[0]) for n in parts for w in sampler.take(n)]

    assert deal(1, (3, 4)) == deal(1, (7,)) == deal(1, (3, 4, 5))[:7]
    assert deal(1, (20,)) != deal(2, (20,)) != list(range(0, 100, 5))


def test_used_up_text_starts_again_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    sampler = WindowSampler(counted(23), 5, 0)
    with caplog.at_level(logging.WARNING, "amq.model.text"):
        first = sampler.take(4)
        assert not caplog.records
        second = sampler.take(3)
    assert torch.equal(second, first[:3])
    assert [r.getMessage() for r in caplog.records] == [
        "the text 'counted' has only 4 windows of 5 tokens: some windows are used for more than one purpose"
    ]


def test_too_short_a_text() -> None:
    with pytest.raises(
        AmqError, match="the text 'counted' has 9 tokens, less than one window of 10: give a longer text"
    ):
        WindowSampler(counted(9), 10, 0)
    with pytest.raises(AmqError, match=r"has 9 tokens \(at most 50 used\), less than one window of 10"):
        fixed_windows(counted(9), 10, 50)
    with pytest.raises(AmqError, match=r"has 90 tokens \(at most 5 used\), less than one window of 10"):
        fixed_windows(counted(90), 10, 5)


@pytest.mark.parametrize("length", [0, -3])
def test_window_length_must_be_positive(length: int) -> None:
    with pytest.raises(AmqError, match=f"a window length of {length} is too small: expected at least 1"):
        WindowSampler(counted(9), length, 0)
    with pytest.raises(AmqError, match=f"a window length of {length} is too small: expected at least 2"):
        fixed_windows(counted(9), length, 5)
    with pytest.raises(AmqError, match="a window length of 1 is too small: expected at least 2"):
        fixed_windows(counted(9), 1, 5)  # no token would be predicted


def test_taking_nothing() -> None:
    assert WindowSampler(counted(9), 3, 0).take(0).shape == (0, 3)


@pytest.mark.parametrize(
    ("tokens", "limit", "windows"), [(20, 20, 4), (20, 19, 3), (23, 100, 4), (100, 15, 3), (5, 5, 1)]
)
def test_fixed_windows_are_the_beginning(tokens: int, limit: int, windows: int) -> None:
    found = fixed_windows(counted(tokens), 5, limit)
    assert torch.equal(found, torch.arange(5 * windows).view(windows, 5))


@pytest.mark.parametrize("name", BUILTIN)
def test_builtin_texts(name: str) -> None:
    corpus = load_corpus(name, byte_tokenizer(), VOCABULARY)
    assert corpus.name == name
    text = load_text(name)
    assert corpus.tokens.dtype == torch.int64 and len(corpus.tokens) == len(text.encode()) > 300_000
    assert corpus.sha256 == hashlib.sha256(text.encode()).hexdigest()
    assert load_text(name) == text


def test_builtin_texts_share_nothing() -> None:
    """One calibrates, the other evaluates: no passage of 100 characters of one is in the other."""
    texts = [" ".join(load_text(n).split()) for n in BUILTIN]
    pieces = [{t[i : i + 100] for i in range(0, len(t) - 100, step)} for t, step in zip(texts, (1, 100), strict=True)]
    assert len(pieces[0] & pieces[1]) <= 0.001 * len(pieces[1])


def test_file(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("héllo\nworld\n", encoding="utf-8")
    corpus = load_corpus(str(path), byte_tokenizer(), VOCABULARY)
    assert byte_tokenizer().decode(corpus.tokens) == "héllo\nworld\n" and corpus.name == str(path)
    path.write_text("héllo\nworlds\n", encoding="utf-8")
    assert load_corpus(str(path), byte_tokenizer(), VOCABULARY).sha256 != corpus.sha256


def test_unusable_files(tmp_path: Path) -> None:
    missing = tmp_path / "missing.txt"
    with pytest.raises(
        AmqError, match="no text '.*missing.txt': expected the path of a text file, or one of pydoc, .*wikitext2, c4"
    ):
        load_text(str(missing))
    with pytest.raises(AmqError, match="no text '.*': expected the path of a text file"):
        load_text(str(tmp_path))
    latin = tmp_path / "latin.txt"
    latin.write_bytes("naïve café".encode("latin-1"))
    with pytest.raises(AmqError, match="latin.txt is not UTF-8 text: .*position 2"):
        load_text(str(latin))
    empty = tmp_path / "empty.txt"
    empty.touch()
    with pytest.raises(AmqError, match="empty.txt' has 0 tokens, less than one window of 8"):
        WindowSampler(load_corpus(str(empty), byte_tokenizer(), VOCABULARY), 8, 0)


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As root every file is readable, so the refusal is made up."""
    path = tmp_path / "secret.txt"
    path.touch()

    def refuse(self: Path, **kwargs: Any) -> str:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(AmqError, match="secret.txt cannot be read: .*Permission denied"):
        load_text(str(path))


def test_dataset_without_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="wikitext2 and c4 need the datasets package")
    from huggingface_hub import constants

    for module in (datasets.config, constants):  # what HF_HUB_OFFLINE=1 sets when they are imported
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(
        AmqError, match=r"dataset wikitext2 \(Salesforce/wikitext\) could not be read: .*give the path of a text file"
    ):
        load_text("wikitext2")


def test_dataset_without_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(AmqError, match="text 'c4' needs the extra \"datasets\""):
        load_text("c4")


@pytest.mark.parametrize("kind", TEMPLATES)
def test_windows_begin_as_the_tokenizer_begins_a_text(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("".join(chr(97 + i % 26) for i in range(203)))
    tokenizer = family_tokenizer(kind, tmp_path)  # gemma's says add_bos_token: false
    corpus = load_corpus(str(path), tokenizer, ROWS)
    assert list(corpus.prefix_names) == PREFIXES[kind] and corpus.unscored == len(PREFIXES[kind])
    prefix = tokenizer.convert_tokens_to_ids(PREFIXES[kind])
    assert tokenizer("")["input_ids"][: len(prefix)] == prefix  # the test's own table is true
    length, slot = 20, 20 - len(prefix)
    windows = WindowSampler(corpus, length, 0).take(203 // slot)
    assert windows.shape == (203 // slot, length) and windows.dtype == torch.int64
    assert windows[:, : len(prefix)].tolist() == [prefix] * len(windows)
    text = tokenizer(path.read_text(), add_special_tokens=False)["input_ids"]
    slots = [text[i : i + slot] for i in range(0, 203 - slot + 1, slot)]
    assert sorted(windows[:, len(prefix) :].tolist()) == sorted(slots)  # each token of text in one window
    assert fixed_windows(corpus, length, 100).tolist() == [[*prefix, *s] for s in slots[: 100 // slot]]


@pytest.mark.parametrize("template", ["", TEMPLATES["qwen"], TEMPLATES["eos"]])
def test_a_tokenizer_that_adds_nothing_gives_the_windows_it_gave(template: str, tmp_path: Path) -> None:
    """Qwen and SmolLM2 (figures in README.md): text from end to end, whatever special tokens the vocabulary has.

    The expected windows are those of the rule before windows had a prefix.
    """
    path = tmp_path / "text.txt"
    path.write_bytes(bytes(range(97, 123)) * 40)
    corpus = load_corpus(str(path), byte_tokenizer(template), ROWS)
    assert corpus.prefix == corpus.prefix_names == () and corpus.unscored == 0
    slots = torch.tensor(byte_tokenizer()(path.read_text())["input_ids"])[: 1040 // 64 * 64].view(-1, 64)
    order = np.random.default_rng(3).permutation(len(slots))
    assert WindowSampler(corpus, 64, 3).take(9).equal(slots[torch.from_numpy(order[:9])])
    assert fixed_windows(corpus, 64, 640).equal(slots[:10])


def test_the_prefix_counts_to_a_window_s_length() -> None:
    bos = (-7,)
    assert fixed_windows(counted(9, bos), 4, 9).tolist() == [[-7, 0, 1, 2], [-7, 3, 4, 5], [-7, 6, 7, 8]]
    with pytest.raises(AmqError, match="has 9 tokens, less than one window of 10 behind <7>: give a longer text"):
        WindowSampler(counted(9, bos), 11, 0)
    with pytest.raises(AmqError, match=r"length of 1 is too small: expected at least 2 .*begins with <7>"):
        WindowSampler(counted(9, bos), 1, 0)
    with pytest.raises(AmqError, match=r"length of 2 is too small: expected at least 3 .*begins with <7>"):
        fixed_windows(counted(9, bos), 2, 9)


def test_text_with_a_token_that_the_model_has_no_row_for(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("before <tool> after")
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<tool>"])
    assert len(load_corpus(str(path), tokenizer, VOCABULARY + 1).tokens) == len("before ") + 1 + len(" after")
    with pytest.raises(AmqError, match="text.txt' holds the token '<tool>' with id 256, but .* has 256 rows: take it"):
        load_corpus(str(path), tokenizer, VOCABULARY)
    with pytest.raises(AmqError, match="begins every text with the token '<bos>' with id 256, but .* 256 rows: use"):
        load_corpus("pydoc", byte_tokenizer(TEMPLATES["llama"]), VOCABULARY)


def encoder(ids: dict[str, list[Any]], special: dict[str, list[Any]]) -> Any:
    """A tokenizer of two tables: anything else is one token 5 per character."""

    def encode(text: str, with_special: bool) -> list[Any]:
        return (special if with_special else ids).get(text, [5] * len(text))

    return encode


def test_ids_that_cannot_be() -> None:
    for wrong in (-1, 10, 2**40):
        with pytest.raises(AmqError, match=f"the text 'x' holds the token 't' with id {wrong}, but .* has 10 rows"):
            tokenize("abc", "x", encoder({"abc": [1, wrong]}, {}), lambda i: "t", 10)
    with pytest.raises(AmqError, match="the text 'x' holds something that the tokenizer has neither a token"):
        tokenize("abc", "x", encoder({"abc": [1, None]}, {}), lambda i: "t", 10)


def test_where_the_prefix_is_looked_for() -> None:
    """A tokenizer without a token for the usual probe is asked with the text itself; one that rewrites is refused."""
    from amq.model.text import PROBE

    odd = encoder({PROBE: []}, {PROBE: [1], "abc": [1, 5, 5, 5, 2]})
    assert tokenize("abc", "x", odd, str, 10).prefix == (1,)
    nothing = encoder({PROBE: [], "": []}, {PROBE: [1], "": [1]})
    assert tokenize("", "x", nothing, str, 10).prefix == ()
    with pytest.raises(AmqError, match="the tokenizer splits 'The quick brown fox' into .*not clear what a window"):
        tokenize("abc", "x", encoder({}, {PROBE: [1, 6, 6]}), str, 10)
