"""Systems: found by name and by entry point; the trainer trains two of different kind and knows neither."""

from __future__ import annotations

import ast
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lightning", reason="needs moeyard[train]")
pytest.importorskip("tensorboard", reason="needs moeyard[train]")

import moeyard.train
from moeyard.models import SYSTEMS, structures_demo
from moeyard.train import system as systems
from moeyard.train.config import load_config
from moeyard.train.errors import UsageError
from moeyard.train.runs import Run, RunStore
from moeyard.train.training import evaluate_run, train
from train.tiny import tiny_table
from train.toy import curve, run, stop_after


def test_every_system_is_what_the_trainer_asks_for() -> None:
    for name in SYSTEMS:
        found = systems.load_system(name)
        assert found.name == name
        load_config(found.Config, defaults=found.defaults)


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(UsageError, match="system tokens: expected one of structures-demo, tokens-demo"):
        systems.load_system("tokens")


def test_systems_of_other_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = metadata.EntryPoint("elsewhere", SYSTEMS["tokens-demo"], "moeyard.systems")
    monkeypatch.setattr(metadata, "entry_points", lambda group: [entry] if group == "moeyard.systems" else [])
    assert "elsewhere" in systems.system_names()
    assert systems.load_system("elsewhere") is systems.load_system("tokens-demo")


def test_nothing_in_train_knows_a_system() -> None:
    """Only the demo, which is a program on this floor and no part of it, and its plots."""
    modules = {entry.partition(":")[0] for entry in SYSTEMS.values()} | {"moeyard.models.structure_pretraining"}
    for path in Path(moeyard.train.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and not path.name.startswith("demo"):
                assert node.module not in modules, f"{path.name}:{node.lineno}"
                assert node.module is None or not node.module.startswith("moeyard.data"), f"{path.name}:{node.lineno}"


def test_models_do_without_lightning() -> None:
    folder = Path(structures_demo.__file__).parent
    for path in folder.glob("*.py"):
        assert "lightning" not in path.read_text(), path.name


@pytest.fixture
def tiny_structures(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(structures_demo, "embed_molecules", lambda progress, seed: (tiny_table(), []))


def structures(root: Path, *more: str, **options: Any) -> Any:
    chosen = systems.load_system("structures-demo")
    settings = ["max_steps=20", "data.max_atoms_per_batch=100", "eval_every=10", "encoder.num_experts=4", *more]
    config = load_config(chosen.Config, defaults=chosen.defaults, settings=settings)
    return train(chosen, config, RunStore(root), write=lambda line: None, **options)


@pytest.mark.usefixtures("tiny_structures")
def test_structures_train_evaluate_and_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = structures(tmp_path / "whole")
    records = curve(whole.folder)
    losses = [record["loss"] for record in records if "loss" in record]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert [record["step"] for record in records if "val_loss" in record] == [10, 20]
    assert Run(whole.folder).info["domains"] == ["small", "ring"]
    assert evaluate_run(Run(whole.folder), kind="last") == (
        20,
        {name: value for name, value in records[-1].items() if name.startswith("val_")},
    )
    with monkeypatch.context() as patch:
        stop_after(patch, 7)
        structures(tmp_path / "parts")
    assert curve(structures(tmp_path / "parts").folder) == records


@pytest.mark.usefixtures("tiny_structures")
def test_a_run_keeps_to_its_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 7)
        begun = structures(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(structures_demo, "embed_molecules", lambda progress, seed: (tiny_table(seed=1), []))
        with pytest.raises(UsageError, match=r"expected the data that it was trained on .*got others .*--restart"):
            structures(tmp_path)
        with pytest.raises(UsageError, match=r"got others \(\w{16}\); put them back$"):
            evaluate_run(Run(begun.folder), kind="last")
    assert structures(tmp_path).steps == 20


@pytest.mark.usefixtures("tiny_structures")
def test_structures_kept_for_evaluation_are_not_trained_on() -> None:
    chosen = systems.load_system("structures-demo")
    config = load_config(chosen.Config, settings=["data.evaluation_fraction=0.25", "data.max_atoms_per_batch=60"])
    data = chosen.open_data(config)
    kept = sorted(i for batch in data.evaluation_batches for i in batch)
    data.training_batches.set_epoch(1)
    trained = sorted(i for batch in data.training_batches for i in batch)
    assert len(kept) == 15
    assert sorted(kept + trained) == list(range(60))


def test_early_stopping_finishes_a_run(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    result = run(tmp_path, "early_stopping.patience=2", "early_stopping.min_delta=100.0")
    assert (result.status, result.reason, result.steps) == ("finished", "", 15)
    assert Run(result.folder).status == "finished"
    assert [r["step"] for r in curve(result.folder) if "val_loss" in r] == [5, 10, 15]
    assert run(tmp_path, "early_stopping.patience=2", "early_stopping.min_delta=100.0").already


def test_the_plateau_lowers_the_learning_rate(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    more = ("name=plateau", "patience=1", "min_delta=100.0", "warmup_steps=0", "max_reductions=2", "factor=0.1")
    result = run(tmp_path, *(f"schedule.{setting}" for setting in more))
    rates = [r["learning_rate"] for r in curve(result.folder) if "loss" in r]
    # The first evaluation, at step 5, is the best; those at 10 and 15 are no better; the one at 20 finds none left.
    assert rates == pytest.approx([3e-3] * 10 + [3e-4] * 5 + [3e-5] * 9)


def test_the_best_weights_are_kept(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    result = run(tmp_path, "monitor=val_accuracy", "mode=max", "optimizer.learning_rate=0.05")
    records = [r for r in curve(result.folder) if "val_loss" in r]
    best = max(records, key=lambda r: r["val_accuracy"])
    assert result.best == {"name": "val_accuracy", "value": best["val_accuracy"], "step": best["step"]}
    step, values = evaluate_run(Run(result.folder))
    assert step == best["step"]
    assert values == {name: value for name, value in best.items() if name.startswith("val_")}
