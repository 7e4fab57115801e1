"""Tests of the model hub with a small local server: revisions, private models, refusals, and a secret token."""

import http.server
import json
import threading
from hashlib import sha256

import pytest
from conftest import run_toolchain

TOKEN = "hf_" + "Sentinel" * 4
COMMITS = {"main": "1" * 40, "v1": "2" * 40, "1" * 40: "1" * 40, "2" * 40: "2" * 40}
OPEN, PRIVATE, FORBIDDEN, PICKLED = "someone/tiny", "someone/private", "someone/forbidden", "someone/pickled"

pytestmark = pytest.mark.slow


class _Hub(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self._answer(body=True)

    def do_HEAD(self):
        self._answer(body=False)

    def log_message(self, *_):
        pass

    def _answer(self, body):
        self.server.requests.append((self.command, self.path, self.headers.get("Authorization")))
        parts = self.path.split("?")[0].strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        name, path_rest = "/".join(parts[2:4] if api else parts[:2]), parts[4:] if api else parts[2:]
        if name == FORBIDDEN:
            return self._refuse(403, "", body)
        if name not in (OPEN, PRIVATE, PICKLED) or (
            name == PRIVATE and self.headers.get("Authorization") != f"Bearer {TOKEN}"
        ):
            return self._refuse(401, "RepoNotFound", body)
        revision = path_rest[1] if len(path_rest) > 1 else "main"
        if revision not in COMMITS:
            return self._refuse(404, "RevisionNotFound", body)
        commit = COMMITS[revision]
        files = {f.name: f for f in self.server.folder.iterdir()}
        files.update(dict.fromkeys(self.server.extra_files, files["config.json"]))
        if name == PICKLED:
            files["pytorch_model.bin"] = files.pop("model.safetensors")
        if api and path_rest[:1] == ["tree"]:
            tree = [
                {"type": "file", "path": file_name, "size": file.stat().st_size, "oid": "0" * 40}
                for file_name, file in sorted(files.items())
            ]
            return self._send(json.dumps(tree).encode(), {"Content-Type": "application/json"}, body)
        if api:
            model_info = {
                "id": name,
                "sha": commit,
                "siblings": [{"rfilename": file_name} for file_name in sorted(files)],
            }
            return self._send(json.dumps(model_info).encode(), {"Content-Type": "application/json"}, body)
        if path_rest[2] not in files:
            return self._refuse(404, "EntryNotFound", body)
        content = files[path_rest[2]].read_bytes()
        return self._send(content, {"X-Repo-Commit": commit, "ETag": f'"{sha256(content).hexdigest()}"'}, body)

    def _refuse(self, status, code, body):
        self._send(b"{}", {"X-Error-Code": code} if code else {}, body, status)

    def _send(self, content, headers, body, status=200):
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(content)


@pytest.fixture
def hub(tiny_checkpoint):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub) as server:
        server.folder, server.requests, server.extra_files = tiny_checkpoint, [], ()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def run(hub, tmp_path):
    """Runs `toolchain export` in a new process, since huggingface_hub reads its settings once, on import."""

    def export(model, *options, token=None):
        env = {
            "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path / "home"),
            "HF_TOKEN": token or "",
            "HF_HUB_DISABLE_XET": "1",
        }
        return run_toolchain("export", "--optimize", "none", "--model", model, *options, cwd=tmp_path, env=env)

    return export


def test_a_private_model_is_downloaded_with_the_token_and_the_token_is_not_stored(run, hub, tmp_path):
    completed = run(PRIVATE, "--revision", "v1", token=TOKEN)
    assert completed.returncode == 0, completed.stderr
    assert f"Bearer {TOKEN}" in {authorization for _, _, authorization in hub.requests}
    manifest = json.loads((tmp_path / "exported" / "private" / "torch-fp32" / "manifest.json").read_text())
    assert manifest["source"] == {"kind": "hub", "ref": PRIVATE, "revision": COMMITS["v1"]}
    assert TOKEN not in completed.stdout + completed.stderr
    for path in (tmp_path / "exported").rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path
    file_names = {path.rsplit("/", 1)[-1] for _, path, _ in hub.requests if "/resolve/" in path}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= file_names


def test_a_downloaded_model_can_be_exported_again_while_the_hub_is_unreachable(run, hub, tmp_path):
    """The cache lacks the pickle file, so it does not hold every file of the repository."""
    hub.extra_files = ("pytorch_model.bin",)
    completed = run(OPEN)
    assert completed.returncode == 0, completed.stderr
    hub.shutdown()
    hub.server_close()
    completed = run(OPEN, "--revision", COMMITS["main"], "--exported", "again")
    assert completed.returncode == 0, completed.stderr
    first_id, second_id = (
        json.loads((tmp_path / folder / "tiny" / "torch-fp32" / "manifest.json").read_text())["id"]
        for folder in ("exported", "again")
    )
    assert first_id == second_id
    completed = run("someone/unknown")
    assert completed.returncode == 1
    assert "someone/unknown is not a folder, and its download from the hub failed" in completed.stderr
    assert "--model PATH" in completed.stderr


@pytest.mark.parametrize(
    ("model", "options", "token", "message"),
    [
        (PRIVATE, [], None, "private and no token gives access"),
        (PRIVATE, [], TOKEN[:-1] + "x", "private and no token gives access"),
        (FORBIDDEN, [], TOKEN, "denies access to someone/forbidden with this login (HTTP 403)"),
        (OPEN, ["--revision", "v9"], TOKEN, "has no revision 'v9'"),
        (PICKLED, [], TOKEN, "has its weights only as pickle (pytorch_model.bin)"),
    ],
)
def test_a_refusal_of_the_hub_gives_an_error_without_the_token(run, tmp_path, model, options, token, message):
    completed = run(model, *options, "--debug", token=token)
    assert completed.returncode == 1
    assert message in completed.stderr
    assert not token or token not in completed.stdout + completed.stderr
    assert not (tmp_path / "exported" / model.split("/")[1] / "torch-fp32").exists()
