"""What a model gives back for one batch of training or evaluation."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class StepOutput(NamedTuple):
    """One batch, scored.

    loss: scalar with a gradient. metrics: further scalars, parts of the loss as "loss_<part>". sizes: what the batch
    held, such as {"tokens": 512, "sequences": 20}, as numbers or scalar tensors; the first one is the unit in which
    progress is told. usage: [L,D,E] int64, slots per layer, domain and expert. batch_fill: share of the batch's budget,
    0 to 1. weight: how much the batch counts in a mean over batches of an evaluation, such as the number of its labels.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    sizes: dict[str, int | Tensor]
    usage: Tensor | None = None
    batch_fill: float | None = None
    weight: float = 1.0
