"""Load on a server: `python benchmarks/serve_load.py URL`, or `--serve DIR` to start one for it.

Without --concurrency: many clients for some time, with short and long prompts, streamed and not, some of which leave in
the middle of an answer. Every request has to end in 200, or in 429 that says when to come again, and the server's
memory has to stay flat; the exit status says whether so. With --concurrency 1,4: tokens per second of one user and of
several, in turns, and with --serve how much slower the server is than the engine that it runs, batch 1. Both say how
much processor time the server took per token, which a busy machine changes less than the speed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import shlex
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
from provenance import write_results
from serving import serving, tiny_folder

from amq.errors import AmqError
from amq.util.settings import run_command

SCHEMA = "amq/serve_load/1"
SERVER_ARGS = "--queue 16 --context 2048"
LEAVING = 0.05
"""Share of the streamed requests whose client leaves in the middle."""

LONGEST_PAUSE = 5.0
"""Clients come again after what Retry-After says, but at the latest after this: the load is to stay."""

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Size:
    """How much load. words: of a short and of a long prompt; tokens: fewest and most of an answer."""

    clients: int
    seconds: float
    words: tuple[int, int]
    tokens: tuple[int, int]
    rounds: int = 5
    patience: float = 120.0  # a request that takes longer hangs


FULL, SMOKE = Size(64, 180.0, (12, 400), (16, 128)), Size(6, 1.0, (2, 20), (4, 12), rounds=1, patience=10.0)


@dataclass
class Tally:
    """What happened. Times in seconds, as the clients saw them."""

    ends: Counter[str] = field(default_factory=Counter)  # HTTP status, or what else became of a request
    first_token: list[float] = field(default_factory=list)
    between_tokens: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    tokens: int = 0
    no_retry_after: int = 0
    memory: list[tuple[float, int]] = field(default_factory=list)


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    if (args.url and args.serve) or not (args.url or args.serve or args.smoke):
        raise AmqError("give either the URL of a running server or --serve DIR")
    if args.server_args is None:
        args.server_args = SERVER_ARGS if args.serve else "--queue 16"  # the tiny model's context is short
    size = SMOKE if args.smoke else FULL
    chosen = {name: value for name in ("clients", "seconds", "rounds") if (value := getattr(args, name)) is not None}
    size = Size(**{**vars(size), **chosen})
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.serve or (tiny_folder(Path(temporary)) if args.url is None else None)
        with serving(folder, shlex.split(args.server_args)) if folder else at(args.url) as (url, process):
            headers = {"Authorization": f"Bearer {args.api_key}"} if args.api_key else {}
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
            client = httpx.AsyncClient(base_url=url, headers=headers, timeout=size.patience, limits=limits)
            result = {"schema": SCHEMA, "server_args": args.server_args, "size": vars(size)}
            if args.concurrency:
                users = [int(n) for n in args.concurrency.split(",")]
                engine = ServedEngine(folder, args.server_args) if folder else None
                measured, good = asyncio.run(users_in_turns(client, users, size, engine, process)), True
            else:
                measured, good = asyncio.run(load(client, process, size, args.seed))
    result.update(measured)
    if args.json:
        write_results(args.json, result)
    return 0 if good else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("url", nargs="?", metavar="URL", help="of a running server, such as http://127.0.0.1:8000")
    add("--serve", type=Path, metavar="DIR", help="start a server on this model")
    add("--server-args", metavar="ARGS", help=f"for --serve (default: {SERVER_ARGS})")
    add("--api-key", metavar="KEY")
    add("--concurrency", metavar="LIST", help="such as 1,4: compare the speed of so many users instead")
    add("--clients", type=int, metavar="N", help=f"default {FULL.clients}")
    add("--seconds", type=float, metavar="S", help=f"default {FULL.seconds:.0f}")
    add("--rounds", type=int, metavar="N", help=f"of --concurrency; the median counts (default {FULL.rounds})")
    add("--seed", type=int, default=0)
    add("--json", type=Path, metavar="FILE", help="write the figures")
    add("--smoke", action="store_true", help="a tiny load, and a tiny random model unless one is given")
    return parser


# the server


@contextmanager
def at(url: str) -> Iterator[tuple[str, psutil.Process | None]]:
    """A server that runs already; its process, for the memory, where it is on this machine and may be looked at."""
    address = urlsplit(url)
    connections = psutil.net_connections("tcp") if address.hostname in ("127.0.0.1", "localhost", "::1") else []
    listening = [c.pid for c in connections if c.status == psutil.CONN_LISTEN and c.laddr.port == address.port]
    yield url, psutil.Process(listening[0]) if listening and listening[0] else None


# requests


def words() -> list[str]:
    from pydoc_data.topics import topics

    return " ".join(topics.values()).split()


async def events(response: httpx.Response) -> AsyncIterator[tuple[float, dict[str, Any]]]:
    """When each event of a stream came, and what it says."""
    rest = b""
    async for data in response.aiter_raw():
        now = time.perf_counter()
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data: {"):
                yield now, json.loads(line[6:])


async def ask(client: httpx.AsyncClient, path: str, body: dict[str, Any], tally: Tally, leave: bool) -> float:
    """One request; returns how long the server wants the client to stay away."""
    start = time.perf_counter()
    async with client.stream("POST", path, json=body) as response:
        if response.status_code != 200:
            await response.aread()
            tally.ends[str(response.status_code)] += 1
            wait = response.headers.get("Retry-After", "")
            tally.no_retry_after += response.status_code == 429 and not wait.isdigit()
            return float(wait) if wait.isdigit() else 1.0
        if body["stream"]:
            await _read_stream(response, tally, start, leave)
        else:
            tally.tokens += json.loads(await response.aread())["usage"]["completion_tokens"]
            tally.ends["200"] += 1
    tally.whole.append(time.perf_counter() - start)
    return 0.0


async def _read_stream(response: httpx.Response, tally: Tally, start: float, leave: bool) -> None:
    last, count, finish = start, 0, None
    async for now, event in events(response):
        if event.get("error"):
            tally.ends["error in the stream"] += 1
            return
        if event.get("usage"):
            tally.tokens += event["usage"]["completion_tokens"]
        for choice in event.get("choices", ()):
            finish = choice["finish_reason"] or finish
            if (choice.get("delta") or {}).get("content") or choice.get("text"):
                (tally.between_tokens if count else tally.first_token).append(now - last)
                last, count = now, count + 1
        if leave and count == 3:
            tally.ends["left by the client"] += 1
            return
    tally.ends["200" if finish else "cut off"] += 1


async def one_client(client: httpx.AsyncClient, model: str, size: Size, seed: int, until: float, tally: Tally) -> None:
    """Requests one after the other until the time is over."""
    draw, vocabulary = random.Random(seed), words()
    while time.perf_counter() < until:
        count = size.words[draw.random() < 0.25]  # a quarter of the prompts is long
        at = draw.randrange(len(vocabulary) - count)
        text = " ".join(vocabulary[at : at + count])
        chat, stream = draw.random() < 0.5, draw.random() < 0.7
        prompt = {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
        options = {"max_tokens": draw.randint(*size.tokens), "temperature": draw.choice((0.0, 0.8)), "stream": stream}
        body = {"model": model, **prompt, **options, **({"stream_options": {"include_usage": True}} if stream else {})}
        path = "/v1/chat/completions" if chat else "/v1/completions"
        try:
            leave = stream and draw.random() < LEAVING
            wait = await asyncio.wait_for(ask(client, path, body, tally, leave), size.patience)
        except (asyncio.TimeoutError, httpx.TimeoutException):
            tally.ends["hung"] += 1
        except httpx.TransportError as error:
            tally.ends[type(error).__name__] += 1
        else:
            left = max(0.0, until - time.perf_counter())
            await asyncio.sleep(min(wait * draw.uniform(1.0, 1.5), LONGEST_PAUSE, left))


# the two measurements


async def load(
    client: httpx.AsyncClient, process: psutil.Process | None, size: Size, seed: int
) -> tuple[dict[str, Any], bool]:
    """Runs the clients and prints the table; the figures, and whether all is as it must be."""
    tally = Tally()
    model = await model_of(client)
    start, cpu = time.perf_counter(), cpu_seconds(process)
    until = start + size.seconds
    watch = asyncio.create_task(_watch(process, tally, start))
    await asyncio.gather(*(one_client(client, model, size, seed + n, until, tally) for n in range(size.clients)))
    elapsed = time.perf_counter() - start
    watch.cancel()
    figures = {
        "elapsed": elapsed,
        "ends": dict(tally.ends),
        "no_retry_after": tally.no_retry_after,
        "tokens": tally.tokens,
        "tokens_per_second": tally.tokens / elapsed,
        "cpu_per_token": (cpu_seconds(process) - cpu) / max(tally.tokens, 1) if process else None,
        **{name: percentiles(getattr(tally, name)) for name in ("first_token", "between_tokens", "whole")},
        "memory": memory(tally.memory),
        "memory_samples": tally.memory,
        "held_up": max((b[0] - a[0] for a, b in pairwise(tally.memory)), default=0.0),
    }
    print(table(figures))
    good = set(tally.ends) <= {"200", "429", "left by the client"} and tally.ends["200"] and not tally.no_retry_after
    return figures, bool(good)


async def model_of(client: httpx.AsyncClient) -> str:
    response = await client.get("/v1/models")
    if response.status_code != 200:
        raise AmqError(f"{client.base_url}/v1/models answered {response.status_code}: {response.text}")
    return response.json()["data"][0]["id"]


async def _watch(process: psutil.Process | None, tally: Tally, start: float) -> None:
    while process is not None:
        tally.memory.append((time.perf_counter() - start, process.memory_info().rss))
        await asyncio.sleep(0.2)


def percentiles(times: Sequence[float]) -> dict[str, float]:
    ordered = sorted(times)
    return {f"p{p}": ordered[min(len(ordered) - 1, len(ordered) * p // 100)] for p in PERCENTILES} if ordered else {}


def memory(samples: Sequence[tuple[float, int]]) -> dict[str, float]:
    """Medians of the second and of the last quarter of the time: what a leak would make differ."""
    if len(samples) < 4:
        return {}
    quarter = len(samples) // 4
    sizes = [size for _, size in samples]
    early, late = statistics.median(sizes[quarter : 2 * quarter]), statistics.median(sizes[-quarter:])
    return {"early": early, "late": late, "most": max(sizes), "growth": late / early - 1}


def table(figures: dict[str, Any]) -> str:
    ends = ", ".join(f"{count} × {end}" for end, count in sorted(figures["ends"].items()))
    lines = [
        f"requests in {figures['elapsed']:.0f} s: {ends}; 429 without Retry-After: {figures['no_retry_after']}",
        f"generated: {figures['tokens']} tokens, {figures['tokens_per_second']:.1f} tokens/s"
        + (f", {1000 * figures['cpu_per_token']:.2f} ms of the server's CPU each" if figures["cpu_per_token"] else ""),
        "",
        "| milliseconds | " + " | ".join(f"p{p}" for p in PERCENTILES) + " |",
        "|---" * (1 + len(PERCENTILES)) + "|",
    ]
    names = {"first_token": "to the first token", "between_tokens": "between tokens", "whole": "whole answer"}
    for name, title in names.items():
        lines.append("| " + " | ".join([title, *(f"{1000 * v:.1f}" for v in figures[name].values())]) + " |")
    if sizes := figures["memory"]:
        early, late, most = (f"{sizes[name] / 2**20:.0f} MiB" for name in ("early", "late", "most"))
        growth = f"{100 * sizes['growth']:+.1f} %"
        lines.append(f"\nresident memory: {early} in the second quarter, {late} in the last ({growth}), {most} at most")
    if figures["held_up"] > 1:
        lines.append(f"this tool itself was held up for {figures['held_up']:.0f} s: times mean little")
    return "\n".join(lines)


class ServedEngine:
    """The engine without a server, in this process."""

    def __init__(self, folder: Path, server_args: str) -> None:
        from amq.runtime import load as load_runtime

        threads = argparse.ArgumentParser()
        threads.add_argument("--threads", type=int)
        self.runtime = load_runtime(folder, threads=threads.parse_known_args(shlex.split(server_args))[0].threads)

    def speed(self, prompt: str, tokens: int) -> tuple[float, float]:
        """Tokens per second after the first, and processor seconds per token."""
        from amq.runtime import Sampling, generate

        start = time.process_time()
        generation = generate(self.runtime, prompt, Sampling(max_new_tokens=tokens, ignore_end=True))
        for _ in generation:
            pass
        return generation.tokens_per_second, (time.process_time() - start) / tokens


@dataclass
class Turns:
    """What the rounds measured; a warm-up round is not in it. cpu: processor seconds per token."""

    totals: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    cpu: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    alone: list[float] = field(default_factory=list)
    bare: list[float] = field(default_factory=list)
    bare_cpu: list[float] = field(default_factory=list)


async def users_in_turns(
    client: httpx.AsyncClient,
    users: Sequence[int],
    size: Size,
    engine: ServedEngine | None,
    process: psutil.Process | None,
) -> dict[str, Any]:
    """Measures each number of users, and the engine, `rounds` times in turns, so that noise is fair to all."""
    model, vocabulary, tokens = await model_of(client), words(), size.tokens[1]
    prompts = [" ".join(vocabulary[500 * n : 500 * n + size.words[0]]) for n in range(max(users))]
    turns = Turns()
    for turn in range(size.rounds + 1):
        kept = turns if turn else Turns()  # the first round warms up
        for n in users:
            start, cpu = time.perf_counter(), cpu_seconds(process)
            speeds = await asyncio.gather(*(decode(client, model, prompt, tokens) for prompt in prompts[:n]))
            kept.totals[n].append(n * tokens / (time.perf_counter() - start))
            kept.cpu[n].append((cpu_seconds(process) - cpu) / (n * tokens))
            kept.alone += speeds if n == 1 else []
        if engine is not None:
            speed, cpu = engine.speed(prompts[0], tokens)
            kept.bare.append(speed)
            kept.bare_cpu.append(cpu)
    return said_of(turns, tokens, process is not None)


def said_of(turns: Turns, tokens: int, with_cpu: bool) -> dict[str, Any]:
    """Prints the table; the figures."""
    figures = {"answer_tokens": tokens, "together": {str(n): speeds_of(values) for n, values in turns.totals.items()}}
    cpu = {str(n): statistics.median(values) for n, values in turns.cpu.items()} if with_cpu else {}
    print("| users | tokens/s, all together | the best round | times one user | server's CPU ms per token |")
    print("|---|---|---|---|---|")
    first = next(iter(figures["together"].values()))
    for n, speed in figures["together"].items():
        milliseconds = f"{1000 * cpu[n]:.2f}" if cpu else "not on this machine"
        print(f"| {n} | {speed['median']:.1f} | {speed['best']:.1f} | {speed['median'] / first['median']:.2f} "
              f"| {milliseconds} |")  # fmt: skip
    figures["cpu_per_token"] = cpu
    if turns.bare and turns.alone:
        server, without = speeds_of(turns.alone), speeds_of(turns.bare)
        overhead = {which: 1 - server[which] / without[which] for which in ("median", "best")}
        engine_cpu = statistics.median(turns.bare_cpu)
        figures.update(server=server, engine=without, overhead=overhead, engine_cpu_per_token=engine_cpu)
        for which in overhead:  # noise only slows down: on a busy machine the best rounds say more than the medians
            print(f"one user after the first token, {which}: server {server[which]:.1f} tokens/s, engine alone "
                  f"{without[which]:.1f}, overhead {100 * overhead[which]:.1f} %")  # fmt: skip
        print(f"CPU ms per token, one user: server {1000 * cpu.get('1', 0):.2f}, engine alone {1000 * engine_cpu:.2f}")
    return figures


def cpu_seconds(process: psutil.Process | None) -> float:
    """Of all its threads, so far; 0 where it is another machine's."""
    if process is None:
        return 0.0
    times = process.cpu_times()
    return times.user + times.system


def speeds_of(values: list[float]) -> dict[str, Any]:
    return {"median": statistics.median(values), "best": max(values), "all": values}


async def decode(client: httpx.AsyncClient, model: str, prompt: str, tokens: int) -> float:
    """Streams one answer of `tokens`; tokens per second after the first, as the client sees them.

    Reads the socket itself: httpx takes a tenth of a millisecond per event, of the processor that the engine wants.
    """
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0.0, "ignore_eos": True}
    content = json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}})
    headers = {"Host": client.base_url.host, "Content-Type": "application/json", "Content-Length": len(content)}
    headers.update({"Connection": "close", "Authorization": client.headers.get("Authorization", "none")})
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    reader, writer = await asyncio.open_connection(client.base_url.host, client.base_url.port)
    writer.write(f"POST /v1/completions HTTP/1.1\r\n{head}\r\n{content}".encode())
    parts, times = [], []
    while part := await reader.read(2**16):
        parts.append(part)
        times.append((time.perf_counter(), b"data: {" in part))
    writer.close()
    answer = b"".join(parts)
    if not re.search(rb'"completion_tokens": ?%d\b' % tokens, answer):
        raise AmqError(f"expected an answer of {tokens} tokens, got: {answer[:500].decode()} …")
    texts = [when for when, event in times if event]
    return (tokens - 1) / (texts[-1] - texts[0])


if __name__ == "__main__":
    sys.exit(run_command(main))
