"""The one training loop: length-grouped batches, mixed precision where the hardware has it, resumable at any moment.

A run's folder holds what is needed to go on: the weights, the optimiser's moments and the best weights so far as
safetensors, the rest as JSON. A step depends on its number and the recipe alone, so a resumed run ends with the same
weights as one that was never stopped.
"""

from __future__ import annotations

import json
import math
import os
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain import hardware
from toolchain.backends.batches import Batch, batch, batches
from toolchain.errors import DataError
from toolchain.inputs import Encoder

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

GROUP = 50  # batches whose rows are sorted by length together
SAVE_EVERY_S = 30.0
SCORING = 64  # rows a batch where nothing is learnt
STATE, WEIGHTS, BEST, TEACHER = "state.json", "weights.safetensors", "best.safetensors", "teacher.safetensors"

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Recipe:
    """AdamW with a linear schedule: `learning_rate` is its peak, `warmup` the share of steps that lead up to it.

    `temperature` softens teacher and student alike; `states` weighs the first token's last hidden state, which the head
    reads, against the answers; `patience` is how many epochs without a better held-out accuracy
    end the training.
    """

    epochs: int
    learning_rate: float
    batch_size: int = 32
    seed: int = 20
    warmup: float = 0.06
    weight_decay: float = 0.01
    clip: float = 1.0
    temperature: float = 2.0
    states: float = 1.0
    patience: int = 2


@dataclass(frozen=True)
class Examples:
    """Token ids and labels of the same rows."""

    ids: list[list[int]]
    labels: list[int]

    def batches(self, encoder: Encoder) -> list[Batch]:
        """All rows, shortest first, in batches for scoring."""
        return batches(self.ids, self.labels, encoder, SCORING)


@dataclass
class _State:
    """Where a run stands; `key` says which run it is. `held_out` has the accuracy before the first step and after
    every epoch, `best` the index of the best of them."""

    key: str
    step: int = 0
    spent_s: float = 0.0
    held_out: list[float] = field(default_factory=list)
    best: int = 0


def train(
    models: tuple[PreTrainedModel, PreTrainedModel],
    rows: tuple[Examples, Examples],
    encoder: Encoder,
    recipe: Recipe,
    resume: tuple[Path, str],
    progress: Progress,
) -> dict[str, Any]:
    """Trains the first of `models` in place to answer as the second, its teacher, on the first of `rows`, and leaves it
    with the weights that were best on the second, which are held out.

    Only parameters that require a gradient are trained; dropout is off, since the teacher's answers leave nothing to
    regularise against. `resume` is a folder and a key: a run of the same key there is taken up where it stopped.
    Returns what the manifest says of it. Raises `DataError` where the loss is no longer finite. Hinton et al. 2015,
    "Distilling the Knowledge in a Neural Network".
    """
    (model, teacher), (train_on, held_out) = models, rows
    folder, key = resume
    folder.mkdir(parents=True, exist_ok=True)
    run = _Run(model, recipe, math.ceil(len(train_on.ids) / recipe.batch_size), folder, key)
    run.learn_from(teacher, train_on, encoder, progress)
    if not run.state.step:
        run.state.held_out.append(accuracy(model, held_out.batches(encoder)))
        run.keep_best()
    while not run.over:
        epoch = len(run.state.held_out) - 1  # a run killed between an epoch's last step and its score owes the score
        for chosen in _order(train_on, recipe, epoch)[run.state.step - epoch * run.steps :]:
            loss = run.learn(batch(chosen, train_on.ids, train_on.labels, encoder))
            progress(run.state.step, run.total, f"epoch {epoch + 1} of {recipe.epochs}, loss {loss:.4f}")
        run.state.held_out.append(accuracy(model, held_out.batches(encoder)))
        if run.state.held_out[-1] >= run.state.held_out[run.state.best]:
            run.keep_best()
        run.save()
    run.finish()
    return {
        **asdict(recipe),
        "rows": len(train_on.ids),
        "steps": run.state.step,
        "best_epoch": run.state.best,
        "held_out_accuracy": [round(value, 4) for value in run.state.held_out],
        "held_out_rows": len(held_out.ids),
        "device": run.device.type,
        "precision": str(run.precision).removeprefix("torch."),
        "seconds": round(run.state.spent_s, 1),
    }


def accuracy(model: PreTrainedModel, rows: list[Batch]) -> float:
    """Share of right answers, on the model's device, in its own precision."""
    import torch

    device = next(model.parameters()).device
    right = 0
    with torch.inference_mode():
        for part in rows:
            answers = model(**{name: t.to(device) for name, t in part.inputs.items()}).logits.argmax(1)
            right += int((answers.cpu() == part.labels).sum())
    return right / sum(len(part.labels) for part in rows)


def _precision(device: torch.device) -> torch.dtype:
    """bfloat16 where it is fast, float32 elsewhere: emulated half precision is slower than none."""
    import torch

    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        fast = bool({"avx512_bf16", "amx_bf16"} & set(hardware.processor()["isa"]))
    return torch.bfloat16 if fast else torch.float32


def _order(rows: Examples, recipe: Recipe, epoch: int) -> list[list[int]]:
    """The epoch's batches: shuffled, but rows of like length together, so that little is padded."""
    rng = random.Random(f"{recipe.seed} {epoch}")
    shuffled = rng.sample(range(len(rows.ids)), len(rows.ids))
    size, found = recipe.batch_size, []
    for start in range(0, len(shuffled), GROUP * size):
        group = sorted(shuffled[start : start + GROUP * size], key=lambda i: len(rows.ids[i]))
        found += [group[i : i + size] for i in range(0, len(group), size)]
    rng.shuffle(found)
    return found


@dataclass(frozen=True)
class _Answers:
    """`logits` [rows, labels], and the `states` [rows, width] of the first token that they are read from."""

    logits: torch.Tensor
    states: torch.Tensor


class _Run:
    """A model under training: its optimiser, the teacher's answers, and where it stands."""

    def __init__(self, model: PreTrainedModel, recipe: Recipe, steps: int, folder: Path, key: str) -> None:
        import torch

        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.precision = _precision(self.device)
        self.steps, self.total = steps, steps * recipe.epochs
        self._model, self._recipe, self._folder = model, recipe, folder
        model.to(self.device).eval()  # type: ignore[arg-type]
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        values = self._trained.values()
        self._optimizer = torch.optim.AdamW(
            values, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True
        )
        self._started = self._saved = time.monotonic()
        self.state = self._restored(key) or _State(key)
        self._before_s = self.state.spent_s

    @property
    def over(self) -> bool:
        """Every epoch was run, or the last ones brought nothing."""
        epochs = len(self.state.held_out) - 1
        return epochs >= self._recipe.epochs or epochs - self.state.best >= self._recipe.patience

    def learn_from(self, teacher: PreTrainedModel, rows: Examples, encoder: Encoder, progress: Progress) -> None:
        """The teacher's logits [rows, labels], computed once a run."""
        import torch
        from safetensors.torch import load_file, save_file

        file = self._folder / TEACHER
        if self.state.step and file.is_file():
            self._answers = _Answers(**{name: t.to(self.device) for name, t in load_file(file).items()})
            return
        teacher.to(self.device).eval()  # type: ignore[arg-type]
        found: list[_Answers] = []
        order: list[int] = []
        parts = rows.batches(encoder)
        with torch.inference_mode():
            for number, part in enumerate(parts):
                found.append(self._ask(teacher, part))
                order += part.rows
                progress(number + 1, len(parts), "the teacher's answers")
        back = torch.tensor(order).argsort()
        logits, states = (
            torch.cat([getattr(answer, name).cpu() for answer in found])[back] for name in ("logits", "states")
        )
        save_file({"logits": logits, "states": states}, file)
        self._answers = _Answers(logits.to(self.device), states.to(self.device))

    def _ask(self, model: PreTrainedModel, part: Batch) -> _Answers:
        import torch

        inputs = {name: tensor.to(self.device) for name, tensor in part.inputs.items()}
        with torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):
            found = model(**inputs, output_hidden_states=True)
        return _Answers(found.logits.float(), found.hidden_states[-1][:, 0].float())

    def learn(self, part: Batch) -> float:
        """One step; the loss is the Kullback-Leibler divergence from the teacher's softened answers."""
        import torch
        from torch.nn import functional

        recipe, step = self._recipe, self.state.step
        rising = (step + 1) / max(1.0, recipe.warmup * self.total)
        for group in self._optimizer.param_groups:
            group["lr"] = recipe.learning_rate * min(rising, (self.total - step) / self.total)
        answers = self._ask(self._model, part)
        wanted = functional.log_softmax(self._answers.logits[part.rows] / recipe.temperature, dim=-1)
        given = functional.log_softmax(answers.logits / recipe.temperature, dim=-1)
        loss = functional.kl_div(given, wanted, log_target=True, reduction="batchmean") * recipe.temperature**2
        states = self._answers.states[part.rows]
        loss = loss + recipe.states * functional.mse_loss(answers.states, states) / states.var()
        if not torch.isfinite(loss):
            raise DataError(
                f"The loss is {float(loss.detach())} at step {step}: the training left what numbers can hold.",
                "Check the checkpoint for NaN; a lower learning rate may help.",
            )
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._trained.values(), recipe.clip)
        self._optimizer.step()
        self.state.step += 1
        if time.monotonic() - self._saved > SAVE_EVERY_S:
            self.save()
        return float(loss.detach())

    def save(self) -> None:
        """What a later run goes on from; the state last, which makes the rest valid."""
        tensors = dict(self._trained)
        for name, parameter in self._trained.items():
            moments = self._optimizer.state.get(parameter, {})
            tensors |= {f"{name}|{key}": value for key, value in moments.items()}
        self.state.spent_s = self._before_s + time.monotonic() - self._started
        _write(self._folder / f"{self.state.step}.{WEIGHTS}", tensors)
        (self._folder / f".{STATE}").write_text(json.dumps(asdict(self.state)))
        os.replace(self._folder / f".{STATE}", self._folder / STATE)
        for old in self._folder.glob(f"*.{WEIGHTS}"):
            if old.name != f"{self.state.step}.{WEIGHTS}":
                old.unlink()
        self._saved = time.monotonic()

    def _restored(self, key: str) -> _State | None:
        """The state of an earlier run of this key, its weights and moments put back."""
        import torch
        from safetensors.torch import load_file

        file = self._folder / STATE
        if not file.is_file() or json.loads(file.read_text())["key"] != key:
            return None
        state = _State(**json.loads(file.read_text()))
        tensors = load_file(self._folder / f"{state.step}.{WEIGHTS}", device=str(self.device))
        with torch.no_grad():
            for name, parameter in self._trained.items():
                parameter.copy_(tensors.pop(name))
        for name, value in tensors.items():
            parameter_name, moment = name.rsplit("|", 1)
            self._optimizer.state[self._trained[parameter_name]][moment] = value
        return state

    def keep_best(self) -> None:
        """The weights as they are now are the best so far."""
        self.state.best = len(self.state.held_out) - 1
        _write(self._folder / f"{self.state.best}.{BEST}", dict(self._trained))

    def finish(self) -> None:
        """Leaves the model with its best weights, on the host."""
        import torch
        from safetensors.torch import load_file

        tensors = load_file(self._folder / f"{self.state.best}.{BEST}")
        with torch.no_grad():
            for name, parameter in self._trained.items():
                parameter.copy_(tensors[name])
        self._model.to("cpu")  # type: ignore[arg-type]


def _write(path: Path, tensors: dict[str, Any]) -> None:
    """Writes them whole or not at all."""
    from safetensors.torch import save_file

    scratch = path.with_name(f".{path.name}")
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, scratch)
    os.replace(scratch, path)
