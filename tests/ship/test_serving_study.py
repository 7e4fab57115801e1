"""Tests of the load generator in benchmarks/serving.py, on a server that loses some requests."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from readme_parts import script

serving = script("serving")
LABELS = {"a film": 1, "a waste": 0}


@contextmanager
def server(answer):
    """Serves on loopback: `answer` maps the number and the id of a request to a status and the id of the answer."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        number = 0

        def do_POST(self):
            Handler.number += 1
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, answered_id = answer(Handler.number, request["id"])
            if status is None:
                self.close_connection = True
                return
            output = {"name": "probabilities", "shape": [1, 2], "data": [0.1, 0.9]}
            content = json.dumps({"id": answered_id, "outputs": [output]}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http_server:
        threading.Thread(target=http_server.serve_forever, daemon=True).start()
        yield http_server.server_port
        http_server.shutdown()


def test_every_client_sends_and_every_answer_counts():
    seen = []
    with server(lambda number, request_id: seen.append(request_id) or (200, request_id)) as port:
        load = serving.run_clients(port, "m", 4, 0.2, LABELS)
    assert {each.split("-")[0] for each in seen} == {"0", "1", "2", "3"}
    assert len(set(seen)) == len(seen) == len(load.times_us)
    assert not load.lost
    assert 0 < load.flips < len(seen)  # the answers name the second label for both sentences
    figures = load.figures()
    assert figures["requests"] == len(seen)
    assert figures["throughput_per_s"] == pytest.approx(len(seen) / load.seconds, rel=0.01)
    assert 0 < figures["p50_ms"] <= figures["p99_ms"] <= figures["largest_ms"]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lambda number, request_id: (503 if number == 3 else 200, request_id), "status 503"),
        (lambda number, request_id: (200, "other" if number == 3 else request_id), "answer to another request"),
        (lambda number, request_id: (None if number == 3 else 200, request_id), "RemoteDisconnected"),
    ],
)
def test_a_request_without_its_answer_is_lost(answer, reason):
    with server(answer) as port:
        load = serving.run_clients(port, "m", 1, 0.3, LABELS)
    assert load.lost == {reason: 1}
    assert len(load.times_us) > 2


def test_a_server_that_is_gone_loses_every_request():
    with server(lambda number, request_id: (200, request_id)) as port:
        pass
    figures = serving.run_clients(port, "m", 2, 0.2, LABELS).figures()
    assert figures["lost"] == figures["lost_by_reason"]["ConnectionRefusedError"] >= 2
    assert "p50_ms" not in figures
