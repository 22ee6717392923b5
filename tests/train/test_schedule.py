"""Learning rate and patience, by hand."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("pydantic", reason="needs moeyard[train]")

from moeyard.train.config import ScheduleConfig
from moeyard.train.schedule import Factor, Patience


def factors(steps: int, **settings: object) -> list[float]:
    factor = Factor(ScheduleConfig.model_validate(settings), learning_rate=0.01, max_steps=10)
    return [factor(step) for step in range(steps)]


def test_constant_with_warmup() -> None:
    assert factors(6, warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert factors(2) == [1.0, 1.0]


def test_cosine_with_warmup_falls_to_the_least_rate() -> None:
    got = factors(12, name="cosine", warmup_steps=2, min_learning_rate=0.001)
    # least = 0.1 of the first rate; a quarter of the way is cos(pi / 4), half of it is (1 + 0.1) / 2.
    want = [0.5, 1.0, 1.0]
    assert got[:3] == want
    assert got[4] == pytest.approx(0.1 + 0.45 * (1 + math.sqrt(0.5)))
    assert got[6] == pytest.approx(0.55)
    assert got[10] == got[11] == pytest.approx(0.1)


def test_plateau_reduces_so_often_and_no_lower() -> None:
    settings = ScheduleConfig(name="plateau", factor=0.5, max_reductions=3, min_learning_rate=0.002)
    factor = Factor(settings, learning_rate=0.01, max_steps=10)
    seen = [factor(5)]
    for _ in range(4):
        factor.reduce()
        seen.append(factor(5))
    assert seen == [1.0, 0.5, 0.25, 0.2, 0.2]
    assert not factor.reduce()
    assert not Factor(ScheduleConfig(), learning_rate=0.01, max_steps=10).reduce()


@pytest.mark.parametrize(
    ("mode", "values", "want"),
    [
        ("min", [3.0, 2.0, 2.0, 1.95, 1.0, math.nan, 1.0, 5.0, 5.0], [0, 0, 0, 1, 0, 0, 1, 0, 1]),
        ("max", [0.1, 0.5, 0.55, 0.4, 0.9], [0, 0, 0, 1, 0]),
    ],
)
def test_patience(mode: str, values: list[float], want: list[int]) -> None:
    patience = Patience(2, min_delta=0.1, mode=mode)
    got = []
    for value in values:
        # As after a resume.
        again = Patience(2, min_delta=0.1, mode=mode)
        again.load_state_dict(patience.state_dict())
        patience = again
        got.append(int(patience.observe(value)))
    assert got == want


def test_no_patience_never_runs_out() -> None:
    patience = Patience(None)
    assert not any(patience.observe(1.0) for _ in range(100))
    assert patience.best == 1.0
