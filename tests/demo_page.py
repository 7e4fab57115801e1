"""Opens the demo page of a web bundle in Chromium."""

from __future__ import annotations

import contextlib
import functools
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chromium import PROGRAM, Chromium
from conftest import MODULES

needs_chromium = pytest.mark.skipif(
    MODULES is None or PROGRAM is None, reason="needs `make test-clients` and Chromium (Debian: chromium)"
)
# Waits until the page has an answer, and returns its text.
READY = """(async () => {
    const busy = () => document.getElementById("classify").disabled;
    for (let i = 0; i < 500 && busy(); i++) await new Promise(done => setTimeout(done, 100));
    if (busy()) throw new Error("the page is busy for 50 seconds");
    return document.getElementById("answer").innerText;
})()"""


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[str]:
    """Serves a folder, like `python -m http.server`, and yields its address."""
    handler = functools.partial(_QuietHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()


class _QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: Any) -> None:
        pass


def use_npm_packages(exported: Path) -> None:
    """Links the npm packages that `make test-clients` installed to the place where `ship` searches for them."""
    assert MODULES
    cache = exported / ".cache"
    cache.mkdir(parents=True, exist_ok=True)
    if not (cache / MODULES.parent.name).exists():
        (cache / MODULES.parent.name).symlink_to(MODULES.parent)


def ask_page(bundle: Path, scratch: Path, text: str) -> tuple[str, str]:
    """Opens the demo page of a web bundle, enters a text, and checks the bundle there.

    Returns:
        The page's answer for the text, and the summary of the check.
    """
    with serve(bundle) as address, Chromium(scratch / "profile") as browser:
        browser.open(address)
        assert "is ready" in browser.run(READY)
        browser.run(f"document.getElementById('text').value = {json.dumps(text)}")
        browser.run("document.getElementById('classify').click()")
        answer = browser.run(READY)
        browser.run("document.getElementById('check').click()")
        browser.run(READY)
        browser.picture(scratch / "page.png")
        return answer, browser.run("document.getElementById('proof').innerText")
