"""The one harness of all benchmarks: ours and its peers interleaved in one run, compared before they are timed.

A benchmark file holds functions `bench_<what>(suite)` or, under `@cases(...)`, `bench_<what>(suite, case)`; each calls
`suite.compare` or `suite.record` and so adds rows. They run in two ways, with the same rows:

    pytest benchmarks            every file under pytest-benchmark (`make bench`); see conftest.py
    python benchmarks/bench_topk_gating.py [--quick] [--json FILE] [-k PART]

A row is {"row", "ours", "unit", "peer", "peer_name", "ratio", "target", "holds", "note"}; `ratio` is peer / ours of two
medians from the same run. `target` is null (any honest outcome), or text: ">= 10 x" is about the ratio, "<= 0.6 s" and
the like about `ours` in that unit.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import math
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from _machine import machine, using_threads, versions

ONE_CORE = "not measured: one core only"
INPUT_SETS = 3
WARM_UP_SECONDS = {False: 0.05, True: 0.3}  # before a timing; True: of several threads
QUICK_WARM_UP_SECONDS = {False: 0.0, True: 0.15}
LEAST_SECONDS = 5e-3  # what one timing should last; shorter calls are repeated
UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}

Call = Callable[[Any], Any]
Runner = Callable[[Callable[[], Any], Callable[[], None], int], None]


class Mismatch(AssertionError):
    """Ours and a peer do not give the same, so there is nothing to time."""


@dataclass(frozen=True)
class Peer:
    """Another implementation of the same. `call` takes what `make` returned; None: it is missing, and `why` says so.

    `same(ours, theirs, inputs)` raises AssertionError where the outputs differ; None: there is nothing to compare (a
    copy of as many bytes).
    """

    name: str
    call: Call | None
    same: Callable[[Any, Any, Any], None] | None
    target: str | None = None
    why: str = "not installed"


@dataclass
class Times:
    """Seconds per call, one entry per round."""

    rounds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    def text(self) -> str:
        if len(self.rounds) == 1:
            return f"{nice_time(self.median)} (once)"
        return f"{nice_time(min(self.rounds))} to {nice_time(max(self.rounds))}"


def cases(*values: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The values of a benchmark's second argument, one run each."""

    def mark(function: Callable[..., None]) -> Callable[..., None]:
        function.cases = values  # type: ignore[attr-defined]
        return function

    return mark


# ---- figures ---------------------------------------------------------------------------------------------------------


def time_unit(seconds: float) -> str:
    return next((unit for unit, size in UNITS.items() if seconds >= size), "ns")


def nice_time(seconds: float) -> str:
    unit = time_unit(seconds)
    return f"{seconds / UNITS[unit]:.3g} {unit}"


def holds(target: str | None, ours: float | None, unit: str, ratio: float | None) -> bool | None:
    """Whether a row reaches its target; None where that is not known or not asked."""
    if target is None:
        return None
    match = re.fullmatch(r"(>=|<=) ([0-9.]+) (\S+)", target)
    if match is None:
        raise ValueError(f"target: expected '>= 10 x', '<= 0.6 s' or the like, got {target!r}")
    sign, limit, of = match[1], float(match[2]), match[3]
    if of != "x" and of != unit:
        raise ValueError(f"target: expected the row's unit {unit}, got {target!r}")
    value = ratio if of == "x" else ours
    if value is None:
        return None
    return value >= limit if sign == ">=" else value <= limit


# ---- what must not be reused -----------------------------------------------------------------------------------------


def _arrays(value: Any) -> Iterator[Tensor | np.ndarray]:
    if isinstance(value, Tensor | np.ndarray):
        yield value
    elif isinstance(value, list | tuple) and len(value) <= 100:
        for item in value:
            yield from _arrays(item)
    elif isinstance(value, dict):
        yield from _arrays(list(value.values()))
    elif hasattr(value, "__dataclass_fields__"):
        yield from _arrays([getattr(value, name) for name in value.__dataclass_fields__])


def _start(array: Tensor | np.ndarray) -> int:
    if isinstance(array, Tensor):
        return array.untyped_storage().data_ptr()
    base = array if array.base is None or not isinstance(array.base, np.ndarray) else array.base
    return int(base.__array_interface__["data"][0])


def poison(outputs: Any, inputs: Any) -> None:
    """Overwrites outputs before their memory is freed, so that nobody can live on what is left there.

    On one thread, or OpenMP's workers would spin on into the next timing.
    """
    kept = {_start(a) for a in _arrays(inputs)}
    with torch.no_grad(), using_threads(1):
        for array in _arrays(outputs):
            if _start(array) in kept:
                continue
            if isinstance(array, Tensor):
                array.detach().fill_(1 if array.dtype == torch.bool else 113)
            elif array.flags.writeable:
                array.fill(113)


def fresh_seed() -> int:
    """A new one on every call: no run sees the inputs of another."""
    return int.from_bytes(os.urandom(4), "little")


# ---- the suite -------------------------------------------------------------------------------------------------------


def plain_runner(ours: Callable[[], Any], setup: Callable[[], None], rounds: int) -> None:
    """What `benchmark.pedantic` does, without pytest-benchmark."""
    for _ in range(rounds):
        setup()
        ours()


class Suite:
    """Collects the rows of one benchmark file."""

    def __init__(self, *, quick: bool = False, rounds: int | None = None, echo: bool = True) -> None:
        self.quick = quick
        self.rounds = rounds or (3 if quick else 7)
        self.rows: list[dict[str, Any]] = []
        self.echo = echo
        self.runner: Runner = plain_runner

    def size(self, full: int, quick: int) -> int:
        return quick if self.quick else full

    def compare(
        self,
        row: str,
        make: Callable[[int], Any],
        ours: Call,
        peers: Sequence[Peer],
        *,
        best: str | None = None,
        limit: str | None = None,
        threads: int = 1,
        note: str = "",
    ) -> Times:
        """Times `ours` beside its peers on fresh inputs, round by round: B C A, B C A, ...

        Args:
            row: the row's name.
            make: inputs from a seed; a few sets of them rotate.
            ours, peers: called with such inputs.
            best: one row, decided by the fastest peer, with this target; the other peers stand in its note. A peer that
                needs over three times as long as the fastest when the outputs are compared is not timed again. None:
                one row per peer, with the peer's target.
            limit: a target for the time of ours itself, in a row of its own.
            threads: torch's number of threads meanwhile.
            note: what the reader must know.
        """
        inputs = [make(fresh_seed()) for _ in range(INPUT_SETS)]
        notes = [note] if note else []
        with using_threads(threads):
            once, failed = self._check(row, inputs[0], ours, peers)
            notes += [f"{peer.name}: {peer.why}" for peer in peers if peer.call is None] + failed
            timed = [peer for peer in peers if peer.name in once]
            if best is not None and timed:
                fastest = min(once[peer.name] for peer in timed)
                timed = [peer for peer in timed if once[peer.name] <= 3 * fastest]
            sides = {"": ours} | {peer.name: peer.call for peer in timed if peer.call is not None}
            warm_up = (QUICK_WARM_UP_SECONDS if self.quick else WARM_UP_SECONDS)[threads > 1]
            times = self._interleave(sides, inputs, once, self.rounds, warm_up)
        for name, seconds in once.items():
            times.setdefault(name, Times([seconds]))
        mine = times.pop("")
        if limit is not None:
            self._row(row, mine, None, None, limit, notes, limit.split()[-1])
        if best is not None:
            ranked = sorted(times, key=lambda name: times[name].median)
            single = {name: " (once)" if len(times[name].rounds) == 1 else "" for name in ranked}
            others = [f"{name} {nice_time(times[name].median)}{single[name]}" for name in ranked[1:]]
            notes += ["others: " + ", ".join(others)] if others else []
            self._row(row, mine, ranked[0] if ranked else None, times, best, notes)
        else:
            for peer in peers:
                self._row(row, mine, peer.name, times, peer.target, notes)
        return mine

    def record(
        self,
        row: str,
        ours: float | None,
        unit: str,
        *,
        peer: float | None = None,
        peer_name: str | None = None,
        ratio: float | None = None,
        target: str | None = None,
        note: str = "",
    ) -> None:
        """Adds a row whose figures come from elsewhere: a share, bytes, a difference of two times."""
        figures = {"ours": ours, "peer": peer, "ratio": ratio}
        rounded = {name: None if x is None else float(f"{x:.4g}") for name, x in figures.items()}
        self.rows.append(
            {
                "row": row,
                "ours": rounded["ours"],
                "unit": unit,
                "peer": rounded["peer"],
                "peer_name": peer_name,
                "ratio": rounded["ratio"],
                "target": target,
                "holds": holds(target, ours, unit, ratio),
                "note": note,
            }
        )
        if self.echo:
            print(line(self.rows[-1]), flush=True)

    def difference(
        self, row: str, call: Call, base: Call, base_name: str, inputs: Sequence[Any], target: str, note: str = ""
    ) -> None:
        """Records what `call` costs more than `base`, in us; both interleaved, one thread, many short rounds."""
        with using_threads(1):
            sides = {"": call, base_name: base}
            for side in sides.values():
                side(inputs[0])  # the first call warms up
            once = {name: self._time_once(side, inputs[0]) for name, side in sides.items()}
            times = self._interleave(sides, inputs, once, 4 * self.rounds, 0.0)
        more = statistics.median(a - b for a, b in zip(times[""].rounds, times[base_name].rounds, strict=True))
        notes = [f"whole call {nice_time(times[''].median)} ({times[''].text()})", note]
        if more <= 0:
            notes.append("not more than the base: too noisy to say")
        alloc = times[base_name].median
        self.record(
            row, more * 1e6 if more > 0 else None, "us", peer=alloc * 1e6, peer_name=base_name, target=target,
            note="; ".join(filter(None, notes)),
        )  # fmt: skip

    def document(self) -> dict[str, Any]:
        """What a JSON file of rows holds; `threads` is what a row used that states none."""
        today = datetime.date.today().isoformat()
        return {"rows": self.rows, "machine": machine(), "date": today, "versions": versions(), "threads": 1}

    def write(self, path: Path) -> None:
        """Whole or not at all: a reader never sees half a file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        with os.fdopen(handle, "w") as file:
            file.write(json.dumps(self.document(), indent=1) + "\n")
        os.chmod(name, 0o644)
        os.replace(name, path)

    # ---- below: one comparison ---------------------------------------------------------------------------------------

    def _check(self, row: str, inputs: Any, ours: Call, peers: Sequence[Peer]) -> tuple[dict[str, float], list[str]]:
        """Compares the outputs, twice for ours: the second run gets the poisoned memory of the first.

        Returns the seconds of a warm call for every side that works, and what to say of those that do not.
        """
        once: dict[str, float] = {}
        failed: list[str] = []
        poison(ours(inputs), inputs)
        start = time.perf_counter()
        expected = ours(inputs)
        once[""] = time.perf_counter() - start
        for peer in peers:
            if peer.call is None:
                continue
            try:
                theirs = peer.call(inputs)
            except Exception as error:
                # A peer that cannot run here is a note; the message could hold paths, so only its kind is kept.
                failed.append(f"{peer.name}: failed with {type(error).__name__}")
                print(f"{row}: {peer.name}: {error}", file=sys.stderr)
                continue
            try:
                if peer.same is not None:
                    peer.same(expected, theirs, inputs)
            except AssertionError as error:
                raise Mismatch(f"{row}: {peer.name} gives something else: {error}") from error
            del theirs
            once[peer.name] = self._time_once(peer.call, inputs)
        return once, failed

    @staticmethod
    def _time_once(call: Call, inputs: Any) -> float:
        start = time.perf_counter()
        call(inputs)
        return time.perf_counter() - start

    def _interleave(
        self, sides: dict[str, Call], inputs: Sequence[Any], once: dict[str, float], rounds: int, warm_up: float
    ) -> dict[str, Times]:
        """Rounds of all sides in turn, ours ("") last; in one round every side has another set of inputs.

        One call, and more for `warm_up` seconds, go untimed before each timing: virtual machines hand memory that lies
        free for two seconds back to their host, and to fetch it again costs several times what any side here computes.
        With several threads it takes longer: until the OpenMP workers of the side before have ceased to spin, and until
        the system has given every thread a core.
        """
        times = {name: Times() for name in sides}
        repeats = {name: max(1, min(10_000, math.ceil(LEAST_SECONDS / max(once[name], 1e-9)))) for name in sides}
        done = 0

        def one(name: str) -> None:
            place = list(sides).index(name)
            chosen = [inputs[(done + place + i) % len(inputs)] for i in range(min(repeats[name], len(inputs)))]
            before = inputs[(done + place - 1) % len(inputs)]
            call, count, number = sides[name], repeats[name], len(chosen)
            outputs = call(before)
            poison(outputs, inputs)
            warm_since = time.perf_counter()
            while time.perf_counter() - warm_since < warm_up:
                outputs = None  # the last call's outputs are gone before the next begins
                outputs = call(before)
            start = time.perf_counter()
            for i in range(count):
                outputs = None
                outputs = call(chosen[i % number])
            times[name].rounds.append((time.perf_counter() - start) / count)
            poison(outputs, inputs)

        def peers() -> None:
            for name in sides:
                if name:
                    one(name)

        def ours() -> None:
            nonlocal done
            one("")
            done += 1

        collecting = gc.isenabled()
        gc.collect()
        gc.disable()
        try:
            self.runner(ours, peers, rounds)
        finally:
            if collecting:
                gc.enable()
        return times

    def _row(
        self,
        row: str,
        mine: Times,
        name: str | None,
        times: dict[str, Times] | None,
        target: str | None,
        notes: list[str],
        unit: str | None = None,
    ) -> None:
        theirs = times.get(name) if times is not None and name is not None else None
        unit = unit or time_unit(mine.median)
        spread = f"{len(mine.rounds)} rounds, {mine.text()}"
        if theirs is not None:
            spread += f"; peer {theirs.text()}"
        self.record(
            row,
            mine.median / UNITS[unit],
            unit,
            peer=None if theirs is None else theirs.median / UNITS[unit],
            peer_name=name,
            ratio=None if theirs is None else theirs.median / mine.median,
            target=target,
            note="; ".join([*notes, spread]),
        )


def line(row: dict[str, Any]) -> str:
    """A row as one line of text."""
    ours = "not measured" if row["ours"] is None else f"{row['ours']:.4g} {row['unit']}"
    peer = "" if row["peer"] is None else f"{row['peer_name']} {row['peer']:.4g} {row['unit']}"
    ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f} x"
    state = {True: "holds", False: "LOST", None: ""}[row["holds"]]
    return f"{row['row'][:76]:76} {ours:>14}  {peer[:46]:46} {ratio:>9}  {row['target'] or '':10} {state}"


# ---- running a file without pytest -----------------------------------------------------------------------------------


def failed_row(name: str, error: BaseException) -> dict[str, Any]:
    """Stands in for the rows of a benchmark that did not run, so that they are missed."""
    text = str(error) if isinstance(error, Mismatch) else type(error).__name__
    empty = dict.fromkeys(("ours", "peer", "peer_name", "ratio", "target", "holds"))
    return {"row": name, "unit": "", **empty, "note": f"did not run: {text}"}


def benchmarks_of(module: dict[str, Any]) -> Iterator[tuple[str, Callable[[Suite], None]]]:
    """Names and functions of one suite argument, cases bound."""
    for name, function in list(module.items()):
        if not name.startswith("bench_") or not callable(function):
            continue
        if not hasattr(function, "cases"):
            yield name, function
        for case in getattr(function, "cases", ()):
            yield f"{name}[{case}]", lambda suite, f=function, c=case: f(suite, c)


def main(module: dict[str, Any]) -> None:
    """`python benchmarks/bench_<op>.py`: the exit status says whether everything ran, not whether targets hold."""
    parser = argparse.ArgumentParser(description=module.get("__doc__"))
    parser.add_argument("--quick", action="store_true", help="smaller sizes and fewer rounds, same targets")
    parser.add_argument("--json", type=Path, help="where the rows go")
    parser.add_argument("-k", default="", metavar="PART", help="only benchmarks whose name contains this")
    options = parser.parse_args()
    suite, ran = Suite(quick=options.quick), True
    for name, function in benchmarks_of(module):
        if options.k not in name:
            continue
        try:
            function(suite)
        except Exception as error:
            ran = False
            print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
            suite.rows.append(failed_row(name, error))
    if options.json is not None:
        suite.write(options.json)
    sys.exit(0 if ran else 1)
