"""Access to the model hub: resolves revisions, downloads files, and explains the hub's errors to the user.

The library huggingface_hub handles the access token (from HF_TOKEN or `hf auth login`). This module never reads the
access token.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from toolchain.errors import HubError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
T = TypeVar("T")


def read_revision(ref: str, revision: str | None) -> tuple[str, frozenset[str]]:
    """Returns the commit of a revision and the names of the files in it.

    If the hub is unreachable, the commit and the file names come from the local download cache.

    Args:
        ref: Hub id of the model.
        revision: Branch, tag or commit; None for the default branch.

    Raises:
        HubError: The hub refuses the model, or is unreachable and the cache has no copy.
    """
    return _call_hub(ref, revision, lambda: _query_revision(ref, revision))


def download(ref: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """Downloads the files that match `patterns` and returns their folder, whose name is the commit.

    Args:
        ref: Hub id of the model.
        revision: Branch, tag or commit; None for the default branch.
        patterns: File name patterns. Files in subfolders never match.

    Raises:
        HubError: The hub refuses the model, or is unreachable and the cache has no copy.
    """
    import huggingface_hub

    def fetch_snapshot() -> Path:
        folder = huggingface_hub.snapshot_download(
            ref, revision=revision, allow_patterns=list(patterns), ignore_patterns=["*/*"]
        )
        return Path(folder)

    return _call_hub(ref, revision, fetch_snapshot)


def _query_revision(ref: str, revision: str | None) -> tuple[str, frozenset[str]]:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    try:
        info = huggingface_hub.HfApi().model_info(ref, revision=revision)
        return str(info.sha), frozenset(file.rfilename for file in info.siblings or ())
    except HfHubHTTPError:
        raise
    except connection_errors():
        # The download cache must hold config.json, but may lack other files of the model. Without `allow_patterns`,
        # current releases of huggingface_hub raise an error if the download cache lacks any file of the model.
        folder = Path(
            huggingface_hub.snapshot_download(
                ref, revision=revision, allow_patterns=["config.json"], local_files_only=True
            )
        )
        return folder.name, frozenset(path.name for path in folder.iterdir())


def connection_errors() -> tuple[type[Exception], ...]:
    """Returns the classes of the errors that an unreachable hub raises.

    Depending on its release, huggingface_hub uses the HTTP library requests, httpx or httpx2. `HfHubHTTPError` inherits
    from the error class of the HTTP library that huggingface_hub uses.
    """
    from huggingface_hub.errors import HfHubHTTPError

    return (OSError, *(base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception)))


def _call_hub(ref: str, revision: str | None, request: Callable[[], T]) -> T:
    """Calls `request` and returns its result; turns every error of the hub into a `HubError` with advice."""
    from huggingface_hub import errors as hub

    hint = f"Check the hub id {ref}, or download the model elsewhere and pass its folder: --model PATH."
    log_in = "Log in with `hf auth login`, or set HF_TOKEN to a token with access."
    failures: tuple[type[Exception], ...] = (*connection_errors(), hub.HFValidationError, UnicodeError)
    try:
        return request()
    except hub.GatedRepoError as error:
        raise HubError(
            f"The model {ref} is gated on the hub.",
            "Accept the model's terms on the hub, and log in with `hf auth login`.",
        ) from error
    except hub.RevisionNotFoundError as error:
        hint = "Name a branch, tag or commit, or run the command without --revision."
        raise HubError(f"{ref} has no revision {revision!r}.", hint) from error
    except hub.RepositoryNotFoundError as error:
        cause = f"The hub has no model {ref}, or the model is private and no token gives access."
        raise HubError(cause, f"{log_in} {hint}") from error
    except hub.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status in (401, 403):
            raise HubError(f"The hub denies access to {ref} with this login (HTTP {status}).", log_in) from error
        raise HubError(f"{ref} is not a folder, and its download from the hub failed.", hint) from error
    except failures as error:
        raise HubError(f"{ref} is not a folder, and its download from the hub failed.", hint) from error
