"""The thread that makes prompts: turns, bounds, who leaves, what fails."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the server needs the extra `serve`")

from helpers.serving import SECONDS  # noqa: E402

from amq.serve.answers import while_connected  # noqa: E402
from amq.serve.errors import ApiError, Gone  # noqa: E402
from amq.serve.prompts import PromptThread  # noqa: E402


def full() -> ApiError:
    return ApiError(429, "full")


def run(test: Callable[[PromptThread, threading.Event], Awaitable[Any]], room: int = 8) -> Any:
    """test: gets a thread that is held at its first function until the event is set."""

    async def body() -> Any:
        prompts, gate = PromptThread(room, full), threading.Event()
        prompts.start()
        began = asyncio.Event()
        loop = asyncio.get_running_loop()

        def hold() -> bool:
            loop.call_soon_threadsafe(began.set)
            return gate.wait(SECONDS)

        holder = asyncio.ensure_future(prompts.make("holder", hold))
        await began.wait()
        try:
            return await asyncio.wait_for(test(prompts, gate), SECONDS)
        finally:
            gate.set()
            assert await holder
            prompts.stop()
            await asyncio.to_thread(prompts._thread.join, SECONDS)
            assert not prompts._thread.is_alive()

    return asyncio.run(body())


async def begun(*work: Any) -> list[asyncio.Future[Any]]:
    """Tasks that have come as far as they can."""
    tasks = [asyncio.ensure_future(one) for one in work]
    for _ in range(3):
        await asyncio.sleep(0)
    return tasks


def test_who_is_made_when_the_server_ends_harms_nothing():
    """What came of it, nobody waits for."""
    gate, failures = threading.Event(), []
    prompts = PromptThread(8, full)

    async def leaves() -> None:
        prompts.start()
        await begun(prompts.make("a", lambda: gate.wait(SECONDS)))
        prompts.stop()

    hook, threading.excepthook = threading.excepthook, failures.append
    try:
        asyncio.run(leaves())
        gate.set()
        prompts._thread.join(SECONDS)
    finally:
        threading.excepthook = hook
    assert not prompts._thread.is_alive() and not failures


def test_clients_take_turns():
    order: list[str] = []

    async def test(prompts: PromptThread, gate: threading.Event) -> None:
        names = ("a1", "a2", "a3", "b1", "c1", "b2")
        tasks = await begun(*(prompts.make(name[0], lambda name=name: order.append(name)) for name in names))
        gate.set()
        await asyncio.gather(*tasks)

    run(test)
    assert order == ["a1", "b1", "c1", "a2", "b2", "a3"]


def test_a_full_room_refuses_the_busiest():
    async def test(prompts: PromptThread, gate: threading.Event) -> list[Any]:
        tasks = await begun(*(prompts.make(name, lambda: "made") for name in "aaaba"))
        gate.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    made = run(test, room=3)
    assert [getattr(one, "status", one) for one in made] == ["made", "made", 429, "made", 429]


def test_who_leaves_costs_nothing():
    made: list[str] = []

    async def test(prompts: PromptThread, gate: threading.Event) -> None:
        left, stays = await begun(*(prompts.make("a", lambda n=name: made.append(n)) for name in ("left", "stays")))
        left.cancel()
        await asyncio.wait([left])
        gate.set()
        await stays

    run(test)
    assert made == ["stays"]


def test_what_fails_is_its_callers_alone():
    class Panic(BaseException):
        """As a Rust library raises it."""

    def panic() -> None:
        raise Panic("at the disco")

    async def test(prompts: PromptThread, gate: threading.Event) -> list[Any]:
        gate.set()
        work = [prompts.make("a", panic), prompts.make("a", lambda: 1 // 0), prompts.make("a", lambda: 7)]
        return await asyncio.gather(*work, return_exceptions=True)

    panicked, divided, made = run(test)
    assert isinstance(panicked, RuntimeError) and "disco" in str(panicked)
    assert isinstance(divided, ZeroDivisionError) and made == 7


def test_work_ends_when_the_client_leaves_or_time_does():
    async def never() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    async def gone() -> dict[str, str]:
        return {"type": "http.disconnect"}

    async def stays() -> dict[str, str]:
        await asyncio.Event().wait()
        raise AssertionError

    async def test() -> None:
        with pytest.raises(Gone):
            await while_connected(gone, never())
        with pytest.raises(ApiError) as late:
            await while_connected(stays, never(), 0.01)
        assert late.value.status == 504

        async def now() -> int:
            return 3

        assert await while_connected(stays, now()) == 3

    ended: list[bool] = []
    asyncio.run(test())
    assert ended == [True, True]
