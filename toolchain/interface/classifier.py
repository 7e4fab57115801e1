"""A loaded model that answers texts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, overload

from toolchain.artifacts.store import Artifact
from toolchain.errors import DataError, SettingsError
from toolchain.interface.arguments import check_number
from toolchain.interface.bundle import Bundle
from toolchain.interface.calls import calling
from toolchain.interface.progress import print_event
from toolchain.predict import Prediction, load_folder_model, load_model, predict_texts
from toolchain.system import hardware

if TYPE_CHECKING:
    from types import TracebackType

    from toolchain.data.files import Text

MOST_TEXTS = 2000  # largest number of texts that the classifier tokenises in one step


class Classifier:
    """A loaded model that predicts labels, scores or entities on the CPU.

    Use it in a `with` block, or call `close`, so that it releases its memory and its process. The model of a bundle
    runs in a child process with limits, after a check of the bundle.

    Args:
        source: An artifact, a bundle, or the folder of a variant or of a bundle.
        threads: Number of threads; None for the number of physical cores.

    Raises:
        ArtifactError: The folder holds neither an artifact nor a bundle.
        TamperedError: The files of the artifact were modified.
        VerdictError: The bundle was modified, or this machine does not reproduce its recorded logits.

    Examples:
        >>> model = tc.open("my-checkpoint")
        >>> with tc.Classifier(model.quantize("onnx-fp32")) as classifier:
        ...     prediction = classifier("a charming film")
        >>> prediction.label
        'POSITIVE'
        >>> sorted(prediction.probabilities)
        ['NEGATIVE', 'POSITIVE']
    """

    @calling()
    def __init__(self, source: Artifact | Bundle | str | Path, *, threads: int | None = None) -> None:
        if threads is not None:
            check_number("threads", threads, 1, whole=True)
        if isinstance(source, str) and not Path(source).exists():
            raise SettingsError(
                f"{source!r} is not a folder.", "Give an artifact, such as `model.build('onnx-int8')`, or a folder."
            )
        if not isinstance(source, Artifact | Bundle | str | Path):
            raise SettingsError(f"{source!r} is not an artifact.", "Give an artifact, or the folder of a bundle.")
        folder = source.path if isinstance(source, Artifact | Bundle) else Path(source)
        model = load_folder_model(folder, print_event)
        self._folder = folder
        self._label_set = model.label_set
        self._loaded_model = load_model(model, threads or hardware.cores())
        self._is_open = True

    @property
    def labels(self) -> tuple[str, ...]:
        """Returns the names of the labels, by index."""
        return self._label_set.names

    @overload
    def __call__(self, texts: str) -> Prediction: ...  # type: ignore[overload-overlap]  # a str is a sequence as well
    @overload
    def __call__(self, texts: Sequence[Text]) -> list[Prediction]: ...
    def __call__(self, texts: str | Sequence[Text]) -> Prediction | list[Prediction]:
        """Predicts texts.

        Args:
            texts: One text, or a list of texts. A pair of texts in the list is a tuple of two texts.

        Returns:
            One prediction for one text; a list of predictions for a list, in its order.

        Raises:
            DataError: An item is not a text.
            SettingsError: The classifier is closed.

        Examples:
            >>> with tc.Classifier(tc.open("my-checkpoint").build("onnx-int8")) as classifier:
            ...     [prediction.label for prediction in classifier(["a charming film", "a film"])]
            ['POSITIVE', 'POSITIVE']
        """
        with calling():
            if not self._is_open:
                raise SettingsError("The classifier is closed.", "Open a new one with `Classifier`.")
            if isinstance(texts, str):
                return self._predict([texts])[0]
            if not isinstance(texts, Iterable):
                raise DataError(f"{texts!r} is not a text.", "Give a text, or a list of texts.")
            return self._predict(list(texts))

    def _predict(self, texts: Sequence[Text]) -> list[Prediction]:
        for number, text in enumerate(texts, start=1):
            _check_text(number, text)
        predictions = []
        for start in range(0, len(texts), MOST_TEXTS):
            predictions += predict_texts(self._loaded_model, self._label_set, texts[start : start + MOST_TEXTS])
        return predictions

    @calling()
    def close(self) -> None:
        """Releases the model. A second call does nothing.

        Examples:
            >>> classifier = tc.Classifier(tc.open("my-checkpoint").build("onnx-int8"))
            >>> classifier.close()
        """
        if self._is_open:
            self._is_open = False
            self._loaded_model.close()

    def __enter__(self) -> Classifier:
        """Returns the classifier, which `__exit__` closes."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Closes the classifier."""
        self.close()

    def __repr__(self) -> str:
        """Returns one line with the folder of the model."""
        return f"<Classifier of {self._folder}{'' if self._is_open else ', closed'}>"


def _check_text(number: int, text: object) -> None:
    """Raises `DataError` if an item of a call is neither a text nor a pair of texts."""
    items = text if isinstance(text, tuple) and len(text) == 2 else (text,)
    parts = [item for item in items if isinstance(item, str)]
    if len(parts) < len(items):
        raise DataError(
            f"Item {number} is {text!r:.80}, which is not a text.", "Give a text, or a tuple of two texts for a pair."
        )
    try:
        "".join(parts).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"Item {number} has half of a surrogate pair.", "Repair the text.") from error
