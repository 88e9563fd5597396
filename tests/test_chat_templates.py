"""amq.runtime.templates: chat templates that never end, or take all memory, in a process of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from amq.errors import AmqError
from amq.runtime import templates
from amq.runtime.chat import ChatOptions, render_chat
from amq.runtime.templates import BoundedRenderer

HELLO = [{"role": "user", "content": "hi <日本> \ud800"}]
PLAIN = "{{ bos_token }}{% for m in messages %}{{ m | tojson }}{% endfor %}{{ tools | tojson }}{{ mood }}"
LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
LONG_SECONDS = 60.0
"""Beyond what any conversation takes here on a busy machine."""


@pytest.fixture(scope="module")
def renderer() -> Iterator[BoundedRenderer]:
    with BoundedRenderer(LONG_SECONDS) as renderer:
        yield renderer


def pid(renderer: BoundedRenderer) -> int:
    assert renderer._process is not None
    return renderer._process.pid


def test_it_renders_as_in_this_process(renderer: BoundedRenderer) -> None:
    options = ChatOptions(tools=[{"name": "f"}], names={"mood": "fine"})
    text = renderer(PLAIN, HELLO, {"bos_token": "<s>"}, options)
    assert text == render_chat(PLAIN, HELLO, {"bos_token": "<s>"}, options) and text.startswith('<s>{"role"')
    going_on = ChatOptions(add_generation_prompt=False, continue_final_message=True)
    assert renderer("{{ messages[0].content }}!", HELLO, {}, going_on) == "hi <日本> \ud800"
    for template, message in (("{{ raise_exception('no') }}", r"conversation \(no\)"), ("{% for", "chat template")):
        with pytest.raises(AmqError, match=message):
            renderer(template, HELLO, {})
    with pytest.raises(AmqError, match="cannot be written as JSON"):
        renderer(PLAIN, [{"role": object()}], {})
    long = [{"role": "user", "content": "é" * 2**20}] * 2
    assert renderer("{% for m in messages %}{{ m.content }}{% endfor %}", long, {}) == "é" * 2**21


def test_every_thread_gets_its_own_answer(renderer: BoundedRenderer) -> None:
    found: dict[int, str] = {}

    def ask(number: int) -> None:
        found[number] = renderer("{{ messages[0].content }}", [{"content": str(number)}], {})

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: str(number) for number in range(8)}


def test_a_template_that_takes_too_long() -> None:
    with BoundedRenderer(seconds=0.5) as renderer:
        with pytest.raises(AmqError, match=r"chat template took longer than 0\.5 s"):
            renderer(LOOPS, HELLO, {})
        assert renderer._process is None
        renderer._seconds = LONG_SECONDS
        assert renderer("{{ messages | length }}", HELLO, {}) == "1"  # another process


def test_a_template_that_takes_too_much_memory(renderer: BoundedRenderer) -> None:
    for template in ("{{ ('a' * n) | length }}", "{% set x = ['a' * 1000] * n %}{{ x | join | length }}"):
        with pytest.raises(AmqError, match=r"needs more than 512 MiB of memory"):
            renderer(template, HELLO, {}, ChatOptions(names={"n": 2 * 10**9}))
        assert renderer("{{ messages | length }}", HELLO, {}) == "1"


def test_a_text_that_is_too_long(renderer: BoundedRenderer) -> None:
    with pytest.raises(AmqError, match=f"makes {templates.TEXT + 1} characters"):
        renderer("{{ 'a' * n }}", HELLO, {}, ChatOptions(names={"n": templates.TEXT + 1}))
    with pytest.raises(AmqError, match="x{400}") as raised:
        renderer("{{ raise_exception('x' * 1000000) }}", HELLO, {})
    assert len(str(raised.value)) < 1000


def test_a_process_that_somebody_kills_is_started_again(renderer: BoundedRenderer) -> None:
    assert renderer("{{ messages | length }}", HELLO, {}) == "1"
    process = renderer._process
    assert process is not None
    process.kill()
    process.wait()
    assert renderer("{{ messages | length }}", HELLO, {}) == "1" and pid(renderer) != process.pid


def test_one_that_dies_meanwhile_is_an_error(renderer: BoundedRenderer) -> None:
    assert renderer("{{ messages | length }}", HELLO, {}) == "1"
    process = renderer._process
    assert process is not None
    timer = threading.Timer(0.2, process.kill)
    timer.start()
    with pytest.raises(AmqError, match=r"ended its process \(status -9\)"):
        renderer(LOOPS, HELLO, {})
    timer.join()


def test_close_ends_it() -> None:
    renderer = BoundedRenderer(LONG_SECONDS)
    renderer.close()  # before it was started
    with pytest.raises(AmqError, match="closed"):
        renderer(PLAIN, HELLO, {})
    with BoundedRenderer(LONG_SECONDS) as renderer:
        renderer("", HELLO, {})
        process = renderer._process
    assert process is not None and process.returncode is not None


def test_a_python_that_cannot_be_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/no/python")
    with pytest.raises(AmqError, match="a process of their own: /no/python"):
        BoundedRenderer()(PLAIN, HELLO, {})
    monkeypatch.setattr(sys, "executable", "")
    with pytest.raises(AmqError, match=r"does not know its sys\.executable"):
        BoundedRenderer()(PLAIN, HELLO, {})
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(AmqError, match="does not start"):
        BoundedRenderer()(PLAIN, HELLO, {})


def test_it_ends_with_the_process_that_started_it() -> None:
    """Killed, so that nothing tells it to end but its stdin's end."""
    code = (
        "import os, signal; from amq.runtime.templates import BoundedRenderer; r = BoundedRenderer(60)\n"
        "r('', [], {}); print(r._process.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    child = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout)
    until = time.monotonic() + 60
    while running(child):
        assert time.monotonic() < until, "it outlived its parent"
        time.sleep(0.05)


def running(process: int) -> bool:
    """A zombie, which nobody has waited for yet, has ended."""
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_it_imports_next_to_nothing() -> None:
    code = (
        "import sys, json; from amq.runtime.chat import render_chat; import amq.runtime.templates\n"
        "render_chat('', [], {}); print(json.dumps(sorted(sys.modules)))"
    )
    command = [sys.executable, "-I", "-S", "-c", f"import sys; sys.path[:] = {sys.path!r}\n{code}"]
    modules: list[Any] = json.loads(subprocess.run(command, capture_output=True, check=True, cwd=os.sep).stdout)
    assert "jinja2" in modules
    assert not {"torch", "numpy", "tokenizers", "transformers", "msgspec", "yaml"} & set(modules)
