"""A real headless Chromium, driven through ChromeDriver's WebDriver interface by plain HTTP."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import urllib3
from service import wait_until

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")

# As root Chromium has no sandbox; the others keep it from asking anything of the network by itself.
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1280,900",
)
KEYS = {"Enter": "\ue007", "Escape": "\ue00c"}
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"


def require_chromium() -> None:
    """Skips where there is no Chromium; fails in CI, which has to install it."""
    if not (CHROMIUM and DRIVER):
        reason = "needs Debian's packages chromium and chromium-driver"
        pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)


class Browser:
    """One window. Elements are named by CSS selectors; each look waits for its element with a deadline."""

    def __init__(self, driver_url: str, folder: Path) -> None:
        self.downloads = folder / "downloads"
        self._http = urllib3.PoolManager(retries=False, timeout=60)
        chrome = {
            "binary": CHROMIUM,
            "args": [*FLAGS, f"--user-data-dir={folder / 'profile'}"],
            "prefs": {"download.default_directory": str(self.downloads)},
        }
        wanted = {"goog:chromeOptions": chrome, "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}}
        self._session = f"{driver_url}/session"
        made = self._call("POST", "", {"capabilities": {"alwaysMatch": wanted}})
        self._session += f"/{made['sessionId']}"
        self._call("POST", "/url", {"url": "about:blank"})  # Chromium's own first page asks for much.

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        sent = json.dumps(body if body is not None else {}).encode() if method == "POST" else None
        answer = self._http.request(method, self._session + path, body=sent, headers={"Content-Type": "application/json"})
        value = json.loads(answer.data)["value"]
        assert answer.status == 200, f"{method} {path}: {value['error']}: {value['message']}"
        return value

    def open(self, url: str) -> None:
        """Load a page anew, even where only the part behind # differs."""
        self._call("POST", "/url", {"url": "about:blank"})
        self._call("POST", "/url", {"url": url})

    def run(self, script: str, *arguments: Any) -> Any:
        """What the body of a function in the page returns."""
        return self._call("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def text(self, selector: str) -> str | None:
        """The text of the first such element, as a reader sees it; None where there is none."""
        found: str | None = self.run("return document.querySelector(arguments[0])?.innerText", selector)
        return found

    def sees(self, selector: str, wanted: str = "", seconds: float = 15) -> str:
        """The text of the first such element once it contains `wanted`; AssertionError after `seconds`."""
        last: list[str | None] = [None]

        def look() -> bool:
            last[0] = self.text(selector)
            return last[0] is not None and wanted in last[0]

        try:
            wait_until(look, seconds)
        except AssertionError:
            raise AssertionError(f"{selector!r} does not show {wanted!r} but {last[0]!r}; the page: {self.text('body')}") from None
        return str(last[0])

    def gone(self, selector: str) -> None:
        """Wait until there is no such element."""
        wait_until(lambda: self.text(selector) is None, what=f"the end of {selector}")

    def click(self, selector: str) -> None:
        """A mouse click in the middle of the element; the page may draw it anew meanwhile."""

        def clicked() -> bool:
            element = self.run("return document.querySelector(arguments[0])", selector)
            if not element:
                return False
            answer = self._http.request("POST", f"{self._session}/element/{element[ELEMENT]}/click", body=b"{}")
            return answer.status == 200

        wait_until(clicked, what=f"a click on {selector}")

    def click_text(self, text: str, within: str = "body") -> None:
        """A click on the button or link that reads so."""
        mark = (
            "return [...document.querySelectorAll(arguments[0] + ' :is(button, a)')].find((one) => one.innerText.trim() === arguments[1])"
        )

        def clicked() -> bool:
            element = self.run(mark, within, text)
            return (
                bool(element) and self._http.request("POST", f"{self._session}/element/{element[ELEMENT]}/click", body=b"{}").status == 200
            )

        wait_until(clicked, what=f"a click on {text!r}")

    def press(self, *keys: str) -> None:
        """Type into what has the focus: characters, or the names in KEYS."""
        pressed = [KEYS.get(key, key) for given in keys for key in ([given] if given in KEYS else given)]
        strokes = [{"type": kind, "value": key} for key in pressed for kind in ("keyDown", "keyUp")]
        self._call("POST", "/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": strokes}]})

    def devtools(self, command: str, **parameters: Any) -> Any:
        """One command of the DevTools protocol."""
        return self._call("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def screenshot(self, path: Path) -> None:
        """The window as a PNG file."""
        path.write_bytes(base64.b64decode(self._call("GET", "/screenshot")))

    def console(self) -> list[str]:
        """What the console has said since it was asked last."""
        return [f"{entry['level']}: {entry['message']}" for entry in self._call("POST", "/se/log", {"type": "browser"})]

    def requests(self) -> list[Mapping[str, Any]]:
        """The requests that the page has made since it was asked last: url, method, headers."""
        entries = [json.loads(entry["message"])["message"] for entry in self._call("POST", "/se/log", {"type": "performance"})]
        return [entry["params"]["request"] for entry in entries if entry["method"] == "Network.requestWillBeSent"]

    def close(self) -> None:
        """Close the window."""
        self._call("DELETE", "")
        self._http.clear()


@contextmanager
def running_browser() -> Iterator[Browser]:
    """A browser with a profile of its own; it, its driver and its files are gone at the end."""
    assert DRIVER is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        driver = subprocess.Popen([DRIVER, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert driver.stdout is not None
        try:
            port = next(found[1] for line in driver.stdout if (found := re.search(r"started successfully on port (\d+)", line)))
            threading.Thread(target=driver.stdout.read, daemon=True).start()
            browser = Browser(f"http://127.0.0.1:{port}", Path(folder))
            yield browser
            browser.close()
        finally:
            driver.terminate()
            driver.wait(20)
            driver.stdout.close()
