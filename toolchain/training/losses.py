"""What a training step makes smaller: distance from the labels, and from what a teacher answers. Imports torch: import
it where it is used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from toolchain.training.batches import task_loss


@dataclass(frozen=True)
class Weights:
    """How much counts what: `task` the labels against the teacher's answers, 0 to 1, and `states` the teacher's hidden
    states beside both, those of the layers `matched`. `temperature` softens teacher and student alike."""

    task: float
    states: float
    temperature: float
    matched: tuple[int, ...] = ()


def loss(
    given: Any, wanted: Any, inputs: dict[str, torch.Tensor], labels: torch.Tensor, weigh: Weights
) -> torch.Tensor:
    """Of a model's outputs, `given`, for a batch and its `labels`; `wanted` are its teacher's, None without one.

    Hinton et al. 2015, "Distilling the Knowledge in a Neural Network"; Sun et al. 2019, "Patient Knowledge
    Distillation", for the states.
    """
    found = weigh.task * task_loss(given.logits.float(), labels) if weigh.task else given.logits.new_zeros(())
    if weigh.task < 1:
        found = found + (1 - weigh.task) * _answers(given.logits, wanted.logits, weigh.temperature, labels.dim() == 2)
    if weigh.states:
        found = found + weigh.states * _states(given, wanted, inputs["attention_mask"], weigh.matched)
    return found


def _answers(mine: torch.Tensor, its: torch.Tensor, temperature: float, multi: bool) -> torch.Tensor:
    """The Kullback-Leibler divergence of the softened answers; of sets, summed over the labels."""
    mine, its = mine.float() / temperature, its.float() / temperature
    if multi:
        # Each label is an answer of its own: yes or no.
        mine, its = (functional.logsigmoid(torch.cat([x, -x], dim=-1)) for x in (mine, its))
    else:
        mine, its = (functional.log_softmax(x, dim=-1) for x in (mine, its))
    return functional.kl_div(mine, its, log_target=True, reduction="batchmean") * temperature**2


def _states(given: Any, wanted: Any, real: torch.Tensor, matched: tuple[int, ...]) -> torch.Tensor:
    """The squared difference of the hidden states relative to the teacher's variance: those behind the layers
    `matched` at the tokens that are `real` [batch, sequence], and once more the first token's last one, which the head
    reads."""

    def apart(mine: torch.Tensor, its: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        squared = (mine.float() - its.float()).square().mean(-1)
        return (squared * weight).sum() / weight.sum() / its.float().var()

    layers = [(given.hidden_states[i], wanted.hidden_states[i]) for i in matched]
    first = torch.zeros_like(real)
    first[:, 0] = 1
    states: torch.Tensor = sum(apart(mine, its, real) for mine, its in layers) / len(layers) + apart(*layers[-1], first)
    return states
