"""The picture of the chat page for the README: `python benchmarks/serve_screenshot.py DIR docs/chat.png`.

Starts a server on DIR, asks in headless Chromium and takes the picture in the middle of the second answer.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from serve_load import serving

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from helpers import chromium  # noqa: E402

QUESTIONS = (
    "What is the capital of France?",
    "Explain step by step how a hash table works, with an example in Python.",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="DIR")
    parser.add_argument("picture", type=Path, metavar="PNG")
    parser.add_argument("--question", action="append", metavar="TEXT", help="one or more; default: two")
    parser.add_argument("--characters", type=int, default=350, help="of the last answer, when the picture is taken")
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--size", default="900x760", metavar="WxH", help="CSS pixels; the picture has twice as many")
    args = parser.parse_args()
    width, height = map(int, args.size.split("x"))
    with (
        serving(args.model, []) as (url, _),
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile,
        chromium.Page(Path(profile)) as page,
    ):
        page.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=2, mobile=False)
        theme = {"name": "prefers-color-scheme", "value": "dark" if args.dark else "light"}
        page.call("Emulation.setEmulatedMedia", features=[theme])
        page.open(url)
        page.run("localStorage.setItem('amq.util.settings', JSON.stringify({temperature: '0', max_tokens: '400'}))")
        page.open(f"{url}/?settings")
        page.wait("server.model")
        *first, last = args.question or QUESTIONS
        for question in first:
            ask(page, question)
            page.wait("document.querySelector('#stop').hidden", 120)
        ask(page, last)
        enough = f"turns.at(-1).view.text.innerText.length > {args.characters}"
        page.wait(f"{enough} || document.querySelector('#stop').hidden", 120)
        page.screenshot(args.picture)
        if page.run("document.querySelector('#stop').hidden"):
            print(f"the answer ended before {args.characters} characters: the picture is not of a running one")


def ask(page: chromium.Page, text: str) -> None:
    page.run("document.querySelector('#message').focus()")
    page.write(text)
    page.press("Enter")


if __name__ == "__main__":
    main()
