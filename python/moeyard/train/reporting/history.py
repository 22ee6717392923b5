"""The history of a run: `metrics.jsonl` read line by line, into one column per metric and expert usage per time bin.

Never more than one line is held as it stands: the usage counts of a long run would not fit into memory.

Shape letters: B time bins, L layers, D domains, E experts.
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]

#: Time bins of the usage, at most; fewer where [B,L,D,E] would be larger than MAX_COUNTS numbers.
MAX_BINS = 60
MAX_COUNTS = 20_000_000


class Series(NamedTuple):
    """One metric: `values[i]`, NaN where it was not finite, at `steps[i]`; steps increase strictly."""

    steps: Floats
    values: Floats


class UsageBins:
    """Expert usage over time, in at most `MAX_BINS` bins of equally many records each.

    The number of records need not be known: whenever the bins are full, neighbours are merged and each holds twice
    as many.
    """

    def __init__(self) -> None:
        self.records, self.width = 0, 1
        self._counts: Counts = np.zeros((0, 0, 0, 0), dtype=np.int64)
        self._first: list[float] = []
        self._last: list[float] = []

    def add(self, step: float, usage: Any) -> bool:
        """Counts one record. False: `usage` is not [L,D,E] of counts, or not of the first record's shape."""
        counts = _counts(usage)
        if counts is None or (self.records and counts.shape != self.shape):
            return False
        if not self.records:
            bins = min(MAX_BINS, MAX_COUNTS // counts.size)
            self._counts = np.zeros((max(bins // 2 * 2, 2), *counts.shape), dtype=np.int64)
        if self.records == self.width * len(self._counts):
            self._merge()
        self._counts[self.records // self.width] += counts
        if self.records % self.width == 0:
            self._first.append(step)
            self._last.append(step)
        self._last[-1] = step
        self.records += 1
        return True

    def _merge(self) -> None:
        half = len(self._counts) // 2
        self._counts[:half] = self._counts[0::2] + self._counts[1::2]
        self._counts[half:] = 0
        self._first, self._last = self._first[0::2], self._last[1::2]
        self.width *= 2

    @property
    def shape(self) -> tuple[int, int, int]:
        """(L, D, E); zeros when no usage was recorded."""
        layers, domains, experts = self._counts.shape[1:]
        return layers, domains, experts

    @property
    def counts(self) -> Counts:
        """[B,L,D,E]"""
        return self._counts[: len(self._first)]

    @property
    def spans(self) -> list[tuple[float, float]]:
        """First and last step of each bin."""
        return list(zip(self._first, self._last, strict=True))

    def late(self) -> Counts:
        """[L,D,E] over the last half of the run (to a bin), when routing has settled."""
        late: Counts = self.counts[self.records // 2 // self.width :].sum(axis=0)
        return late


def _counts(usage: Any) -> Counts | None:
    try:
        counts = np.asarray(usage)
    except ValueError:  # ragged
        return None
    if counts.ndim != 3 or counts.size == 0 or counts.dtype.kind not in "iu" or counts.min() < 0:
        return None
    return counts.astype(np.int64)


class History:
    """Columns of numbers by name, usage bins, and what could not be read.

    Where steps were done twice, because a run went on from an earlier checkpoint, the columns keep the later record;
    the usage counts both.
    """

    def __init__(self) -> None:
        self.usage = UsageBins()
        self.unreadable = 0
        self.cut_off = False
        self._columns: dict[str, tuple[array[float], array[float]]] = {}

    @classmethod
    def of(cls, records: Iterable[Mapping[str, Any]]) -> History:
        """The history of records that are in memory."""
        history = cls()
        for record in records:
            history.add(record)
        return history

    def add(self, record: Mapping[str, Any]) -> None:
        """Takes in one record. Numbers become columns, null is NaN, anything else is passed over."""
        step = _number(record.get("step"))
        if step is None or not math.isfinite(step):
            self.unreadable += 1
            return
        for name, value in record.items():
            number = math.nan if value is None else _number(value)
            if number is not None:
                steps, values = self._columns.setdefault(name, (array("d"), array("d")))
                steps.append(step)
                values.append(number)
        if record.get("experts") and not self.usage.add(step, record["experts"]):
            self.unreadable += 1

    @property
    def names(self) -> list[str]:
        """The columns, in order of appearance."""
        return list(self._columns)

    @property
    def last_step(self) -> int:
        """0 when no step was done."""
        return int(max((steps[-1] for steps, _ in self._columns.values()), default=0))

    def __contains__(self, name: str) -> bool:
        return name in self._columns

    def series(self, name: str) -> Series:
        """A column; empty when there is none of that name."""
        if name not in self._columns:
            return Series(np.empty(0), np.empty(0))
        steps, values = (np.array(column, dtype=np.float64) for column in self._columns[name])
        # Smallest step from here on: a record with a later one was done again.
        later = np.minimum.accumulate(steps[::-1])[::-1]
        kept = np.append(steps[:-1] < later[1:], True)
        return Series(steps[kept], np.where(np.isfinite(values), values, np.nan)[kept])


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def read_history(path: Path) -> History:
    """Reads a `metrics.jsonl`. A file that is not there is an empty history.

    Lines that are not JSON objects with a step are counted in `unreadable` and left out; a last line without its end,
    cut off by a crash or still being written, only sets `cut_off`.
    """
    history = History()
    if not path.is_file():
        return history
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                history.cut_off = True
                break
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                history.unreadable += 1
                continue
            if isinstance(record, dict):
                history.add(record)
            else:
                history.unreadable += 1
    return history
