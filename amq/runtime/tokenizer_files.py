"""The JSON files beside a tokenizer as typed records: tokenizer_config.json, and what tells where a text ends."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from amq.errors import AmqError
from amq.util.records import MOST, read_record

Record = TypeVar("Record")

DEFAULT, TOOL_USE = "default", "tool_use"
"""Names of chat templates: where a model has the latter, it is for conversations with tools."""
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Special tokens that tokenizer_config.json gives by name, and chat templates may use."""


def read_optional(path: Path, kind: type[Record]) -> Record:
    """The file `path` as a `kind`, or an empty one where there is no such file. Raises AmqError naming the file."""
    return read_record(path, kind, floats=True) if path.is_file() else kind()


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # ValueError: it is not UTF-8
        raise AmqError(f"{path} cannot be read as text in UTF-8 ({error}): it is damaged") from error


@dataclass(frozen=True)
class TokenText:
    """A token as older files have it, of which its text is wanted."""

    content: str


@dataclass(frozen=True)
class AddedTokenRecord:
    """The arguments of tokenizers' AddedToken; None leaves its default."""

    content: str
    single_word: bool | None = None
    lstrip: bool | None = None
    rstrip: bool | None = None
    normalized: bool | None = None
    special: bool | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class NamedTemplate:
    name: str
    template: str


@dataclass(frozen=True)
class TokenizerConfig:
    """tokenizer_config.json."""

    bos_token: str | TokenText | None = None
    eos_token: str | TokenText | None = None
    unk_token: str | TokenText | None = None
    sep_token: str | TokenText | None = None
    pad_token: str | TokenText | None = None
    cls_token: str | TokenText | None = None
    mask_token: str | TokenText | None = None
    add_bos_token: bool | None = None
    add_eos_token: bool | None = None
    added_tokens_decoder: dict[str, AddedTokenRecord] | None = None
    extra_special_tokens: dict[str, str | TokenText] | list[str | TokenText] | None = None
    additional_special_tokens: list[str | TokenText] | None = None
    chat_template: str | list[NamedTemplate] | dict[str, str] | None = None

    def __post_init__(self) -> None:
        for key in self.added_tokens_decoder or {}:
            if not (key.isascii() and key.isdigit() and len(key) < 11 and int(key) <= MOST):
                raise ValueError(f"expected token ids as keys of added_tokens_decoder, got {key[:40]!r}")

    @property
    def names(self) -> dict[str, str]:
        """{bos_token: its text, …} of those that there are."""
        tokens = {name: getattr(self, name) for name in NAMED}
        return {name: _text(token) for name, token in tokens.items() if token is not None}

    @property
    def added_tokens(self) -> list[AddedTokenRecord]:
        """In the order of their ids."""
        return [token for _, token in sorted((self.added_tokens_decoder or {}).items(), key=lambda item: int(item[0]))]

    @property
    def extra_names(self) -> list[str]:
        extra = self.extra_special_tokens or self.additional_special_tokens or []
        return [_text(token) for token in (extra.values() if isinstance(extra, dict) else extra)]

    def named_template(self, name: str) -> str | None:
        """Of several templates the one of this name; a single one is the default."""
        if isinstance(self.chat_template, list):
            return next((t.template for t in self.chat_template if t.name == name), None)
        if isinstance(self.chat_template, dict):
            return self.chat_template.get(name)
        return self.chat_template if name == DEFAULT else None


def _text(token: str | TokenText) -> str:
    return token if isinstance(token, str) else token.content


@dataclass(frozen=True)
class EndTokens:
    """`eos_token_id`: one, several, or none."""

    eos_token_id: int | list[int] | None = None

    def __post_init__(self) -> None:
        for token in self.end_ids:
            if not 0 <= token <= MOST:
                raise ValueError(f"expected eos_token_id from 0 to {MOST}, got {str(token)[:40]}")

    @property
    def end_ids(self) -> list[int]:
        if self.eos_token_id is None:
            return []
        return self.eos_token_id if isinstance(self.eos_token_id, list) else [self.eos_token_id]


@dataclass(frozen=True)
class ModelFile(EndTokens):
    """config.json or generation_config.json."""

    text_config: EndTokens | None = None
