"""Rows measured on a GPU: the suite of _harness.py with another clock.

A side is timed as the difference of two CUDA graphs: one clears the L2 cache and calls the side, several times over,
the other only clears the cache. So every call starts cold, and neither Python nor the launch of a graph is in the
figure. What cannot be captured, because it synchronises, is timed call by call between two events, host work included;
its note says so.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from _harness import Call, Suite, Times

REPEATS = 20  # calls in one graph
WARM_UPS = 3


class EventTimes(Times):
    """Of a side that no CUDA graph can hold."""

    def text(self) -> str:
        return f"{super().text()} by events, host work included"


class CudaSuite(Suite):
    """Collects rows on `device`. On the CPU it runs every side once, to see that it works, and keeps no figure."""

    def __init__(self, device: torch.device, *, rounds: int = 7) -> None:
        super().__init__(rounds=rounds)
        self.device = device
        self.measures = device.type == "cuda"
        self.copy_rate: float | None = None  # bytes per second, of a large copy
        if self.measures:
            cache = torch.cuda.get_device_properties(device).L2_cache_size
            self.scratch = torch.empty(2 * cache, dtype=torch.uint8, device=device)

    def document(self) -> dict[str, Any]:
        found = super().document()
        if self.measures:
            found["machine"] = torch.cuda.get_device_name(self.device)
            found["versions"] |= {"cuda": torch.version.cuda or "none"}
        else:
            found["machine"] = "No GPU"
        return found

    def record(self, row: str, ours: float | None, unit: str, **rest: Any) -> None:
        if not self.measures:
            kept = [part for part in rest.get("note", "").split("; ") if "(once)" not in part]
            ours, rest = None, {**rest, "peer": None, "ratio": None, "note": "; ".join(kept)}
        super().record(row, ours, unit, **rest)

    def share_of_copy(self, row: str, moved: int, times: Times, target: str | None) -> None:
        """Records what part of the measured copy bandwidth a side reaches that has to move `moved` bytes."""
        note, share = f"{moved:,} bytes, read and written", None
        if self.measures and self.copy_rate is not None:
            rate = moved / times.median
            note, share = f"{note}, at {rate / 1e9:,.0f} GB/s", 100 * rate / self.copy_rate
        self.record(row, share, "%", peer=100.0, peer_name="a large copy", target=target, note=note)

    def time(self, call: Call, inputs: Sequence[Any]) -> Times:
        """Of one side alone."""
        return self._interleave({"": call}, inputs, {"": self._time_once(call, inputs[0])}, self.rounds, 0.0)[""]

    # ---- the clock ---------------------------------------------------------------------------------------------------

    def _time_once(self, call: Call, inputs: Any) -> float:
        self._synchronize()
        start = time.perf_counter()
        call(inputs)
        self._synchronize()
        return time.perf_counter() - start

    def _interleave(
        self, sides: dict[str, Call], inputs: Sequence[Any], once: dict[str, float], rounds: int, warm_up: float
    ) -> dict[str, Times]:
        """Rounds of all sides in turn; `once` and `warm_up` are the CPU's business."""
        if not self.measures:
            return {name: Times([once[name]]) for name in sides}
        empty = self._capture(lambda _: None, inputs)
        assert empty is not None
        graphs = {name: self._capture(call, inputs) for name, call in sides.items()}
        times = {name: EventTimes() if graph is None else Times() for name, graph in graphs.items()}
        for i in range(rounds):
            for name, call in sides.items():
                graph = graphs[name]
                if graph is None:
                    seconds = self._one_cold_call(call, inputs[i % len(inputs)])
                else:
                    seconds = (self._seconds(graph.replay) - self._seconds(empty.replay)) / REPEATS
                times[name].rounds.append(max(seconds, 1e-9))
        return times

    def _capture(self, call: Call, inputs: Sequence[Any]) -> torch.cuda.CUDAGraph | None:
        """A graph of REPEATS cold calls on rotating inputs; None where the call cannot be captured."""
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for i in range(WARM_UPS):
                call(inputs[i % len(inputs)])
        self._synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=stream):
                for i in range(REPEATS):
                    self.scratch.zero_()
                    call(inputs[i % len(inputs)])
        except RuntimeError:
            with contextlib.suppress(RuntimeError):  # the error of the broken capture is still to be fetched
                self._synchronize()
            return None
        graph.replay()
        self._synchronize()
        return graph

    def _one_cold_call(self, call: Call, inputs: Any) -> float:
        self.scratch.zero_()
        return self._seconds(lambda: call(inputs))

    def _seconds(self, work: Callable[[], Any]) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop)) * 1e-3

    def _synchronize(self) -> None:
        if self.measures:
            torch.cuda.synchronize(self.device)


def generator(suite: CudaSuite, seed: int) -> torch.Generator:
    return torch.Generator(suite.device).manual_seed(seed)


def small(suite: CudaSuite, size: int) -> int:
    """The size itself on a GPU; without one the rows are only tried."""
    return size if suite.measures else min(size, 64)


def launches(call: Callable[[], Any]) -> int:
    """Kernels that a call launches, as the profiler sees them; copies and fills of torch count."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    return sum(1 for event in seen.events() if event.device_type == DeviceType.CUDA)
