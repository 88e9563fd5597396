"""What a tokenizer's decoder does with a single token, where that is known."""

from __future__ import annotations

import json
import re
from typing import Any

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Decoding:
    """How tokens become text, if that is known; `exact` says so.

    byte_level: tokens are bytes, each written as a character. byte_fallback: tokens `<0x00>` … are a byte each; where a
    run of them is no UTF-8, each becomes U+FFFD. replaced: (old, new) inside each token; with metaspace also in what
    bytes spell. first: this character is left out of the text's first token. strip: (character, how many of it are cut
    from the beginning of a text).
    """

    def __init__(
        self,
        exact: bool,
        byte_level: bool = False,
        byte_fallback: bool = False,
        replaced: tuple[str, str] = ("", ""),
        strip: tuple[str, int] = ("", 0),
        metaspace: bool = False,
        first: str = "",
    ) -> None:
        self.exact, self.byte_level, self.byte_fallback = exact, byte_level, byte_fallback
        self.replaced, self.strip, self.metaspace, self.first = replaced, strip, metaspace, first
        self._alphabet = _byte_alphabet() if byte_level else None

    @classmethod
    def of(cls, decoder: Any) -> Decoding:
        """From a decoder of tokenizers; one that this does not know in full is not exact."""
        if decoder is None:
            return cls(False)
        state = json.loads(decoder.__getstate__())
        steps = state["decoders"] if state["type"] == "Sequence" else [state]
        kinds = [step["type"] for step in steps]
        if kinds[-1:] == ["Fuse"]:
            del kinds[-1], steps[-1]
        if kinds == ["ByteLevel"]:
            return cls(True, byte_level=True)
        if kinds in (["Metaspace"], ["ByteFallback", "Metaspace"]):
            mark = steps[-1]["replacement"]
            first = "" if steps[-1]["prepend_scheme"] == "never" else mark
            return cls(True, byte_fallback=len(kinds) > 1, replaced=(mark, " "), metaspace=True, first=first)
        known = kinds in (["Replace", "ByteFallback"], ["Replace", "ByteFallback", "Fuse", "Strip"])
        if not known or "String" not in steps[0]["pattern"] or steps[-1].get("stop"):
            return cls(False)
        strip = (steps[3]["content"], steps[3]["start"]) if len(steps) > 3 else ("", 0)
        replaced = (steps[0]["pattern"]["String"], steps[0]["content"])
        return cls(True, byte_fallback=True, replaced=replaced, strip=strip)

    def to_bytes(self, token: str) -> bytes:
        if self._alphabet is not None:
            if any(character not in self._alphabet for character in token):
                return token.encode()  # an added token is its own text
            return bytes(self._alphabet[character] for character in token)
        if (byte := self.to_byte(token)) is not None:
            return bytes([byte])
        return token.replace(*self.replaced).encode()

    def to_byte(self, token: str) -> int | None:
        """Of a token that stands for a byte of no own character."""
        match = BYTE_TOKEN.fullmatch(token) if self.byte_fallback else None
        return int(match[1], 16) if match else None


def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE writes each byte as a printable character: Latin-1's own, and from U+0100 on for the others."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in set(printable)]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}
