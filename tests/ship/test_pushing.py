"""Tests of `ship --push` with a local stand-in of the model hub: uploads, refusals, lost connections, and folders."""

import json
import os
import shutil
import subprocess
import sys
import time

import huggingface_hub
import pytest
from hub_server import HUB_FILE, TOKEN, USER, hub_server
from huggingface_hub import constants

from toolchain.errors import HubError, ShippingError, VerdictError
from toolchain.progress import no_bar
from toolchain.ship import pushing, shipping
from toolchain.ship.pushing import Repository
from toolchain.ship.shipping import Order

NAME = f"{USER}/tiny"
COMMIT, UPLOAD = f"POST /api/models/{NAME}/commit", "PUT /lfs/"


def quiet(line):
    pass


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def commits_of(hub, name=NAME):
    """Returns the titles of the commits after the hub's own first commit."""
    return [title for _, title, _ in hub.repositories[name].commits[1:]]


@pytest.fixture(scope="module")
def bundles(built_tiny, tmp_path_factory):
    """Two versions of a bundle for Python, and a bundle for the web. Tests must not change them."""
    folder = tmp_path_factory.mktemp("bundles")
    for name, variants, target in (
        ("old", ("onnx-int8", "onnx-fp32"), "python"),
        ("new", ("onnx-int8",), "python"),
        ("web", ("onnx-int8",), "web"),
    ):
        shipping.ship(built_tiny, Order(variants, target, demo=False), folder / name, quiet, no_bar)
    return folder


def forget_connections():
    """Closes the connections of huggingface_hub, which keep its settings; the name depends on the release."""
    (getattr(huggingface_hub, "close_session", None) or huggingface_hub.utils.reset_sessions)()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The stand-in of the hub, to which huggingface_hub in this process now connects, with a valid token."""
    with hub_server() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        forget_connections()
        yield hub
        forget_connections()


def push(folder, name=NAME, *, public=False, say=quiet):
    return pushing.push(folder, Repository(name, public), say)


def test_a_bundle_gets_a_private_repository_and_one_commit_with_its_files(hub, bundles):
    url = push(bundles / "old")
    repository = hub.repositories[NAME]
    bundle_id = json.loads((bundles / "old" / "bundle.json").read_text())["id"]
    model = json.loads((bundles / "old" / "bundle.json").read_text())["model"]["name"]
    assert commits_of(hub) == [f"Bundle of {model} for python, id {bundle_id}"]
    assert repository.private
    assert {path: data for path, data in repository.files.items() if path != HUB_FILE} == files_of(bundles / "old")
    assert url == f"{hub.endpoint}/{NAME}/commit/{repository.commits[-1][0]}"
    assert {"onnx-fp32.onnx", "model.onnx"} <= {*repository.files}
    assert len(hub.objects) >= 2  # the models went by Git LFS


def test_a_public_repository_needs_the_flag(hub, bundles):
    push(bundles / "new", public=True)
    assert not hub.repositories[NAME].private
    hub.add(f"{USER}/mine", {}, private=True)
    lines = []
    push(bundles / "new", f"{USER}/mine", public=True, say=lines.append)
    assert hub.repositories[f"{USER}/mine"].private
    assert any("stays private" in line for line in lines)


@pytest.mark.slow
def test_a_downloaded_bundle_passes_verification(hub, bundles, tmp_path):
    push(bundles / "new")
    # Another process downloads, because huggingface_hub computes its addresses when Python imports it.
    settings = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    code = f"import huggingface_hub; huggingface_hub.snapshot_download({NAME!r}, local_dir={str(tmp_path / 'copy')!r})"
    environment = {**os.environ, **settings, "HF_HOME": str(tmp_path / "home")}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True)
    names = {*files_of(tmp_path / "copy")}
    assert HUB_FILE in names
    assert any(name.startswith(".cache/huggingface/") for name in names)
    report = shipping.verify(tmp_path / "copy")
    assert report["id"] == shipping.verify(bundles / "new")["id"]
    # A push of the copy pushes the bundle alone, so the repository already holds it.
    push(tmp_path / "copy")
    assert len(commits_of(hub)) == 1
    (tmp_path / "copy" / ".cache" / "other").write_text("")
    with pytest.raises(VerdictError, match=r"\.cache/other is not listed"):
        push(tmp_path / "copy")


def test_a_second_push_of_the_same_bundle_makes_no_commit(hub, bundles):
    push(bundles / "new")
    hub.requests.clear()
    lines = []
    url = push(bundles / "new", say=lines.append)
    assert len(commits_of(hub)) == 1
    assert lines == [f"{NAME}: the repository already holds this bundle, so it stays unchanged"]
    assert url.startswith(f"{hub.endpoint}/{NAME}/tree/")
    assert {method for method, _ in hub.requests} == {"GET"}


def test_a_new_version_replaces_the_old_one_in_one_commit(hub, bundles):
    push(bundles / "old")
    push(bundles / "new")
    assert len(commits_of(hub)) == 2
    files = hub.repositories[NAME].files
    assert "onnx-fp32.onnx" not in files
    assert {*files} == {*files_of(bundles / "new"), HUB_FILE}


@pytest.mark.parametrize("case", ["another file", "edited card", "another target"])
def test_a_repository_with_other_files_stays_as_it_is(hub, bundles, case):
    if case == "another file":
        hub.add(NAME, {"weights.bin": b"1"}, title="Upload weights.bin")
    elif case == "edited card":
        push(bundles / "old")
        repository = hub.repositories[NAME]
        repository.commit("Update README.md", {**repository.files, "README.md": b"better"})
    else:
        push(bundles / "web")
    before = list(hub.repositories[NAME].commits)
    with pytest.raises(ShippingError, match="no earlier version of this bundle") as refusal:
        push(bundles / "new")
    assert "Push to another name" in refusal.value.hint
    assert hub.repositories[NAME].commits == before


@pytest.mark.parametrize(
    ("faults", "cause", "hint"),
    [
        ({"POST /api/repos/create": 401}, "refuses the token (HTTP 401)", "hf auth login"),
        ({"POST /api/repos/create": 403}, f"may not write to {NAME} (HTTP 403)", f"write access to {USER}"),
        ({"POST /api/repos/create": 409}, "may not read it, or somebody just created it (HTTP 409)", "another name"),
        ({f"POST /api/models/{NAME}/preupload": 403}, f"may not write to {NAME} (HTTP 403)", "write access"),
        ({COMMIT: 412}, "during the upload (HTTP 412)", "again"),
        ({COMMIT: 500}, "HTTP 500", "again"),
        ({UPLOAD: 403}, "HTTP 403", "write access"),
        ({UPLOAD: 0}, "unreachable, or the connection broke off", "again"),
        ({COMMIT: 0}, "unreachable, or the connection broke off", "again"),
        ({f"GET /api/models/{NAME}": 0}, "unreachable, or the connection broke off", "again"),
        ({f"GET /api/models/{NAME}": 429}, "HTTP 429", "again"),
    ],
)
def test_a_failed_upload_changes_no_repository(hub, bundles, monkeypatch, faults, cause, hint):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # huggingface_hub waits before it tries again
    hub.faults = faults
    with pytest.raises(HubError) as failure:
        push(bundles / "new")
    assert cause in failure.value.cause
    assert hint in failure.value.hint
    assert failure.value.exit_code == 1
    assert not hub.repositories or not commits_of(hub)
    hub.faults = {}
    push(bundles / "new")
    assert len(commits_of(hub)) == 1


def test_an_unreachable_hub_gives_an_error(hub, bundles, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the port `discard`, on which nothing listens
    with pytest.raises(HubError, match="The hub is unreachable"):
        push(bundles / "new")


@pytest.mark.parametrize(
    ("token", "cause"),
    [
        (None, "There is no token for the hub"),
        ("hf_wrong", "refuses the token (HTTP 401)"),
        (TOKEN[:20] + "\x01" + TOKEN[20:], "a character that no token has"),
        (f"{TOKEN}ü", "a character that no token has"),
    ],
)
def test_without_a_valid_token_nothing_is_uploaded(hub, bundles, monkeypatch, token, cause):
    monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError) as failure:
        push(bundles / "new")
    assert cause in failure.value.cause
    assert "hf auth login" in failure.value.hint
    assert not token or token not in str(failure.value)
    assert not hub.repositories


def test_the_token_comes_from_the_file_of_the_login(hub, bundles, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "no-token").write_text(f"{TOKEN}\n")
    push(bundles / "new")
    assert len(commits_of(hub)) == 1


@pytest.mark.slow
def test_no_message_and_no_traceback_shows_the_token(hub, bundles, say, tmp_path):
    shutil.copytree(bundles / "new", tmp_path / "bundle")
    hub.faults, hub.echoes_token = {"POST /api/repos/create": 500}, True
    code, out, err = say("ship", "--output", tmp_path / "bundle", "--push", NAME, "--debug")
    assert code == 1
    assert "Traceback" in err
    assert f"The hub refuses the upload to {NAME} (HTTP 500)" in err
    assert TOKEN not in out + err
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path


def test_a_refused_model_card_stops_the_upload_before_any_file(hub, bundles, monkeypatch):
    monkeypatch.setattr("hub_server.card_faults", lambda card: ['"license" must be one of …'])
    with pytest.raises(HubError, match='"license" must be one of'):
        push(bundles / "new")
    assert not commits_of(hub)
    assert not hub.objects


def test_a_modified_bundle_is_not_pushed(hub, bundles, tmp_path):
    shutil.copytree(bundles / "new", tmp_path / "bundle")
    with (tmp_path / "bundle" / "README.md").open("a") as file:
        file.write("more")
    with pytest.raises(VerdictError, match=r"README\.md has \d+ bytes instead of"):
        push(tmp_path / "bundle")
    assert not hub.requests


def test_an_unsigned_bundle_equals_its_signed_copy_on_the_hub(hub, bundles):
    push(bundles / "new")
    repository = hub.repositories[NAME]
    repository.commit("Sign", {**repository.files, "model.sig": b"{}"})
    push(bundles / "new")
    assert len(commits_of(hub)) == 2


def test_ship_builds_pushes_and_prints_the_commit(hub, built_tiny, say, tmp_path):
    model_options = ("--model", built_tiny.source.ref, "--exported", built_tiny.exported)
    command = ("ship", "onnx-int8", "--target", "python", "--output", tmp_path / "bundle", *model_options)
    code, out, err = say(*command, "--push", NAME)
    assert code == 0, err
    assert len(commits_of(hub)) == 1
    bundle_id = json.loads((tmp_path / "bundle" / "bundle.json").read_text())["id"]
    commit = hub.repositories[NAME].commits[-1][0]
    assert out.splitlines() == [
        str(tmp_path / "bundle"),
        f"id {bundle_id}",
        f"pushed to {hub.endpoint}/{NAME}/commit/{commit}",
    ]
    code, out, err = say(*command, "--push", NAME, "--json")
    assert code == 0
    assert json.loads(out)["id"] == bundle_id
    assert "already holds this bundle" in err
    assert len(commits_of(hub)) == 1


@pytest.mark.slow
def test_an_existing_bundle_is_pushed_without_a_build(hub, bundles, say, tmp_path):
    shutil.copytree(bundles / "new", tmp_path / "bundle")
    code, out, err = say("ship", "--output", tmp_path / "bundle", "--push", tmp_path / "copy")
    assert code == 0, err
    assert out.splitlines()[-1] == f"pushed to {tmp_path / 'copy'}"
    assert files_of(tmp_path / "copy") == files_of(tmp_path / "bundle") == files_of(bundles / "new")
    assert not hub.requests


def test_a_folder_gets_the_files_once(bundles, tmp_path):
    (tmp_path / "empty").mkdir()
    lines = []
    for target in (tmp_path / "new" / "folder", tmp_path / "empty"):
        assert pushing.push(bundles / "new", target, lines.append) == str(target)
        assert files_of(target) == files_of(bundles / "new")
        pushing.push(bundles / "new", target, lines.append)
        assert lines[-1] == f"{target}: the folder already holds this bundle, so it stays unchanged"
    assert {path.name for path in tmp_path.iterdir()} == {"new", "empty"}


@pytest.mark.parametrize("case", ["file", "folder", "other bundle", "link"])
def test_a_folder_with_other_files_stays_as_it_is(bundles, tmp_path, case):
    target = tmp_path / "target"
    if case == "file":
        target.write_text("mine")
    elif case == "folder":
        target.mkdir()
        (target / "mine.txt").write_text("mine")
    elif case == "link":
        (tmp_path / "elsewhere").mkdir()
        target.symlink_to(tmp_path / "elsewhere")
    else:
        shutil.copytree(bundles / "old", target)
    before = files_of(tmp_path)
    with pytest.raises(ShippingError, match="is not an empty folder"):
        pushing.push(bundles / "new", target, quiet)
    assert files_of(tmp_path) == before


def test_a_folder_inside_of_the_bundle_is_refused(bundles):
    with pytest.raises(ShippingError, match="is inside of the bundle"):
        pushing.push(bundles / "new", bundles / "new" / "copy", quiet)
    assert not (bundles / "new" / "copy").exists()


@pytest.mark.parametrize(
    "name",
    ["tiny", "a/b/c", "some one/tiny", "someone/.tiny", "someone/a--b", "someone/tiny.git", "someone/", "ü/tiny"],
)
def test_a_name_that_the_hub_does_not_allow_is_a_usage_error(say, tmp_path, name):
    code, out, err = say("ship", "--output", tmp_path, "--push", name)
    assert (code, out) == (2, "")
    assert "A folder begins with . or /" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "needs both --push and --output"),
        (["--push", NAME], "needs both --push and --output"),
        (["--output", "b", "--push", NAME, "--target", "web"], "--target needs a VARIANT"),
        (["--output", "b", "--push", NAME, "--sign", "key.pem"], "--sign needs a VARIANT"),
        (["onnx-int8", "--push", NAME], "Missing option '--target'"),
        (["onnx-int8", "--target", "web", "--public"], "--public needs --push USER/NAME"),
        (["--output", "b", "--push", "./copy", "--public"], "--public needs --push USER/NAME"),
    ],
)
def test_options_that_exclude_each_other_are_usage_errors(say, options, message):
    code, out, err = say("ship", *options)
    assert (code, out) == (2, "")
    assert message in err
