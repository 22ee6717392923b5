"""The demo on a tiny generated table: falling loss, same seed same losses, files, plots, Ctrl-C, user's mistakes."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("lightning", reason="needs moeyard[train]")
pytest.importorskip("pydantic", reason="needs moeyard[train]")
pytest.importorskip("matplotlib", reason="needs moeyard[train]")

from engines import NO_GPU, has_gpu
from moeyard.data.structures import embed_molecules, molecule_list, peptide_list
from moeyard.models import structures_demo
from moeyard.models.structures_demo import StructuresDemoData
from moeyard.train import demo
from moeyard.train.checkpoint import Checkpoints
from moeyard.train.demo import DemoOptions, DemoSummary, run_demo
from moeyard.train.errors import UsageError
from moeyard.train.metrics import read_metrics
from moeyard.train.plots import smoothed
from moeyard.train.system import Progress
from moeyard.train.trainer import fit
from train.tiny import tiny_table


class Left(NamedTuple):
    path: str
    reason: str


@pytest.fixture(autouse=True)
def _tiny_structures(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)  # these batches are too small to share

    def structures(progress: object = None, seed: int = 0) -> object:
        return tiny_table(), [Left("odd molecule", "could not be embedded")]

    monkeypatch.setattr(demo, "embed_molecules", structures)


def run(out: Path, **changes: object) -> tuple[DemoSummary, list[str]]:
    lines: list[str] = []
    options = {"steps": 20, "max_atoms_per_batch": 100, "experts": 4, "out": out, **changes}
    return run_demo(DemoOptions(**options), write=lines.append), lines


def losses(out: Path) -> list[float]:
    return [r["loss"] for r in read_metrics(out / "metrics.jsonl")]


def test_twenty_steps(tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    summary, lines = run(tmp_path)
    assert torch.equal(torch.random.get_rng_state(), state), "the global random state was touched"
    assert summary.steps == 20
    assert summary.last_loss < 0.8 * summary.first_loss
    assert summary.structures == 60
    assert summary.domains == {"small": 40, "ring": 20}
    assert 0.5 < summary.batch_fill <= 1.0
    assert summary.skipped == [("odd molecule", "could not be embedded")]
    assert not summary.interrupted
    for shares in summary.expert_share:
        assert sum(shares) == pytest.approx(1.0)
    assert any(line.startswith("step 20/20") for line in lines)

    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in records] == list(range(1, 21))
    for r in records:
        assert r["atoms"] <= 100
        assert sum(map(sum, r["experts"][0])) == 2 * r["atoms"]
    for name in ("overview.png", "loss.png", "experts.png", "throughput.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / name).stat().st_size > 10_000
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["options"]["seed"] == 0
    assert config["versions"]["torch"] == torch.__version__
    saved = json.loads((tmp_path / "summary.json").read_text())
    assert saved["last_loss"] == summary.last_loss
    assert sorted(saved["files"]) == sorted(p.name for p in tmp_path.iterdir())


def test_same_seed_same_losses(tmp_path: Path) -> None:
    first, again, other = (tmp_path / name for name in ("first", "again", "other"))
    run(first, steps=8, seed=5)
    torch.rand(3)
    run(again, steps=8, seed=5, workers=1)
    run(other, steps=8, seed=6)
    assert losses(first) == losses(again)
    assert losses(first) != losses(other)


def test_time_limit(tmp_path: Path) -> None:
    summary, _ = run(tmp_path, steps=100_000, seconds=1.0)
    assert 1 <= summary.steps < 100_000


@pytest.mark.parametrize("workers", [0, 1])
def test_interrupt_keeps_what_was_done(tmp_path: Path, workers: int) -> None:
    metrics = tmp_path / "metrics.jsonl"

    def interrupt_after_some_steps() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (metrics.exists() and metrics.read_text().count("\n") >= 3):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    sender = threading.Thread(target=interrupt_after_some_steps)
    sender.start()
    try:
        summary, _ = run(tmp_path, steps=100_000, workers=workers)
    finally:
        sender.join()
    assert summary.interrupted
    assert 3 <= summary.steps == len(losses(tmp_path))
    assert (tmp_path / "loss.png").exists()
    assert json.loads((tmp_path / "summary.json").read_text())["interrupted"]
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_structure_beyond_the_budget_is_a_batch_of_its_own(tmp_path: Path) -> None:
    summary, _ = run(tmp_path, steps=4, max_atoms_per_batch=8)
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert summary.batch_fill <= 1.0
    assert all(r["atoms"] <= 8 or r["structures"] == 1 for r in records)


def resident_run(out: Path, steps: int, *, keep: bool = False, **limits: float) -> list[float]:
    """The demo's training with structures, batches and graphs on one device."""
    out.mkdir(exist_ok=True)
    config = demo.settings(DemoOptions(steps=steps, max_atoms_per_batch=100, experts=4, out=out))
    data = StructuresDemoData(tiny_table(), max_atoms_per_batch=100, device="cuda")
    checkpoints = Checkpoints(out / "checkpoints", system="structures-demo", signature="0" * 8) if keep else None
    model = demo.build_model(config, data)
    fit(model, data, config, out, checkpoints=checkpoints, write=lambda line: None, **limits)
    return losses(out)


def test_structures_that_stay_on_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Epochs are planned and gathered by the ops alone, here on the CPU in place of a GPU."""
    monkeypatch.setattr(structures_demo, "own_gpu", lambda: torch.device("cpu"))
    first = resident_run(tmp_path / "first", 20)
    assert first[-1] < 0.8 * first[0]
    for r in read_metrics(tmp_path / "first" / "metrics.jsonl"):
        assert r["atoms"] <= 100
        assert sum(map(sum, r["experts"][0])) == 2 * r["atoms"]
    assert resident_run(tmp_path / "again", 8) == first[:8]
    begun = resident_run(tmp_path / "resumed", 20, keep=True, seconds=1e-3)
    assert 0 < len(begun) < 20
    assert resident_run(tmp_path / "resumed", 20, keep=True) == first


@pytest.mark.skipif(not has_gpu(), reason=NO_GPU)
def test_on_a_gpu(tmp_path: Path) -> None:
    summary, _ = run(tmp_path / "first", device="cuda")
    assert summary.last_loss < 0.8 * summary.first_loss
    assert 0.5 < summary.batch_fill <= 1.0
    assert summary.comparison == []
    run(tmp_path / "again", device="cuda")
    # Sums over edges are in no fixed order there.
    assert losses(tmp_path / "again") == pytest.approx(losses(tmp_path / "first"), rel=1e-2)


@pytest.mark.skipif(has_gpu(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^device = cuda: CUDA (kernels|device): not "):
        run(tmp_path, device="cuda")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "tpu"}, "device: expected cpu or cuda, got 'tpu'"),
        ({"steps": 0}, "--steps: expected 1 to 2147483647, got 0"),
        ({"seconds": 0}, "--seconds: expected a positive number up to 1e9, got 0"),
        ({"seconds": float("nan")}, "--seconds"),
        ({"seconds": float("inf")}, "--seconds"),
        ({"experts": 8193}, "--experts: expected 1 to 8192, got 8193"),
        ({"experts": 2, "top_k": 3}, "--top-k: expected 1 to 2, got 3"),
        ({"max_atoms_per_batch": -5}, "--max-atoms-per-batch: expected 1 to 2147483647, got -5"),
        ({"workers": -1}, "--workers: expected 0 to 256, got -1"),
        ({"seed": 2**40}, "--seed: expected 0 to 2147483647, got 1099511627776"),
        ({"structures": Path("no/such/folder")}, "--structures: .*does not exist"),
    ],
)
def test_bad_options(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run(tmp_path, **changes)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="--out: cannot write into"):
        run(tmp_path / "file" / "run")


def test_smoothing_by_hand() -> None:
    import numpy as np

    got = smoothed(np.array([1.0, 2.0, 6.0, 3.0]), 3)
    assert got.tolist() == [1.5, 3.0, 11 / 3, 4.5]
    gap = smoothed(np.array([1.0, np.nan, np.nan, np.nan, 3.0]), 3)
    np.testing.assert_equal(gap, [1.0, 1.0, np.nan, 3.0, 3.0])


class TestRealStructures:
    @pytest.fixture(autouse=True)
    def _needs_the_readers(self) -> None:
        for package in ("rdkit", "gemmi"):
            pytest.importorskip(package, reason="needs moeyard[structures]")

    def test_embedded_molecules(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def some(progress: Progress, seed: int) -> object:
            # A tenth of the list: the data room's tests embed all of it.
            return embed_molecules(molecule_list()[::10], peptide_list()[:3], seed=seed, progress=progress)

        monkeypatch.setattr(demo, "embed_molecules", some)
        seen: list[tuple[int, int, str]] = []
        options = DemoOptions(steps=20, max_atoms_per_batch=500, out=tmp_path)
        summary = run_demo(options, progress=lambda *report: seen.append(report), write=lambda line: None)
        assert summary.domains["peptide"] == 3
        assert summary.last_loss < 0.8 * summary.first_loss
        assert seen[-1] == (len(seen), len(seen), "structures embedded")

    @pytest.mark.slow
    def test_alphafold_models(self, tmp_path: Path, data_dir: Path) -> None:
        options = DemoOptions(structures=data_dir / "structures" / "alphafold", steps=20, seconds=90, out=tmp_path)
        summary = run_demo(options, write=lambda line: None)
        assert summary.domains["protein"] >= 20
        assert summary.last_loss < 0.8 * summary.first_loss
