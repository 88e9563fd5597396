"""Wire format, version 1: frames (docs/split.md is the specification).

    magic "AMQS" · version u8 · type u8 · cut u8 · 0 · micro-batch u16 · step u64 · length u32 · check u8[8] · payload

All integers are little-endian. `check` is BLAKE2b of the head before it and the payload, 8 bytes; with a key it is
BLAKE2b's keyed form over the number of the frame in its direction, head and payload, so that nobody without the key
can make, change, repeat or reorder a frame. Nothing is pickled, and JSON is in hello alone.

A head is judged before its payload is read: `Limits` says how long a payload of each type may be.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

from amq.errors import AmqError

MAGIC, VERSION = b"AMQS", 1
HEAD = struct.Struct("<4sBBBxHQI")
CHECK_BYTES = 8
HEAD_BYTES = HEAD.size + CHECK_BYTES
MOST_HELLO = 64 << 10
MOST_ERROR = 4 << 10
LOSS = struct.Struct("<d3d")
"""Payload of a loss frame: the loss, and the server's seconds of computing, encoding and waiting."""
BUSY = "another client is being served"
"""The reason of a server that is not free; it may be soon."""
TO_SERVER, TO_CLIENT = b"to server", b"to client"
"""Directions, part of a keyed check: a frame cannot be thrown back at its sender."""


class Type(IntEnum):
    HELLO = 1  # JSON: terms, durable steps, nonce; both ways
    WIDTHS = 2  # a new table of widths for the stream that the frame's direction and cut name
    LABELS = 3  # the tokens of a micro-batch, of which a server that computes the loss makes targets
    FORWARD = 4  # hidden states at a cut
    BACKWARD = 5  # their gradients
    LOSS = 6  # of a finished step, and the server's seconds
    ACK = 7  # nothing but a sign of life
    ADAPTER = 8  # the server's half of the trained LoRA, as safetensors
    BYE = 9  # the run is finished
    ERROR = 10  # why the connection ends, UTF-8


class WireError(AmqError):
    """The other party sent what it must not: the connection is closed, and the party told."""


class LinkLost(AmqError):
    """The other party is gone or silent: it may come back."""


class NotFinite(AmqError):
    """Training has brought NaN or infinity: this step cannot be done, and would end so again."""

    REMEDY = (
        "lower --learning-rate or load the model in a wider --dtype, and begin anew with another --output at both ends"
    )


class PeerError(AmqError):
    """What the other party said of why it ends the connection."""


@dataclass(frozen=True)
class Frame:
    type: Type
    payload: bytes = b""
    step: int = 0
    micro_batch: int = 0
    cut: int = 0

    @property
    def wire_bytes(self) -> int:
        return HEAD_BYTES + len(self.payload)

    @property
    def place(self) -> str:
        return f"{self.type.name.lower()} of step {self.step}, micro-batch {self.micro_batch}, cut {self.cut}"


@dataclass(frozen=True)
class Head:
    type: Type
    cut: int
    micro_batch: int
    step: int
    length: int


Limits = Mapping[Type, int]
"""Bytes that a payload of each type may have; a type that is missing is not expected at all."""
FIRST: Limits = {Type.HELLO: MOST_HELLO, Type.ERROR: MOST_ERROR}
"""Before hello nothing else is let in."""


def check_of(key: bytes, direction: bytes, number: int, head: bytes, payload: bytes | memoryview) -> bytes:
    """The 8 bytes between head and payload. key: empty where none was agreed. number: of the frame, from 0 on."""
    digest = hashlib.blake2b(digest_size=CHECK_BYTES, key=key, person=b"amq split v1")
    if key:
        digest.update(direction + struct.pack("<Q", number))
    digest.update(head)
    digest.update(payload)
    return digest.digest()


def pack_head(frame: Frame) -> bytes:
    return HEAD.pack(MAGIC, VERSION, frame.type, frame.cut, frame.micro_batch, frame.step, len(frame.payload))


def read_head(data: bytes, limits: Limits) -> Head:
    """The head of a frame, judged: raises WireError before a byte of the payload is read."""
    magic, version, kind, cut, micro_batch, step, length = HEAD.unpack(data)
    if magic != MAGIC:
        raise WireError(f"expected a frame that begins with {MAGIC!r}, got {magic!r}: the peer is no `amq split`")
    if version != VERSION:
        raise WireError(f"wire format version {version} came, this is version {VERSION}: use the same amq at both ends")
    if data[7] != 0:
        raise WireError(f"byte 7 of a frame's head must be 0, got {data[7]}")
    known = {int(t) for t in Type}
    if kind not in known or Type(kind) not in limits:
        expected = ", ".join(t.name.lower() for t in limits)
        name = Type(kind).name.lower() if kind in known else f"type {kind}"
        raise WireError(f"a frame of {name} came where only {expected} may come")
    most = limits[Type(kind)]
    if length > most:
        raise WireError(f"a frame of {Type(kind).name.lower()} says {length} bytes, at most {most} are expected")
    return Head(Type(kind), cut, micro_batch, step, length)


def reason_in(frame: Frame) -> str:
    """The text of an error frame, fit for a terminal."""
    text = frame.payload.decode("utf-8", "replace")
    return "".join(c if c.isprintable() else " " for c in text)


def session_key(key: bytes, client_nonce: bytes, server_nonce: bytes) -> bytes:
    """The key of a connection's frames after hello; empty without a key."""
    if not key:
        return b""
    return hashlib.blake2b(client_nonce + server_nonce, key=key, digest_size=32, person=b"amq split sess").digest()


def secret(text: bytes, path: str) -> bytes:
    """The key that a file's content stands for: all of it but white space around."""
    if len(text.strip()) < 16:
        raise AmqError(
            f"the key in {path} has {len(text.strip())} characters: expected at least 16 (`openssl rand -hex 32`)"
        )
    return hashlib.blake2b(text.strip(), digest_size=32, person=b"amq split key").digest()
