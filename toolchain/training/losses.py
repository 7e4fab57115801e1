"""Losses of a training step: distance from the labels, and from a teacher's logits and hidden states.

This module imports torch, so other modules import this module only inside functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from toolchain.data.labels import MULTI, REGRESSION, TOKENS
from toolchain.training.batches import Batch, task_loss


@dataclass(frozen=True)
class Weights:
    """Weights of the terms of the loss.

    Attributes:
        task: Weight of the term for the labels, 0 to 1. The term for the teacher's logits has the weight 1 - `task`.
        states: Weight of the term for the hidden states, which is added to the terms for labels and logits.
        exits: Weight of the term for the logits of exits, which is added to the other terms.
        temperature: Divisor of the logits of teacher and student.
        matched: Indices of the entries of `hidden_states` that the loss compares between student and teacher.
    """

    task: float
    states: float
    temperature: float
    exits: float = 0.0
    matched: tuple[int, ...] = ()


def loss(
    outputs: Any,
    teacher_outputs: Any,
    exit_logits: Sequence[torch.Tensor],
    inputs: dict[str, torch.Tensor],
    part: Batch,
    weights: Weights,
) -> torch.Tensor:
    """Returns the loss of a model's outputs for one batch.

    The loss on the teacher's logits follows Hinton et al. 2015, "Distilling the Knowledge in a Neural Network". The
    loss on the hidden states follows Sun et al. 2019, "Patient Knowledge Distillation".

    Args:
        outputs: Outputs of the model under training.
        teacher_outputs: Outputs of the model's teacher; None without a teacher.
        exit_logits: Logits of the exits' heads, each of shape [batch, labels]; empty without exits.
        inputs: The model's inputs on its device by name, with ``attention_mask``.
        part: The batch.
        weights: Weights of the loss's terms for labels, logits, hidden states and exits.
    """
    total = weights.task * task_loss(outputs.logits.float(), part) if weights.task else outputs.logits.new_zeros(())
    if weights.task < 1:
        logits, teacher_logits = outputs.logits, teacher_outputs.logits
        if part.task == TOKENS:  # each token is a row, without the tokens of padding
            is_token = inputs["attention_mask"].bool()
            logits, teacher_logits = logits[is_token], teacher_logits[is_token]
        total = total + (1 - weights.task) * _logit_loss(logits, teacher_logits, weights.temperature, part.task)
    if weights.states:
        total = total + weights.states * _state_loss(
            outputs, teacher_outputs, inputs["attention_mask"], weights.matched, part.task
        )
    if exit_logits:
        # An exit compares a probability with a threshold. So the temperature is 1, and each head learns the teacher's
        # probabilities unchanged.
        divergences = [_logit_loss(logits, teacher_outputs.logits, 1.0, part.task) for logits in exit_logits]
        total = total + weights.exits * torch.stack(divergences).mean()
    return total


def _logit_loss(student: torch.Tensor, teacher: torch.Tensor, temperature: float, task: str) -> torch.Tensor:
    """Returns the Kullback-Leibler divergence between student and teacher.

    For a multi-label model, the function sums the divergence over the labels. For regression, the function returns the
    mean squared difference of the scores.
    """
    if task == REGRESSION:
        return functional.mse_loss(student.float(), teacher.float())
    student, teacher = student.float() / temperature, teacher.float() / temperature
    if task == MULTI:
        # In a multi-label model, each label is a separate yes-or-no prediction.
        student, teacher = (functional.logsigmoid(torch.cat([x, -x], dim=-1)) for x in (student, teacher))
    else:
        student, teacher = (functional.log_softmax(x, dim=-1) for x in (student, teacher))
    return functional.kl_div(student, teacher, log_target=True, reduction="batchmean") * temperature**2


def _state_loss(
    outputs: Any, teacher_outputs: Any, mask: torch.Tensor, matched: tuple[int, ...], task: str
) -> torch.Tensor:
    """Returns the mean squared difference between student and teacher in matched hidden states.

    The function divides the squared difference by the variance of the teacher's hidden states. The mean covers only the
    tokens whose value in `mask`, of shape [batch, sequence], is 1. The first token's last hidden state has extra weight
    in the loss, because the head of a sequence classifier reads this state.
    """

    def difference(student: torch.Tensor, teacher: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        squared = (student.float() - teacher.float()).square().mean(-1)
        return (squared * weight).sum() / weight.sum() / teacher.float().var()

    layers = [(outputs.hidden_states[i], teacher_outputs.hidden_states[i]) for i in matched]
    zero = torch.zeros((), device=mask.device)
    states = sum((difference(student, teacher, mask) for student, teacher in layers), start=zero) / len(layers)
    if task == TOKENS:
        return states
    first_token = torch.zeros_like(mask)
    first_token[:, 0] = 1
    return states + difference(*layers[-1], first_token)
