"""Text ↔ tokens as transformers' fast tokenizers do it, without importing transformers, which takes seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amq.errors import AmqError
from amq.runtime.chat import PLAIN, ChatOptions, Messages, prepared, render_chat
from amq.runtime.decoding import Decoding
from amq.runtime.special_text import SpecialText
from amq.runtime.text_stream import TextStream
from amq.runtime.tokenizer_files import DEFAULT, TOOL_USE, ModelFile, TokenizerConfig, read_optional, read_text

__all__ = ["ChatPrompt", "TextStream", "Tokenizer", "TooLong"]

GUARD = "\n"
"""Encoded in front of a part of a text, so that it is not taken for the text's beginning, and left out again."""
PANIC = "PanicException"
"""What a Rust library raises where it would abort: no Exception, and no module of Python has its class."""
LONG = 1000
"""Tokens that are worth the handing over to another thread."""
LONG_TOKEN = 6
"""Characters of a token that few texts reach on average: English has 4 to 5, code and other languages fewer."""

Render = Callable[[str, Messages, Mapping[str, Any], ChatOptions], str]
"""`render_chat`, or what does it elsewhere."""


class TooLong(AmqError):
    """A text has more tokens than were asked for."""

    def __init__(self, limit: int, found: int | None = None) -> None:
        count = f"more than {limit}" if found is None else f"{found}"
        super().__init__(f"the prompt has {count} tokens, of which {limit} are allowed: give a shorter one")


@dataclass(frozen=True)
class ChatPrompt:
    """A conversation as a model reads it: its tokens, and the text that they are of."""

    tokens: list[int]
    text: str


class Tokenizer:
    """A `tokenizers.Tokenizer` with the model's end tokens and chat template. Made by `from_folder`.

    template: of chats, or None. tool_template: of chats with tools, where that is another one. end_ids: tokens after
    which a text is complete. special_ids: tokens that are not part of a text, such as its end.
    Encoding and decoding raise AmqError where tokenizers panics, as it does where a pattern of tokenizer.json gives up.
    """

    def __init__(
        self,
        inner: Any,
        end_ids: Iterable[int],
        template: str | None = None,
        names: Mapping[str, str] | None = None,
        tool_template: str | None = None,
    ) -> None:
        inner.no_truncation()
        inner.no_padding()
        self._inner, self._names = inner, dict(names or {})
        self.template, self.tool_template = template, tool_template
        self.end_ids = frozenset(end_ids)
        added = inner.get_added_tokens_decoder()
        self._special = {token.content: i for i, token in added.items() if token.special}
        self._added = {token.content: i for i, token in added.items()}
        self.special_ids = frozenset(self._special.values())
        self.decoding = Decoding.of(inner.decoder)
        self._bytes: dict[int, bytes] = {}
        templates = f"{template or ''}\0{tool_template or ''}"
        self._separator = SpecialText(self._special, [token.content for token in added.values()], templates)

    @classmethod
    def from_folder(cls, folder: Path | str) -> Tokenizer:
        """Reads tokenizer.json, tokenizer_config.json, the chat template, and the end tokens.

        These are generation_config.json's, or else config.json's, and the tokenizer's own, which often differ: one
        ends a base model's texts, the other a chat's turns. What is put around a text is tokenizer.json's
        post-processor alone, as in transformers: `add_bos_token` and `add_eos_token` count for nothing beside it.
        Raises AmqError naming the file that is missing or damaged.
        """
        import tokenizers

        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise AmqError(f"{path} does not exist: expected the tokenizer beside the model (save it there)")
        try:
            with _no_panic("it"):
                inner = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exceptions
            raise AmqError(f"{path} cannot be read ({error}): it is damaged, or of a newer tokenizers") from error
        config = read_optional(folder / "tokenizer_config.json", TokenizerConfig)
        names = config.names
        _add_tokens(inner, config, names)
        end_ids = _end_ids(folder)
        if names.get("eos_token"):  # it is known by now: `_add_tokens` added what was not
            end_ids = [*end_ids, _known_id(inner, names["eos_token"])]
        templates = [_template(folder, config, name) for name in (DEFAULT, TOOL_USE)]
        return cls(inner, end_ids, templates[0], names, templates[1])

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
        if not isinstance(templates, Mapping):
            templates = {DEFAULT: templates}
        copy, names = tokenizers.Tokenizer.from_str(inner.to_str()), tokenizer.special_tokens_map
        return cls(copy, end_ids, templates.get(DEFAULT), names, templates.get(TOOL_USE))

    @property
    def vocab_size(self) -> int:
        """Added tokens included. A model may have more rows, which stand for nothing."""
        return int(self._inner.get_vocab_size())

    def json(self) -> str:
        """As tokenizer.json."""
        return str(self._inner.to_str())

    def special_named(self, text: str) -> int | None:
        """The special token whose text is exactly this."""
        return self._special.get(text)

    def added_named(self, text: str) -> int | None:
        """The token that is no part of the model's vocabulary proper and whose text is exactly this; special or not."""
        return self._added.get(text)

    def encode(self, text: str, special: bool = True, limit: int | None = None) -> list[int]:
        """Token ids, with the special tokens that the tokenizer puts around a text unless `special` is false.

        Raises TooLong where there are more than `limit`; long before the end of a text that is much longer.
        """
        return self._encode([text], special, limit)

    def encode_chat(
        self, messages: Messages, options: ChatOptions = PLAIN, limit: int | None = None, render: Render = render_chat
    ) -> ChatPrompt:
        """A conversation, up to where the model answers.

        messages: [{"role": "user", "content": …}, …] as OpenAI's clients send them; see `prepared`.
        limit: as in `encode`; more messages than that are not even looked at.
        Raises AmqError where the model has no chat template, or one that refuses the conversation.
        """
        template = (self.tool_template if options.tools else None) or self.template
        if template is None:
            raise AmqError("the model has no chat template: give plain text (without --chat; /v1/completions)")
        if limit is not None and len(messages) > limit:
            raise TooLong(limit)
        conversation: Messages = prepared(template, messages)
        mark = ""
        if not options.special:
            conversation, options, mark = self._separator.marked(conversation, options)
        parts = self._separator.parts(render(template, conversation, self._names, options), mark)
        return ChatPrompt(self._encode(parts, False, limit), "".join(parts))  # the template writes special tokens

    def _encode(self, parts: Sequence[str], special: bool, limit: int | None) -> list[int]:
        """Of a text whose parts share no token."""
        if limit is not None:
            self._refuse_long("".join(parts), limit)
        first, *rest = self._encode_batch([parts[0], *(GUARD + part for part in parts[1:])], special)
        if rest:
            guard = self._encode_batch([GUARD], special)[0]
            for part, tokens in zip(parts[1:], rest, strict=True):
                guarded = tokens[: len(guard)] == guard
                first += tokens[len(guard) :] if guarded else self._encode_batch([part], special)[0]
        if limit is not None and len(first) > limit:
            raise TooLong(limit, len(first))
        return first

    def _refuse_long(self, text: str, limit: int) -> None:
        """Raises TooLong where the beginning of a text has more than `limit` tokens already.

        A text's own tokens differ from its beginning's near the cut only; an eighth more is far from what a tokenizer
        changes there. Where a beginning has fewer, the next is as long as should do, and twice as long at least: a text
        that fits costs at most three times.
        """
        most = limit + limit // 8 + 16
        size = max(limit, 1) * LONG_TOKEN
        while size < len(text):
            space = max(text.rfind(" ", size // 2, size), text.rfind("\n", size // 2, size))
            count = len(self._encode_batch([text[: size if space < 0 else space]], False)[0])
            if count > most:
                raise TooLong(limit)
            size = max(2 * size, size * (most + most // 8) // max(count, 1))

    def _encode_batch(self, texts: Sequence[str], special: bool) -> list[list[int]]:
        """tokenizers' `encode` would hold Python's lock, so that no other thread runs meanwhile."""
        try:
            with _no_panic("this text"):
                return [e.ids for e in self._inner.encode_batch_fast(texts, add_special_tokens=special)]
        except TypeError as error:
            if all(isinstance(text, str) for text in texts):  # a lone surrogate: half a character, as JSON can spell
                raise AmqError("the text holds half a character (a lone surrogate): it is not valid Unicode") from error
            raise

    def decode(self, tokens: Sequence[int]) -> str:
        """The text, without special tokens; bytes that are no UTF-8 become U+FFFD, unknown ids nothing."""
        return self._decode(tokens, True)

    def _decode(self, tokens: Sequence[int], skip_special: bool) -> str:
        with _no_panic("these tokens"):
            if len(tokens) > LONG:  # `decode` would hold Python's lock, so that no other thread runs meanwhile
                return str(self._inner.decode_batch([list(tokens)], skip_special_tokens=skip_special)[0])
            return str(self._inner.decode(list(tokens), skip_special_tokens=skip_special))

    def token_name(self, token: int) -> str:
        """As the vocabulary spells it; "" of an unknown id."""
        return self._inner.id_to_token(token) or ""

    def is_byte(self, token: int) -> bool:
        """Whether it stands for a byte that needs not be a character."""
        return self.decoding.to_byte(self.token_name(token)) is not None

    def token_bytes(self, token: int) -> bytes:
        """What a token adds inside a text, special tokens by their name; b"" of an unknown id."""
        found = self._bytes.get(token)
        if found is None:
            text = self.token_name(token)
            if not text or self.decoding.exact:
                found = self.decoding.to_bytes(text)
            else:
                found = self._decode([token], False).encode()
            self._bytes[token] = found
        return found

    def token_text(self, token: int) -> str:
        """`token_bytes` as text, incomplete characters as U+FFFD."""
        return self.token_bytes(token).decode("utf-8", "replace")


@contextmanager
def _no_panic(what: str) -> Iterator[None]:
    """A panic of Rust as AmqError."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != PANIC:
            raise
        raise AmqError(f"tokenizer.json: tokenizers gave up on {what} ({error}): its patterns are damaged") from error


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


def _template(folder: Path, config: TokenizerConfig, name: str) -> str | None:
    """A file of its own goes before the config."""
    path = folder / ("chat_template.jinja" if name == DEFAULT else f"additional_chat_templates/{name}.jinja")
    return read_text(path) if path.is_file() else config.named_template(name)
