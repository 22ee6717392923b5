"""The demo: real structures in, a small MoE structure encoder trained, metrics and plots out.

    structures -> atom-budget batches -> radius graphs -> MoE encoder -> runs/demo/

`run_demo` does the work and returns a `DemoSummary`; printing is the command line's business.
"""

from __future__ import annotations

import platform
import statistics
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moeyard.data.structures import StructureTable, embed_molecules, read_structures
from moeyard.models.structure_pretraining import StructurePretraining
from moeyard.models.structures_demo import StructuresDemoData, system
from moeyard.train import plots
from moeyard.train.config import TrainConfig, load_config
from moeyard.train.demo_comparison import StepComparison, compare_steps
from moeyard.train.errors import UsageError
from moeyard.train.files import write_json
from moeyard.train.metrics import read_metrics
from moeyard.train.module import random_state_apart
from moeyard.train.processes import need_device
from moeyard.train.report import write_report
from moeyard.train.runs import versions
from moeyard.train.system import Progress
from moeyard.train.trainer import fit


@dataclass(frozen=True)
class DemoOptions:
    """What `moeyard demo` can be told. Training ends after `steps` or `seconds`, whichever comes first."""

    structures: Path | None = None
    steps: int = 800
    seconds: float = 60.0
    max_atoms_per_batch: int = 2000
    experts: int = 8
    top_k: int = 2
    seed: int = 0
    out: Path = Path("runs/demo")
    workers: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        # The upper ends are those of the ops (experts), of int32, and of good sense (workers).
        for name, low, high in (
            ("steps", 1, 2**31 - 1),
            ("max_atoms_per_batch", 1, 2**31 - 1),
            ("experts", 1, 8192),
            ("top_k", 1, self.experts),
            ("seed", 0, 2**31 - 1),
            ("workers", 0, 256),
        ):
            if not low <= getattr(self, name) <= high:
                option = name.replace("_", "-")
                raise UsageError(f"--{option}: expected {low} to {high}, got {getattr(self, name)}")
        if not 0 < self.seconds <= 1e9:
            raise UsageError(f"--seconds: expected a positive number up to 1e9, got {self.seconds:g}")
        need_device(self.device)
        if self.structures is not None and not self.structures.exists():
            raise UsageError(f"--structures: expected a folder of structure files; {self.structures} does not exist")


@dataclass(frozen=True)
class DemoSummary:
    """What a run did. Rates and fills are over all steps; first and last loss are means over a tenth of them each."""

    steps: int
    seconds: float
    structures: int
    atoms: int
    domains: dict[str, int]
    structures_per_second: float
    atoms_per_second: float
    batch_fill: float
    median_step_seconds: float
    first_loss: float
    last_loss: float
    expert_share: list[list[float]]  # [layer][expert] of the slots, last half of the run
    warnings: list[str]
    skipped: list[tuple[str, str]]
    interrupted: bool
    out: str
    files: list[str] = field(default_factory=list)
    comparison: list[StepComparison] = field(default_factory=list)  # a batch's steps beside plain PyTorch


def run_demo(
    options: DemoOptions,
    *,
    progress: Progress | None = None,
    terminal: bool = False,
    write: Callable[[str], None] = print,
) -> DemoSummary:
    """Trains on structures and leaves metrics, plots, configuration and summary in `options.out`.

    Args:
        options: see `DemoOptions`.
        progress: told (done, total, what) while structures are read or embedded.
        terminal: a live bar while training; otherwise plain lines.
        write: takes those lines, and warnings.

    Returns:
        The summary. After Ctrl-C during training it covers what was done until then.

    Raises:
        UsageError: nothing to train on, or an output folder that cannot be written.

    Determinism: the same options, seed and number of threads give the same losses; on a GPU, where sums over edges are
    in no fixed order, to rounding. Only the number of steps that fit into `seconds` depends on the machine. The global
    random state is left alone.
    """
    _writable_folder(options.out)
    table, skipped = load_structures(options, progress)
    config = settings(options)
    data = StructuresDemoData(
        table, max_atoms_per_batch=options.max_atoms_per_batch, seed=options.seed, device=options.device
    )
    model = build_model(config, data)
    write_config(options, config, model, table)
    result = fit(model, data, config, options.out, seconds=options.seconds, terminal=terminal, write=write)
    records = read_metrics(options.out / "metrics.jsonl")
    interrupted = result.reason == "interrupted"
    summary = summarize(options, table, records, result.seconds, result.warnings, skipped, interrupted)
    drawn = plots.draw(records, options.out, table.domains)
    files = ["config.json", "metrics.jsonl", "summary.json", "report.html", *(path.name for path in drawn)]
    summary = replace(summary, files=files)
    write_json(options.out / "summary.json", asdict(summary))
    write_report(options.out)
    if not interrupted and options.device == "cpu":
        # What the run has come to is written; the comparison is an extra.
        summary = replace(summary, comparison=compare(config, table, write))
        write_json(options.out / "summary.json", asdict(summary))
    return summary


def load_structures(options: DemoOptions, progress: Progress | None) -> tuple[StructureTable, list[tuple[str, str]]]:
    """The structures to train on, and what was left out with the reasons."""

    stage = "structures embedded" if options.structures is None else "files read"

    def tell(done: int, total: int, what: str) -> None:
        # The name of the stage, not of each molecule or file.
        if progress is not None:
            progress(done, total, stage)

    if options.structures is None:
        table, skipped = embed_molecules(progress=tell, seed=options.seed)
    else:
        table, skipped = read_structures(options.structures, progress=tell)
    reasons = [(s.path, s.reason) for s in skipped]
    if len(table) == 0:
        where = "the embedded list" if options.structures is None else str(options.structures)
        first = f"; the first of {len(reasons)} skipped: {': '.join(reasons[0])}" if reasons else ""
        raise UsageError(f"--structures: no readable PDB, mmCIF or SDF structure in {where}{first}")
    return table, reasons


def settings(options: DemoOptions) -> TrainConfig:
    """The options as settings of the system structures-demo."""
    values = {
        "seed": options.seed,
        "max_steps": options.steps,
        "workers": options.workers,
        "device": options.device,
        # In float32 the host would have to learn how many tokens each expert has.
        "precision": "bf16" if options.device == "cuda" else "32",
        "data": {"max_atoms_per_batch": options.max_atoms_per_batch, "evaluation_fraction": 0.0},
        "encoder": {"num_experts": options.experts, "experts_per_token": options.top_k},
    }
    return load_config(system.Config, defaults={**system.defaults, **values})


def build_model(config: TrainConfig, data: StructuresDemoData) -> StructurePretraining:
    # Seeded without a trace: whoever calls the demo from a program keeps their own random state.
    with random_state_apart():
        torch.manual_seed(config.seed)
        return system.build_model(config, data)


def summarize(
    options: DemoOptions,
    table: StructureTable,
    records: Sequence[dict[str, Any]],
    seconds: float,
    alarms: Sequence[str],
    skipped: list[tuple[str, str]],
    interrupted: bool,
) -> DemoSummary:
    """Boils the records down; all zeros when not one step was done."""
    busy = sum(r["step_seconds"] + r["data_seconds"] for r in records) or 1.0
    tenth = max(len(records) // 10, 1)
    losses = [r["loss"] for r in records]
    usage = np.sum([np.array(r["experts"]).sum(axis=1) for r in records[len(records) // 2 :]], axis=0)
    names = Counter(table.domains[d] for d in table.domain.tolist())
    return DemoSummary(
        steps=len(records),
        seconds=seconds,
        structures=len(table),
        atoms=int(table.ptr[-1]),
        domains=dict(names),
        structures_per_second=sum(r["structures"] for r in records) / busy,
        atoms_per_second=sum(r["atoms"] for r in records) / busy,
        batch_fill=_mean([r["batch_fill"] for r in records]),
        median_step_seconds=statistics.median([r["step_seconds"] for r in records]) if records else 0.0,
        first_loss=_mean(losses[:tenth]),
        last_loss=_mean(losses[-tenth:]),
        expert_share=(usage / np.maximum(usage.sum(axis=1, keepdims=True), 1)).tolist() if records else [],
        warnings=list(alarms),
        skipped=skipped,
        interrupted=interrupted,
        out=str(options.out),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def compare(config: Any, table: StructureTable, write: Callable[[str], None]) -> list[StepComparison]:
    """One batch's steps with our ops and with plain PyTorch, at the sizes of the run."""
    encoder = config.encoder
    try:
        return compare_steps(
            table,
            max_atoms_per_batch=config.data.max_atoms_per_batch,
            cutoff=encoder.cutoff,
            dim=encoder.dim,
            hidden=encoder.expert_hidden,
            num_experts=encoder.num_experts,
            experts_per_token=encoder.experts_per_token,
            seed=config.seed,
        )
    except ValueError as error:
        write(f"warning: no comparison with plain PyTorch: {error}")
    except KeyboardInterrupt:
        write("warning: no comparison with plain PyTorch: interrupted")
    return []


def write_config(
    options: DemoOptions, settings: TrainConfig, model: StructurePretraining, table: StructureTable
) -> None:
    """Everything that a run depends on, so that it can be repeated."""
    config = {
        "options": {k: str(v) if isinstance(v, Path) else v for k, v in asdict(options).items()},
        "settings": settings.model_dump(mode="json"),
        "domains": list(table.domains),
        "parameters": sum(p.numel() for p in model.parameters()),
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "machine": f"{platform.system()} {platform.machine()}",
    }
    write_json(options.out / "config.json", config)


def _writable_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        # An earlier run stays until there is something to put in its place.
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise UsageError(f"--out: cannot write into {out}: {error.strerror}") from None
