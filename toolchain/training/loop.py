"""The training loop: length-grouped batches, mixed precision if the hardware supports it, resumable at any moment.

The folder of a training run holds everything that a resumed run needs. The weights, the optimisers' moments and the
best weights so far are safetensors files. A JSON file holds the progress of the run, such as the number of steps and
the scores. The batch, learning rate and dropout of a training step depend only on the step's number, the rows and the
recipe. So a resumed run ends with the same weights as an uninterrupted run.
"""

from __future__ import annotations

import inspect
import json
import math
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.data.encoding import Encoder
from toolchain.errors import CheckpointError, DataError, first_line
from toolchain.models.architectures import matched_layers
from toolchain.system import files, hardware
from toolchain.system.decoding import Amount, Count, Line, decode, decode_object, read_bytes, strict
from toolchain.training import mixed_precision
from toolchain.training.batches import Batch, Targets, batch, batches
from toolchain.training.scoring import BATCH, score, score_name

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

GROUP = 50  # rows for this many batches are sorted by length and then split into batches
SAVE_EVERY_S = 30.0
WIDTHS = 8  # batch widths are multiples of this number, because oneDNN compiles its kernels for every new shape
STATE, WEIGHTS, BEST = "state.json", "weights.safetensors", "best.safetensors"

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Recipe:
    """Settings of a training run, with a linear learning rate schedule.

    Sparse Adam trains the embeddings, and AdamW trains all other parameters.

    Attributes:
        epochs: Largest number of epochs.
        learning_rate: Peak learning rate.
        batch_size: Number of rows in a training step.
        seed: Random seed of row order and dropout.
        warmup: Share of the steps in which the learning rate rises to its peak.
        weight_decay: Weight decay of AdamW.
        clip: Largest allowed norm of the gradients of all parameters except embeddings.
        temperature: Divisor of the logits in distillation, as in `losses.Weights`.
        states: Weight of the hidden states in the loss, as in `losses.Weights`.
        patience: Training ends this many epochs after the best epoch on the held-out rows.
        task: Weight of the labels in the loss, as in `losses.Weights`.
        exits: Weight of the exits in the loss, as in `losses.Weights`. Above 0, training needs a teacher, and makes
            exits after early layers more accurate.
        dropout: Whether to apply the dropout of the model's config. Training with a teacher needs no dropout.
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
    task: float = 0.0
    exits: float = 0.0
    dropout: bool = False


@dataclass(frozen=True)
class Examples:
    """Rows of a data set: the token ids and the class labels of each row."""

    ids: Sequence[Sequence[int]]
    labels: Targets

    def of_epoch(self, epoch: int) -> Examples:
        """Returns the rows to train on in the given epoch; this class returns the same rows in every epoch.

        A subclass may return different rows in each epoch, but always the same number of rows.
        """
        return self

    def batches(self, encoder: Encoder) -> list[Batch]:
        """Returns all rows in batches for scoring, shortest rows first."""
        return batches(self.ids, self.labels, encoder, BATCH)


@strict
@dataclass
class _State:
    """Progress of the training run that `key` identifies.

    `held_out` is a list of scores on the held-out rows: accuracies, or R² for regression. `losses` is a list of losses
    on the held-out rows. In both lists, entry 0 describes the model before the first step, and entry n describes the
    model after epoch n. `best` is the number of the epoch after which the model had its best score, or 0 if the model
    before the first step had its best score. The function `train` explains the score.
    """

    key: Line
    step: Count = 0
    spent_s: Amount = 0.0
    held_out: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    best: Count = 0
    scale: Amount = 65536.0  # initial scale of the loss in float16 training, as in PyTorch's `GradScaler`


def train(
    models: tuple[PreTrainedModel, PreTrainedModel | None],
    rows: tuple[Examples, Examples],
    encoder: Encoder,
    recipe: Recipe,
    resume: tuple[Path, str],
    progress: Progress,
) -> dict[str, Any]:
    """Trains a model in place and leaves it with the weights that score best on the held-out rows.

    The score is the accuracy if the labels are part of the loss, and otherwise the loss, which fluctuates less. The
    function trains only parameters that require a gradient.

    Args:
        models: The model to train, and its teacher or None.
        rows: The training rows, and the held-out rows.
        encoder: The model's `Encoder`, which pads the batches.
        recipe: Settings of the training run.
        resume: Folder of the training run, and the key that identifies the run. If the folder holds an interrupted run
            with the same key, the function continues this run.
        progress: Called with the number of finished steps, the number of all steps, and a text with epoch and loss.

    Returns:
        A dict of the recipe's settings and the run's steps, scores, device, precision and duration.

    Raises:
        DataError: The loss of a step is not finite. The folder of the run holds the training state from before the
            failed step.
    """
    (model, teacher), (train_on, held_out) = models, rows
    folder, key = resume
    folder.mkdir(parents=True, exist_ok=True)
    epoch_rows = train_on.of_epoch(0)
    run = _Run((model, teacher), recipe, math.ceil(len(epoch_rows.ids) / recipe.batch_size), folder, key)
    held_out_batches = held_out.batches(encoder)
    if not run.state.held_out:
        run.judge(held_out_batches)
    while not run.is_finished:
        # A run scores the weights before the first epoch and after every epoch. If a run was killed before it scored
        # the weights of an epoch, the resumed run must score these weights.
        epoch = len(run.state.held_out) - 1
        epoch_rows = train_on.of_epoch(epoch)
        for batch_rows in _shuffle_batches(epoch_rows, recipe, epoch)[run.state.step - epoch * run.steps :]:
            loss = run.learn(batch(batch_rows, epoch_rows.ids, epoch_rows.labels, encoder, WIDTHS))
            progress(run.state.step, run.total, f"epoch {epoch + 1} of {recipe.epochs}, loss {loss:.4f}")
        run.judge(held_out_batches)
        run.save()
    run.finish()
    return {
        **asdict(recipe),
        "rows": len(epoch_rows.ids),
        "steps": run.state.step,
        "best_epoch": run.state.best,
        "score": score_name(models[0], held_out_batches),
        "held_out_accuracy": [round(value, 4) for value in run.state.held_out],
        "held_out_loss": [round(value, 4) for value in run.state.losses],
        "held_out_rows": len(held_out.ids),
        "device": run.device.type,
        "precision": str(run.precision).removeprefix("torch."),
        "seconds": round(run.state.spent_s, 1),
    }


def _shuffle_batches(rows: Examples, recipe: Recipe, epoch: int) -> list[list[int]]:
    """Returns the epoch's batches in random order; each holds rows of similar length, which reduces padding."""
    rng = random.Random(f"{recipe.seed} {epoch}")
    shuffled = rng.sample(range(len(rows.ids)), len(rows.ids))
    size, epoch_batches = recipe.batch_size, []
    for start in range(0, len(shuffled), GROUP * size):
        group = sorted(shuffled[start : start + GROUP * size], key=lambda i: len(rows.ids[i]))
        epoch_batches += [group[i : i + size] for i in range(0, len(group), size)]
    rng.shuffle(epoch_batches)
    return epoch_batches


class _Run:
    """A model under training, with its optimisers, its teacher and its progress."""

    def __init__(
        self, models: tuple[PreTrainedModel, PreTrainedModel | None], recipe: Recipe, steps: int, folder: Path, key: str
    ) -> None:
        import torch

        from toolchain.training.exit_heads import ExitHeads
        from toolchain.training.losses import Weights

        # The number of threads changes the order of sums, and so the weights. Code that ran earlier in this process may
        # have changed PyTorch's number of threads.
        torch.set_num_threads(hardware.cores())
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.precision = mixed_precision.precision(self.device)
        self.steps, self.total = steps, steps * recipe.epochs
        (model, teacher), self._recipe, self._folder = models, recipe, folder
        matched = tuple(matched_layers(model)) if recipe.states or recipe.exits else ()
        self._weights = Weights(recipe.task, recipe.states, recipe.temperature, recipe.exits, matched)
        self._model = model.to(self.device)  # type: ignore[arg-type]
        exit_layers = (0, *matched[:-1]) if recipe.exits else ()
        self._exit_heads = ExitHeads(model, exit_layers, recipe.seed).to(self.device)
        self._teacher = teacher and teacher.to(self.device, self.precision).eval()  # type: ignore[arg-type]
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._parameters |= {f"exits.{name}": p for name, p in self._exit_heads.named_parameters()}
        tables = set()
        for name, module in model.named_modules():
            # DeBERTa uses its whole table of relative positions in every step, so this table has no sparse gradients.
            if isinstance(module, torch.nn.Embedding) and not name.endswith("rel_embeddings"):
                # A batch uses only a few hundred of the many thousand rows of an embedding table. An update of the
                # whole embedding table takes a fifth of the time of a training step.
                module.sparse = True
                tables.add(f"{name}.weight")
        self._dense_parameters = [p for name, p in self._parameters.items() if name not in tables]
        adamw = torch.optim.AdamW(self._dense_parameters, weight_decay=recipe.weight_decay, fused=True)
        sparse_adam = torch.optim.SparseAdam([p for name, p in self._parameters.items() if name in tables])
        self._optimizers = (adamw, sparse_adam)
        self._optimizer_of = {name: sparse_adam if name in tables else adamw for name in self._parameters}
        self._start_time = self._save_time = time.monotonic()
        self.state = self._restore(key) or _State(key)
        self._earlier_s = self.state.spent_s
        # Some gradients are too small for float16, so the scaler enlarges the loss and thus all gradients.
        is_float16 = self.precision == torch.float16
        self._scaler = torch.amp.GradScaler(self.device.type, init_scale=self.state.scale, enabled=is_float16)

    @property
    def is_finished(self) -> bool:
        """Returns whether all epochs are finished, or the best epoch is `patience` epochs ago."""
        epochs = len(self.state.held_out) - 1
        return epochs >= self._recipe.epochs or epochs - self.state.best >= self._recipe.patience

    def learn(self, part: Batch) -> float:
        """Runs one training step and returns the loss of the batch before the step."""
        import torch

        recipe, step = self._recipe, self.state.step
        warmup_share = (step + 1) / max(1.0, recipe.warmup * self.total)
        rate = recipe.learning_rate * min(warmup_share, (self.total - step) / self.total)
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)
            optimizer.param_groups[0]["lr"] = rate
        if recipe.dropout:
            # The seed depends on the number of the step, so a resumed run has the same dropout.
            torch.manual_seed(recipe.seed * self.total + step)
        self._model.train(recipe.dropout)
        loss = self._loss(part)
        self._model.eval()
        if not torch.isfinite(loss):
            self.save()
            raise DataError(
                f"The training diverged: the loss is {float(loss.detach())} at step {step}. "
                f"{self._folder} contains the weights before this step.",
                "Check the checkpoint for NaN, or try a lower learning rate.",
            )
        self._scaler.scale(loss).backward()
        for optimizer in self._optimizers:
            self._scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(self._dense_parameters, recipe.clip)
        for optimizer in self._optimizers:
            self._scaler.step(optimizer)
        self._scaler.update()
        self.state.step += 1
        if time.monotonic() - self._save_time > SAVE_EVERY_S:
            self.save()
        return float(loss.detach())

    def _loss(self, part: Batch) -> torch.Tensor:
        import torch

        from toolchain.training.losses import loss

        inputs = {name: tensor.to(self.device) for name, tensor in part.inputs.items()}
        states = self._recipe.states > 0 or self._recipe.exits > 0
        with mixed_precision.attention(self.device):
            with torch.no_grad():
                teacher_outputs = self._teacher and self._teacher(
                    **self._teacher_inputs(inputs), output_hidden_states=states
                )
            with torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):
                outputs = self._model(**inputs, output_hidden_states=states)
        exit_logits = self._exit_heads(outputs.hidden_states, inputs["attention_mask"])
        return loss(outputs, teacher_outputs, exit_logits, inputs, part, self._weights)

    def judge(self, rows: list[Batch]) -> None:
        """Scores the current weights and stores them if no earlier weights have a better score."""
        import torch

        self.state.held_out.append(score(self._model, rows))
        with torch.no_grad():
            total = sum(float(self._loss(part)) * len(part.labels) for part in rows)
        self.state.losses.append(total / sum(len(part.labels) for part in rows))
        scores = self.state.held_out if self._recipe.task else [-value for value in self.state.losses]
        if scores[-1] >= scores[self.state.best] or len(scores) == 1:
            self.state.best = len(scores) - 1
            _write(self._folder / f"{self.state.best}.{BEST}", dict(self._parameters))

    def _teacher_inputs(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns the inputs that the teacher accepts, which may be fewer than the trained model's inputs."""
        assert self._teacher is not None
        parameters = inspect.signature(self._teacher.forward).parameters
        return {name: tensor for name, tensor in inputs.items() if name in parameters}

    def save(self) -> None:
        """Writes the weights file and then the state file, which tells a resumed run which weights file to read."""
        import torch

        tensors: dict[str, torch.Tensor] = dict(self._parameters)
        for name, parameter in self._parameters.items():
            moments = self._optimizer_of[name].state.get(parameter, {})
            tensors |= {f"{name}|{key}": torch.as_tensor(value) for key, value in moments.items()}
        self.state.spent_s = self._earlier_s + time.monotonic() - self._start_time
        self.state.scale = self._scaler.get_scale() if self._scaler.is_enabled() else self.state.scale
        _write(self._folder / f"{self.state.step}.{WEIGHTS}", tensors)
        files.write_whole(self._folder / STATE, json.dumps(asdict(self.state)))
        for file in self._folder.glob(f"*.{WEIGHTS}"):
            if file.name != f"{self.state.step}.{WEIGHTS}":
                file.unlink()
        self._save_time = time.monotonic()

    def _restore(self, key: str) -> _State | None:
        """Restores the interrupted run that `key` identifies, and returns its state; returns None if there is none.

        Raises `CheckpointError` if the folder is damaged.
        """
        import torch
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        file = self._folder / STATE
        if not file.is_file():
            return None
        try:
            content = read_bytes(file)
            stored_key = decode_object(content).get("key")
            if isinstance(stored_key, str) and stored_key != key:
                return None
            state = decode(_State, content)
            epoch = len(state.held_out) - 1
            is_in_epoch = 0 <= epoch * self.steps <= state.step <= (epoch + 1) * self.steps
            if not is_in_epoch or len(state.losses) != len(state.held_out) or state.best > epoch:
                raise ValueError("its numbers of steps and of epochs contradict each other")
            tensors = load_file(self._folder / f"{state.step}.{WEIGHTS}", device=str(self.device))
            with torch.no_grad():
                for name, parameter in self._parameters.items():
                    if tensors[name].shape != parameter.shape:
                        raise ValueError(f"{name} has another shape")
                    parameter.copy_(tensors.pop(name))
            for name, value in tensors.items():
                parameter_name, moment = name.rsplit("|", 1)
                state_of = self._optimizer_of[parameter_name].state[self._parameters[parameter_name]]
                # `SparseAdam` stores its step count as an integer, `AdamW` as a float tensor.
                state_of[moment] = value if value.is_floating_point() else int(value)
        except (ValueError, LookupError, FileNotFoundError, SafetensorError) as error:
            raise CheckpointError(
                f"{self._folder} does not hold an interrupted training: {first_line(error)}.",
                "Delete this folder, and train again.",
            ) from error
        return state

    def finish(self) -> None:
        """Loads the best weights into the model and moves the model to the CPU."""
        import torch
        from safetensors.torch import load_file

        tensors = load_file(self._folder / f"{self.state.best}.{BEST}")
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(tensors[name])
        self._model.to("cpu")


def _write(path: Path, tensors: dict[str, Any]) -> None:
    """Writes the tensors to a scratch file and renames it, so that `path` never holds a partial file."""
    from safetensors.torch import save_file

    scratch = path.with_name(f".{path.name}")
    with files.writing_in_rust(scratch):
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, scratch)
        files.flush(scratch)
    os.replace(scratch, path)
