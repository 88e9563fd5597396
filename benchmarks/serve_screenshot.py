"""Pictures of the chat page for the documents: `python benchmarks/serve_screenshot.py DIR docs`.

Starts a server on DIR, asks in headless Chromium, and writes into the folder

    chat.png           in the middle of an answer
    chat-tools.png     a call, and the result that the reader is about to send
    chat-json.png      an answer by a JSON schema; dark
    chat-thinking.png  thinking, unfolded; narrow. Where the model does not think, a stand-in does: the picture says so

A picture of what the model lacks is left out, and that is said. With --only NAME, just that one.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from serving import serving

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from helpers import chromium  # noqa: E402
from helpers.chat_stand_in import Handler, StandIn  # noqa: E402

ENOUGH = 350
"""Characters of the answer in whose middle chat.png is taken."""

PATIENCE = 300.0
"""Seconds for an answer."""

WEATHER = {
    "name": "get_weather",
    "description": "The weather of today in a city",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 40}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
CITY = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "country": {"type": "string"},
        "sights": {"type": "array", "items": {"type": "string", "maxLength": 30}, "minItems": 3, "maxItems": 4},
        "capital": {"type": "boolean"},
    },
    "required": ["city", "country", "sights", "capital"],
    "additionalProperties": False,
}
THOUGHT = (
    "Both have the same whole part, 9. After the point stand 11 and 9, but these are hundredths and tenths: "
    "0.11 and 0.90. So 9.9 is the larger one."
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="DIR")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where the pictures go")
    parser.add_argument("--only", choices=[picture.name for picture in PICTURES], metavar="NAME", help="such as chat")
    args = parser.parse_args()
    with (
        serving(args.model, []) as (url, _),
        standing_in() as stand_in,
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile,
        chromium.Page(Path(profile), timeout=PATIENCE) as page,
    ):
        for picture in PICTURES:
            if args.only in (None, picture.name):
                take(page, picture, url, stand_in, args.folder / f"{picture.name}.png")


@dataclass(frozen=True)
class Picture:
    """What is done on the page before a picture of it is taken.

    needs: of the model's capabilities. stand_in: who is asked where the model lacks it. size: CSS pixels, the picture
    has twice as many. settings: of the page.
    """

    name: str
    ask: Callable[[chromium.Page], None]
    needs: str = ""
    stand_in: bool = False
    size: tuple[int, int] = (900, 760)
    dark: bool = False
    settings: dict[str, Any] = field(default_factory=dict)


def take(page: chromium.Page, picture: Picture, url: str, stand_in: str, path: Path) -> None:
    width, height = picture.size
    page.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=2, mobile=False)
    theme = {"name": "prefers-color-scheme", "value": "dark" if picture.dark else "light"}
    page.call("Emulation.setEmulatedMedia", features=[theme])
    page.open(f"{url}/?{picture.name}")
    page.wait("server.model")
    if picture.needs and not page.run(f"Boolean(server.capabilities[{json.dumps(picture.needs)}])"):
        print(f"{path}: this model has no {picture.needs}; {'a stand-in is asked' if picture.stand_in else 'left out'}")
        if not picture.stand_in:
            return
        page.open(stand_in)
        page.wait("server.model")
    settings = {"temperature": "0", "max_tokens": "200", **picture.settings}
    page.run(f"newChat(), Object.assign(settings, {json.dumps(settings)}), showUsage()")
    picture.ask(page)
    path.parent.mkdir(parents=True, exist_ok=True)
    page.screenshot(path)
    print(path)


def ask(page: chromium.Page, text: str, finished: bool = True) -> None:
    page.run("document.querySelector('#message').focus()")
    page.write(text)
    page.press("Enter")
    if finished:
        until(page, "!running")


def until(page: chromium.Page, condition: str) -> None:
    """Raises RuntimeError where the server refuses instead."""
    page.wait(f"Boolean(turns.at(-1).problem) || ({condition})", PATIENCE)
    if problem := page.run("turns.at(-1).problem"):
        raise RuntimeError(f"{problem['message']} ({problem['details']})")


def half_an_answer(page: chromium.Page) -> None:
    ask(page, "What is the capital of France?")
    ask(page, "Explain step by step how a hash table works, with an example in Python.", finished=False)
    until(page, f"turns.at(-1).view.text.innerText.length > {ENOUGH} || !running")
    if page.run("!running"):
        print(f"the answer ended before {ENOUGH} characters: the picture is not of a running one")


def a_call(page: chromium.Page) -> None:
    ask(page, "What is the weather in Paris? Is it warm enough for a walk?")
    until(page, "waitsForResults(turns.at(-1))")
    page.write('{"sky": "clear", "celsius": 21.5, "wind": "light"}')


def an_object(page: chromium.Page) -> None:
    ask(page, "Describe Paris for a tourist.")


def a_thought(page: chromium.Page) -> None:
    ask(page, "Which is larger, 9.11 or 9.9?")
    page.run("document.querySelector('.thought').open = true")
    page.run("toEnd()")


PICTURES = (
    Picture("chat", half_an_answer),
    Picture(
        "chat-tools",
        a_call,
        "tools",
        settings={"tools": json.dumps([WEATHER]), "tool_choice": "one"},
    ),
    Picture("chat-json", an_object, "json", dark=True, settings={"json": True, "schema": json.dumps(CITY)}),
    Picture("chat-thinking", a_thought, "thinking", stand_in=True, size=(360, 640), settings={"max_tokens": ""}),
)


class Thinker(Handler):
    """Thinks, then answers, at the pace of a small model."""

    def reply(self, last: dict[str, Any]) -> None:
        self.begin()
        for name, text in (("reasoning_content", THOUGHT), ("content", "**9.9** is larger than 9.11.")):
            for word in text.split(" "):
                self.delta({name: word + " "})
                time.sleep(0.02)
        self.delta({}, "stop")


@contextmanager
def standing_in() -> Iterator[str]:
    """The URL of a server without a model."""
    server = StandIn(Thinker, "no model")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.url
    server.shutdown()
    server.server_close()


if __name__ == "__main__":
    main()
