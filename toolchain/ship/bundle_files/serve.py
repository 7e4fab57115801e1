"""`python serve.py [PORT]` serves this folder at http://localhost:8000/ with the headers for WebAssembly threads.

The server answers only this machine. It needs Python and no packages.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

# A browser lets WebAssembly use threads only in a page with these headers.
HEADERS = {"Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp"}


class Handler(SimpleHTTPRequestHandler):
    """Answers requests for files with `HEADERS`."""

    def end_headers(self) -> None:
        """Ends the headers of a response, after it adds `HEADERS`."""
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()


def create_server(folder: Path, port: int) -> ThreadingHTTPServer:
    """Returns a server of `folder` on this machine; with port 0, the system chooses a free port."""
    return ThreadingHTTPServer(("127.0.0.1", port), partial(Handler, directory=str(folder)))


if __name__ == "__main__":
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 8000
    try:
        server = create_server(Path(__file__).parent, port)
    except OSError as error:
        sys.exit(f"Port {port} cannot be used: {error.strerror}. Choose another one: python serve.py {port + 1}")
    with server:
        print(f"http://localhost:{server.server_port}/ (stop with Ctrl-C)")
        with suppress(KeyboardInterrupt):
            server.serve_forever()
