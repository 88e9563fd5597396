"""The tokenizer in a GGUF file: what llama.cpp needs of a byte-level BPE, read from what transformers loads.

llama.cpp knows how text is cut into words ("pre-tokenized") by a name, so that a tokenizer can be exported only if its
rule is one of those in `RULES`. That the two then make the same tokens is checked by benchmarks/export_matrix.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amq.errors import AmqError

GPT2 = "<gpt-2>"
"""Stands for the rule that is built into the ByteLevel pre-tokenizer."""
DIGITS = "<one digit>"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_HEAD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_MARKS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SLASH = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _by_case(ending: str, digits: str) -> str:
    """Words end where small letters are followed by large ones."""
    start = r"[^\r\n\p{L}\p{N}]?"
    return f"{start}{_UPPER}*{_LOWER}+{ending}|{start}{_UPPER}+{_LOWER}*{ending}|{digits}{_SLASH}"


RULES = {
    (GPT2,): "gpt-2",
    (DIGITS, GPT2): "smollm",
    (_HEAD + r"\p{N}{1,3}" + _TAIL,): "llama-bpe",
    (_HEAD + r"\p{N}" + _TAIL,): "qwen2",
    (_MARKS + _TAIL.replace(r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]"),): "qwen35",
    (_by_case(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?", r"\p{N}{1,3}"),): "gpt-4o",
    (_by_case("", r"\p{N}"),): "tekken",
}
"""How words are cut, as a tokenizer.json says it → llama.cpp's name for it."""


@dataclass(frozen=True)
class GgufTokenizer:
    """What goes into the file.

    rule: llama.cpp's name of the pre-tokenizer. tokens, types: by id, as long as the embedding.
    merges: "left right", first one first. special: {bos, eos, unk, pad: id}. adds: {bos, eos: put around every text}.
    """

    rule: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    special: dict[str, int]
    adds: dict[str, bool]
    chat_template: str | None

    def add_to(self, writer: Any) -> None:
        """Adds the keys to a `gguf.GGUFWriter`."""
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.rule)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        writer.add_token_merges(self.merges)
        for kind, token in self.special.items():
            getattr(writer, f"add_{kind}_token_id")(token)
        writer.add_add_bos_token(self.adds["bos"])
        writer.add_add_eos_token(self.adds["eos"])
        writer.add_add_space_prefix(False)
        if self.chat_template:
            writer.add_chat_template(self.chat_template)


def read_tokenizer(folder: Path, size: int) -> GgufTokenizer:
    """The tokenizer in `folder` for a model with `size` token embeddings, or an AmqError that says what GGUF lacks."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        data = json.loads(tokenizer.backend_tokenizer.to_str())
    except (OSError, ValueError, KeyError, AttributeError) as error:  # AttributeError: one without a fast backend
        raise AmqError(f"{folder} has no tokenizer that GGUF can hold ({error}): expected tokenizer.json") from error
    model = data["model"]
    if model["type"] != "BPE" or model.get("byte_fallback") or not model["merges"]:
        kind = "BPE with byte fallback (SentencePiece)" if model.get("byte_fallback") else model["type"]
        raise AmqError(
            f"{folder}: its tokenizer is a {kind} with {len(model.get('merges', ()))} merges; the gguf export knows "
            "byte-level BPE with merges (GPT-2, Llama 3, Qwen, SmolLM)"
        )
    tokens, types = _tokens(data, size, folder)
    ids = {kind: getattr(tokenizer, f"{kind}_token_id", None) for kind in ("bos", "eos", "unk", "pad")}
    text = tokenizer("a").input_ids
    return GgufTokenizer(
        rule=pre_tokenizer_rule(data, folder),
        tokens=tokens,
        types=types,
        merges=[pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]],
        special={kind: token for kind, token in ids.items() if token is not None},
        adds={"bos": text[0] == ids["bos"], "eos": text[-1] == ids["eos"]},
        chat_template=tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None,
    )


def pre_tokenizer_rule(data: Mapping[str, Any], folder: Path) -> str:
    """llama.cpp's name for the pre-tokenizer of a tokenizer.json, or an AmqError."""
    step = data["pre_tokenizer"] or {"type": "none"}
    rule = tuple(part for s in step.get("pretokenizers", [step]) for part in _parts(s))
    normalizer = (data["normalizer"] or {}).get("type", "NFC")
    if rule not in RULES or normalizer != "NFC":
        raise AmqError(
            f"{folder}: the gguf export does not know llama.cpp's name for this tokenizer's rule of cutting words, "
            f"{' then '.join(rule)!r} (normalizer {normalizer}); it knows {', '.join(RULES.values())}"
        )
    return RULES[rule]


def _parts(step: Mapping[str, Any]) -> list[str]:
    """What one step of a pre-tokenizer cuts at."""
    if step["type"] == "ByteLevel":
        return [GPT2] if step.get("use_regex", True) else []
    if step["type"] == "Digits" and step.get("individual_digits"):
        return [DIGITS]
    if step["type"] == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return [step["pattern"].get("Regex", str(step["pattern"]))]
    return [json.dumps(step)]


def _tokens(data: Mapping[str, Any], size: int, folder: Path) -> tuple[list[str], list[int]]:
    """Texts and types by id; ids that the embedding has and the tokenizer has not are UNUSED."""
    from gguf import TokenType

    tokens, types = [f"[PAD{i}]" for i in range(size)], [int(TokenType.UNUSED)] * size
    entries = [(text, i, TokenType.NORMAL) for text, i in data["model"]["vocab"].items()]
    for token in data["added_tokens"]:
        kind = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
        entries.append((token["content"], token["id"], kind))
    for text, i, kind in entries:
        if i >= size:
            raise AmqError(f"{folder}: token {text!r} has id {i}, but the model has {size} embeddings")
        tokens[i], types[i] = text, int(kind)
    return tokens, types
