"""Tokenizers of a few dozen tokens, of the kinds that language models have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

BYTES = [f"<0x{b:02X}>" for b in range(256)]
NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
PIECES = ["<unk>", "<s>", "</s>", *BYTES, "▁", *"abcdefghijklmnop", "▁a", "▁b", "é"]


def sentencepiece(decoder: Any, pieces: list[str] = PIECES) -> Tokenizer:
    """As Llama 2's: ▁ for spaces, one of them in front of the text, bytes for what the vocabulary lacks."""
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    merges = [("▁", "a"), ("▁", "b")]
    inner = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoder
    inner.add_special_tokens(["<s>", "</s>"])
    return inner


def llama() -> Tokenizer:
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return sentencepiece(decoders.Sequence(steps))


def gemma() -> Tokenizer:
    return sentencepiece(decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]))


def fallback_metaspace(scheme: str = "first") -> Tokenizer:
    """Spaces are marked by the pre-tokenizer, at the beginning of a text alone for scheme `first`."""
    inner = sentencepiece(decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=scheme)]))
    inner.normalizer = normalizers.Sequence([])
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    return inner


def unigram() -> Tokenizer:
    """Its model, too, knows `</s>`, and likes it."""
    pieces = [(piece, 0.0 if piece in ("<s>", "</s>") else -5.0) for piece in PIECES]
    inner = Tokenizer(models.Unigram(pieces, 0, byte_fallback=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    inner.add_special_tokens(["<s>", "</s>"])
    return inner


def metaspace() -> Tokenizer:
    """Without bytes."""
    inner = Tokenizer(models.Unigram([("<unk>", 0.0), ("▁", -2.0), ("▁hello", -1.0), ("lo", -2.0), ("h", -3.0)], 0))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return inner


def bytes_alone() -> Tokenizer:
    """A token per byte, and no merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return inner


def byte_level(fuse: bool = False) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("h", "i"), ("<", "|"), ("Ġ", "a"), ("a", "a"), ("aa", "aa"), ("Ġ", "Ġ")]
    vocabulary = {piece: i for i, piece in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    inner = Tokenizer(models.BPE(vocabulary, merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()]) if fuse else decoders.ByteLevel()
    inner.add_tokens(["<think>", "日本", "▁x"])
    inner.add_special_tokens(["<s>", "</s>", "<|im_start|>", "<|im_end|>"])
    return inner


def wordpiece() -> Tokenizer:
    inner = Tokenizer(
        models.WordPiece({"[UNK]": 0, "hello": 1, "##lo": 2, "h": 3, ".": 4, "##é": 5}, unk_token="[UNK]")
    )
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    return inner


def bpe_with_ends() -> Tokenizer:
    """Tokens tell where a word ends, as GPT's did; bytes in between."""
    pieces = ["<unk>", *BYTES, "a", "b", "a</w>", "b</w>"]
    inner = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>"))
    inner.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.BPEDecoder()])
    return inner


def with_merges() -> Any:
    """Byte-level BPE with two merges over 254 bytes and a special token, which is put before every text."""
    import transformers
    from tokenizers import processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:253]
    vocab = {piece: i for i, piece in enumerate([*alphabet, "he", "hel"])}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[("h", "e"), ("he", "l")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>")
    fast.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 255)]
    )
    return fast


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "llama": llama,
    "gemma": gemma,
    "fallback, metaspace": fallback_metaspace,
    "fallback, metaspace without prefix": lambda: fallback_metaspace("never"),
    "unigram": unigram,
    "metaspace": metaspace,
    "byte level": byte_level,
    "byte level, fuse": lambda: byte_level(True),
    "wordpiece": wordpiece,
    "ends of words": bpe_with_ends,
}
