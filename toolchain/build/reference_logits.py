"""Reference logits of artifacts, for validation; a process computes an artifact's logits of a batch only once.

Validation compares all variants of a model on the same batches, and PyTorch takes most of the time of a validation.
`ship` compares several files with one artifact.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from toolchain.artifacts.store import Artifact
from toolchain.backends import Place, Session, open_session

if TYPE_CHECKING:
    import numpy as np

# Maps the id of an artifact and the digest of a batch to the logits. If the bytes of a model change, its id
# changes.
_LOGITS: dict[tuple[str, str], np.ndarray] = {}


class ReferenceLogits:
    """The logits of an artifact; loads the model for the first batch whose logits are not known yet.

    Args:
        artifact: The artifact.
        runtime: Runtime of the artifact, ``torch`` or ``onnx``.
        place: Execution provider and options of the model's session.
    """

    def __init__(self, artifact: Artifact, runtime: str, place: Place) -> None:
        self._artifact, self._runtime, self._place = artifact, runtime, place
        self._id = artifact.manifest.id
        self._session: Session | None = None

    def run(self, batch: dict[str, np.ndarray]) -> np.ndarray:
        """Returns the logits of a batch; see `Session.run`."""
        key = (self._id, _digest(batch))
        if key not in _LOGITS:
            self._session = self._session or open_session(self._artifact.path, self._runtime, self._place)
            _LOGITS[key] = self._session.run(batch)
        return _LOGITS[key]

    def close(self) -> None:
        """Releases the model."""
        if self._session:
            self._session.close()


def _digest(batch: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name, array in sorted(batch.items()):
        digest.update(f"{name} {array.dtype} {array.shape} ".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
