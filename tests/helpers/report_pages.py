"""What tests of reports look at: the page as a browser reads it, its charts' rows, and how much a picture shows."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from helpers import chromium


class Page(HTMLParser):
    """What a page would load, its headings, its visible text, and the specifications of its charts."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.html = (folder / "report.html").read_text(encoding="utf-8")
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.text, self.hidden, self.headings = "", False, list[str]()
        self.feed(self.html)
        self.specs: dict[str, Any] = json.loads(re.search(r"^const specs = (.*), themes = ", self.html, re.M)[1])

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.hidden = tag in ("script", "style")
        self.loads += [f"{tag} {key}={value}" for key, value in attributes if key in ("src", "href", "data", "poster")]

    def handle_endtag(self, tag: str) -> None:
        self.hidden = False

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.text += f" {data}"
            if self.tags[-1:] == ["h2"] and data.strip():
                self.headings.append(data)

    @property
    def words(self) -> str:
        return " ".join(self.text.split())


def pixels(path: Path) -> set[bytes]:
    """The distinct bytes of a PNG's filtered rows, 8 at a time: a blank picture has a handful."""
    data, at, packed = path.read_bytes(), 8, b""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    while at < len(data):
        size, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        packed += data[at + 8 : at + 8 + size] if kind == b"IDAT" else b""
        at += 12 + size
    raw = zlib.decompress(packed)
    return {raw[i : i + 8] for i in range(0, len(raw), 8)}


def rows(spec: Any) -> list[dict[str, Any]]:
    """All rows of data in a specification."""
    parts = spec.values() if isinstance(spec, dict) else spec if isinstance(spec, list) else ()
    own = spec["data"].get("values", []) if isinstance(spec, dict) and "data" in spec else []
    return [*own, *(row for part in parts for row in rows(part))]


@contextmanager
def browse(report: Path, profile: Path, scheme: str, charts: int) -> Iterator[chromium.Page]:
    """The report in a browser without a network, after a look at it wide and narrow. scheme: light or dark."""
    with chromium.Page(profile, timeout=60) as page:
        page.call("Network.enable")
        page.call("Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=0, uploadThroughput=0)
        page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        for width in (1400, 400):
            size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
            page.call("Emulation.setDeviceMetricsOverride", **size)
            page.open("about:blank")
            page.open(report.as_uri())
            page.wait(f"document.querySelectorAll('.chart svg').length == {charts}", 60)
            assert page.run("document.documentElement.scrollWidth") == width
            widths = page.run("[...document.querySelectorAll('.chart svg')].map(svg => svg.clientWidth)")
            assert all(300 < w <= width for w in widths)
            assert page.messages == [], "Vega warns in the console"
        shade = page.run("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).reduce((a, b) => a + +b, 0)")
        assert (shade < 200) == (scheme == "dark")
        yield page
