"""One training step of every system, on the CPU and on a GPU: gradients for all parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("lightning", reason="needs moeyard[train]")
pytest.importorskip("pydantic", reason="needs moeyard[train]")

from lightning.fabric.utilities.apply_func import move_data_to_device

from engines import engine, no_synchronisation
from moeyard.models import SYSTEMS
from moeyard.models.structures_demo import StructuresDemoData
from moeyard.train.config import load_config
from moeyard.train.module import autocast, scored
from moeyard.train.system import load_system
from train.tiny import tiny_table

pytestmark = [pytest.mark.usefixtures("engine"), pytest.mark.engines("cpu", "cuda")]


def data_of(name: str, config: Any) -> Any:
    if name == "structures-demo":  # its own would embed molecules
        return StructuresDemoData(tiny_table(), max_atoms_per_batch=100, device=config.device)
    return load_system(name).open_data(config)


@pytest.mark.parametrize("name", sorted(SYSTEMS))
def test_a_step(name: str) -> None:
    with engine.without_mode():
        system = load_system(name)
        config = load_config(system.Config, defaults=system.defaults, settings=[f"device={engine.device}"])
        data = data_of(name, config)
        torch.manual_seed(0)
        model = system.build_model(config, data).to(engine.device)
        batches = iter(data.loader(data.training_batches, num_workers=0))
        for number in range(2):
            batch = move_data_to_device(next(batches), torch.device(engine.device))
            model.zero_grad()
            output = scored(model, batch, seed=0, number=number)
            output.loss.backward()
            assert torch.isfinite(output.loss)
            assert all(p.grad is not None for p in model.parameters())


@pytest.mark.engines("cuda")
def test_structures_on_a_gpu_are_not_waited_for() -> None:
    """Once an epoch is planned, its batches are gathered, embedded in graphs and learned from without the host; in
    bfloat16, whose grouped products need no numbers of tokens."""
    with engine.without_mode():
        system = load_system("structures-demo")
        config = load_config(system.Config, defaults=system.defaults, settings=[f"device={engine.device}"])
        data = data_of("structures-demo", config)
        model = system.build_model(config, data).to(engine.device)
        assert data.resident is not None
        batches = iter(data.loader(list(data.training_batches), num_workers=0))
        with autocast("bf16", torch.device("cuda")):
            scored(model, next(batches), seed=0, number=0).loss.backward()
            with no_synchronisation():
                scored(model, next(batches), seed=0, number=1).loss.backward()
