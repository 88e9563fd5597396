"""How a connection begins: each party says hello, and both know the run, its key and the step to go on from.

The client's hello has the terms of the run, the steps of which it has states, and a nonce; the server's has the step
that both go on from, and its own nonce. With a key, hello is authenticated by it, and all that follows by a key made
of it and both nonces: what was recorded from another connection is refused.
"""

from __future__ import annotations

import json
import re
import secrets
from dataclasses import dataclass
from typing import Any

from amq.errors import AmqError
from amq.split.link import Link
from amq.split.stream import payload_limit
from amq.split.terms import Terms
from amq.split.wire import MOST_ERROR, Frame, Limits, PeerError, Type, WireError, reason_in, session_key
from amq.util.records import MOST, check_range, parse_record, to_json

HELLO_SECONDS = 10.0
"""For a client to say hello in, from its connection on."""
LOSS_BYTES = 64
MOST_STATES = 16
MOST_PAYLOAD = 1 << 30


@dataclass(frozen=True, kw_only=True)
class ClientHello:
    """terms: as `Terms.json`. durable: steps of the client's states. channels: of the hidden states."""

    terms: Terms
    durable: tuple[int, ...]
    channels: int
    nonce: str

    def __post_init__(self) -> None:
        check_range(self, "channels", most=1 << 20)
        if len(self.durable) > MOST_STATES or not all(0 <= step <= MOST for step in self.durable):
            raise ValueError(f"expected at most {MOST_STATES} durable steps from 0 to {MOST}")
        _check_nonce(self.nonce)


@dataclass(frozen=True, kw_only=True)
class ServerHello:
    """start: the step that both go on from. adapter: bytes of the server's half of the adapter, at most."""

    start: int
    adapter: int
    nonce: str

    def __post_init__(self) -> None:
        check_range(self, "start", least=0)
        check_range(self, "adapter", least=0, most=1 << 40)
        _check_nonce(self.nonce)


def _check_nonce(nonce: str) -> None:
    if not re.fullmatch("[0-9a-f]{32}", nonce):
        raise ValueError("expected a nonce of 32 hexadecimal digits")


def nonce() -> str:
    return secrets.token_hex(16)


def send_hello(link: Link, hello: ClientHello | ServerHello) -> None:
    link.send_now(Frame(Type.HELLO, json.dumps(to_json(hello)).encode()))


def read_client(frame: Frame) -> ClientHello:
    return _read(frame, ClientHello, "the client's hello")


def read_server(link: Link, seconds: float) -> ServerHello:
    """The server's answer. Raises PeerError with its reason where it refuses."""
    frame = link.receive_now(seconds)
    if frame.type is Type.ERROR:
        raise PeerError(f"the server refuses: {reason_in(frame)}")
    return _read(frame, ServerHello, "the server's hello")


def _read(frame: Frame, kind: Any, what: str) -> Any:
    if frame.type is not Type.HELLO:
        raise WireError(f"expected hello, got {frame.place}")
    try:
        data = json.loads(frame.payload)
        json.dumps(data, ensure_ascii=False).encode()  # halves of surrogate pairs are no text that could be shown
        return parse_record(data, kind, what)
    except AmqError as error:
        raise WireError(str(error)) from None
    except (ValueError, RecursionError) as error:
        raise WireError(f"{what} is not JSON: {error}") from None


def limits_of(terms: Terms, channels: int, adapter: int, *, client: bool) -> Limits:
    """What may come after hello. client: to the client; adapter: bytes of one that it may be sent."""
    tensor = payload_limit(terms, channels)
    if max(tensor, adapter) > MOST_PAYLOAD:
        raise WireError(
            f"a payload could have {max(tensor, adapter)} bytes, at most {MOST_PAYLOAD} are allowed: give a smaller "
            "--batch, --window-length or --lora"
        )
    both = {Type.WIDTHS: channels, Type.FORWARD: tensor, Type.BACKWARD: tensor}
    if terms.labels == "server":
        del both[Type.FORWARD if client else Type.BACKWARD]
    own = {Type.LOSS: LOSS_BYTES, Type.ADAPTER: adapter} if client else {Type.LABELS: 4 * terms.tokens}
    return {**both, **own, Type.ACK: 0, Type.BYE: 0, Type.ERROR: MOST_ERROR}


def common_step(ours: list[int], theirs: tuple[int, ...]) -> int:
    """The largest step of which both parties have a state."""
    shared = set(ours) & set(theirs)
    if not shared:
        raise AmqError(
            f"no common state: the client has steps {list(theirs)}, the server {ours}; start both anew, each with "
            "another --output, or bring the missing state back"
        )
    return max(shared)


def begin(link: Link, key: bytes, client: ClientHello, server: ServerHello, *, is_client: bool) -> None:
    """After both hellos: the connection's own key, its limits, its threads."""
    own = session_key(key, client.nonce.encode(), server.nonce.encode())
    link.start(limits_of(client.terms, client.channels, server.adapter, client=is_client), own)
