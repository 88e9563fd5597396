"""Text ↔ tokens as transformers' fast tokenizers do it, without importing transformers, which takes seconds.

`TextStream` turns tokens into text one at a time. Where the tokenizer's decoder works on bytes (byte-level BPE, and
SentencePiece with byte fallback: nearly every language model), each token's bytes are known and an incremental UTF-8
decoder joins them: a token costs a dictionary lookup, however long the text is.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from amq.errors import AmqError
from amq.runtime.chat import render_chat
from amq.runtime.tokenizer_files import ModelFile, TokenizerConfig, read_optional, read_text

PANIC = "PanicException"
"""What a Rust library raises where it would abort: no Exception, and no module of Python has its class."""
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Tokenizer:
    """A `tokenizers.Tokenizer` with the model's end tokens and chat template. Made by `from_folder`.

    end_ids: tokens after which a text is complete.
    """

    def __init__(
        self, inner: Any, end_ids: Iterable[int], template: str | None = None, names: Mapping[str, str] | None = None
    ) -> None:
        inner.no_truncation()
        inner.no_padding()
        self._inner, self._template, self._names = inner, template, dict(names or {})
        self.end_ids = frozenset(end_ids)
        self.special_ids = frozenset(i for i, token in inner.get_added_tokens_decoder().items() if token.special)
        self.decoding = _Decoding.of(inner.decoder)
        self._bytes: dict[int, bytes] = {}

    @classmethod
    def from_folder(cls, folder: Path | str) -> Tokenizer:
        """Reads tokenizer.json, tokenizer_config.json, the chat template, and the end tokens.

        These come from generation_config.json, or else config.json. What is put around a text is tokenizer.json's
        post-processor alone, as in transformers: `add_bos_token` and `add_eos_token` count for nothing beside it.
        Raises AmqError naming the file that is missing or damaged.
        """
        import tokenizers

        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise AmqError(f"{path} does not exist: expected the tokenizer beside the model (save it there)")
        try:
            inner = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exceptions
            raise AmqError(f"{path} cannot be read ({error}): it is damaged, or of a newer tokenizers") from error
        config = read_optional(folder / "tokenizer_config.json", TokenizerConfig)
        names = config.names
        _add_tokens(inner, config, names)
        end_ids = _end_ids(folder)
        if not end_ids and names.get("eos_token"):  # it is known by now: `_add_tokens` added what was not
            end_ids = [_known_id(inner, names["eos_token"])]
        return cls(inner, end_ids, _template(folder, config), names)

    @classmethod
    def from_transformers(cls, tokenizer: Any, end_ids: Iterable[int]) -> Tokenizer:
        """A copy of a fast tokenizer of transformers; raises AmqError for one that is written in Python."""
        import tokenizers

        inner = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(inner, tokenizers.Tokenizer):
            raise AmqError(
                f"the tokenizer {type(tokenizer).__name__} is not a fast one: convert it, so that the model's folder "
                "has a tokenizer.json"
            )
        templates = tokenizer.chat_template
        template = templates.get("default") if isinstance(templates, Mapping) else templates
        return cls(tokenizers.Tokenizer.from_str(inner.to_str()), end_ids, template, tokenizer.special_tokens_map)

    @property
    def has_template(self) -> bool:
        return self._template is not None

    @property
    def vocab_size(self) -> int:
        """Added tokens included. A model may have more rows, which stand for nothing."""
        return self._inner.get_vocab_size()

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids, with the special tokens that the tokenizer puts around a text unless `special` is false."""
        return self._encode(text, special)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of a conversation [{"role": "user", "content": …}, …], up to where the model answers.

        Raises AmqError where the model has no chat template, or one that refuses the conversation.
        """
        if self._template is None:
            raise AmqError("the model has no chat template: give plain text (without --chat; /v1/completions)")
        return self._encode(render_chat(self._template, messages, self._names), False)  # it writes special tokens

    def _encode(self, text: str, special: bool) -> list[int]:
        try:
            return self._inner.encode(text, add_special_tokens=special).ids
        except TypeError as error:
            if isinstance(text, str):  # a lone surrogate: half a character in UTF-16, which JSON can spell
                raise AmqError("the text holds half a character (a lone surrogate): it is not valid Unicode") from error
            raise
        except BaseException as error:
            if type(error).__name__ != PANIC:
                raise
            raise AmqError(
                f"tokenizer.json: tokenizers gave up on this text ({error}): its patterns are damaged"
            ) from error

    def decode(self, tokens: Sequence[int]) -> str:
        """The text, without special tokens; bytes that are no UTF-8 become U+FFFD, unknown ids nothing."""
        return self._inner.decode(list(tokens), skip_special_tokens=True)

    def token_bytes(self, token: int) -> bytes:
        """What a token adds inside a text, special tokens by their name; b"" of an unknown id."""
        found = self._bytes.get(token)
        if found is None:
            text = self._inner.id_to_token(token)
            if text is None:
                found = b""
            elif self.decoding.exact:
                found = self.decoding.to_bytes(text)
            else:
                found = self._inner.decode([token], skip_special_tokens=False).encode()
            self._bytes[token] = found
        return found

    def token_text(self, token: int) -> str:
        """`token_bytes` as text, incomplete characters as U+FFFD."""
        return self.token_bytes(token).decode("utf-8", "replace")


class _Decoding:
    """What a decoder does with a token, if that is known; `exact` says so.

    strip: (character, how many of it are cut from the beginning of a text).
    """

    def __init__(
        self,
        exact: bool,
        byte_level: bool = False,
        replaced: Sequence[tuple[str, str]] = (),
        strip: tuple[str, int] = ("", 0),
    ) -> None:
        self.exact, self.replaced, self.strip = exact, replaced, strip
        self._alphabet = _byte_alphabet() if byte_level else None

    @classmethod
    def of(cls, decoder: Any) -> _Decoding:
        """From a decoder of tokenizers; one that this does not know in full is not exact."""
        if decoder is None:
            return cls(False)
        state = json.loads(decoder.__getstate__())
        steps = state["decoders"] if state["type"] == "Sequence" else [state]
        kinds = [step["type"] for step in steps]
        if [kind for kind in kinds if kind != "Fuse"] == ["ByteLevel"]:
            return cls(True, byte_level=True)
        known = kinds in (["Replace", "ByteFallback", "Fuse"], ["Replace", "ByteFallback", "Fuse", "Strip"])
        if not known or "String" not in steps[0]["pattern"] or steps[-1].get("stop"):
            return cls(False)
        strip = (steps[3]["content"], steps[3]["start"]) if len(steps) > 3 else ("", 0)
        return cls(True, False, [(steps[0]["pattern"]["String"], steps[0]["content"])], strip)

    def to_bytes(self, token: str) -> bytes:
        if self._alphabet is not None:
            if any(character not in self._alphabet for character in token):
                return token.encode()  # an added token is its own text
            return bytes(self._alphabet[character] for character in token)
        if match := BYTE_TOKEN.fullmatch(token):
            return bytes([int(match[1], 16)])
        for old, new in self.replaced:
            token = token.replace(old, new)
        return token.encode()


class TextStream:
    """Tokens → text, piece by piece: joined, the pieces are `Tokenizer.decode` of all tokens, up to the stop text.

    No piece ends in half a character, nor in what may become a stop text; bytes that can be no character's are U+FFFD.
    (One difference: after an invalid byte, tokenizers with byte fallback give up the valid characters before it too.
    Those have been handed out by then.)
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip, self._left = tokenizer.decoding.strip
        self._last: int | None = None
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that is complete with this token; "" once a stop text has come."""
        if self.stopped or token in self._tokenizer.special_ids:
            return ""
        if self._tokenizer.decoding.exact:
            new = self._utf8.decode(self._tokenizer.token_bytes(token))
        else:
            new = self._after_last(token)
        return self._release(self._stripped(new)) if new else ""

    def finish(self) -> str:
        """What was held back: no more tokens come. "" after a stop text."""
        if self.stopped:
            return ""
        text = self._release(self._stripped(self._utf8.decode(b"", final=True)))
        if not self.stopped:
            text += self._held
            self._held = ""
        return text

    def _after_last(self, token: int) -> str:
        """For decoders that look at a token's neighbour at most."""
        before = [] if self._last is None else [self._last]
        self._last = token
        return self._tokenizer.decode([*before, token])[len(self._tokenizer.decode(before)) :]

    def _stripped(self, text: str) -> str:
        while self._left and text:
            if not text.startswith(self._strip):
                self._left = 0
                break
            text, self._left = text[len(self._strip) :], self._left - 1
        return text

    def _release(self, new: str) -> str:
        """Of what was held and the new text, the part that belongs to no stop text; notices the first stop text."""
        if not self._stop:
            return new
        text = self._held + new
        found = [(place + len(stop), place) for stop in self._stop if (place := text.find(stop)) >= 0]
        if found:  # the one that is complete first
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        keep = max(_overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """The longest end of `text` with which `stop` begins."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE writes each byte as a printable character: Latin-1's own, and from U+0100 on for the others."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in set(printable)]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


def _known_id(inner: Any, token: str) -> int:
    number = inner.token_to_id(token)
    if number is None:
        raise AmqError(f"the tokenizer does not know its own end token {token!r}: tokenizer.json is damaged")
    return int(number)


def _add_tokens(inner: Any, config: TokenizerConfig, names: Mapping[str, str]) -> None:
    """Those that tokenizer_config.json has and tokenizer.json lacks, or does not know as special."""
    from tokenizers import AddedToken

    for token in config.added_tokens:
        if inner.token_to_id(token.content) is None:
            inner.add_tokens([AddedToken(**token.arguments)])
    special = {token.content for token in inner.get_added_tokens_decoder().values() if token.special}
    wanted = [*names.values(), *config.extra_names]
    missing = [text for text in dict.fromkeys(wanted) if text not in special]
    inner.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in missing])


def _end_ids(folder: Path) -> list[int]:
    """As transformers' generate takes them."""
    config = read_optional(folder / "config.json", ModelFile)
    for source in (read_optional(folder / "generation_config.json", ModelFile), config, config.text_config):
        if source is not None and source.eos_token_id is not None:
            return source.end_ids
    return []


def _template(folder: Path, config: TokenizerConfig) -> str | None:
    """chat_template.jinja goes before the config's own, of several there the default."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return read_text(path)
    return config.default_template
