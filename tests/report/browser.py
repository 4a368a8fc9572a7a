"""A headless Chromium, driven by its chromedriver over HTTP (W3C WebDriver); no package needed."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
DRIVER = shutil.which("chromedriver")
MISSING = (
    ""
    if CHROMIUM and DRIVER
    else "no chromium and chromedriver here (Debian: chromium, chromium-driver)"
)

_OPTIONS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]


class Browser:
    """One window."""

    def __init__(self, port: int) -> None:
        self._port, self._session = port, ""
        wanted = {
            "goog:chromeOptions": {"binary": CHROMIUM, "args": _OPTIONS},
            "goog:loggingPrefs": {"browser": "ALL"},
        }
        answer = self._ask("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self._session = f"/session/{answer['sessionId']}"

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = json.dumps(body) if body is not None else None
        link = http.client.HTTPConnection("localhost", self._port, timeout=120)
        try:
            link.request(method, self._session + path, data, {"Content-Type": "application/json"})
            answer = link.getresponse()
            found = json.loads(answer.read())["value"]
        finally:
            link.close()
        if answer.status != 200:
            raise RuntimeError(str(found)[:2000])
        return found

    def open(self, path: Path, width: int = 1600, height: int = 1000, theme: str = "light") -> None:
        """Load a file into a window of that size, under that colour scheme of the system."""
        self.devtools(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=width < 600,
        )  # fmt: skip
        features = [{"name": "prefers-color-scheme", "value": theme}]
        self.devtools("Emulation.setEmulatedMedia", media="", features=features)
        self._ask("POST", "/url", {"url": path.resolve().as_uri()})
        for _ in range(600):  # the page's script starts behind the first paint
            if self.run("return 'ready' in document.documentElement.dataset"):
                return
            time.sleep(0.05)
        raise RuntimeError("the page's script has not run")

    def devtools(self, command: str, **params: Any) -> Any:
        """A command of the DevTools protocol."""
        return self._ask("POST", "/goog/cdp/execute", {"cmd": command, "params": params})

    def run(self, script: str, *args: Any) -> Any:
        """The value that JavaScript returns."""
        return self._ask("POST", "/execute/sync", {"script": script, "args": list(args)})

    def click(self, selector: str) -> None:
        """A real click of the mouse: what something else covers can't be clicked."""
        found = self._ask("POST", "/element", {"using": "css selector", "value": selector})
        self._ask("POST", f"/element/{next(iter(found.values()))}/click", {})

    def type(self, selector: str, text: str) -> None:
        """Type into an element."""
        found = self._ask("POST", "/element", {"using": "css selector", "value": selector})
        self._ask("POST", f"/element/{next(iter(found.values()))}/value", {"text": text})

    def log(self) -> list[dict[str, Any]]:
        """What came to the console since it was asked last."""
        found: list[dict[str, Any]] = self._ask("POST", "/se/log", {"type": "browser"})
        return found

    def screenshot(self, path: Path) -> None:
        """What the window shows."""
        path.write_bytes(base64.b64decode(self._ask("GET", "/screenshot")))

    def close(self) -> None:
        """End the session."""
        self._ask("DELETE", "")


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """A browser that ends with the block."""
    assert DRIVER is not None
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    silent = subprocess.DEVNULL
    driver = subprocess.Popen([DRIVER, f"--port={port}"], stdout=silent, stderr=silent)
    try:
        for _ in range(300):
            with contextlib.suppress(OSError), socket.create_connection(("localhost", port), 1):
                break
            time.sleep(0.1)
        window = Browser(port)
        try:
            yield window
        finally:
            window.close()
    finally:
        driver.terminate()
        driver.wait(10)
