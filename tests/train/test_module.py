"""The wrapped model: random numbers per batch, clipping, weight decay and moving average by hand."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

pytest.importorskip("lightning", reason="needs moeyard[train]")

from moeyard.models.step import StepOutput
from moeyard.train.config import OptimizerConfig, TrainConfig
from moeyard.train.module import EVALUATION, TRAINING, SystemModule, batch_generator, parameter_groups, scored


class Draws(nn.Module):
    """Draws from both generators."""

    experts_per_token = 1

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[1.0, 2.0]]))

    def training_step(self, batch: object, generator: torch.Generator) -> StepOutput:
        drawn = {"own": torch.rand((), generator=generator), "global": torch.rand(())}
        return StepOutput(self.weight.sum(), drawn, {"rows": 1})


def test_random_numbers_depend_on_seed_batch_and_purpose_alone() -> None:
    def draw(seed: int, batch: int, purpose: int) -> tuple[float, ...]:
        torch.rand(7)  # what ran before has no say
        with torch.random.fork_rng(devices=[]):
            metrics = scored(Draws(), None, seed, batch, purpose).metrics
        return tuple(float(value) for value in metrics.values())

    keys = list(itertools.product((0, 1), (0, 1, 2**31), (TRAINING, EVALUATION)))
    seen = [draw(*key) for key in keys]
    assert [draw(*key) for key in keys] == seen
    assert len({value for pair in seen for value in pair}) >= len(keys)
    assert len(set(seen)) == len(keys)
    assert float(torch.rand((), generator=batch_generator(1, 2))) == draw(1, 2, TRAINING)[0]


def test_evaluation_uses_its_own_step_where_there_is_one() -> None:
    class Both(Draws):
        def evaluation_step(self, batch: object, generator: torch.Generator) -> StepOutput:
            return StepOutput(torch.tensor(7.0), {}, {})

    assert float(scored(Both(), None, 0, 0, EVALUATION).loss) == 7.0
    assert float(scored(Both(), None, 0, 0).loss) == 3.0


@pytest.mark.parametrize(("limit", "want"), [(None, [3.0, 4.0]), (1.0, [0.6, 0.8]), (10.0, [3.0, 4.0])])
def test_the_gradient_is_measured_and_then_clipped(limit: float | None, want: list[float]) -> None:
    config = TrainConfig(gradient_clip=limit, optimizer=OptimizerConfig(learning_rate=0.25))
    module = SystemModule(Draws(), config)
    optimizer = module.configure_optimizers()["optimizer"]
    module.model.weight.grad = torch.tensor([[3.0, 4.0]])
    module.configure_gradient_clipping(optimizer)
    assert module.grad_norm == 5.0
    assert module.learning_rate == 0.25
    torch.testing.assert_close(module.model.weight.grad, torch.tensor([want]))


def test_only_matrices_decay() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(3, 2), "norm": nn.LayerNorm(2), "linear": nn.Linear(2, 2)})
    model["linear"].experts_bias = nn.Parameter(torch.zeros(4, 2))
    decayed, kept = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    assert [p is model["linear"].weight for p in decayed["params"]] == [True]
    assert len(kept["params"]) == 5


def test_the_moving_average() -> None:
    module = SystemModule(Draws(), TrainConfig(ema_decay=0.75))
    module.end_step()  # the first one is the weights themselves
    with torch.no_grad():
        module.model.weight += 4.0
    module.end_step()
    assert module.evaluated_model().weight.tolist() == [[2.0, 3.0]]
    # DDP and the optimizer leave it alone.
    assert not module.evaluated_model().weight.requires_grad
    assert SystemModule(Draws(), TrainConfig()).evaluated_model().weight.tolist() == [[1.0, 2.0]]
