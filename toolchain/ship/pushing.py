"""Pushes a bundle to a repository of the model hub in one commit, or copies it to a folder.

The library huggingface_hub finds the access token (HF_TOKEN, or `hf auth login`) and sends it to the hub. No message,
no traceback and no file of the toolchain contains the token.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import toolchain
from toolchain.artifacts.publishing import lock, replace, scratch_folder
from toolchain.artifacts.store import sha256
from toolchain.errors import HubError, ShippingError, ToolchainError
from toolchain.models.hub import connection_errors
from toolchain.progress import Say
from toolchain.ship import checking
from toolchain.ship.bundle_files.verify import BUNDLE, HUB_FILE, SIGNATURE, BundleError, read_bundle

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo, RepoSibling

_LOG_IN = "Log in with `hf auth login`, or set HF_TOKEN to a token with write access."
_AGAIN = "Run the same command again. A repository gets all files of a bundle in one commit, or none of them."
_CONNECT = f"Check the network connection. {_AGAIN}"
_SHOWN = 300  # a message shows at most this many characters of a library's message


@dataclass(frozen=True)
class Repository:
    """A repository of the model hub.

    Attributes:
        name: Its id, in the form ``user/name``.
        public: Whether a new repository is public. An existing repository keeps its visibility.
    """

    name: str
    public: bool = False


@dataclass(frozen=True)
class _Files:
    """The files that a push publishes.

    Attributes:
        folder: Folder of the bundle.
        paths: Paths of the files in the bundle.
        title: First words of the commit's title, which name the model and the target.
        id: Id of the bundle.
    """

    folder: Path
    paths: tuple[str, ...]
    title: str
    id: str


def check_name(name: str) -> None:
    """Checks the id of a repository, ``user/name``.

    Raises:
        ValueError: The hub allows no such id.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"the hub allows no such name: {name[:_SHOWN]!r}") from error
    if name.count("/") != 1 or not name.isascii():
        raise ValueError(f"{name[:_SHOWN]!r} does not have the form USER/NAME")


def push(folder: Path, destination: Repository | Path, say: Say) -> str:
    """Publishes the files of a bundle, and returns the URL of the commit or the path of the folder.

    The function compares the files with bundle.json first, but it runs no model. If the destination already holds the
    bundle, the function changes nothing.

    Args:
        folder: Folder of the bundle.
        destination: A repository of the hub; or a folder that is new, empty, or holds the same bundle.

    Raises:
        ShippingError: `folder` holds no bundle, or the destination holds other files.
        VerdictError: The bundle was modified.
        HubError: The hub is unreachable, or refuses the token, the repository or the files.
        ArtifactError: The operating system refuses to write the folder.
    """
    with lock(folder, lambda: say(f"{folder}: another run is writing this bundle, waiting")):
        _, record = checking.read(folder)
        optional = [SIGNATURE] if (folder / SIGNATURE).is_file() else []
        paths = (*(file.path for file in record.files), BUNDLE, *optional)
        title = f"Bundle of {record.model.name[:_SHOWN]} for {record.target}"
        files = _Files(folder, paths, title, record.id)
        if isinstance(destination, Path):
            return _copy(files, destination, say)
        return _upload(files, destination, say)


def _copy(files: _Files, target: Path, say: Say) -> str:
    if _holds_bundle(files, target):
        say(f"{target}: the folder already holds this bundle, so it stays unchanged")
        return str(target)
    if target.resolve().is_relative_to(files.folder.resolve()):
        raise ShippingError(f"{target} is inside of the bundle.", "Push to another folder.")
    with lock(target, lambda: say(f"{target}: another run is writing this folder, waiting")):
        if target.is_symlink() or (target.exists() and not (target.is_dir() and not any(target.iterdir()))):
            raise ShippingError(f"{target} exists and is not an empty folder.", "Push to a new folder.")
        with scratch_folder(target) as scratch:
            for path in files.paths:
                (scratch / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(files.folder / path, scratch / path)
            replace(scratch, target)
    say(f"{target}: {len(files.paths)} files written")
    return str(target)


def _holds_bundle(files: _Files, target: Path) -> bool:
    """Returns whether a folder holds the bundle with the same signature; any signature if the bundle has none."""
    try:
        is_equal = read_bundle(target)["id"] == files.id
        return is_equal and (
            SIGNATURE not in files.paths or sha256(target / SIGNATURE) == sha256(files.folder / SIGNATURE)
        )
    except (BundleError, OSError):
        return False


def _upload(files: _Files, repository: Repository, say: Say) -> str:
    """Uploads the files in one commit, compares the commit with them, and returns its URL."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    name = repository.name
    token = _read_token()
    with _hub_errors(name, token):
        api = HfApi(token=token)
        if (info := _find(api, name)) is None:
            say(f"{name}: creating a {'public' if repository.public else 'private'} repository")
            api.create_repo(name, private=not repository.public)
            info = api.model_info(name, files_metadata=True)
        elif repository.public and info.private:
            say(f"{name}: the repository stays private; its settings on the hub can make it public")
        remote = {file.rfilename: file for file in info.siblings or ()}
        if not _difference(files, remote):
            say(f"{name}: the repository already holds this bundle, so it stays unchanged")
            return f"{api.endpoint}/{name}/tree/{info.sha}"
        if remote.keys() - {HUB_FILE}:
            _require_pushed(api, files, name)
        stale = sorted(remote.keys() - {*files.paths, HUB_FILE})
        say(f"{name}: uploading {len(files.paths)} files")
        commit = api.create_commit(
            name,
            [
                *(CommitOperationAdd(path_in_repo=path, path_or_fileobj=files.folder / path) for path in files.paths),
                *(CommitOperationDelete(path_in_repo=path) for path in stale),
            ],
            commit_message=f"{files.title}, id {files.id}",
            commit_description=f"Written by toolchain {toolchain.__version__}.",
            parent_commit=info.sha,
        )
        info = api.model_info(name, revision=commit.oid, files_metadata=True)
        if path := _difference(files, {file.rfilename: file for file in info.siblings or ()}):
            raise HubError(f"The commit {commit.oid} of {name} differs from the bundle in {path}.", _AGAIN)
    say(f"{name}: uploaded in one commit, and equal to the bundle; the repository is {_visibility(info)}")
    return str(commit.commit_url)


def _visibility(info: ModelInfo) -> str:
    return "private" if info.private else "public"


def _read_token() -> str:
    """Returns the token that huggingface_hub finds.

    Raises:
        HubError: There is no token, or it has a character that no HTTP header may have. The HTTP library would show
            such a token in its error message.
    """
    from huggingface_hub import get_token

    try:
        token = get_token()
    except Exception as error:  # huggingface_hub raises errors of many classes if it gets tokens from a service
        raise HubError("huggingface_hub cannot get a token for the hub.", _LOG_IN) from error
    if token is None:
        raise HubError("There is no token for the hub.", _LOG_IN)
    if not re.fullmatch("[!-~]+", token):
        raise HubError("The token for the hub has a character that no token has.", _LOG_IN)
    return token


def _find(api: HfApi, name: str) -> ModelInfo | None:
    """Returns the newest commit of a repository with the digests of its files; None if the hub shows none to us."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return api.model_info(name, files_metadata=True)
    except RepositoryNotFoundError:
        return None


def _difference(files: _Files, remote: Mapping[str, RepoSibling]) -> str:
    """Returns the first path whose file on the hub differs from the bundle's file; an empty string without one.

    A bundle without a signature equals the same bundle with one, as in `ship`.
    """
    unsigned = {SIGNATURE} - {*files.paths}
    for path in sorted(({*files.paths} | remote.keys()) - {HUB_FILE} - unsigned):
        if path not in remote or path not in files.paths or not _is_equal(files.folder / path, remote[path]):
            return path
    return ""


def _is_equal(file: Path, remote: RepoSibling) -> bool:
    """Returns whether a file equals the one on the hub, which states the sha256 of a large file, else git's digest."""
    size = file.stat().st_size
    if remote.size != size:
        return False
    if remote.lfs:
        return bool(remote.lfs.sha256 == sha256(file))
    content = b"blob %d\0" % size + file.read_bytes()
    return remote.blob_id == hashlib.sha1(content, usedforsecurity=False).hexdigest()


def _require_pushed(api: HfApi, files: _Files, name: str) -> None:
    """Raises `ShippingError` unless the newest commit of the repository pushed a bundle of this model and target."""
    title = api.list_repo_commits(name)[0].title
    if not re.fullmatch(re.escape(files.title) + ", id [0-9a-f]{64}", title):
        raise ShippingError(
            f"The repository {name} has files that are no earlier version of this bundle: its newest commit is "
            f"{title[:_SHOWN]!r}.",
            "Push to another name, or delete the files of the repository first.",
        )


@contextlib.contextmanager
def _hub_errors(name: str, token: str) -> Iterator[None]:
    """Turns every error of huggingface_hub into a `HubError` without the token."""
    try:
        yield
    except ToolchainError:
        raise
    # huggingface_hub, hf_xet and the HTTP libraries raise errors of many classes.
    except Exception as error:
        failure = _explain(name, list(_chain(error)), token)
        # A server could repeat the token in its answer, which the traceback of --debug would show.
        shows_token = token in "".join(traceback.format_exception(error))
        raise failure from (None if shows_token else error)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _explain(name: str, errors: Sequence[BaseException], token: str) -> HubError:
    """Returns the error for the user.

    Args:
        name: Id of the repository.
        errors: The error of the library and its causes.
        token: The token, which the message must not contain.
    """
    statuses = [status for error in errors if (status := _status(error))]
    message = " ".join(str(errors[0]).replace(token, "TOKEN").split())[:_SHOWN]
    if not statuses:
        if any(isinstance(error, connection_errors()) for error in errors):
            return HubError(
                f"The hub is unreachable, or the connection broke off during the upload to {name}.", _CONNECT
            )
        return HubError(f"The upload to {name} failed: {message}.", _AGAIN)
    status = statuses[0]
    known = {
        401: ("The hub refuses the token (HTTP 401).", _LOG_IN),
        403: (
            f"The token may not write to {name} (HTTP 403).",
            f"Use a token with write access to {name.partition('/')[0]}.",
        ),
        404: (f"The hub has no repository {name}, or the token may not read it (HTTP 404).", _LOG_IN),
        409: (
            f"The repository {name} exists, but the token may not read it, or somebody just created it (HTTP 409).",
            "Push to another name, or run the command again.",
        ),
        412: (f"Somebody changed {name} during the upload (HTTP 412).", _AGAIN),
    }
    return HubError(*known.get(status, (f"The hub refuses the upload to {name} (HTTP {status}): {message}.", _AGAIN)))


def _status(error: BaseException) -> int:
    """Returns the HTTP status of an error; 0 if the error has none."""
    response: Any = getattr(error, "response", None)
    return int(getattr(response, "status_code", 0) or 0)
