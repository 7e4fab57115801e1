"""Losses of a training step: distance from the labels, and from a teacher's logits and hidden states.

The module imports torch, so other modules import it inside functions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from toolchain.training.batches import task_loss


@dataclass(frozen=True)
class Weights:
    """Weights of the terms of the loss.

    Attributes:
        task: Weight of the labels, 0 to 1. The teacher's logits have the weight 1 - `task`.
        states: Weight of the teacher's hidden states, added to the two other terms.
        temperature: Divisor of the logits of teacher and student.
        matched: Indices of the compared entries of `hidden_states`.
    """

    task: float
    states: float
    temperature: float
    matched: tuple[int, ...] = ()


def loss(
    given: Any, wanted: Any, inputs: dict[str, torch.Tensor], labels: torch.Tensor, weigh: Weights
) -> torch.Tensor:
    """Returns the loss of a model's outputs for one batch.

    The term of the logits follows Hinton et al. 2015, "Distilling the Knowledge in a Neural Network". The term of the
    states follows Sun et al. 2019, "Patient Knowledge Distillation".

    Args:
        given: Outputs of the model under training.
        wanted: Outputs of its teacher; None without a teacher.
        inputs: The model's inputs by name, with ``attention_mask`` if hidden states count.
        labels: As in `Batch.labels`.
        weigh: Weights of the terms.
    """
    found = weigh.task * task_loss(given.logits.float(), labels) if weigh.task else given.logits.new_zeros(())
    if weigh.task < 1:
        found = found + (1 - weigh.task) * _answers(given.logits, wanted.logits, weigh.temperature, labels.dim() == 2)
    if weigh.states:
        found = found + weigh.states * _states(given, wanted, inputs["attention_mask"], weigh.matched)
    return found


def _answers(mine: torch.Tensor, its: torch.Tensor, temperature: float, multi: bool) -> torch.Tensor:
    """Returns the Kullback-Leibler divergence of the softened predictions, summed over labels if `multi`."""
    mine, its = mine.float() / temperature, its.float() / temperature
    if multi:
        # Each label is a separate yes-or-no prediction.
        mine, its = (functional.logsigmoid(torch.cat([x, -x], dim=-1)) for x in (mine, its))
    else:
        mine, its = (functional.log_softmax(x, dim=-1) for x in (mine, its))
    return functional.kl_div(mine, its, log_target=True, reduction="batchmean") * temperature**2


def _states(given: Any, wanted: Any, real: torch.Tensor, matched: tuple[int, ...]) -> torch.Tensor:
    """Returns the squared difference of the matched hidden states, relative to the teacher's variance.

    The mean over the matched states covers only `real` tokens [batch, sequence]. The last state of the first token
    counts once more, since the classification head reads it.
    """

    def apart(mine: torch.Tensor, its: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        squared = (mine.float() - its.float()).square().mean(-1)
        return (squared * weight).sum() / weight.sum() / its.float().var()

    layers = [(given.hidden_states[i], wanted.hidden_states[i]) for i in matched]
    first = torch.zeros_like(real)
    first[:, 0] = 1
    states: torch.Tensor = sum(apart(mine, its, real) for mine, its in layers) / len(layers) + apart(*layers[-1], first)
    return states
