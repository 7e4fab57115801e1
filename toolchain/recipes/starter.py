"""Chooses a first recipe: the variants that fit a target and an accuracy drop, with the reasons as comments."""

from __future__ import annotations

import difflib
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from toolchain.artifacts.names import VariantName
from toolchain.data.inputs import HELD_OUT_SPLIT
from toolchain.errors import SettingsError
from toolchain.models.checkpoints import ROOT_VARIANT
from toolchain.recipes.record import SCHEMA, BenchRecord, ModelRecord, Recipe, ShipRecord, TrainingRecord, VariantRecord
from toolchain.ship.targets.releases import DEFAULT

COMPARE = "compare"  # in place of a target: the recipe has no bundle
PLACES = {
    "web": "a browser or Node, with transformers.js",
    "python": "Python on a CPU, without PyTorch",
    "mobile": "a phone, with Android or iOS",
    "server": "a server with Triton or KServe, on a CPU or a GPU",
    "ray-serve": "Ray Serve, on a CPU",
    "mlflow": "MLflow",
    "other": "any other ONNX runtime, such as OpenVINO; C or C++",
    COMPARE: "nowhere yet: only compare variants",
}
MAX_DROP = 50.0  # points; a model of two classes that loses more is worse than a guess
WIDTH = 100  # of a line of a comment
_EXITS_SHARE = 0.5  # of the allowed accuracy drop; int8 and pruning may use the rest


@dataclass(frozen=True)
class Answers:
    """The user's answers, with the facts about the model and the data on which the recipe depends.

    Attributes:
        model: The checkpoint.
        training: Training data, which is also the data of the benchmark.
        target: Kind of app, a key of `PLACES`.
        max_drop: Largest accuracy drop, in percentage points.
        bench_rows: Number of texts that the benchmark measures.
        bench_split: Split of the data for the benchmark; None for ``validation``.
        can_prune: Whether pruning supports the architecture.
        can_exit: Whether the recipe has exits: the model classifies texts, its layers are large enough, and the data
            has enough training rows.
        layers: Number of encoder layers; 0 if config.json does not state it.
    """

    model: ModelRecord
    training: TrainingRecord
    target: str
    max_drop: float
    bench_rows: int
    bench_split: str | None = None
    can_prune: bool = True
    can_exit: bool = True
    layers: int = 0


@dataclass(frozen=True)
class Draft:
    """A recipe, and its comments as `writing.to_toml` takes them."""

    recipe: Recipe
    comments: Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class _Proposal:
    """A variant of the recipe with the reason for it, and whether the benchmark measures it."""

    name: VariantName
    reason: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    is_measured: bool = True


@dataclass(frozen=True)
class _Pruning:
    """A pruned model: its ratio in per cent, its recovery epochs, whether whole layers are removed, and its reason."""

    percent: int
    epochs: int
    removes_layers: bool
    reason: str


_THIRD = _Pruning(30, 1, False, "Removes the least important heads and neurons: 30 % of the encoder's linear weights.")
_HALF = _Pruning(50, 1, False, "Removes the least important heads and neurons: half of the encoder's linear weights.")
_MOST = _Pruning(
    73,
    4,
    True,
    "Removes 73 % of the encoder's linear weights, whole layers first. Depth costs more time than width, so this model "
    "is the fastest of the recipe, and loses the most accuracy.",
)


def find_target(text: str) -> str:
    """Returns the target with this name, a key of `PLACES`.

    Raises:
        SettingsError: There is no such target; the error suggests a similar name, or the target for a place such as
            ``browser`` or ``phone``.
    """
    word = text.strip().lower()
    if word in PLACES:
        return word
    matches = [name for name, place in PLACES.items() if word in re.findall(r"\w+", place.lower()) and len(word) > 2]
    matches = matches or difflib.get_close_matches(word, PLACES, n=1)
    hint = f"Did you mean {' or '.join(matches)}?" if matches else f"The targets are {', '.join(PLACES)}."
    raise SettingsError(f"There is no target {text[:80]!r}.", hint)


def parse_drop(text: str) -> float:
    """Returns an accuracy drop in points.

    Raises:
        SettingsError: The text is not a number from 0 to `MAX_DROP`.
    """
    try:
        drop = float(text)
    except ValueError:
        drop = math.nan
    if not 0 <= drop <= MAX_DROP:
        raise SettingsError(
            f"The accuracy drop {text[:80]!r} is not a number of points from 0 to {MAX_DROP:g}.",
            "Pass a number such as 0, 0.5 or 1. One point is one text in a hundred.",
        )
    return abs(drop)  # without the sign of -0


def draft(answers: Answers) -> Draft:
    """Returns the recipe for the answers; the same answers always give the same recipe."""
    proposals, shipped = _propose(answers)
    training, is_embedded = answers.training, answers.training.kind == "embedded"
    bench = BenchRecord(
        variants=tuple(proposal.name for proposal in proposals if proposal.is_measured),
        providers=("cpu",),
        quick=True,
        data=None if is_embedded else training.ref,
        kind="hub" if training.kind == "hub" else "file",
        text_column=training.text_column,
        text_pair_column=training.text_pair_column,
        label_column=training.label_column,
        split=answers.bench_split,
    )
    recipe = Recipe(
        schema=SCHEMA,
        variants=tuple(VariantRecord(proposal.name, settings=dict(proposal.settings)) for proposal in proposals),
        model=answers.model,
        training=training,
        bench=bench,
        ship=None if answers.target == COMPARE else ShipRecord(answers.target, (shipped,)),
    )
    comments: dict[str, str] = {proposal.name: proposal.reason for proposal in proposals}
    comments |= {"model": _model_comment(answers), "training": _training_comment(answers)}
    comments |= {"bench": _bench_comment(answers), "ship": _ship_comment(answers, shipped)}
    return Draft(
        recipe,
        {"recipe": _introduction(answers, shipped), **{name: _wrap(text) for name, text in comments.items()}},
    )


def _propose(answers: Answers) -> tuple[list[_Proposal], VariantName]:
    """Returns the variants of the recipe, parents first, and the variant to ship."""
    graph = VariantName("onnx-std" if answers.target == "other" else "onnx-fp32")
    int8 = graph.with_parts(scheme="int8", static=True)
    keeps_all = answers.max_drop == 0
    proposals = [
        _Proposal(VariantName(ROOT_VARIANT), "The checkpoint in PyTorch. The benchmark compares all variants with it."),
        _Proposal(graph, _graph_reason(answers)),
        *(_exits(answers, graph, is_first=True) if keeps_all else ()),
        _Proposal(int8, _int8_reason(answers)),
        *_exits(answers, int8, is_first=not keeps_all),
    ]
    for index, pruning in enumerate(_prunings(answers)):
        proposals += _pruned(answers, pruning, int8, is_first=index == 0)
    if keeps_all:
        return proposals, graph
    return proposals, int8 if answers.max_drop < 1 else proposals[-1].name


def _prunings(answers: Answers) -> Sequence[_Pruning]:
    if not answers.can_prune or answers.max_drop == 0:
        return ()
    if answers.max_drop < 1:
        return (_THIRD,)
    return (_HALF,) if answers.max_drop < 2 else (_HALF, _MOST)


def _pruned(answers: Answers, pruning: _Pruning, int8: VariantName, *, is_first: bool) -> list[_Proposal]:
    """Returns a pruned model, its recovery, its int8 graph and the exits of this graph.

    Args:
        answers: The answers.
        pruning: The pruned model.
        int8: Name of the unpruned int8 graph.
        is_first: Whether this is the first pruned model of the recipe, whose comments explain the settings.
    """
    torch = VariantName(f"torch-pruned{pruning.percent}")
    kept_layers = round(answers.layers * 2 / 3)
    settings = {"layers": kept_layers} if pruning.removes_layers and 0 < kept_layers < answers.layers else {}
    epochs = "1 epoch" if pruning.epochs == 1 else f"{pruning.epochs} epochs"
    reason, recovery = pruning.reason, f"Trains it for {epochs} on the logits of the unpruned model."
    if is_first:
        reason += (
            ' Also try the setting cost = "latency": it measures the time of heads and neurons on the machine that '
            "builds."
        )
        recovery += (
            " On a CPU, this training takes longer than all other steps together. If you stop `build`, the same "
            "command continues the training."
        )
        recovery += " The setting exits also trains the early layers for exits." if answers.can_exit else ""
    recovered = torch.with_parts(recovered=pruning.epochs)
    graph = int8.with_parts(pruned=pruning.percent, recovered=pruning.epochs)
    return [
        _Proposal(torch, reason, settings, is_measured=False),
        _Proposal(recovered, recovery, {"exits": 1.0} if answers.can_exit else {}, is_measured=False),
        _Proposal(graph, "The recovered model in 8 bits."),
        *_exits(answers, graph, is_first=False),
    ]


def _exits(answers: Answers, parent: VariantName, *, is_first: bool) -> list[_Proposal]:
    """Returns the variant with exits that is built from `parent`; nothing if the model cannot have exits.

    Args:
        answers: The answers.
        parent: Name of the variant without exits.
        is_first: Whether this is the first variant with exits of the recipe, whose comment explains the settings.
    """
    if not answers.can_exit:
        return []
    max_drop = round(answers.max_drop * _EXITS_SHARE, 3)
    reason = f"{parent} with exits."
    if is_first:
        reason += (
            " A text with a confident early prediction skips the later layers. This lowers the mean latency, but not "
            f"the p95. max_drop = {max_drop} is the largest drop that the exits may add on held-out rows"
        )
        reason += ", half of the allowed drop." if max_drop else "."
        reason += (
            " If `build` says that no exits save work, raise max_drop, or delete this variant here and in the tables "
            "at the end."
        )
    return [_Proposal(parent.with_parts(exits=True), reason, {"max_drop": max_drop})]


def _graph_reason(answers: Answers) -> str:
    kind = "with standard operators, which every ONNX runtime has" if answers.target == "other" else "for ONNX Runtime"
    return f"The same weights as an ONNX graph {kind}. It is faster than PyTorch, and loses no accuracy."


def _int8_reason(answers: Answers) -> str:
    reason = (
        "Weights and activations of 8 bits: about a quarter of the bytes, and faster on most processors. The scales "
        "come from the training data, so a text gets the same answer in every batch. If it loses too much, try "
        "settings = { keep_fp32 = 2 }: the 2 most sensitive layers stay in fp32."
    )
    if answers.target in ("web", "mobile"):
        reason += ' For a smaller download, try settings = { embeddings = "int4" }.'
    if not answers.can_exit:
        reason += " The recipe has no exits: they need a classifier of texts, large layers and enough training rows."
    if not answers.can_prune and answers.max_drop > 0:
        reason += " The recipe has no pruned model, because pruning does not support this architecture."
    return reason


def _introduction(answers: Answers, shipped: VariantName) -> list[str]:
    drop = _points(answers.max_drop)
    facts = [
        f"Model: {answers.model.ref}",
        f"Data: {answers.training.ref}",
        f"Target: {answers.target} ({PLACES[answers.target]})",
        f"Allowed accuracy drop: {drop}",
    ]
    if answers.target == COMPARE:
        plan = "`build` builds the variants, and measures all of them in one comparison."
    else:
        loss = f"more than {drop}" if answers.max_drop else "any accuracy"
        plan = (
            f"`build` builds the variants, measures all of them in one comparison, and writes a bundle of {shipped}. "
            f"Nobody measured this model yet, so read the comparison. If this variant loses {loss}, or if another one "
            "is better, write the other name into [ship] and build again: `build` keeps finished variants."
        )
    search = f"`toolchain tune --max-drop {answers.max_drop:g}` searches for better settings, and takes longer."
    title = "A first recipe, written by `toolchain init`. `toolchain build` reads this file; edit it as you like."
    return [title, "", *facts, "", *_wrap(plan), *(_wrap(search) if answers.max_drop else [])]


def _model_comment(answers: Answers) -> str:
    match answers.model.kind:
        case "embedded":
            return "The model inside the toolchain."
        case "hub":
            return "A model of the Hugging Face hub. The key revision can fix a commit."
    return "A path is relative to this file. `toolchain build --model FOLDER` names another folder."


def _training_comment(answers: Answers) -> str:
    steps = ["calibrate int8"]
    steps += ["prune", "recover"] if _prunings(answers) else []
    steps += ["train exits"] if answers.can_exit else []
    used = ", ".join(steps[:-1]) + f" and {steps[-1]}" if len(steps) > 1 else steps[0]
    return f"Rows to {used}. The toolchain sets a tenth of the rows aside, and never trains on these held-out rows."


def _bench_comment(answers: Answers) -> str:
    rows = answers.bench_rows
    text = (
        "Each variant is measured for about 20 s; without the line quick, for about 60 s. On a machine with an NVIDIA "
        'GPU, also measure torch-fp16 and onnx-fp16: add them as [[variants]] and here, and "cuda" to providers. '
        f"The benchmark measures {rows:,} texts, so one text is {_points(100 / rows)} of accuracy."
    )
    if 100 / rows > max(answers.max_drop, 0.5):
        text += " These are few: more texts make the comparison reliable."
    if answers.bench_split == HELD_OUT_SPLIT:
        text += (
            " They are the held-out rows of the data. If the model itself was trained on this data, its accuracy here "
            "may be too high: then name other labelled rows as data, and delete the line split."
        )
    if answers.target == COMPARE:
        text += " For an app, add a table [ship] with the keys target and variants."
    return text


_SHIP_NOTES = {
    "web": "The demo page needs npm once; demo = false leaves it out. For graphics processors, also add "
    "onnx-webgpu-fp16 and onnx-webgpu, as [[variants]] and here.",
    "python": "`toolchain tune --session VARIANT` searches for the best session settings on a machine, and "
    "`toolchain ship --session FILE` writes them into a bundle.",
    "mobile": f"The phones need ONNX Runtime {DEFAULT} or newer; `toolchain ship --ort-mobile RELEASE` supports "
    "another release.",
    "server": "For NVIDIA GPUs, also add onnx-fp16, as [[variants]] and here: int8 runs on the CPU only.",
    "ray-serve": "`serve run` and `serve deploy` of Ray Serve run the bundle.",
    "mlflow": "`mlflow models serve` and mlflow.pyfunc load the bundle.",
    "other": "The names of the graphs begin with onnx-std, because other graphs have operators that only ONNX Runtime "
    "has.",
}


def _ship_comment(answers: Answers, shipped: VariantName) -> str:
    if answers.target == COMPARE:
        return ""
    if answers.max_drop == 0:
        reason = f"{shipped} computes the same as the checkpoint. If the comparison shows no loss for int8, ship int8."
    elif answers.max_drop < 1:
        reason = f"{shipped} needs no training, and is likely to lose less than 1 point. Check this in the comparison."
    else:
        drop = _points(answers.max_drop)
        reason = f"{shipped} is the fastest one that is likely to lose at most {drop}. Check this in the comparison."
    return f"{reason} {_SHIP_NOTES[answers.target]}"


def _points(number: float) -> str:
    return f"{round(number, 2):g} point" + ("" if number == 1 else "s")


def _wrap(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, break_on_hyphens=False, break_long_words=False)
