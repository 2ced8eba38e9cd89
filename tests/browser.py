"""A headless Chromium, driven through its pipe: what a page complains of, holds and looks like."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--remote-debugging-pipe",
)  # fmt: skip
PATIENCE = 60.0  # seconds for one answer


class Browser:
    """One page; see :func:`browser`."""

    def __init__(self, to: int, answers: int) -> None:
        self._to, self._from = to, answers
        self._count, self._rest = 0, b""
        self._session = ""
        self.events: list[dict[str, Any]] = []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        given = self._call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = given["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")

    def open(self, path: Path, *, width: int = 1200, height: int = 900, dark: bool = False) -> None:
        """Load a file and wait until it stands."""
        self.events.clear()
        self._call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=False,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[scheme])
        self._call("Page.navigate", url=path.resolve().as_uri())
        until = time.monotonic() + PATIENCE
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            assert time.monotonic() < until, "the page does not load"
            self._read()

    def ask(self, expression: str) -> Any:
        """The value of an expression in the page."""
        found = self._call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def complaints(self) -> list[str]:
        """What the console, the log and uncaught errors have said."""
        self.ask("1")  # what was said before has arrived by then
        return [
            json.dumps(event["params"])
            for event in self.events
            if event["method"]
            in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        ]

    def requests(self) -> list[str]:
        """Every address that was asked for."""
        return [
            event["params"]["request"]["url"]
            for event in self.events
            if event["method"] == "Network.requestWillBeSent"
        ]

    def picture(self, path: Path) -> None:
        """The whole page as a PNG."""
        found = self._call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(found["data"]))

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        self._count += 1
        asked: dict[str, Any] = {"id": self._count, "method": method, "params": params}
        if self._session:
            asked["sessionId"] = self._session
        os.write(self._to, json.dumps(asked).encode() + b"\0")
        until = time.monotonic() + PATIENCE
        while True:
            assert time.monotonic() < until, f"{method} is not answered"
            said = self._read()
            if said.get("id") == self._count:
                assert "error" not in said, said
                return dict(said["result"])

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            more = os.read(self._from, 2**16)
            assert more, "the browser has ended"
            self._rest += more
        line, _, self._rest = self._rest.partition(b"\0")
        said: dict[str, Any] = json.loads(line)
        if "method" in said:
            self.events.append(said)
        return said


@contextmanager
def browser() -> Iterator[Browser]:
    """A browser with nothing of its own, for as long as the block runs."""
    assert CHROMIUM is not None
    to_child, to = os.pipe()
    answers, from_child = os.pipe()
    home = tempfile.mkdtemp(prefix="chromium-")

    def lay_pipes() -> None:  # it reads from 3 and writes to 4
        spare = [os.dup(to_child), os.dup(from_child)]
        os.dup2(spare[0], 3)
        os.dup2(spare[1], 4)

    child = subprocess.Popen(
        [CHROMIUM, *FLAGS, f"--user-data-dir={home}"],
        close_fds=False, preexec_fn=lay_pipes, start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(to_child)
    os.close(from_child)
    try:
        yield Browser(to, answers)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, 9)
        child.wait()
        os.close(to)
        os.close(answers)
        shutil.rmtree(home, ignore_errors=True)
