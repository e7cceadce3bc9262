"""A headless Chromium, told what to do through two pipes (the DevTools protocol)."""

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import time

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")

_SECONDS = 60


class Browser:
    """One page of a browser that reaches no network; events are kept by method.

    Chromium reads JSON from its file descriptor 3 and writes it to 4, each ended by a zero byte.
    """

    def __init__(self, folder):
        read, self._write = os.pipe()
        self._read, write = os.pipe()
        flags = [
            *("--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"),
            *("--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND"),
            *(f"--user-data-dir={folder}", "--no-first-run", "--hide-scrollbars"),
        ]
        script = f'exec 3<&{read} 4>&{write}; exec "$0" "$@"'
        self._process = subprocess.Popen(
            ["/bin/bash", "-c", script, PROGRAM, *flags, "about:blank"],
            pass_fds=(read, write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(read)
        os.close(write)
        self._rest, self._number, self._session = b"", 0, None
        self.events = {}
        target = self.do("Target.createTarget", url="about:blank")["targetId"]
        attached = self.do("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.do(f"{domain}.enable")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.suppress(OSError):
            self.do("Browser.close")
        self._process.wait(_SECONDS)
        os.close(self._read)
        os.close(self._write)

    def do(self, method, **parameters):
        """Calls a method of the protocol and returns its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            found = self._next()
            if found.get("id") == self._number:
                assert "error" not in found, (method, found["error"])
                return found["result"]
            self._keep(found)

    def _keep(self, event):
        self.events.setdefault(event.get("method"), []).append(event.get("params"))

    def _next(self, seconds=_SECONDS):
        end = time.monotonic() + seconds
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._read], [], [], max(end - time.monotonic(), 0))
            part = os.read(self._read, 1 << 20) if ready else b""
            if not part:
                raise OSError("the browser does not answer")
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\0")
        return json.loads(line)

    def open(self, path, width, scheme="light"):
        """Loads a file at a width in CSS pixels, in a light or a dark scheme."""
        self.do("Emulation.setDeviceMetricsOverride", width=width, height=900,
                deviceScaleFactor=1, mobile=width < 600)  # fmt: skip
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.do("Emulation.setEmulatedMedia", features=features)
        self.events.pop("Page.loadEventFired", None)
        self.do("Page.navigate", url=path.resolve().as_uri())
        while "Page.loadEventFired" not in self.events:
            self._keep(self._next())

    def value(self, expression):
        """Of a JavaScript expression."""
        found = self.do(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def press(self, key):
        """A key, "Tab", "Enter" or " "."""
        for kind in ("keyDown", "keyUp"):
            text = {"Enter": "\r", " ": " "}.get(key, "") if kind == "keyDown" else ""
            codes = {"Enter": 13, " ": 32, "Tab": 9}
            self.do("Input.dispatchKeyEvent", type=kind, key=key, text=text,
                    windowsVirtualKeyCode=codes[key])  # fmt: skip

    def screenshot(self, path):
        """The whole page."""
        shot = self.do("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def pdf(self, path):
        """As it is printed."""
        path.write_bytes(base64.b64decode(self.do("Page.printToPDF")["data"]))

    def complaints(self):
        """What was written to the console, thrown, or refused."""
        methods = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
        return [event for method in methods for event in self.events.get(method, [])]

    def requests(self):
        """Addresses of what was fetched, but for what is inside of the page."""
        urls = [one["request"]["url"] for one in self.events.get("Network.requestWillBeSent", [])]
        return [url for url in urls if not url.startswith(("data:", "blob:"))]
