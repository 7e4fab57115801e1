"""Validate: compares an artifact's logits with its PyTorch model's, over all kinds of input that an app may send."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from toolchain.data.encoding import Encoder, pad
from toolchain.data.files import Text
from toolchain.data.labels import answers, margins

if TYPE_CHECKING:
    import numpy as np

    from toolchain.backends import Session

TOLERANCE = 1e-4  # largest |Δlogit| allowed for an fp32 variant: rounding in another order, no more
MAX_FLIPS = 0.02  # share of all sentences that may flip in a variant with fewer bits
CONFIDENCE = 0.95  # required confidence that more flip, before validation refuses the artifact
SENTENCES = 200
SEED = 20
LENGTHS = (1, 2, 3, 8, 25, 64, 128, 512)
TEXTS = {
    "empty string": "",
    "emoji": "I ❤️ this film 🎬🍿 👍🏽",
    "accents": "Déjà vu: un café naïve, Übermut, señor Ōe — très bien",
    "over-long text": "a remarkably long and winding sentence " * 400,
}


def grid(encoder: Encoder, sentences: Sequence[Text]) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Yields named batches of many shapes: 1 token up to the model's limit, batches of 1, 2 and 7, and unusual texts.

    Batches of mixed lengths occur with padding on the right and on the left.

    Args:
        encoder: Encoder of the model.
        sentences: Real sentences; three of them are in the batches of 7 texts.
    """
    rng = random.Random(SEED)
    vocabulary = encoder.tokenizer.get_vocab_size()

    def ids(length: int) -> list[int]:
        return [rng.randrange(vocabulary) for _ in range(length)]

    def batch(rows: Sequence[Sequence[int]], left: bool = False) -> dict[str, np.ndarray]:
        return pad(rows, encoder.names, encoder.pad_id, left)

    lengths = sorted({min(length, encoder.max_length) for length in (*LENGTHS, encoder.max_length)})
    for length in lengths:
        yield f"1 × {length} tokens", batch([ids(length)])
    for size in (2, 7):
        yield f"{size} × 25 tokens", batch([ids(min(25, encoder.max_length)) for _ in range(size)])
        mixed = [ids(length) for length in rng.sample(lengths, min(size, len(lengths)))]
        yield f"{size} mixed lengths, right padding", batch(mixed)
        yield f"{size} mixed lengths, left padding", batch(mixed, left=True)
    for name, text in TEXTS.items():
        yield name, batch(encoder.encode([text]))
    real = encoder.encode([*TEXTS.values(), *sentences[:3]])
    yield "7 texts, right padding", batch(real)
    yield "7 texts, left padding", batch(real, left=True)
    pairs = encoder.encode([(TEXTS["accents"], TEXTS["emoji"]), (TEXTS["emoji"], TEXTS["over-long text"])])
    yield "2 pairs of texts, right padding", batch(pairs)
    yield "2 pairs of texts, left padding", batch(pairs, left=True)


def validate(
    contender: Session,
    reference: Session,
    encoder: Encoder,
    sentences: Sequence[Text],
    agreement: str,
    original: Encoder | None = None,
) -> dict[str, Any]:
    """Compares the logits of two sessions on `grid` and, one by one, on `sentences`.

    All logits must be finite. ``exact`` also needs every |Δlogit| ≤ `TOLERANCE`. ``close`` also needs at most
    `allowed_flips` flips. ``free`` needs nothing else, because it is another model.

    Args:
        contender: Session of the artifact.
        reference: Session of the PyTorch model.
        encoder: Encoder of the artifact.
        sentences: Sentences to count flips on.
        agreement: As in `Variant.agreement`.
        original: Encoder of the reference if its vocabulary differs. Both models then get the same tokens of `grid`
            under their own ids, and each encoder tokenises the sentences.

    Returns:
        The report: verdict, largest and mean |Δlogit|, worst case of the grid and number of flips. `flip_margins` holds
        the reference's margin (`labels.margins`) in each sentence that flips.
    """
    import numpy as np

    original = original or encoder
    ids = _ids_in(original, encoder) if original is not encoder else None
    grid_deltas = {}
    for name, batch in grid(encoder, sentences):
        same = batch if ids is None else {**batch, "input_ids": ids[batch["input_ids"]]}
        grid_deltas[name] = _delta(contender.run(batch), reference.run(same))
    deltas: list[float] = []
    flip_margins: list[float] = []
    for row, its in zip(encoder.encode(sentences), original.encode(sentences), strict=True):
        got = contender.run(pad([row], encoder.names, encoder.pad_id))
        want = reference.run(pad([its], original.names, original.pad_id))
        deltas.append(_delta(got, want))
        if answers(got, encoder.multi_label) != answers(want, encoder.multi_label):
            flip_margins.append(float(margins(want, encoder.multi_label)[0]))
    worst = max(grid_deltas, key=lambda name: grid_deltas[name])
    finite = bool(np.isfinite([*grid_deltas.values(), *deltas]).all())
    largest = max(grid_deltas[worst], *deltas)
    flips = len(flip_margins)
    allowed = {"exact": largest <= TOLERANCE, "close": flips <= allowed_flips(len(deltas)), "free": True}
    passed = finite and allowed[agreement]
    return {
        "passed": bool(passed),
        "agreement": agreement,
        "finite": finite,
        "grid_largest_delta": {name: _rounded(delta) for name, delta in grid_deltas.items()},
        "worst_case": worst,
        "largest_delta": _rounded(largest),
        "mean_delta": _rounded(float(np.mean(deltas))),
        "sentences": len(deltas),
        "flips": flips,
        "flip_margins": [_rounded(margin) for margin in flip_margins],
    }


def _ids_in(original: Encoder, encoder: Encoder) -> np.ndarray:
    """Returns an array, int64 [tokens], that maps each token id of `encoder` to the token's id in `original`."""
    import numpy as np

    there, here = original.tokenizer.get_vocab(), encoder.tokenizer.get_vocab()
    return np.array([there[token] for token in sorted(here, key=lambda token: here[token])], np.int64)


def allowed_flips(sentences: int) -> int:
    """Returns the largest number of flips that passes validation.

    One more flip would show, with `CONFIDENCE`, that more than `MAX_FLIPS` of all sentences flip (exact binomial).

    Args:
        sentences: Number of sentences compared.
    """
    from scipy import stats

    return int(stats.binom.ppf(CONFIDENCE, sentences, MAX_FLIPS))


def _delta(got: np.ndarray, want: np.ndarray) -> float:
    """Returns the largest |Δlogit|; infinite if the shapes differ or a logit is not finite, so that no check passes."""
    import numpy as np

    if got.shape != want.shape or not (np.isfinite(got).all() and np.isfinite(want).all()):
        return float("inf")
    return float(np.abs(got - want).max())


def _rounded(value: float) -> float | None:
    """Rounds to three significant digits; returns None for values that JSON cannot represent."""
    return float(f"{value:.3g}") if value < float("inf") else None


def sentence(report: dict[str, Any]) -> str:
    """Returns a one-line summary of the report."""
    delta = "not finite" if not report["finite"] else f"{report['largest_delta']:.2g} (worst: {report['worst_case']})"
    flips = f"{report['flips']} of {report['sentences']} sentences flipped"
    allowed = {
        "exact": f"≤ {TOLERANCE:g} allowed",
        "close": f"≤ {allowed_flips(report['sentences'])} allowed",
        "free": "another model: finite answers required",
    }[report["agreement"]]
    return f"largest |Δlogit| {delta}, {flips}, {allowed}"
