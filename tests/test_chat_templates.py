"""amq.runtime.templates: chat templates that never end, or take all memory, in a process of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from amq.errors import AmqError
from amq.runtime import templates
from amq.runtime.chat import ChatOptions, render_chat
from amq.runtime.templates import BoundedRenderer

HELLO = [{"role": "user", "content": "hi <日本> \ud800"}]
PLAIN = "{{ bos_token }}{% for m in messages %}{{ m | tojson }}{% endfor %}{{ tools | tojson }}{{ mood }}"
ENDLESS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "quadratic": "{% set n = namespace(s='') %}{% for a in range(99999) %}{% set n.s = 'a' ~ n.s ~ 'a' * 100 %}"
    "{% endfor %}",
}
LONG_SECONDS = 60.0
"""Beyond what any conversation takes here on a busy machine."""


@pytest.fixture(scope="module")
def renderer() -> Iterator[BoundedRenderer]:
    with closing(BoundedRenderer(LONG_SECONDS)) as renderer:
        yield renderer


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


@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_that_takes_too_long(name: str) -> None:
    with closing(BoundedRenderer(seconds=0.5)) as renderer:
        with pytest.raises(AmqError, match=r"model's chat template takes more than 0\.5 s of a processor"):
            renderer(ENDLESS[name], HELLO, {})
        assert renderer("{{ messages | length }}", HELLO, {}) == "1"  # another process


def test_a_template_that_takes_too_much_memory(renderer: BoundedRenderer) -> None:
    for template in ("{{ ('a' * n) | length }}", "{% set x = ['a' * 1000] * n %}{{ x | join | length }}"):
        with pytest.raises(AmqError, match=r"takes more than 512 MiB of memory"):
            renderer(template, HELLO, {}, ChatOptions(names={"n": 2 * 10**9}))
        assert renderer("{{ messages | length }}", HELLO, {}) == "1"


def test_a_text_that_is_too_long(renderer: BoundedRenderer) -> None:
    with pytest.raises(AmqError, match=f"makes {templates.TEXT + 1} characters"):
        renderer("{{ 'a' * n }}", HELLO, {}, ChatOptions(names={"n": templates.TEXT + 1}))
    with pytest.raises(AmqError, match="x{400}") as raised:
        renderer("{{ raise_exception('x' * 1000000) }}", HELLO, {})
    assert len(str(raised.value)) < 1000


def test_it_imports_next_to_nothing() -> None:
    code = (
        "import sys, json; from amq.runtime.chat import render_chat; import amq.runtime.templates\n"
        "render_chat('', [], {}); print(json.dumps(sorted(sys.modules)))"
    )
    command = [sys.executable, "-I", "-S", "-c", f"import sys; sys.path[:] = {sys.path!r}\n{code}"]
    modules: list[Any] = json.loads(subprocess.run(command, capture_output=True, check=True, cwd=os.sep).stdout)
    assert "jinja2" in modules
    assert not {"torch", "numpy", "tokenizers", "transformers", "msgspec", "yaml"} & set(modules)
