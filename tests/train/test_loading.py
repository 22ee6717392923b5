"""Stringed epochs: every batch once, from any place, over any number of processes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

pytest.importorskip("lightning", reason="needs moeyard[train]")

from moeyard.data.batching import AtomBudgetBatchSampler
from moeyard.train.loading import RepeatedEpochs


class Epochs:
    """Three batches in even epochs and two in odd ones, marked with the epoch's number."""

    epoch = -1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        yield from ([self.epoch, i] for i in range(3 - self.epoch % 2))


WANT = [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [2, 0], [2, 1], [2, 2], [3, 0], [3, 1]]


def test_epochs_are_strung_together() -> None:
    batches = RepeatedEpochs(Epochs(), 7)
    assert len(batches) == 7
    assert list(batches) == WANT[:7]
    assert list(batches) == WANT[:7]


@pytest.mark.parametrize("first", range(10))
@pytest.mark.parametrize("ahead", [0, 1, 4])
def test_it_goes_on_from_any_place(first: int, ahead: int) -> None:
    begun = RepeatedEpochs(Epochs(), 10)
    batches = iter(begun)
    # A loader with workers has asked for more than has been trained on.
    for _ in range(min(first + ahead, 10)):
        next(batches)
    position = begun.position(first)
    rest = RepeatedEpochs(Epochs(), 10, first=first, position=position)
    assert list(rest) == WANT[first:]
    assert len(rest) == 10
    if first < 10:
        assert [rest.position(n)[0] for n in range(first, 10)] == [epoch for epoch, _ in WANT[first:]]


@pytest.mark.parametrize("processes", [2, 5])
def test_processes_share_the_batches(processes: int) -> None:
    shares = [list(RepeatedEpochs(Epochs(), 10, rank=r, processes=processes)) for r in range(processes)]
    assert {len(share) for share in shares} == {10 // processes}
    assert [share[i] for i in range(10 // processes) for share in shares] == WANT
    late = list(RepeatedEpochs(Epochs(), 10, rank=1, processes=2, first=4, position=(1, 1)))
    assert late == WANT[5::2]


@pytest.mark.parametrize("processes", [2, 5])
def test_every_process_knows_where_all_are(processes: int) -> None:
    """An epoch may end within a step, after this process's batch of it."""
    for first in range(0, 10 + 1, processes):
        for rank in range(processes):
            begun = RepeatedEpochs(Epochs(), 10, rank=rank, processes=processes)
            list(itertools.islice(iter(begun), first // processes))
            assert [begun.position(n)[0] for n in range(first)] == [epoch for epoch, _ in WANT[:first]]
            rest = RepeatedEpochs(
                Epochs(), 10, rank=rank, processes=processes, first=first, position=begun.position(first)
            )
            assert list(rest) == WANT[first + rank :: processes]


def test_real_sampler_in_the_middle_of_an_epoch() -> None:
    sampler = AtomBudgetBatchSampler([3, 5, 2, 4, 1, 6, 2, 5, 3], 8, seed=1, lookahead=2)
    whole = RepeatedEpochs(sampler, 20)
    want = list(whole)
    for first in range(20):
        again = AtomBudgetBatchSampler([3, 5, 2, 4, 1, 6, 2, 5, 3], 8, seed=1, lookahead=2)
        assert list(RepeatedEpochs(again, 20, first=first, position=whole.position(first))) == want[first:]


def test_a_sampler_without_batches_is_an_error_not_a_hang() -> None:
    class Empty(Epochs):
        def __iter__(self) -> Iterator[list[int]]:
            return iter(())

    with pytest.raises(ValueError, match="at least one batch"):
        list(RepeatedEpochs(Empty(), 3))


def test_steps_that_the_processes_cannot_share() -> None:
    with pytest.raises(ValueError, match="steps: expected multiples of 2 processes, got 0 of 3"):
        RepeatedEpochs(Epochs(), 3, processes=2)
