"""What one client's requests and connections do to the others."""

from __future__ import annotations

import json
import socket
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from serving import Client, Served, completion, memory

from attacks.bench import ATTACKER, MIB, MORE_MEMORY, MORE_SECOND, SECOND, Bench, Row

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
LOREM = "lorem ipsum dolor sit amet "


def requests(bench: Bench) -> Iterator[Row]:
    """Bodies that are expensive to read, to refuse, to encode; and uploads that never end."""
    with bench.server("--queue", "64") as server:
        for attack in (long_prompts, empty_messages, wrong_messages, flood, uploads, slow_headers):
            yield attack(bench, server)


def statuses(client: Client, path: str, body: bytes, count: int) -> str:
    found = Counter(str(client.call("POST", path, body).status or "closed") for _ in range(count))
    return ", ".join(f"{count} × {status}" for status, count in sorted(found.items()))


def long_prompt(bench: Bench, server: Served) -> bytes:
    text = LOREM * (bench.size.body // len(LOREM) + 1)
    return json.dumps(completion(server.model, text[: bench.size.body])).encode()


def long_prompts(bench: Bench, server: Served) -> Row:
    body, attacker = long_prompt(bench, server), server.client(ATTACKER)
    did = f"{bench.size.prompts} prompts of {len(body) / MIB:.1f} MiB, one after another"
    return bench.beside(server, "long prompts", did, lambda: statuses(attacker, TEXT, body, bench.size.prompts))


def empty_messages(bench: Bench, server: Served) -> Row:
    messages = [{"role": "user", "content": ""}] * bench.size.messages
    content = {"model": server.model, "max_tokens": 1, "messages": messages}
    body = json.dumps(content, separators=(",", ":")).encode()
    did = f"3 chats of {bench.size.messages:,} empty messages"
    return bench.beside(server, "empty messages", did, lambda: statuses(server.client(ATTACKER), CHAT, body, 3))


def wrong_messages(bench: Bench, server: Served) -> Row:
    body = b'{"model": "x", "messages": [' + b"0," * bench.size.wrong + b"0]}"
    did = f"3 chats of {bench.size.wrong:,} wrong messages"
    return bench.beside(server, "wrong messages", did, lambda: statuses(server.client(ATTACKER), CHAT, body, 3))


def flood(bench: Bench, server: Served) -> Row:
    """Others' prompts that take a moment to encode, behind one client's that are refused in the end."""
    body, attacker, second = long_prompt(bench, server), server.client(ATTACKER), server.client(SECOND)
    question = completion(server.model, "word " * bench.size.medium, max_tokens=1)
    second.call("POST", TEXT, question)
    alone = second.call("POST", TEXT, question)
    asked = []

    def act() -> str:
        with ThreadPoolExecutor(bench.size.flood) as pool:
            calls = [pool.submit(attacker.call, "POST", TEXT, body) for _ in range(bench.size.flood)]
            time.sleep(bench.size.quiet / 3)
            asked.append(second.call("POST", TEXT, question))
            ends = Counter(str(call.result().status or "closed") for call in calls)
        got = ", ".join(f"{count} × {status}" for status, count in sorted(ends.items()))
        return f"the other: {asked[0]}, alone {alone.seconds:.2f} s; the flood got {got}"

    did = f"{bench.size.flood} prompts of {len(body) / MIB:.1f} MiB at once, then another client's of "
    row = bench.beside(server, "flood of prompts", f"{did}{5 * bench.size.medium} characters", act)
    served = asked[0].status == alone.status == 200 and asked[0].seconds <= alone.seconds + MORE_SECOND
    return Row(**{**vars(row), "good": row.good and served})


def uploads(bench: Bench, server: Served) -> Row:
    """Bodies whose end never comes."""
    attacker, held = server.client(ATTACKER), []
    body = b'{"model": "x", "prompt": "' + b"a" * bench.size.body

    def act() -> str:
        until = time.monotonic() + 60
        for _ in range(bench.size.uploads):
            with suppress(OSError):
                connection = attacker.connect(3)
                held.append(connection)
                connection.sendall(attacker.head(TEXT, len(body) + 100) + body)
            if time.monotonic() > until:
                break
        time.sleep(bench.size.quiet / 3)
        return f"{still_open(held)} of {len(held)} are open"

    try:
        did = f"{bench.size.uploads} bodies of {len(body) / MIB:.1f} MiB, all but the last 100 bytes"
        return bench.beside(server, "endless uploads", did, act, most=MORE_MEMORY)
    finally:
        close(held)


def slow_headers(bench: Bench, server: Served) -> Row:
    attacker, held = server.client(ATTACKER), []
    closed: list[float] = []

    def act() -> str:
        start = time.monotonic()
        for _ in range(bench.size.slow):
            held.append(attacker.connect())
            held[-1].sendall(f"POST {TEXT} HTTP/1.1\r\nHost: localhost\r\n".encode())
        while (left := still_open(held)) and time.monotonic() < start + bench.size.wait:
            for connection in held:
                with suppress(OSError):
                    connection.sendall(b"X: y\r\n")
            time.sleep(min(1.0, bench.size.wait))
        if not left:
            closed.append(time.monotonic() - start)
        return f"all closed after {closed[0]:.0f} s" if closed else f"{left} of {len(held)} are still open"

    try:
        did = f"{bench.size.slow} connections, a header line per second for {bench.size.wait:.0f} s"
        row = bench.beside(server, "slow headers", did, act)
        return Row(**{**vars(row), "target": f"{row.target}; closed", "good": row.good and bool(closed)})
    finally:
        close(held)


def silent(bench: Bench) -> Iterator[Row]:
    """More connections that send nothing than the server may open files."""
    size, held = bench.size, []
    with bench.server(open_files=size.open_files) as server:
        attacker, second, before = server.client(ATTACKER), server.client(SECOND), memory(server.process)
        question = completion(server.model)
        alone = second.call("POST", TEXT, question)
        try:
            for _ in range(size.idle):
                with suppress(OSError):
                    held.append(attacker.connect(2))
            first = second.call("POST", TEXT, question, timeout=10)
            health = second.call("GET", "/health", timeout=10)
            time.sleep(size.hold)
            later = second.call("POST", TEXT, question, timeout=10)
            happened = (
                f"second client {first}, {size.hold:.0f} s later {later}, alone {alone.seconds:.2f} s; "
                f"/health {health}; {still_open(held)} of {len(held)} are open"
            )
            good = all(a.status == 200 and a.seconds <= alone.seconds + MORE_SECOND for a in (first, health, later))
            now = memory(server.process)
        finally:
            close(held)
    did = f"{size.idle:,} connections that send nothing, a server that may open {size.open_files:,} files"
    yield Row(
        "silent connections", did, f"others are answered, {MORE_SECOND} s above quiet", happened, good,
        memory=(before, now, now),
    )  # fmt: skip


def still_open(connections: list[socket.socket]) -> int:
    count = 0
    for connection in connections:
        connection.setblocking(False)
        try:
            while connection.recv(4096):  # an answer before the end
                pass
        except BlockingIOError:
            count += 1
        except OSError:
            continue
        finally:
            connection.settimeout(3)
    return count


def close(connections: list[socket.socket]) -> None:
    for connection in connections:
        connection.close()
