"""An HTTP service that labels texts with the bundle in the folder ``bundle``."""

import sys
from pathlib import Path

from fastapi import FastAPI
from pydantic import BaseModel, Field

BUNDLE = Path(__file__).parent / "bundle"
sys.dont_write_bytecode = True  # a __pycache__ in the bundle would be an unlisted file
sys.path.insert(0, str(BUNDLE))
from classify import Classifier  # noqa: E402 (the file is in the bundle)

app = FastAPI(title="Text classifier")
classify = Classifier(BUNDLE)


class Question(BaseModel):
    """The body of a request."""

    text: str = Field(min_length=1, max_length=20_000)


class Answer(BaseModel):
    """The label with the highest probability, and this probability."""

    label: str
    score: float


@app.post("/classify")
def classify_text(question: Question) -> Answer:
    """Returns the answer for one text. FastAPI runs the function in a thread, because it is not `async`."""
    probabilities = classify([question.text])[0]
    label = max(probabilities, key=lambda name: probabilities[name])
    return Answer(label=label, score=probabilities[label])


@app.get("/health")
def report_health() -> dict[str, str]:
    """Answers as soon as the model is loaded."""
    return {"status": "ok"}
