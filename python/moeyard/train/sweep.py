"""Sweeps: one run per point of a grid of settings, several at a time, on this machine, on Slurm or on Ray.

Every run lies in the run store like any other, so a sweep that is called again skips what is finished and goes on with
the rest. A run that fails does not end the others.
"""

from __future__ import annotations

import importlib
import itertools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from moeyard.train.config import TrainConfig, config_class, load_config, parse_setting, parse_value, signature
from moeyard.train.errors import UsageError
from moeyard.train.metrics import read_metrics
from moeyard.train.runs import Run, RunStore
from moeyard.train.system import System, load_system

ENGINES = ("local", "slurm", "ray")

#: submitit ends local jobs after five minutes unless told otherwise; a run ends by itself.
_LOCAL = {"timeout_min": 60 * 24 * 365}


@dataclass(frozen=True)
class Job:
    """One point of the grid: the settings in which it differs, and all of them."""

    system: str
    point: tuple[str, ...]
    config: TrainConfig
    run: Run

    @property
    def finished(self) -> bool:
        return self.run.status == "finished"


@dataclass(frozen=True)
class Outcome:
    """How a job stands. `best` has name, value and step; `error` says why it failed."""

    job: Job
    status: str
    steps: int = 0
    best: dict[str, Any] | None = None
    error: str = ""


def expand(grid: Sequence[str]) -> list[tuple[str, ...]]:
    """Every combination of "a=1,2" and "b.c=x,y", the last one varying fastest; commas inside brackets or quotes do not
    divide."""
    axes = []
    for axis in grid:
        path, equals, values = axis.partition("=")
        if not equals or not values.strip():
            raise UsageError(f"--grid: expected key=value,value such as seed=0,1,2, got {axis!r}")
        axes.append([f"{path.strip()}={value}" for value in _divided(values)])
    names = [parse_setting(axis[0])[0] for axis in axes]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(f"--grid: expected every setting once, got {', '.join(twice)} twice")
    return list(itertools.product(*axes))


def _divided(values: str) -> list[str]:
    parts, depth, quote = [""], 0, ""
    for char in values:
        if quote:
            quote = "" if char == quote else quote
        elif char in "\"'":
            quote = char
        depth += (char in "[{") - (char in "]}") if not quote else 0
        if char == "," and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += char
    return [part.strip() for part in parts]


def plan(
    system: System, store: RunStore, grid: Sequence[str], *, file: Path | None = None, settings: Sequence[str] = ()
) -> list[Job]:
    """The jobs of a grid, all of them checked; points that come to the same settings are one job."""
    jobs: dict[str, Job] = {}
    for point in expand(grid):
        config = load_config(system.Config, defaults=system.defaults, file=file, settings=[*settings, *point])
        name = signature(config)
        jobs.setdefault(name, Job(system.name, point, config, store.run(system.name, name)))
    return list(jobs.values())


def work(system: str, config: str, root: str, seconds: float | None, threads: int | None) -> dict[str, Any]:
    """What a job does, wherever it runs: trains, and gives {"error": ...} instead of raising.

    Args:
        system: its name.
        config: all settings as JSON.
        root: of the run store, an absolute path that the engine's machines share.
        seconds: time limit.
        threads: of torch, None for its own choice.
    """
    import torch

    from moeyard.train.training import train

    if threads is not None:
        torch.set_num_threads(threads)
    try:
        chosen = load_system(system)
        read = config_class(chosen.Config).model_validate_json(config, strict=True)
        result = train(chosen, read, RunStore(Path(root)), seconds=seconds)
    except Exception as error:  # one run's failure is a line in the table
        return {"error": str(error) if isinstance(error, UsageError) else f"{type(error).__name__}: {error}"}
    return {"error": "", "reason": result.reason}


class Handle(Protocol):
    """A job that has been handed to an engine."""

    def done(self) -> bool: ...

    def result(self) -> dict[str, Any]: ...

    def cancel(self) -> Any: ...


class Engine(Protocol):
    """Takes jobs; `close` comes last."""

    def start(self, *arguments: Any) -> Handle: ...

    def close(self) -> None: ...


class Submitit:
    """Jobs as processes of this machine, or of a Slurm cluster.

    Args:
        folder: for submitit's logs.
        cluster: "local" or "slurm".
        options: submitit's parameters, such as timeout_min or slurm_partition.
    """

    def __init__(self, folder: Path, cluster: str, options: Mapping[str, Any]) -> None:
        submitit = importlib.import_module("submitit")
        try:
            self._executor = submitit.AutoExecutor(folder=str(folder), cluster=cluster)
            self._executor.update_parameters(**{**(_LOCAL if cluster == "local" else {}), **options})
        except (RuntimeError, ValueError, NameError, AssertionError, TypeError) as error:
            raise UsageError(f"--engine {cluster}: {' '.join(str(error).split())}") from None

    def start(self, *arguments: Any) -> Handle:
        job: Handle = self._executor.submit(work, *arguments)
        return job

    def close(self) -> None:
        pass


class Ray:
    """Jobs as tasks of a Ray cluster: the one at $RAY_ADDRESS, else one on this machine for as long as the sweep.

    Args:
        options: of `ray.remote`, such as num_cpus or num_gpus.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.ray = importlib.import_module("ray")
        self._ours = not self.ray.is_initialized()
        if self._ours:
            self.ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        self._task = self.ray.remote(**{"num_cpus": 1, "max_retries": 0, **options})(work)

    def start(self, *arguments: Any) -> Handle:
        return _RayHandle(self.ray, self._task.remote(*arguments))

    def close(self) -> None:
        if self._ours:
            self.ray.shutdown()


@dataclass
class _RayHandle:
    ray: Any
    reference: Any

    def done(self) -> bool:
        return bool(self.ray.wait([self.reference], timeout=0)[0])

    def result(self) -> dict[str, Any]:
        value: dict[str, Any] = self.ray.get(self.reference)
        return value

    def cancel(self) -> None:
        self.ray.cancel(self.reference)


@dataclass
class Sweep:
    """Runs jobs on an engine.

    Args:
        store: where the runs lie.
        engine: one of `ENGINES`.
        parallel: jobs at a time; None for one on this machine, and for all at once elsewhere.
        seconds: time limit of every run.
        options: "key=value" for the engine, see `Submitit` and `Ray`.
        write: takes a line per event.
    """

    store: RunStore
    engine: str = "local"
    parallel: int | None = None
    seconds: float | None = None
    options: Sequence[str] = ()
    write: Callable[[str], None] = print
    _outcomes: dict[str, Outcome] = field(default_factory=dict)

    def run(self, jobs: Sequence[Job]) -> list[Outcome]:
        """Runs what is not finished; the outcomes of all jobs, the best first.

        Raises:
            UsageError: the engine is not there, or does not take its options.
        """
        waiting = [job for job in jobs if not job.finished]
        if len(waiting) < len(jobs):
            self.write(f"already finished: {len(jobs) - len(waiting)} of {len(jobs)} runs")
        if waiting:
            engine = self._engine(jobs[0].system)
            try:
                self._drain(engine, waiting)
            finally:
                engine.close()
        return ranked([self._outcomes.get(job.run.signature) or outcome(job) for job in jobs])

    def _engine(self, system: str) -> Engine:
        options = {}
        for option in self.options:
            name, equals, value = option.partition("=")
            if not equals:
                raise UsageError(f"--option: expected key=value, got {option!r}")
            options[name] = parse_value(value)
        if self.engine == "ray":
            return Ray(options)
        return Submitit(self.store.root.absolute() / system / "sweep-logs", self.engine, options)

    def _drain(self, engine: Engine, waiting: list[Job]) -> None:
        local = self.engine == "local"
        parallel = self.parallel or (1 if local else len(waiting))
        threads = max((os.cpu_count() or 1) // parallel, 1) if local and parallel > 1 else None
        running: dict[str, tuple[Job, Handle]] = {}
        try:
            while waiting or running:
                while waiting and len(running) < parallel:
                    job = waiting.pop(0)
                    config, root = job.config.model_dump_json(), str(self.store.root.absolute())
                    running[job.run.signature] = (job, engine.start(job.system, config, root, self.seconds, threads))
                    self.write(f"{job.run.signature} started: {' '.join(job.point)}")
                for name in [name for name, (_, handle) in running.items() if handle.done()]:
                    self._note(*running.pop(name))
                time.sleep(0.1)
        except KeyboardInterrupt:
            for _, handle in running.values():
                handle.cancel()
            raise

    def _note(self, job: Job, handle: Handle) -> None:
        try:
            error = handle.result()["error"]
        except Exception as crash:  # killed, or never started: the engine's own words, the last of them
            error = (str(crash).strip().splitlines() or [type(crash).__name__])[-1]
        self._outcomes[job.run.signature] = got = outcome(job, error)
        self.write(f"{job.run.signature} {got.status}{f': {got.error}' if got.error else ''}")


def outcome(job: Job, error: str = "") -> Outcome:
    """How a job stands, from its folder."""
    info = job.run.info
    status = "failed" if error else job.run.status
    return Outcome(job, status, int(info.get("steps", 0)), info.get("best") or _last_loss(job.run), error)


def _last_loss(run: Run) -> dict[str, Any] | None:
    path = run.folder / "metrics.jsonl"
    losses = [r for r in read_metrics(path) if r.get("loss") is not None] if path.exists() else []
    return {"name": "loss", "value": losses[-1]["loss"], "step": losses[-1]["step"]} if losses else None


def ranked(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The best first, by what each run's settings monitor; those without a value last."""

    def key(item: Outcome) -> tuple[bool, float]:
        if item.best is None:
            return True, 0.0
        rising = item.job.config.mode == "max" and item.best["name"] == item.job.config.monitor
        return False, -item.best["value"] if rising else item.best["value"]

    return sorted(outcomes, key=key)
