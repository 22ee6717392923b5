"""The copy ceiling of a GPU, and what the template op reaches of it: `python benchmarks/cuda_copy.py --json FILE`.

A large device-to-device copy bounds every op that only moves bytes. Timed with CUDA events over rotating buffers that
are far larger than the L2 cache; bytes read plus bytes written, medians.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch

import moeyard

ROUNDS, BUFFERS = 30, 4


def milliseconds(copy: Callable[[int], object]) -> list[float]:
    """One time per round; the first rounds warm up."""
    times = []
    for i in range(ROUNDS + 5):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        copy(i % BUFFERS)
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return times[5:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="where the rows go")
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of one buffer")
    options = parser.parse_args()
    count = int(options.gigabytes * 1e9 / 4)
    sources = [torch.randn(count, device="cuda") for _ in range(BUFFERS)]
    target = torch.full_like(sources[0], float("nan"))
    assert torch.equal(moeyard.identity(sources[0]), sources[0])
    ours, peer = [], []
    for _ in range(3):  # A B A B
        peer += milliseconds(lambda i: target.copy_(sources[i]))
        ours += milliseconds(lambda i: moeyard.identity(sources[i]))
    moved = 2 * 4 * count / 1e6
    rate = {"ours": moved / statistics.median(ours), "peer": moved / statistics.median(peer)}
    row = {"row": f"copy of {options.gigabytes:g} GB", "unit": "GB/s", "peer_name": "torch copy_", "target": None}
    row |= rate | {"ratio": rate["ours"] / rate["peer"], "holds": None, "note": "the roofline of byte-moving ops"}
    device = torch.cuda.get_device_name()
    report = {
        "rows": [row],
        "machine": device,
        "date": datetime.date.today().isoformat(),
        "versions": {"torch": torch.__version__, "cuda": torch.version.cuda, "moeyard": moeyard.__version__},
        "threads": torch.get_num_threads(),
    }
    options.json.write_text(json.dumps(report, indent=1))
    print(f"{device}: torch {rate['peer']:.0f} GB/s, identity {rate['ours']:.0f} GB/s")


if __name__ == "__main__":
    main()
