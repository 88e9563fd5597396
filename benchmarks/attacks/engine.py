"""An engine that dies or hangs, and chat templates of strangers that never end or take all memory."""

from __future__ import annotations

import time
from collections.abc import Iterator

import psutil
from serving import Served, chat, completion

from attacks.bench import ATTACKER, Bench, Row
from attacks.load import CHAT, TEXT

PASSES = 3
"""That go well before the fault."""

RENDERER = 600
"""MiB: the bound of the process that renders templates, and what else one takes."""


def faults(bench: Bench) -> Iterator[Row]:
    for name, fault in {
        "dead engine: a panic": "panic",
        "dead engine: SystemExit": "exit",
        "hanging engine": "stall",
    }.items():
        flags = bench.flags("--stall", f"{bench.size.stall:g}") if fault == "stall" else []
        with bench.server("--timeout", "30", *flags, fault=fault, after=PASSES) as server:
            yield dead(bench, server, name, fault if flags or fault != "stall" else "stall, no --stall here")


def dead(bench: Bench, server: Served, name: str, did: str) -> Row:
    """The request that meets the fault, the next one, /health until it is red, the process's end."""
    limit = bench.size.stall + bench.size.patience
    body = completion(server.model, max_tokens=30, ignore_eos=True)
    client, start = server.client(), time.monotonic()
    answer = client.call("POST", TEXT, body, timeout=limit)
    following = client.call("POST", TEXT, body, timeout=limit)
    goes_on = following.status == 200
    health = client.call("GET", "/health", timeout=5)
    while not goes_on and health.status == 200 and time.monotonic() < start + 3 * limit:
        time.sleep(0.02)
        health = client.call("GET", "/health", timeout=5)
    status = None if goes_on else exit_status(server.process, limit)
    happened = (
        f"the request: {answer}; the next: {following}; /health {health.status or 'closed'}; "
        f"{'the process runs' if status is None else f'the process ended with {status}'}"
    )
    target = "an error at once; it goes on, or /health is red and the process ends with a failure"
    good = answer.status >= 500 and (goes_on or (health.status != 200 and bool(status)))
    return Row(name, f"forward: {did}, after {PASSES} passes", target, happened, good)


def exit_status(process: psutil.Process, seconds: float) -> int | None:
    """None where it still runs after `seconds`."""
    try:
        return process.wait(seconds)
    except psutil.TimeoutExpired:
        return None


def templates(bench: Bench) -> Iterator[Row]:
    size = bench.size
    loop = f"{{% for a in range({size.loop}) %}}{{% for b in range({size.loop}) %}}{{% endfor %}}{{% endfor %}}x"
    for attack, template in {
        "template that loops": loop,
        "template that takes memory": f"{{{{ ('a' * {size.bomb})|length }}}}",
    }.items():
        with bench.with_template(template) as folder:
            yield from one_template(bench, attack, template, folder)


def one_template(bench: Bench, attack: str, template: str, folder: object) -> Iterator[Row]:
    with bench.server("--timeout", "10", **({"folder": folder} if bench.folder else {})) as server:
        client = server.client(ATTACKER)

        def act() -> str:
            return f"the chat: {client.call('POST', CHAT, chat(server.model), timeout=bench.size.patience)}"

        yield bench.beside(server, attack, f"one chat with {template[:70]}…", act, most=RENDERER)
