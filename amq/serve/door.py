"""Who may come in: keys, and the names by which a server without a key may be called.

A key is known by its SHA-256 digest alone: whose turn it is, whose cached prefixes those are, what a log calls it.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import re
from collections.abc import Iterable
from pathlib import Path

from amq.errors import AmqError
from amq.serve.settings import ServeSettings

log = logging.getLogger("amq.serve")

TAG_DIGITS = 8
"""Hexadecimal digits of a key's digest that stand for it in a queue and in a log."""

IPV6_CLIENT_BITS = 64
"""One client is given at least so large a network: whoever has one could come from 2^64 addresses."""

Headers = Iterable[tuple[bytes, bytes]]


class Door:
    """keys: digests, hexadecimal; none of them: everyone may come in who calls the server by a name of its own.

    Raises AmqError where the file of keys cannot be read or holds none.
    """

    def __init__(self, settings: ServeSettings) -> None:
        self.keys = [_digest(key.encode()) for key in all_keys(settings)]
        if settings.api_key_file is not None and (mode := Path(settings.api_key_file).stat().st_mode & 0o777) & 0o077:
            log.warning("%s may be read by others (mode %o): chmod 600 it", settings.api_key_file, mode)
        self._hosts = {"localhost", *(_plain(name) for name in (settings.host, *settings.allow_host))}

    def right_host(self, headers: Headers) -> bool:
        """Whether a request to a server without a key calls it by an address or by a name that is known to be its own.

        Else a web page could have its own name resolve to the server's address, and read the answers (DNS rebinding).
        """
        if self.keys:
            return True
        name = _plain(re.sub(rb":\d+$", b"", dict(headers).get(b"host", b"")).decode("latin-1"))
        return name in self._hosts or _address(name.strip("[]")) is not None

    def owner(self, headers: Headers) -> str | None:
        """The digest of the key that was sent, "" where the server has none; None for a wrong key or none.

        Compares with every key, in a time that tells nothing about them.
        """
        scheme, _, key = dict(headers).get(b"authorization", b"").partition(b" ")
        given = _digest(key.strip())
        matches = [known for known in self.keys if hmac.compare_digest(given, known)]
        if not self.keys:
            return ""
        return matches[0] if matches and scheme.lower() == b"bearer" else None

    def client(self, owner: str, address: str) -> str:
        """Whose turn it is: the key's where there are several, else the address's, however the client spells itself."""
        if owner and len(self.keys) > 1:
            return f"key:{owner[:TAG_DIGITS]}"
        return f"address:{client_address(address)}"


def client_address(text: str) -> str:
    """One client's address: IPv4 also where it is written as IPv6, of IPv6 the network; other texts as they are."""
    address = _address(text.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is None:
            return str(ipaddress.ip_network((address, IPV6_CLIENT_BITS), strict=False))
        address = address.ipv4_mapped
    return text if address is None else str(address)


def all_keys(settings: ServeSettings) -> list[str]:
    """Those given by themselves, and those of the file. Raises AmqError."""
    return [*settings.api_key, *([] if settings.api_key_file is None else read_keys(Path(settings.api_key_file)))]


def read_keys(path: Path) -> list[str]:
    """One key a line; empty lines and those that begin with # count for nothing. Raises AmqError."""
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise AmqError(f"--api-key-file {path} cannot be read: {error}") from None
    keys = [line.strip() for line in text.splitlines()]
    keys = [key for key in keys if key and not key.startswith("#")]
    if not keys:
        raise AmqError(f"--api-key-file {path} holds no key: write one per line")
    return keys


def _plain(name: str) -> str:
    return name.lower().removesuffix(".")


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


def _digest(key: bytes) -> str:
    return hashlib.sha256(key).hexdigest()
