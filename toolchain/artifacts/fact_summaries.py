"""One-line summaries of facts in a manifest, for the output of a build, the notes of a report, and `explain`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from toolchain.artifacts.steps import Exits, Prune, Quantize, Recover, Step

# The effect of each pass in `toolchain.passes.PASSES`. A pass whose name only adds a form, such as
# ``quantize-linear-int4``, has the text of the longest name here with which its name begins.
PASS_EFFECTS = {
    "fuse": "groups of nodes became one fused operator of ONNX Runtime",
    "half": "weights were converted to fp16",
    "residual-sum": "residual additions were kept out of a slow fused kernel",
    "first-token": "nodes of the last layer now compute only the first token, which the classifier reads",
    "first-query": "attention nodes now compute the query of the first token only",
    "split-attention": "fused attention nodes were split into standard operators",
    "trim-vocabulary": "embedding tables lost the rows of the removed tokens",
    "padding": "embeddings of padding tokens were replaced, so that padding changes no activation scale",
    "quantize-linear": "linear layers, or groups of them with one input, now multiply 8-bit integers",
    "quantize-linear-int4": "linear layers now have weights of 4 bits",
    "smooth": "inputs of linear layers were rescaled, so that outliers lose less in int8",
    "quantize-embedding": "embedding look-ups now read 8-bit tables",
    "quantize-embedding-int4": "embedding look-ups now read 4-bit tables",
    "exits": "exits were added",
}


def summarize_step(step: Step, facts: Mapping[str, Any]) -> str:
    """Returns a summary of pruning, recovery, exits or vocabulary trimming; empty for other steps or without the fact.

    Args:
        step: The step that built the artifact.
        facts: Facts of the artifact's manifest.
    """
    summaries = {
        Prune: ("pruning", summarize_pruning),
        Recover: ("recovery", summarize_recovery),
        Exits: ("exits", summarize_exits),
        Quantize: ("vocabulary", summarize_vocabulary),
    }
    name, summarize = summaries.get(type(step), ("", None))
    return summarize(facts[name]) if summarize and name in facts else ""


def summarize_rewrites(counts: Mapping[str, int]) -> list[str]:
    """Returns a line for each pass: its name, its number of rewrites, and its effect; `counts` is ``rewrites``."""
    lines = []
    for name, count in counts.items():
        known = [effect for effect in PASS_EFFECTS if name == effect or name.startswith(f"{effect}-")]
        effect = f": {PASS_EFFECTS[max(known, key=len)]}" if known else ""
        rewrites = "1 rewrite" if count == 1 else f"{count} rewrites"
        lines.append(f"pass {name}, {rewrites}{effect}" if count else f"pass {name} found nothing to rewrite")
    return lines


def summarize_headroom(headroom: float) -> str:
    """Returns a one-line summary of the fact ``int8_headroom``."""
    if headroom >= 1:
        return f"int8 products saturate on no processor (headroom {headroom:.2f})"
    return (
        f"int8 products can saturate on x86 processors without VNNI (headroom {headroom:.2f}); the toolchain sets a "
        "session option there, which prevents this"
    )


def summarize_pruning(facts: Mapping[str, Any]) -> str:
    """Returns a one-line summary of the fact ``pruning``."""
    if facts["method"] == "mask":
        return (
            f"{facts['zeroed']:.1%} of the encoder's linear parameters are set to zero, and none is removed: "
            "a mask makes the model neither smaller nor faster"
        )
    before, after = (facts["encoder_parameters"][key] / 1e6 for key in ("before", "after"))
    return (
        f"Pruning removed {facts['achieved']:.1%} of the encoder's linear parameters, and kept {after:.1f} of "
        f"{before:.1f} million. Attention heads left, from the first to the last layer: "
        f"{', '.join(map(str, facts['heads']))}. FFN neurons left: {', '.join(map(str, facts['ffn']))}. "
        f"{_summarize_embedding(facts)}"
        f"Speed-up predicted from {facts['predicted_speedup']['by']}: {facts['predicted_speedup']['value']:.2f}×"
    )


def _summarize_embedding(facts: Mapping[str, Any]) -> str:
    if "embedding_parameters" not in facts:
        return ""
    before, after = (facts["embedding_parameters"][key] / 1e6 for key in ("before", "after"))
    return (
        f"Word embeddings of rank {facts['embedding_rank']} have {after:.1f} million parameters instead of "
        f"{before:.1f} million. "
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
