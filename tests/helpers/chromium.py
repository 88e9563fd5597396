"""Drives headless Chromium through the DevTools protocol over a pipe: nothing to install but the browser."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

EXECUTABLE = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-extensions", "--hide-scrollbars"),
    "--disable-dev-shm-usage",  # containers give /dev/shm 64 MB
)
KEYS = {"Enter": (13, "\r"), "Escape": (27, ""), "Tab": (9, "")}
SECONDS = 60.0
"""How long anything may take before a test fails; far above what it takes, because machines are busy at times."""


class Page:
    """A browser with one page. Use as a context manager.

    folder: an empty one, for the browser's profile. size: of the window, CSS pixels.
    Raises RuntimeError for what goes wrong in the page or the browser, TimeoutError where something does not come.
    """

    def __init__(self, folder: Path, size: tuple[int, int] = (900, 900), timeout: float = SECONDS) -> None:
        self.timeout, self.count, self.rest = timeout, 0, b""
        self.messages: list[str] = []
        """What the page wrote to its console, and exceptions that nothing caught."""
        theirs_in, self.commands = os.pipe()
        self.answers, theirs_out = os.pipe()
        shell = f'exec "$@" 3</dev/fd/{theirs_in} 4>/dev/fd/{theirs_out}'  # the two that the protocol uses
        command = [str(EXECUTABLE), *FLAGS, f"--user-data-dir={folder}", f"--window-size={size[0]},{size[1]}"]
        self.process = subprocess.Popen(
            ["sh", "-c", shell, "sh", *command, "--remote-debugging-pipe", "about:blank"],
            pass_fds=(theirs_in, theirs_out),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self.session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Page:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
        os.close(self.commands)
        os.close(self.answers)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command of the protocol and its result."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + self.timeout
        while True:
            answer = self._read(deadline, method)
            if answer.get("id") == self.count:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            if answer.get("method") == "Runtime.consoleAPICalled":
                self.messages.append(
                    " ".join(str(a.get("value", a.get("description"))) for a in answer["params"]["args"])
                )
            elif answer.get("method") == "Runtime.exceptionThrown":
                self.messages.append(json.dumps(answer["params"]["exceptionDetails"]))

    def _read(self, deadline: float, method: str) -> dict[str, Any]:
        while b"\0" not in self.rest:
            if not select.select([self.answers], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError(f"{method}: no answer from the browser in {self.timeout} s")
            data = os.read(self.answers, 1 << 20)
            if not data:
                raise RuntimeError(f"{method}: the browser ended, status {self.process.poll()}")
            self.rest += data
        message, self.rest = self.rest.split(b"\0", 1)
        return json.loads(message)

    def run(self, script: str) -> Any:
        """The JSON value of a JavaScript expression in the page."""
        result = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in result:
            raise RuntimeError(f"{script}: {result['exceptionDetails']}")
        return result["result"].get("value")

    def wait(self, condition: str, seconds: float = SECONDS) -> Any:
        """The expression's value as soon as it is true."""
        deadline = time.monotonic() + seconds
        while not (value := self.run(condition)):
            if time.monotonic() > deadline:
                shown = self.run("document.body.innerText")
                raise TimeoutError(f"not true in {seconds} s: {condition}\nconsole: {self.messages}\npage: {shown}")
            time.sleep(0.02)
        return value

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.wait(f"location.href.startsWith({json.dumps(url)}) && document.readyState === 'complete'")

    def write(self, text: str) -> None:
        """Types into what has the focus."""
        self.call("Input.insertText", text=text)

    def press(self, key: str, shift: bool = False) -> None:
        code, text = KEYS[key]
        common = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": 8 if shift else 0}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **common)
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))
