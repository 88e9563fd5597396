"""amq.runtime.tokenizer against transformers' tokenizers: ids, chats, limits, errors."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from helpers.small_tokenizers import KINDS, NAMES, byte_level, llama, metaspace
from helpers.tiny_models import TEMPLATES, byte_tokenizer, family_tokenizer, tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from tokenizers import Tokenizer as Inner

from amq.errors import AmqError
from amq.runtime.tokenizer import Tokenizer, TooLong
from amq.util.files import cache_dir

TEXTS = ("", "hello", "  two  spaces ", "naïve 日本語 🙂 \x00\n\t", "<|im_start|>user\nhi<|im_end|>", "a" * 300)
CHAT = [
    {"role": "system", "content": "Be <brief> & kind."},
    {"role": "user", "content": "Was heißt 🙂?", "name": None},
    {"role": "assistant", "content": "x"},
    {"role": "user", "content": ""},
]
TEMPLATE = """{%- for m in messages %}
    {%- if m.role == 'system' %}{% continue %}{% endif %}
    {%- if m.content == 'stop' %}{{ raise_exception('no stop, ' ~ bos_token) }}{% endif %}
{{ bos_token }}[{{ m.role }}] {% generation %}{{ m | tojson }}{% endgeneration %} {{ strftime_now('%Y') | length }}
{% endfor %}
{% if add_generation_prompt %}>{% endif %}"""


def bpe_with_specials() -> Any:
    """The byte tokenizer with an end token, a template, and added tokens that no byte alphabet can write."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    tokenizer.add_tokens([AddedToken("日本", normalized=False), AddedToken("x y", normalized=False)])
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def as_transformers(inner: Inner, **names: str) -> Any:
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **names)


MADE = {
    "bytes": byte_tokenizer,
    "added": bpe_with_specials,
    "sentencepiece": lambda: as_transformers(llama(), add_bos_token=True, **NAMES),
    "metaspace": lambda: as_transformers(metaspace(), unk_token="<unk>"),
}


@pytest.fixture(scope="module", params=[*MADE, "smollm2"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Tokenizer]:
    """(transformers' tokenizer, ours) from one folder."""
    if request.param == "smollm2":
        folders = sorted((cache_dir() / "models").glob("SmolLM2*"))
        if not folders:
            pytest.skip("SmolLM2 is not in the cache: python -m amq.eval smollm2 puts it there")
        folder, kind = folders[0], transformers.PreTrainedTokenizerFast
    else:
        folder, made = tmp_path_factory.mktemp("tokenizer"), MADE[request.param]()
        made.save_pretrained(folder)
        kind = type(made)
    return kind.from_pretrained(folder), Tokenizer.from_folder(folder)


def test_encodes_and_decodes_as_transformers_does(pair: tuple[Any, Tokenizer]) -> None:
    theirs, ours = pair
    copied = Tokenizer.from_transformers(theirs, [])
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        assert ours.encode(text) == copied.encode(text) == ids
        assert ours.decode(ids) == copied.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        long = ids * (2000 // max(len(ids), 1))  # in another way
        assert ours.decode(long) == theirs.decode(long, skip_special_tokens=True)
    assert ours.template == copied.template == theirs.chat_template
    if theirs.chat_template:
        text = theirs.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode_chat(CHAT).tokens == copied.encode_chat(CHAT).tokens == ids
        assert ours.encode_chat(CHAT).text == text


def test_what_a_template_refuses(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_transformers(bpe_with_specials(), [])
    with pytest.raises(AmqError, match="no stop, <s>"):
        tokenizer.encode_chat([{"role": "user", "content": "stop"}])
    for template in ("{% for", "{{ messages[0].content + 1 }}", "{{ ''.__class__.__mro__[1].__subclasses__() }}"):
        broken = bpe_with_specials()
        broken.chat_template = template
        with pytest.raises(AmqError, match="chat template"):
            Tokenizer.from_transformers(broken, []).encode_chat(CHAT)
    with pytest.raises(AmqError, match="has no chat template"):
        Tokenizer.from_transformers(byte_tokenizer(), []).encode_chat(CHAT)


def test_text_that_is_not_unicode() -> None:
    with pytest.raises(AmqError, match="lone surrogate"):
        Tokenizer.from_transformers(byte_tokenizer(), []).encode("a\ud800")


def test_end_tokens_and_ends_of_a_text(tmp_path: Path) -> None:
    bpe_with_specials().save_pretrained(tmp_path)
    end = Tokenizer.from_folder(tmp_path).encode("</s>")[0]
    assert Tokenizer.from_folder(tmp_path).end_ids == {end}  # by its name
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"eos_token_id": 7}}))
    assert Tokenizer.from_folder(tmp_path).end_ids == {7, end}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 4]}))
    assert Tokenizer.from_folder(tmp_path).end_ids == {3, 4, end}
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "chat_template.jinja").unlink()
    assert Tokenizer.from_folder(tmp_path).template is None
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "{{ bos_token }}!"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": named}))
    assert len(Tokenizer.from_folder(tmp_path).encode_chat(CHAT).tokens) == 2


@pytest.mark.parametrize("given", [None, 3, [3, 4]])
def test_end_tokens_of_a_model_in_transformers(given: int | list[int] | None, tmp_path: Path) -> None:
    """Of generation_config.json and of the tokenizer, as for a folder that the native engine runs."""
    from amq.runtime import load

    model = tiny_llama(vocab_size=259)
    model.generation_config.eos_token_id = given
    model.save_pretrained(tmp_path)
    byte_tokenizer(TEMPLATES["llama"]).save_pretrained(tmp_path)
    listed = given if isinstance(given, list) else [] if given is None else [given]
    expected = {*listed, Tokenizer.from_folder(tmp_path).encode("<eos>", special=False)[0]}
    assert load(tmp_path).tokenizer.end_ids == expected == Tokenizer.from_folder(tmp_path).end_ids


@pytest.mark.parametrize("kind", TEMPLATES)
def test_what_is_put_around_a_text(kind: str, tmp_path: Path) -> None:
    """As transformers does it, whatever the flags say: files that were converted from GGUF contradict themselves."""
    expected = family_tokenizer(kind, tmp_path)("abc")["input_ids"]
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text())
    for begin, end in itertools.product((None, False, True), repeat=2):
        flags = {"add_bos_token": begin, "add_eos_token": end}
        path.write_text(json.dumps(config | {name: value for name, value in flags.items() if value is not None}))
        assert transformers.AutoTokenizer.from_pretrained(tmp_path)("abc")["input_ids"] == expected, flags
        assert Tokenizer.from_folder(tmp_path).encode("abc") == expected, flags
    bare = Tokenizer.from_folder(tmp_path).encode("abc", special=False)
    assert len(bare) == 3 and " ".join(map(str, bare)) in " ".join(map(str, expected))


def test_limits_in_the_file_cut_nothing(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert len(Tokenizer.from_folder(tmp_path).encode("0123456789")) == 10


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(AmqError, match=r"tokenizer\.json does not exist"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(AmqError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.from_folder(tmp_path)
    with pytest.raises(AmqError, match="is not a fast one"):
        Tokenizer.from_transformers(object(), [])


CONFIG, GENERATION = "tokenizer_config.json", "generation_config.json"
DAMAGE = {
    "no object": (CONFIG, [], "expected `object`, got `array`"),
    "deep": (CONFIG, "[" * 100_000, "nested too deeply"),
    "cut": (CONFIG, '{"bos_', "is not valid JSON"),
    "key of an added token": (CONFIG, {"added_tokens_decoder": {"x": {"content": "a"}}}, "token ids as keys .*'x'"),
    "huge key": (CONFIG, {"added_tokens_decoder": {"9" * 5000: {"content": "a"}}}, "token ids as keys"),
    "added token without text": (CONFIG, {"added_tokens_decoder": {"1": {}}}, "missing required field `content`"),
    "flag of an added token": (
        CONFIG,
        {"added_tokens_decoder": {"1": {"content": "a", "special": "no"}}},
        "special: expected `bool | null`",
    ),
    "list of added tokens": (CONFIG, {"added_tokens_decoder": [1]}, r"added_tokens_decoder: expected `object"),
    "number as a token": (CONFIG, {"bos_token": 5}, r"bos_token: expected `str"),
    "empty token": (CONFIG, {"eos_token": {}}, r"eos_token: .*missing required field `content`"),
    "flag": (CONFIG, {"add_bos_token": "yes"}, "add_bos_token: expected `bool"),
    "number as a template": (CONFIG, {"chat_template": 5}, "chat_template: expected `str"),
    "numbers as templates": (CONFIG, {"chat_template": [5]}, r"chat_template\[0\]: expected `object`"),
    "templates without text": (CONFIG, {"chat_template": [{"name": "default"}]}, "required field `template`"),
    "number as more tokens": (CONFIG, {"extra_special_tokens": 5}, "extra_special_tokens: expected"),
    "numbers as more tokens": (CONFIG, {"additional_special_tokens": [5]}, r"additional_special_tokens\[0\]"),
    "end as text": (GENERATION, {"eos_token_id": "x"}, "eos_token_id: expected `int"),
    "half an end": (GENERATION, {"eos_token_id": 1.5}, "eos_token_id: expected `int"),
    "end as a flag": (GENERATION, {"eos_token_id": True}, "eos_token_id: expected `int"),
    "no end in a list": (GENERATION, {"eos_token_id": [None]}, r"eos_token_id\[0\]: expected `int`"),
    "negative end": (GENERATION, {"eos_token_id": -1}, "eos_token_id from 0"),
    "list": (GENERATION, [], "expected `object`, got `array`"),
    "end in config.json": ("config.json", {"text_config": {"eos_token_id": "x"}}, "text_config.eos_token_id: expected"),
    "text_config": ("config.json", {"text_config": 3}, "text_config: expected `object"),
    "template that is no text": ("chat_template.jinja", b"\xff", "cannot be read as text"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_wrong_files_beside_a_tokenizer_are_named(tmp_path: Path, case: str) -> None:
    name, content, message = DAMAGE[case]
    byte_tokenizer().save_pretrained(tmp_path)
    data = content if isinstance(content, (str, bytes)) else json.dumps(content)
    (tmp_path / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    with pytest.raises(AmqError, match=message) as raised:
        Tokenizer.from_folder(tmp_path)
    assert str(tmp_path / name) in str(raised.value)


def test_forms_of_tokens_and_templates_that_files_have(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    full = {"__type": "AddedToken", "content": "<s>", "lstrip": False, "normalized": False, "special": True}
    config = {
        "bos_token": full,
        "eos_token": "</s>",
        "pad_token": None,
        "added_tokens_decoder": {"300": {"content": "<b>"}, "20": {"content": "<a>", "special": True}},
        "extra_special_tokens": {"image": "<img>", "audio": {"content": "<aud>"}},
        "chat_template": {"default": "{{ bos_token }}{{ messages[0].content }}", "tool": "x"},
        "model_max_length": 1e30,
    }
    (tmp_path / CONFIG).write_text(json.dumps(config))
    (tmp_path / "config.json").write_text('{"time_step_limit": [0.0, Infinity]}')
    tokenizer = Tokenizer.from_folder(tmp_path)
    first, second, *_ = tokenizer.encode("<a><b>")
    assert second == first + 1  # in the order of their ids
    assert len(tokenizer.encode("<img><aud></s>")) == 3
    assert tokenizer.decode(tokenizer.encode_chat([{"role": "user", "content": "hi"}]).tokens) == "hi"
    assert tokenizer.end_ids == {tokenizer.encode("</s>")[0]}


def test_a_pattern_that_gives_up_is_named(tmp_path: Path) -> None:
    """tokenizers panics there: an exception that is no Exception."""
    byte_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    state = json.loads(path.read_text())
    pattern = {"Regex": "(a|aa|a+)+$|(x+x+)+y"}
    state["pre_tokenizer"] = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    path.write_text(json.dumps(state))
    with pytest.raises(AmqError, match=r"tokenizer\.json: tokenizers gave up on this text"):
        Tokenizer.from_folder(tmp_path).encode("x" * 40 + "b" + "a" * 40 + "!")


def test_special_tokens_by_their_text_and_the_file_itself(tmp_path: Path) -> None:
    bpe_with_specials().save_pretrained(tmp_path)
    ours = Tokenizer.from_folder(tmp_path)
    assert ours.special_named("</s>") == ours.encode("</s>")[0] and ours.special_named("日本") is None
    again = Tokenizer(Inner.from_str(ours.json()), [])
    assert again.encode("<s>日本 x y</s>é") == ours.encode("<s>日本 x y</s>é") and again.special_ids == ours.special_ids


def unlimited(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, special=False)


@pytest.mark.parametrize("kind", KINDS)
def test_a_limit_refuses_what_is_longer_and_nothing_else(kind: str) -> None:
    ours = Tokenizer(KINDS[kind](), [])
    words = st.sampled_from(["a", "hello", "aaaaaaaa", " ", "   ", "\n", "日本", "é", "hi ", "</s>", "<think>", "."])

    @settings(max_examples=60, deadline=None)
    @given(st.lists(words, max_size=40), st.integers(1, 60), st.integers(1, 50))
    def around(parts: list[str], limit: int, times: int) -> None:
        text = "".join(parts) * times
        tokens = unlimited(ours, text)
        for most in {limit, len(tokens)}:
            if len(tokens) <= most:
                assert ours.encode(text, special=False, limit=most) == tokens
            else:
                with pytest.raises(TooLong, match=f"of which {most} are allowed"):
                    ours.encode(text, special=False, limit=most)

    around()


@pytest.mark.parametrize("text", ["a" * 1000, " " * 1000, "a " * 500, "hi" * 500])
def test_a_text_that_fits_is_not_refused_for_its_length(text: str) -> None:
    """Tokens of many characters; texts without a space; the limit exactly, and one below."""
    ours = Tokenizer(byte_level(), [])
    tokens = unlimited(ours, text)
    assert ours.encode(text, limit=len(tokens)) == tokens
    with pytest.raises(TooLong, match=f"the prompt has {len(tokens)} tokens, of which {len(tokens) - 1} are allowed"):
        ours.encode(text, limit=len(tokens) - 1)


def test_a_text_that_is_far_too_long_is_read_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = Tokenizer.from_transformers(byte_tokenizer(), [])
    read: list[int] = []
    encode = ours._encode_batch
    monkeypatch.setattr(
        ours, "_encode_batch", lambda texts, special: (read.extend(map(len, texts)), encode(texts, special))[1]
    )
    with pytest.raises(TooLong, match="more than 100 tokens"):
        ours.encode("word " * 100_000, limit=100)
    with pytest.raises(TooLong, match="more than 100 tokens"):
        ours.encode("w" * 100_000, limit=100)
    assert sum(read) < 2000
