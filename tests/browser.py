"""A headless Chromium, driven by Debian's chromium-driver in the W3C WebDriver protocol, without a library."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# https://www.w3.org/TR/webdriver2/#elements
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
_PATIENCE_SECONDS = 60
_ARGUMENTS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1500,1000")


class WebDriverError(Exception):
    """What the driver answers when it cannot."""


def missing() -> str:
    """Return what is missing to drive a browser, empty if nothing is."""
    names = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return f"{', '.join(names)} not found: apt-get install chromium chromium-driver" if names else ""


@contextmanager
def chromium() -> Iterator[Browser]:
    """Give a fresh browser, which is gone afterwards."""
    driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True)
    try:
        assert driver.stdout is not None
        port = next(match[1] for line in driver.stdout if (match := re.search(r"successfully on port (\d+)", line)))
        browser = Browser(f"http://127.0.0.1:{port}")
        try:
            yield browser
        finally:
            browser.ask("DELETE", "")
    finally:
        driver.kill()
        driver.communicate()


class Element:
    """An element of the page."""

    def __init__(self, browser: Browser, reference: dict[str, str]) -> None:
        self.browser = browser
        self.reference = reference

    @property
    def text(self) -> str:
        """What is to be read in it."""
        return str(self.browser.ask("GET", f"/element/{self.reference[_ELEMENT]}/text"))

    def click(self) -> None:
        """Move the mouse to its middle and press, once it stands still."""
        self._wait_until_still()
        origin = {"type": "pointerMove", "origin": self.reference, "x": 0, "y": 0}
        press, release = ({"type": kind, "button": 0} for kind in ("pointerDown", "pointerUp"))
        mouse = {"type": "pointer", "id": "mouse", "actions": [origin, press, release]}
        self.browser.ask("POST", "/actions", {"actions": [mouse]})

    def _wait_until_still(self) -> None:
        before = None
        while (now := self.browser.ask("GET", f"/element/{self.reference[_ELEMENT]}/rect")) != before:
            before = now
            time.sleep(0.1)

    def find(self, selector: str, text: str = "") -> Element:
        """Wait for an element in this one."""
        return self.browser.find(selector, text, within=f"/element/{self.reference[_ELEMENT]}")


class Browser:
    """A browser's only window."""

    def __init__(self, driver: str) -> None:
        self._base = f"{driver}/session"
        options = {"binary": shutil.which("chromium"), "args": _ARGUMENTS}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"performance": "ALL", "browser": "ALL"}}
        session = self.ask("POST", "", {"capabilities": {"alwaysMatch": wanted}})
        self._base += f"/{session['sessionId']}"

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """Send a command and return the driver's answer."""
        content = json.dumps(body or {}).encode() if method == "POST" else None
        request = urllib.request.Request(f"{self._base}{path}", content, method=method)
        try:
            with urllib.request.urlopen(request, timeout=_PATIENCE_SECONDS) as response:
                return json.load(response)["value"]
        except urllib.error.HTTPError as error:
            raise WebDriverError(json.load(error)["value"]["message"]) from error

    def open(self, url: str) -> None:
        """Go to an address."""
        self.ask("POST", "/url", {"url": url})

    def find(self, selector: str, text: str = "", *, within: str = "") -> Element:
        """Wait for an element that matches a CSS selector and, if asked, has a text in it."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        seen: list[str] = []
        while time.monotonic() < deadline:
            try:
                found = self.ask("POST", f"{within}/elements", {"using": "css selector", "value": selector})
                elements = [Element(self, reference) for reference in found]
                seen = [element.text for element in elements]
            except WebDriverError:  # the page changed meanwhile
                continue
            for element, its_text in zip(elements, seen, strict=True):
                if text in its_text:
                    return element
            time.sleep(0.05)
        raise AssertionError(f"no {selector!r} with {text!r} among {seen}")

    def screenshot(self) -> bytes:
        """Return the window as PNG."""
        return base64.b64decode(self.ask("GET", "/screenshot"))

    def requested(self) -> list[str]:
        """Return what was asked for over the network since the last call."""
        messages = [json.loads(entry["message"])["message"] for entry in self._log("performance")]
        return [
            message["params"]["request"]["url"]
            for message in messages
            if message["method"] == "Network.requestWillBeSent"
        ]

    def complaints(self) -> list[str]:
        """Return what stands in the console since the last call."""
        return [entry["message"] for entry in self._log("browser")]

    def _log(self, kind: str) -> list[dict[str, Any]]:
        return list(self.ask("POST", "/se/log", {"type": kind}))
