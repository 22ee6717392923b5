"""Pretraining: corruption and its seeds, the losses by hand, stringed epochs, callbacks on made-up outputs."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("lightning", reason="needs moeyard[train]")

from moeyard.data.batching import collate
from moeyard.models import StructureEncoderConfig
from moeyard.train.callbacks import CollapseAlarm, MetricsWriter, PlainProgress, StopOnInterrupt, read_metrics
from moeyard.train.loading import RepeatedEpochs
from moeyard.train.pretraining import PretrainingConfig, StructurePretraining, corrupt, step_generator
from train.tiny import tiny_table

SIZES = StructureEncoderConfig(dim=16, num_layers=2, num_basis=8, num_experts=4, expert_hidden=16)


def module(seed: int = 0, **changes: float) -> StructurePretraining:
    torch.manual_seed(seed)
    return StructurePretraining(SIZES, PretrainingConfig(seed=seed, **changes), num_domains=2)


def test_corruption_depends_on_seed_and_step_alone() -> None:
    positions, elements = torch.zeros(500, 3), torch.full((500,), 6)

    def draw(seed: int, step: int) -> tuple[torch.Tensor, ...]:
        torch.rand(7)  # the global generator has no say
        generator = step_generator(seed, step)
        return tuple(corrupt(positions, elements, noise_std=0.2, mask_fraction=0.15, generator=generator))

    first = draw(3, 10)
    for got, want in zip(draw(3, 10), first, strict=True):
        assert torch.equal(got, want)
    for other in (draw(4, 10), draw(3, 11)):
        assert not torch.equal(other[0], first[0])
        assert not torch.equal(other[3], first[3])


def test_corruption_does_what_it_says() -> None:
    positions = torch.randn(20_000, 3)
    elements = torch.full((20_000,), 8)
    before = positions.clone()
    got = corrupt(positions, elements, noise_std=0.2, mask_fraction=0.15, generator=step_generator(0, 0))
    assert torch.equal(positions, before)
    assert (elements == 8).all()
    torch.testing.assert_close(got.positions, positions + 0.2 * got.noise)
    assert got.noise.std().item() == pytest.approx(1.0, abs=0.02)
    assert got.masked.float().mean().item() == pytest.approx(0.15, abs=0.01)
    assert torch.equal(got.elements == 0, got.masked)


def test_losses_equal_their_formulas() -> None:
    model = module(noise_weight=2.0, element_weight=0.5, balance_weight=0.1, z_weight=0.01)
    table = tiny_table(copies=8)
    batch = collate(table, torch.arange(len(table)))
    corruption = corrupt(
        batch.positions, batch.elements, noise_std=0.1, mask_fraction=0.3, generator=step_generator(0, 0)
    )
    encoding = model.encoder(corruption.positions, corruption.elements, batch.ptr)
    got = model.losses(encoding, corruption, batch.elements)
    noise = torch.nn.functional.mse_loss(encoding.noise, corruption.noise)
    element = torch.nn.functional.cross_entropy(
        encoding.element_logits[corruption.masked], batch.elements[corruption.masked]
    )
    torch.testing.assert_close(got["loss_noise"], noise)
    torch.testing.assert_close(got["loss_element"], element)
    want = 2.0 * noise + 0.5 * element + 0.1 * got["loss_balance"] + 0.01 * got["loss_z"]
    torch.testing.assert_close(got["loss"], want)


def test_nothing_masked_is_no_loss_of_elements() -> None:
    model = module(mask_fraction=0.0)
    table = tiny_table(copies=2)
    out = model.outputs(collate(table, torch.arange(len(table))), step=0)
    assert out["metrics"]["loss_element"] == 0
    assert out["loss"].isfinite()


def test_usage_counts_every_slot_of_every_domain() -> None:
    model = module()
    table = tiny_table(copies=4)
    usage = model.outputs(collate(table, torch.arange(len(table))), step=0)["usage"]
    assert usage.shape == (2, 2, 4)
    # 4 waters and 4 methanes have 32 atoms, 4 benzenes 48; each atom fills two slots.
    assert usage.sum(2).tolist() == [[64, 96], [64, 96]]


@pytest.mark.parametrize("changes", [{"noise_std": 0.0}, {"noise_std": math.nan}, {"mask_fraction": 1.5}])
def test_bad_configuration(changes: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        PretrainingConfig(**changes)


class Epochs:
    """Three batches per epoch, marked with the epoch's number."""

    epoch = -1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        yield from ([self.epoch, i] for i in range(3))


def test_epochs_are_strung_together() -> None:
    batches = RepeatedEpochs(Epochs(), 7)
    assert len(batches) == 7
    want = [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2], [2, 0]]
    assert list(batches) == want
    assert list(batches) == want


def test_a_sampler_without_batches_is_an_error_not_a_hang() -> None:
    class Empty(Epochs):
        def __iter__(self) -> Iterator[list[int]]:
            return iter(())

    with pytest.raises(ValueError, match="at least one batch"):
        list(RepeatedEpochs(Empty(), 3))


def outputs(usage: list[list[list[int]]], loss: float = 1.0) -> dict[str, object]:
    return {"metrics": {"loss": torch.tensor(loss)}, "usage": torch.tensor(usage), "edges": 4}


def test_collapse_alarm_warns_once() -> None:
    lines: list[str] = []
    alarm = CollapseAlarm(1, span=2, warn=lines.append)
    even, one = [[[5, 5]], [[5, 5]]], [[[5, 5]], [[9, 1]]]
    for step, usage in enumerate([even, even, one, one, one, one], start=1):
        alarm.on_train_batch_end(SimpleNamespace(global_step=step), None, outputs(usage), None, 0)
    assert lines == ["layer 1, step 4: expert 0 takes 90% of the tokens"]
    assert alarm.warnings == lines


def test_collapse_alarm_judges_a_short_run() -> None:
    alarm = CollapseAlarm(1, span=100)
    trainer = SimpleNamespace(global_step=1)
    alarm.on_train_batch_end(trainer, None, outputs([[[10, 0]]]), None, 0)
    alarm.on_train_end(trainer, None)
    assert alarm.warnings == [
        "layer 0, step 1: expert 0 takes 100% of the tokens",
        "layer 0, step 1: expert 1 got no token",
    ]


def test_metrics_are_strict_json_and_survive_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path, max_atoms_per_batch=10)
    batch = SimpleNamespace(ptr=torch.tensor([0, 3, 8]))
    writer.on_train_start(None, None)
    for step, loss in enumerate([2.0, math.nan], start=1):
        writer.on_train_batch_start(None, None, batch, 0)
        writer.on_train_batch_end(SimpleNamespace(global_step=step), None, outputs([[[1, 2]]], loss), batch, 0)
    # On disk before the file is closed.
    lines = [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]
    assert [(r["step"], r["loss"], r["structures"], r["atoms"]) for r in lines] == [(1, 2.0, 2, 8), (2, None, 2, 8)]
    assert lines[0]["batch_fill"] == 0.8
    assert lines[0]["experts"] == [[[1, 2]]]
    writer.teardown(None, None, "fit")
    with path.open("a") as file:
        file.write('{"step": 3, "lo')
    assert read_metrics(path) == lines


def test_plain_progress_ends_with_the_last_step() -> None:
    lines: list[str] = []
    progress = PlainProgress(lines.append, every_seconds=1e9)
    progress.on_train_start(None, None)
    for step in (1, 2, 3):
        trainer = SimpleNamespace(global_step=step, max_steps=3)
        progress.on_train_batch_end(trainer, None, outputs([]), SimpleNamespace(ptr=torch.tensor([0, 5])), 0)
    progress.on_train_end(None, None)
    assert [line.split("  ")[0] for line in lines] == ["step 1/3", "step 3/3"]


def test_first_interrupt_stops_second_raises() -> None:
    before = signal.getsignal(signal.SIGINT)
    trainer = SimpleNamespace(should_stop=False)
    stop = StopOnInterrupt()
    stop.setup(trainer, None, "fit")
    try:
        os.kill(os.getpid(), signal.SIGINT)
        assert trainer.should_stop
        assert stop.interrupted
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        stop.teardown(trainer, None, "fit")
    assert signal.getsignal(signal.SIGINT) is before
