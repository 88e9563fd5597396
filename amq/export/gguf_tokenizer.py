"""The tokenizer in a GGUF file: what llama.cpp needs of a byte-level BPE or of SentencePiece's BPE, read from what
transformers loads.

llama.cpp knows how text is cut into words ("pre-tokenized") by a name, so that a tokenizer can be exported only if its
rule is one of those in `RULES`. That the two then make the same tokens is checked by benchmarks/export_matrix.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amq.errors import AmqError

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
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

    rule: llama.cpp's name of the pre-tokenizer, "default" of SentencePiece's.
    tokens, types: by id, as long as the embedding. merges: "left right", first one first.
    scores: of SentencePiece's tokens by id, which it has instead of merges.
    space: whether a text begins with a space of its own.
    special: {bos, eos, unk, pad: id}. adds: {bos, eos: put around every text}.
    """

    rule: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    special: dict[str, int]
    adds: dict[str, bool]
    chat_template: str | None
    scores: list[float] | None = None
    space: bool = False

    def add_to(self, writer: Any) -> None:
        """Adds the keys to a `gguf.GGUFWriter`."""
        writer.add_tokenizer_model("gpt2" if self.scores is None else "llama")
        writer.add_tokenizer_pre(self.rule)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.scores is None:
            writer.add_token_merges(self.merges)
        else:
            writer.add_token_scores(self.scores)
        for kind, token in self.special.items():
            getattr(writer, f"add_{kind}_token_id")(token)
        writer.add_add_bos_token(self.adds["bos"])
        writer.add_add_eos_token(self.adds["eos"])
        writer.add_add_space_prefix(self.space)
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
    if model["type"] != "BPE" or not model["merges"]:
        raise AmqError(
            f"{folder}: its tokenizer is a {model['type']} with {len(model.get('merges', ()))} merges; the gguf export "
            "knows BPE with merges, of bytes (GPT-2, Llama 3, Qwen, SmolLM) or as SentencePiece's (Llama 2, Gemma)"
        )
    pieces = bool(model.get("byte_fallback"))
    tokens, types = _tokens(data, size, folder)
    ids = {kind: getattr(tokenizer, f"{kind}_token_id", None) for kind in ("bos", "eos", "unk", "pad")}
    text = tokenizer("a").input_ids
    return GgufTokenizer(
        rule="default" if pieces else pre_tokenizer_rule(data, folder),
        tokens=tokens,
        types=types,
        merges=[pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]],
        special={kind: token for kind, token in ids.items() if token is not None},
        adds={"bos": text[0] == ids["bos"], "eos": text[-1] == ids["eos"]},
        chat_template=tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None,
        scores=sentencepiece_scores(data, size, folder) if pieces else None,
        space=pieces and leading_space(data, folder),
    )


def sentencepiece_scores(data: Mapping[str, Any], size: int, folder: Path) -> list[float]:
    """Of every id: the earlier a token is merged, the higher.

    llama.cpp merges any two neighbours that make a token, so that every way to cut a token in two must be a merge of
    the tokenizer; as in all that were made of a SentencePiece model. Raises AmqError naming a token where it is not.
    """
    vocabulary = data["model"]["vocab"]
    pairs = [tuple(pair.split(" ", 1)) if isinstance(pair, str) else tuple(pair) for pair in data["model"]["merges"]]
    known, added = set(pairs), {token["content"] for token in data["added_tokens"]}
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(pairs):
        ranks.setdefault(left + right, rank)
    scores = [0.0] * size
    for token, index in vocabulary.items():
        cuts = ((token[:i], token[i:]) for i in range(1, len(token)))
        odd = next((c for c in cuts if c not in known and c[0] in vocabulary and c[1] in vocabulary), None)
        if odd is not None and token not in added and not _BYTE.fullmatch(token):
            raise AmqError(
                f"{folder}: its tokenizer does not merge {odd[0]!r} and {odd[1]!r}, which are token {token!r}: it "
                "is not one of SentencePiece's, and llama.cpp would cut texts otherwise"
            )
        scores[index] = -float(ranks.get(token, 0))
    return scores


def leading_space(data: Mapping[str, Any], folder: Path) -> bool:
    """Whether SentencePiece's tokenizer puts a space before a text; raises AmqError for steps that are not known."""
    steps = [s for key in ("normalizer", "pre_tokenizer") for s in _steps(data[key])]
    kinds = [step["type"] for step in steps]
    blank = [s for s in steps if s["type"] == "Split" and s["pattern"] == {"String": " "}]  # none is left to cut at
    odd = [step for step in steps if step["type"] not in ("Prepend", "Replace", "Metaspace") and step not in blank]
    if odd or not {"Replace", "Metaspace"} & set(kinds):
        shown = json.dumps(odd[0]) if odd else "no step that marks spaces"
        raise AmqError(f"{folder}: the gguf export does not know this step of SentencePiece's tokenizer: {shown}")
    return any(s["type"] == "Prepend" or s.get("prepend_scheme", "never") != "never" for s in steps)


def _steps(step: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if step is None:
        return []
    return list(step.get("normalizers") or step.get("pretokenizers") or [step])


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
    if RULES[rule] == "llama-bpe" and not data.get("model", {}).get("ignore_merges"):
        return "dbrx"  # cuts words alike, and leaves a word that is a token to the merges
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
    pieces = data["model"].get("byte_fallback")
    kinds = {True: TokenType.BYTE, False: TokenType.NORMAL}
    entries = [(t, i, kinds[bool(pieces and _BYTE.fullmatch(t))]) for t, i in data["model"]["vocab"].items()]
    for token in data["added_tokens"]:
        kind = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
        kind = TokenType.UNKNOWN if token["content"] == data["model"].get("unk_token") else kind
        entries.append((token["content"], token["id"], kind))
    for text, i, kind in entries:
        if i >= size:
            raise AmqError(f"{folder}: token {text!r} has id {i}, but the model has {size} embeddings")
        tokens[i], types[i] = text, int(kind)
    return tokens, types
