"""Validate: compares the logits of an artifact and of its PyTorch model on all kinds of input that an app may send."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from toolchain.data.encoding import Encoder, pad
from toolchain.data.files import Text
from toolchain.data.labels import REGRESSION, SINGLE, TOKENS, answers, margins

if TYPE_CHECKING:
    import numpy as np

    from toolchain.backends import Session
    from toolchain.build.reference_logits import ReferenceLogits

TOLERANCE = 1e-4  # Largest |Δlogit| allowed for an fp32 variant, which may differ only by rounding.
MAX_FLIPS = 0.02  # Share of all sentences that may flip in a quantised variant.
CONFIDENCE = 0.95  # Validation fails if, with 95 % confidence, more than `MAX_FLIPS` of all sentences flip.
# Limit of a quantised regression model: largest |Δscore| of a sentence / standard deviation of the reference's scores.
MAX_SHIFT = 1.0
SENTENCES = 200
SEED = 20
LENGTHS = (1, 2, 3, 8, 25, 64, 128, 512)
# Largest number of tokens in a batch of several texts: the memory of attention grows with the square of this number.
LONGEST = 512
TEXTS = {
    "empty string": "",
    "emoji": "I ❤️ this film 🎬🍿 👍🏽",
    "accents": "Déjà vu: un café naïve, Übermut, señor Ōe — très bien",
    "over-long text": "a remarkably long and winding sentence " * 400,
}


def grid(encoder: Encoder, sentences: Sequence[Text]) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Yields named batches of many shapes: 1 to `LONGEST` tokens, batch sizes 1, 2 and 7, and unusual texts.

    Batches of mixed lengths occur with padding on every side that the model supports.

    Args:
        encoder: `Encoder` of the model.
        sentences: Sentences of real data; the batches of 7 texts contain the first three of them.
    """
    rng = random.Random(SEED)
    vocabulary = encoder.tokenizer.get_vocab_size()

    def ids(length: int) -> list[int]:
        return [rng.randrange(vocabulary) for _ in range(length)]

    def batch(rows: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
        return pad(rows, encoder.names, encoder.pad_id)

    def padded(name: str, rows: Sequence[Sequence[int]]) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
        for side in encoder.padding_sides:
            yield f"{name}, {side} padding", pad(rows, encoder.names, encoder.pad_id, side == "left")

    short_encoder = encoder if encoder.max_length <= LONGEST else Encoder.open(encoder.folder, encoder.names, LONGEST)
    lengths = sorted({min(length, short_encoder.max_length) for length in LENGTHS})
    for length in lengths:
        yield f"1 × {length} tokens", batch([ids(length)])
    for size in (2, 7):
        yield f"{size} × 25 tokens", batch([ids(min(25, encoder.max_length)) for _ in range(size)])
        mixed_rows = [ids(length) for length in rng.sample(lengths, min(size, len(lengths)))]
        yield from padded(f"{size} mixed lengths", mixed_rows)
    for name, text in TEXTS.items():
        yield name, batch(encoder.encode([text]))
    yield from padded("7 texts", short_encoder.encode([*TEXTS.values(), *sentences[:3]]))
    pairs = [(TEXTS["accents"], TEXTS["emoji"]), (TEXTS["emoji"], TEXTS["over-long text"])]
    yield from padded("2 pairs of texts", short_encoder.encode(pairs))


def validate(
    contender: Session,
    reference: Session | ReferenceLogits,
    encoder: Encoder,
    sentences: Sequence[Text],
    agreement: str,
    reference_encoder: Encoder | None = None,
) -> dict[str, Any]:
    """Compares the logits of two sessions on the batches of `grid` and on each of the `sentences` alone.

    The agreement ``exact`` requires finite logits and every |Δlogit| ≤ `TOLERANCE`. The agreement ``close`` requires
    finite logits and at most `allowed_flips` flips. For regression, it instead requires that no sentence's score moves
    by more than `MAX_SHIFT` standard deviations of the reference's scores. The agreement ``free`` requires only finite
    logits, because pruning, recovery and exits make another model.

    Args:
        contender: Session of the artifact.
        reference: Session of the PyTorch model, or its known logits.
        encoder: `Encoder` of the artifact.
        sentences: Sentences on which flips are counted.
        agreement: The required agreement, as in `Variant.agreement`.
        reference_encoder: `Encoder` of the reference; None if both models have the same vocabulary. If the vocabularies
            differ, both models get the same tokens of `grid`, each model with its own ids. Each `Encoder` tokenises the
            sentences for its own model.

    Returns:
        The report: verdict, largest and mean |Δlogit|, worst batch of the grid and number of flips. `flip_margins`
        holds the reference's margin (`labels.margins`) in each sentence that flips. For regression, the report holds
        `shift` instead of the flips: the largest |Δscore| of a sentence in standard deviations of the reference's
        scores. For token classification, flips are counted over words, and `words` holds their number.
    """
    import numpy as np

    reference_encoder = reference_encoder or encoder
    reference_ids = _map_token_ids(reference_encoder, encoder) if reference_encoder is not encoder else None
    grid_deltas = {}
    for name, batch in grid(encoder, sentences):
        reference_batch = batch if reference_ids is None else {**batch, "input_ids": reference_ids[batch["input_ids"]]}
        grid_deltas[name] = _max_delta(contender.run(batch), reference.run(reference_batch), batch, encoder.task)
    deltas: list[float] = []
    pairs: list[tuple[np.ndarray, np.ndarray]] = []
    for row, reference_row in zip(encoder.encode(sentences), reference_encoder.encode(sentences), strict=True):
        batch = pad([row], encoder.names, encoder.pad_id)
        logits = contender.run(batch)
        reference_logits = reference.run(pad([reference_row], reference_encoder.names, reference_encoder.pad_id))
        deltas.append(_max_delta(logits, reference_logits, batch, encoder.task))
        if encoder.task == TOKENS:  # each word is a row, with the logits of its first token
            logits = logits[0, [position for position, _, _ in row.spans]]
            reference_logits = reference_logits[0, [position for position, _, _ in reference_row.spans]]
        pairs.append((logits, reference_logits))
    worst_case = max(grid_deltas, key=lambda name: grid_deltas[name])
    is_finite = bool(np.isfinite([*grid_deltas.values(), *deltas]).all())
    largest_delta = max(grid_deltas[worst_case], *deltas)
    is_close, changes = (_shift if encoder.task == REGRESSION else _flips)(pairs, encoder.task)
    # Scores may be large, so the limit for rounding grows with their size.
    scale = max(1.0, *(float(np.abs(row).max()) for _, row in pairs)) if encoder.task == REGRESSION else 1.0
    agreement_checks = {"exact": largest_delta <= TOLERANCE * scale, "close": is_close, "free": True}
    is_valid = is_finite and agreement_checks[agreement]
    return {
        "passed": bool(is_valid),
        "agreement": agreement,
        "finite": is_finite,
        "grid_largest_delta": {name: _round_to_json(delta) for name, delta in grid_deltas.items()},
        "worst_case": worst_case,
        "largest_delta": _round_to_json(largest_delta),
        "mean_delta": _round_to_json(float(np.mean(deltas))),
        "sentences": len(deltas),
        **changes,
    }


def _flips(pairs: Sequence[tuple[np.ndarray, np.ndarray]], task: str) -> tuple[bool, dict[str, Any]]:
    """Returns whether the number of flips is allowed, and the flips for the report of `validate`.

    Args:
        pairs: Logits of the contender and of the reference for each sentence, or for each word of the sentence.
        task: Task of both models.
    """
    row_task = SINGLE if task == TOKENS else task
    count, flip_margins = 0, list[float | None]()
    for logits, reference_logits in pairs:
        all_answers = zip(answers(logits, row_task), answers(reference_logits, row_task), strict=True)
        for (answer, reference_answer), margin in zip(all_answers, margins(reference_logits, row_task), strict=True):
            count += 1
            if answer != reference_answer:
                flip_margins.append(_round_to_json(float(margin)))
    report: dict[str, Any] = {"flips": len(flip_margins), "flip_margins": flip_margins}
    if task == TOKENS:
        report["words"] = count
    return len(flip_margins) <= allowed_flips(count), report


def _shift(pairs: Sequence[tuple[np.ndarray, np.ndarray]], task: str) -> tuple[bool, dict[str, Any]]:
    """Returns whether the largest shift of a score is allowed, and the shift for the report of `validate`.

    The arguments are those of `_flips`.
    """
    import numpy as np

    scores, reference_scores = (
        np.array([answers(logits, task)[0] for logits in each]) for each in zip(*pairs, strict=True)
    )
    # Equal scores have no spread. Then a difference above `TOLERANCE` is too large.
    shift = float(np.abs(scores - reference_scores).max() / max(reference_scores.std(), TOLERANCE))
    return shift <= MAX_SHIFT, {"shift": _round_to_json(shift)}


def _map_token_ids(reference_encoder: Encoder, encoder: Encoder) -> np.ndarray:
    """Returns an int64 array of shape [tokens] that maps token ids of `encoder` to ids of `reference_encoder`."""
    import numpy as np

    reference_vocabulary, vocabulary = reference_encoder.tokenizer.get_vocab(), encoder.tokenizer.get_vocab()
    return np.array(
        [reference_vocabulary[token] for token in sorted(vocabulary, key=lambda token: vocabulary[token])], np.int64
    )


def allowed_flips(sentences: int) -> int:
    """Returns the largest number of flips that passes validation.

    An exact binomial test with the confidence `CONFIDENCE` determines the largest number of flips that passes. With one
    flip more than this largest number, the test shows that the true share of flips exceeds `MAX_FLIPS`. The true share
    of flips is the share among all possible sentences, not only among the compared sentences.

    Args:
        sentences: Number of sentences compared.
    """
    from scipy import stats

    return int(stats.binom.ppf(CONFIDENCE, sentences, MAX_FLIPS))


def _max_delta(logits: np.ndarray, reference_logits: np.ndarray, batch: Mapping[str, np.ndarray], task: str) -> float:
    """Returns the largest |Δlogit|; infinite if the shapes differ or a logit is not finite, so that no check passes.

    In token classification, only the logits of tokens count, because no app reads the logits of padding.
    """
    import numpy as np

    if task == TOKENS and logits.shape == reference_logits.shape:
        is_token = batch["attention_mask"].astype(bool)
        logits, reference_logits = logits[is_token], reference_logits[is_token]

    if logits.shape != reference_logits.shape or not (
        np.isfinite(logits).all() and np.isfinite(reference_logits).all()
    ):
        return float("inf")
    return float(np.abs(logits - reference_logits).max())


def _round_to_json(value: float) -> float | None:
    """Rounds to three significant digits; returns None for values that JSON cannot represent."""
    return float(f"{value:.3g}") if value < float("inf") else None


def validation_summary(report: dict[str, Any]) -> str:
    """Returns a one-line summary of a validation report."""
    delta = "not finite" if not report["finite"] else f"{report['largest_delta']:.2g} (worst: {report['worst_case']})"
    if "shift" in report:
        shift = "unknown" if report["shift"] is None else f"{report['shift']:.3g}"
        changes = f"largest shift of a score {shift} standard deviations"
        allowed = f"{MAX_SHIFT:g}"
    else:
        kind = "words" if "words" in report else "sentences"
        count = report[kind]
        changes = f"{report['flips']} of {count} {kind} flipped"
        allowed = f"{allowed_flips(count)}"
    limits = {
        "exact": f"≤ {TOLERANCE:g} allowed",
        "close": f"≤ {allowed} allowed",
        "free": "no limit, because pruning, recovery or exits make another model",
    }[report["agreement"]]
    return f"largest |Δlogit| {delta}, {changes}, {limits}"
