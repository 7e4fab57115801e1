"""Controls a headless Chromium over its debugging pipe, and collects the errors and requests of a page."""

from __future__ import annotations

import base64
import fcntl
import itertools
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
TIMEOUT_S = 300
FLAGS = (
    "--headless",
    "--remote-debugging-pipe",
    "--no-sandbox",  # Chromium cannot use its sandbox if it runs as root, as in containers
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # the browser can reach only this machine
)

# WebGPU on SwiftShader, a graphics processor in software
WEBGPU_FLAGS = ("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan")

EXTENSION_FLAGS = ("--enable-unsafe-extension-debugging",)  # lets a debugger install extensions


class Chromium:
    """A browser with one tab.

    Commands are those of the DevTools protocol, https://chromedevtools.github.io/devtools-protocol/.
    """

    def __init__(self, profile: Path, flags: Sequence[str] = ()):
        (child_in, our_out), (our_in, child_out) = os.pipe(), os.pipe()
        # The browser expects the pipe at file descriptors 3 and 4, so this process moves its pipe ends to numbers from
        # 10 on.
        low_descriptors = [child_in, child_out]
        child_in, child_out = (fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in low_descriptors)
        for fd in low_descriptors:
            os.close(fd)
        self._process = subprocess.Popen(
            [
                "bash",
                "-c",
                f'exec "$@" 3<&{child_in} 4>&{child_out}',
                "-",
                PROGRAM,
                *FLAGS,
                *flags,
                f"--user-data-dir={profile}",
            ],
            pass_fds=(child_in, child_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for fd in (child_in, child_out):
            os.close(fd)
        self._to, self._from = our_out, our_in
        self._ids, self._unread, self._session = itertools.count(1), b"", None
        self.events: list[dict] = []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def __enter__(self) -> Chromium:
        return self

    def __exit__(self, *_) -> None:
        os.close(self._to)
        os.close(self._from)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def ask(self, method: str, **params) -> dict:
        """Sends a command and returns its result; adds the events that arrive meanwhile to `events`."""
        number = next(self._ids)
        message = {"id": number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            reply = self._next(time.monotonic() + TIMEOUT_S)
            if reply.get("id") == number:
                assert "error" not in reply, f"{method}: {reply['error']}"
                return reply["result"]
            self.events.append(reply)

    def _next(self, deadline: float) -> dict:
        while b"\0" not in self._unread:
            ready, _, _ = select.select([self._from], [], [], max(0.0, deadline - time.monotonic()))
            part = os.read(self._from, 1 << 16) if ready else b""
            assert part, "Chromium does not answer"
            self._unread += part
        line, _, self._unread = self._unread.partition(b"\0")
        return json.loads(line)

    def load_extension(self, folder: Path, worker: str) -> None:
        """Installs the extension in a folder, and sends all later commands to its service worker.

        The browser needs the flags `EXTENSION_FLAGS`.

        Args:
            worker: The file of the service worker.
        """
        self._session = None  # only the browser installs extensions, not a tab
        extension = self.ask("Extensions.loadUnpacked", path=str(folder))["id"]
        address, deadline = f"chrome-extension://{extension}/{worker}", time.monotonic() + TIMEOUT_S
        while not (ids := [t["targetId"] for t in self.ask("Target.getTargets")["targetInfos"] if t["url"] == address]):
            assert time.monotonic() < deadline, f"Chromium does not start {address}"
            time.sleep(0.1)
        self._session = self.ask("Target.attachToTarget", targetId=ids[0], flatten=True)["sessionId"]
        self.ask("Runtime.enable")

    def open(self, page: Path | str) -> None:
        """Loads the file or address, and waits until the page is complete."""
        self._load(page)
        # After two drawn frames, the scripts that the page runs after loading have ended.
        self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done, 200))))")

    def open_without_scripts(self, page: Path) -> None:
        """Loads the file as a browser without JavaScript, until the next page; expressions in `run` still work."""
        self.ask("Emulation.setScriptExecutionDisabled", value=True)
        self._load(page)
        self.ask("Emulation.setScriptExecutionDisabled", value=False)

    def _load(self, page: Path | str) -> None:
        self.events.clear()
        self.ask("Page.navigate", url=page if isinstance(page, str) else page.as_uri())
        deadline = time.monotonic() + TIMEOUT_S
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next(deadline))

    def run(self, code: str):
        """Evaluates an expression in the page, awaits it and returns its value."""
        reply = self.ask("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in reply, reply
        return reply["result"].get("value")

    def press(self, key: str, code: int) -> None:
        """Presses and releases a key."""
        for kind in ("rawKeyDown", "char", "keyUp"):
            text = {"text": "\r"} if kind == "char" else {}
            self.ask("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, **text)

    def move_mouse(self, x: float, y: float) -> None:
        """Moves the mouse to a place of the window."""
        self.ask("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y, pointerType="mouse")

    def tap(self, x: float, y: float) -> None:
        """Touches a place of the window with a finger, and lifts the finger."""
        self.ask("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
        self.ask("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def show_as(self, media: str = "screen", scheme: str = "light", width: int = 1280, height: int = 900) -> None:
        """Sets the medium (screen or print), the colour scheme (light or dark) and the size of the window."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.ask("Emulation.setEmulatedMedia", media=media, features=features)
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def picture(self, path: Path) -> None:
        """Writes a PNG of the whole page."""
        data = self.ask("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))

    def print(self) -> bytes:
        """Returns the page as a PDF, in the sizes of paper that the page sets."""
        self.ask("Emulation.setEmulatedMedia", media="")
        return base64.b64decode(self.ask("Page.printToPDF", preferCSSPageSize=True)["data"])

    def complaints(self, page: Path | str) -> list[str]:
        """Returns all errors, warnings and exceptions, and all requests that the page must not make.

        A page from a file may request only this file. A page from an address may request everything below this address.
        """

        def is_own(url: str) -> bool:
            return url.startswith((page, "data:")) if isinstance(page, str) else url == page.as_uri()

        complaints = []
        for event in self.events:
            method, params = event["method"], event.get("params", {})
            if method == "Runtime.exceptionThrown":
                complaints.append(f"exception: {params['exceptionDetails']['text']}")
            elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
                complaints.append(f"console.{params['type']}: {[a.get('value') for a in params['args']]}")
            elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
                complaints.append(f"{params['entry']['source']}: {params['entry']['text']}")
            elif method == "Network.requestWillBeSent" and not is_own(params["request"]["url"]):
                complaints.append(f"request: {params['request']['url']}")
            elif method == "Network.webSocketCreated":
                complaints.append(f"request: {params['url']}")
        return complaints
