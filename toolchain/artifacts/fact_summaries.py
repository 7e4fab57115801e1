"""One-line summaries of facts in a manifest, for the output of a build and the notes of a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def summarize_pruning(facts: Mapping[str, Any]) -> str:
    """Returns a one-line summary of the fact ``pruning``."""
    if facts["method"] == "mask":
        return (
            f"{facts['zeroed']:.1%} of the encoder's linear parameters are set to zero, and none is removed: "
            "a mask makes the model neither smaller nor faster"
        )
    before, after = (facts["encoder_parameters"][key] / 1e6 for key in ("before", "after"))
    return (
        f"Pruning removed {facts['achieved']:.1%} of the encoder's linear parameters "
        f"({before:.1f} → {after:.1f} million). Attention heads per layer: {' '.join(map(str, facts['heads']))}. "
        f"FFN neurons per layer: {' '.join(map(str, facts['ffn']))}. "
        f"Speed-up predicted from {facts['predicted_speedup']['by']}: {facts['predicted_speedup']['value']:.2f}×"
    )


def summarize_recovery(facts: Mapping[str, Any]) -> str:
    """Returns a one-line summary of the fact ``recovery``."""
    scores = " → ".join(f"{value:.2%}" for value in facts["held_out_accuracy"])
    return (
        f"{facts.get('score', 'accuracy')} on {facts['held_out_rows']} held-out rows {scores}, "
        f"lowest held-out loss after epoch {facts['best_epoch']}; "
        f"{facts['steps']} training steps in {facts['precision']} on {facts['device']}"
    )


def summarize_exits(facts: Mapping[str, Any]) -> str:
    """Returns a one-line summary of the fact ``exits``."""
    shares = describe_exit_shares(facts, facts["shares"])
    return (
        f"Of {facts['held_out_rows']} held-out rows, {shares}. A text exits if its confidence is at least "
        f"{facts['confidence']:g}. On these rows, the accuracy drop is {facts['drop']:.2f} points, and the expected "
        f"work is {facts['work']:.0%} of the work without exits"
    )


def describe_exit_shares(facts: Mapping[str, Any], shares: Sequence[float]) -> str:
    """Returns which share of the texts exits after which layer, as text; `facts` is the fact ``exits``."""
    places = [f"after layer {layer}" if layer else "after the embeddings" for layer in facts["layers"]]
    return ", ".join(f"{share:.0%} exit {place}" for share, place in zip(shares, places, strict=True))


def summarize_vocabulary(facts: Mapping[str, Any]) -> str:
    """Returns a one-line summary of the fact ``vocabulary``."""
    return (
        f"{facts['kept']:,} of {facts['of']:,} tokens kept, {facts['bytes_saved'] / 1e6:.1f} MB saved; held-out rows, "
        f"compared with the fp32 parent: {_summarize_rows(facts['held_out'])}; held-out rows with a removed token: "
        f"{_summarize_rows(facts['out_of_domain'])}"
    )


def _summarize_rows(counts: Mapping[str, Any]) -> str:
    if not counts["rows"]:
        return "none"
    if "before" in counts:  # a regression or a token classifier
        return f"{counts['rows']} rows, {counts['score']} {counts['before']:.2%} → {counts['after']:.2%}"
    before, after = (counts[key] / counts["rows"] for key in ("right_before", "right_after"))
    return f"{counts['rows']} rows, accuracy {before:.2%} → {after:.2%}, {counts['flips']} flips"
