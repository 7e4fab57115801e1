"""A stand-in for the HTTP API of the model hub on loopback: repositories, uploads, commits and downloads.

It keeps everything in memory. It answers as the hub's own documentation and the library huggingface_hub describe.
"""

import base64
import hashlib
import http.server
import json
import socket
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field

import yaml

TOKEN = "hf_" + "Sentinel" * 4
USER = "someone"
HUB_FILE = ".gitattributes"
LARGE_BYTES = 100_000  # the stand-in stores a larger file by Git LFS


def git_blob_id(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Repository:
    """A repository: its visibility, and its commits as triples (id, title, content by path), the oldest first."""

    private: bool = False
    commits: list = field(default_factory=list)

    def commit(self, title, files):
        self.commits.append((hashlib.sha1(f"{len(self.commits)}{title}".encode()).hexdigest(), title, dict(files)))

    @property
    def files(self):
        return self.commits[-1][2]


@dataclass
class Hub:
    """The state of the hub, and the faults that a test wants.

    Attributes:
        repositories: Repositories by id.
        objects: Uploaded large files by sha256.
        requests: Method and path of every request.
        faults: HTTP status by the beginning of "METHOD PATH"; 0 cuts the connection in the middle of the body.
        echoes_token: Whether errors repeat the token in the answer.
    """

    endpoint: str = ""
    repositories: dict = field(default_factory=dict)
    objects: dict = field(default_factory=dict)
    requests: list = field(default_factory=list)
    faults: dict = field(default_factory=dict)
    echoes_token: bool = False

    def add(self, name, files, title="initial commit", private=False):
        repository = self.repositories[name] = Repository(private)
        repository.commit(title, {HUB_FILE: b"*.onnx filter=lfs\n", **files})
        return repository


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._answer()

    def do_HEAD(self):
        self._answer()

    def do_POST(self):
        self._answer()

    def do_PUT(self):
        self._answer()

    def _answer(self):
        hub = self.server.hub
        path = self.path.split("?")[0]
        hub.requests.append((self.command, path))
        for start, status in hub.faults.items():
            if f"{self.command} {path}".startswith(start):
                return self._close_connection() if status == 0 else self._refuse(status)
        content = self._read()
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if not path.startswith("/lfs/") and token != TOKEN:
            return self._refuse(401, message="Invalid credentials in Authorization header")
        parts = path.strip("/").split("/")
        if path == "/api/validate-yaml":
            faults = card_faults(json.loads(content)["content"])
            return self._send({"errors": [{"message": fault} for fault in faults]}, 400 if faults else 200)
        if path == "/api/repos/create":
            return self._create(json.loads(content))
        if parts[0] == "lfs":
            hub.objects[parts[1]] = content
            assert hashlib.sha256(content).hexdigest() == parts[1]
            return self._send({})
        if parts[2:5] == ["info", "lfs", "objects"]:
            return self._send(
                {"transfer": "basic", "objects": [self._action(o) for o in json.loads(content)["objects"]]}
            )
        is_api = parts[:2] == ["api", "models"]
        name, rest = "/".join(parts[2:4] if is_api else parts[:2]), parts[4:] if is_api else parts[2:]
        if name not in hub.repositories:
            return self._refuse(404, code="RepoNotFound")
        return self._answer_for(name, hub.repositories[name], rest, content, is_api)

    def _answer_for(self, name, repository, rest, content, is_api):
        kind = rest[0] if rest else "info"
        if kind == "preupload":
            return self._send({"files": [self._upload_mode(each, repository) for each in json.loads(content)["files"]]})
        if kind == "commit":
            return self._commit(name, repository, [json.loads(line) for line in content.splitlines()])
        if kind == "commits":
            commits = [
                {"id": oid, "title": title, "message": "", "date": "2026-01-01T00:00:00.000Z", "authors": []}
                for oid, title, _ in reversed(repository.commits)
            ]
            return self._send(commits)
        revision = rest[1] if len(rest) > 1 else "main"
        oid, _, files = next(
            (c for c in reversed(repository.commits) if revision in ("main", c[0])), repository.commits[-1]
        )
        if kind == "tree":
            return self._send([_entry(path, data, "path") | {"type": "file"} for path, data in sorted(files.items())])
        if is_api:
            siblings = [_entry(path, data, "rfilename") for path, data in sorted(files.items())]
            return self._send({"id": name, "sha": oid, "private": repository.private, "siblings": siblings})
        file = files.get("/".join(rest[2:]))
        if file is None:
            return self._refuse(404, code="EntryNotFound")
        return self._send(file, headers={"X-Repo-Commit": oid, "ETag": f'"{hashlib.sha256(file).hexdigest()}"'})

    def _create(self, order):
        name = f"{order['organization'] or USER}/{order['name']}"
        if order["organization"] != USER:
            return self._refuse(403, message="You don't have the rights to create a model under this namespace")
        if name in self.server.hub.repositories:
            return self._refuse(409)
        self.server.hub.add(name, {}, private=order.get("private", order.get("visibility") == "private"))
        return self._send({"url": f"{self.server.hub.endpoint}/{name}"})

    def _upload_mode(self, file, repository):
        existing = repository.files.get(file["path"])
        return {
            "path": file["path"],
            "uploadMode": "lfs" if file["size"] > LARGE_BYTES else "regular",
            "shouldIgnore": False,
            "oid": None if existing is None else git_blob_id(existing),
        }

    def _action(self, item):
        hub = self.server.hub
        if item["oid"] in hub.objects:
            return item
        return {**item, "actions": {"upload": {"href": f"{hub.endpoint}/lfs/{item['oid']}"}}}

    def _commit(self, name, repository, lines):
        head = lines[0]["value"]
        if head.get("parentCommit") not in (None, repository.commits[-1][0]):
            return self._refuse(412)
        files = dict(repository.files)
        for line in lines[1:]:
            key, value = line["key"], line["value"]
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.server.hub.objects[value["oid"]]
            else:
                assert key == "deletedFile"
                del files[value["path"]]
        repository.commit(head["summary"], files)
        oid = repository.commits[-1][0]
        return self._send({"commitOid": oid, "commitUrl": f"{self.server.hub.endpoint}/{name}/commit/{oid}"})

    def _read(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def _close_connection(self):
        if self.command in ("POST", "PUT"):
            self.rfile.read(100)
        self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True

    def _refuse(self, status, code="", message=""):
        if self.server.hub.echoes_token:
            message = f"refused: {self.headers.get('Authorization')}"
        # The server may not have read the body, so the client must use another connection next.
        headers = {"Connection": "close", **({"X-Error-Code": code} if code else {})}
        self.close_connection = True
        self._send({"error": message}, status, {**headers, **({"X-Error-Message": message} if message else {})})

    def _send(self, content, status=200, headers=None):
        if not isinstance(content, bytes):
            content, headers = json.dumps(content).encode(), {"Content-Type": "application/json", **(headers or {})}
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _entry(path, data, key):
    is_large = len(data) > LARGE_BYTES
    digest = hashlib.sha256(data).hexdigest()
    lfs = {"lfs": {"oid": digest, "sha256": digest, "size": len(data), "pointerSize": 130}} if is_large else {}
    return {key: path, "size": len(data), "blobId": git_blob_id(data), "oid": git_blob_id(data), **lfs}


def card_faults(card):
    """Returns what the hub would refuse in the metadata of a model card, by its specification modelcard.md."""
    if not card.startswith("---\n"):
        return ["empty metadata"]
    data = yaml.safe_load(card.split("---\n")[1])
    faults = [f"{key} is no text" for key in ("library_name", "pipeline_tag", "license") if not _is_text(data, key)]
    for index in data.get("model-index", []):
        for result in index["results"]:
            if not (result["task"]["type"] and result["dataset"]["type"] and result["dataset"]["name"]):
                faults.append("a result lacks its task or its data set")
            faults += ["a metric lacks its type or value" for m in result["metrics"] if {"type", "value"} - m.keys()]
    return faults


def _is_text(data, key):
    return key not in data or isinstance(data[key], str)


@contextmanager
def hub_server():
    """Yields the `Hub` behind a server on loopback."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        server.hub = Hub(f"http://127.0.0.1:{server.server_port}")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server.hub
        finally:
            server.shutdown()
