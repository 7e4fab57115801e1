"""Loads this bundle as an MLflow model: `MLmodel` names this module as the loader of the flavor python_function."""

from typing import Any

import pandas as pd
from classify import Classifier


class BundleModel:
    """An MLflow model that classifies the texts of a table.

    Args:
        folder: Folder of the bundle.
    """

    def __init__(self, folder: str) -> None:
        self._classify = Classifier(folder)

    def predict(self, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Returns one row for each text of the column ``text``; the signature in `MLmodel` names the columns.

        Each text is a batch of its own, so that an answer does not depend on the other rows of the table.
        """
        rows = []
        for number, text in enumerate(model_input["text"], start=1):
            if not isinstance(text, str):
                raise ValueError(f"Row {number}: the column 'text' holds no text.")
            rows.append(self._answer(text))
        return pd.DataFrame(rows, index=model_input.index)

    def _answer(self, text: str) -> dict[str, str | float]:
        scores = self._classify([text])[0]
        if self._classify.task == "regression":
            return {"score": scores[self._classify.labels[0]]}
        columns = {f"score_{label}": score for label, score in scores.items()}
        if self._classify.task == "multi_label_classification":
            return {"label": "|".join(label for label, score in scores.items() if score > 0.5), **columns}
        best = max(scores, key=lambda label: scores[label])
        return {"label": best, "score": scores[best], **columns}


def _load_pyfunc(folder: str) -> BundleModel:
    """Returns the model; MLflow calls this function with the folder of the bundle."""
    return BundleModel(folder)
