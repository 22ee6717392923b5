"""Deliberate mistakes in the shipped CUDA kernels: each must fail the tests that run under the emulation.

A mutant is a patch of one file in a copy of the sources. Its text has to be there exactly once, so that a change of the
kernel that takes the place of a mistake away is noticed here.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from emulation import ROOT, build, built_as, only_process, under_sanitizer

pytestmark = pytest.mark.slow

PLANS = "test_permute_tokens_engines.py -k plans"
ROWS = "test_permute_tokens_engines.py -k rows"
GATES = "test_topk_gating_engines.py -k any_call"
LAST_BITS = "test_topk_gating_engines.py -k last_bits"
FOLLOWING = "test_topk_gating_engines.py -k follow"
HEAVIEST, PERMUTE = (f"permute_tokens/{name}" for name in ("keep_heaviest.cuh", "permute_tokens_cuda.cu"))
SORT, SCAN, WORDS = (f"common/{name}.cuh" for name in ("digit_sort", "scan", "words"))
GATE, BACKWARD, SELECT, ROW = (f"topk_gating/gate_{name}.cuh" for name in ("forward", "backward", "select", "row"))
TREE, HITS, LISTS, CELLS, EDGE_ROWS, EDGES = (
    f"radius_graph/{name}.cuh" for name in ("tree", "hits", "lists", "cells", "rows", "edges")
)
PACK, RANKS, GATHER = (
    f"pack_batches/{name}" for name in ("pack_batches_cuda.cu", "segment_ranks.cuh", "gather_segments_cuda.cu")
)
NEIGHBOURS = "test_radius_graph_engines.py -k agree"
NEAREST = "test_radius_graph_engines.py -k ties"
ROOM = "test_radius_graph_engines.py -k capacity"
EPOCHS = "test_pack_batches_engines.py -k agree"
BATCHES = "test_gather_segments_engines.py -k agree"


class Mutant(NamedTuple):
    file: str  # below csrc
    right: str
    wrong: str
    tests: str  # below tests/ops
    symptom: str  # in what pytest prints
    flavour: str = "plain"


DIFFERENT = "AssertionError|Fatal Python error"  # a wrong row may become an address
MUTANTS = {
    "removed barrier": Mutant(
        SORT, "p.bins, rank);\n    __syncthreads();", "p.bins, rank);", PLANS, DIFFERENT
    ),
    "removed barrier around a reused array": Mutant(
        HEAVIEST, "  __syncthreads();\n  return before;", "  return before;", PLANS, DIFFERENT
    ),
    "removed __syncwarp": Mutant(
        ROW, "table[at] += value;\n    __syncwarp();", "table[at] += value;", GATES, "data race", "folded"
    ),
    "off by one, read": Mutant(
        PERMUTE, "row < m.plan.rows ? m.plan", "row <= m.plan.rows ? m.plan", ROWS, "heap-buffer-overflow", "address"
    ),
    "off by one, shared memory": Mutant(
        SORT, "b < kSortWarps * p.bins;", "b <= kSortWarps * p.bins;", PLANS, "heap-buffer-overflow", "address"
    ),
    "off by one, rank": Mutant(
        SORT, "count[bin[j]] + lower : 0", "count[bin[j]] + lower + 1 : 0", PLANS, DIFFERENT
    ),
    "wrong lane mask": Mutant(
        PERMUTE, "kFull = 0xffffffffu", "kFull = 0x7fffffffu", ROWS, "the calling lane is not in that of"
    ),
    "missing tail zero": Mutant(
        PERMUTE, "c < m.words; c += kWarp) store", "c < m.words / kWarp * kWarp; c += kWarp) store", ROWS, DIFFERENT
    ),
    "no zeros between rows": Mutant(
        BACKWARD, "if (id[r] >= 0) given[place(r)] = 0;", "(void)r;", FOLLOWING, DIFFERENT
    ),
    "non-atomic add": Mutant(SORT, "atomicAdd(&bins[bin[j]], 1u)", "++bins[bin[j]]", PLANS, DIFFERENT, "preempt"),
    "non-atomic add, as a race": Mutant(
        GATE, "atomicAdd(shared.counts + slots.id[r], 1)", "++shared.counts[slots.id[r]]", GATES, "data race", "thread"
    ),
    "blocks that write to the same place": Mutant(
        SORT, "counts[int64_t(blockIdx.x) * p.bins + b] = ", "counts[int64_t(blockIdx.x / 2) * p.bins + b] = ", PLANS,
        "data race", "blocks"
    ),
    "misaligned vector access": Mutant(
        WORDS, "bits |= reinterpret_cast<uintptr_t>(address);", "(void)address;", ROWS, "misaligned"
    ),
    "unwritten output": Mutant(
        PERMUTE, "if (j < slots && (j & (team - 1))", "if (j + 1 < slots && (j & (team - 1))", ROWS, DIFFERENT
    ),
    "short keys trusted too far": Mutant(
        SELECT, "      nearest = min(nearest, next(last) ^ last);\n", "", LAST_BITS, DIFFERENT
    ),
    "swapped tie rule": Mutant(
        SELECT,
        "(v.x == best ? 0 : v.y == best ? 1 : v.z == best ? 2 : 3)",
        "(v.w == best ? 3 : v.z == best ? 2 : v.y == best ? 1 : 0)",
        GATES,
        DIFFERENT,
    ),
    "a box at the limit passed by": Mutant(TREE, "wanted = gap <= limit;", "wanted = gap < limit;", NEAREST, DIFFERENT),
    "edges between graphs": Mutant(
        HITS, "place >= q.range.begin && place < q.range.end", "place < tree.shape.points", NEIGHBOURS, DIFFERENT
    ),
    "cells that are too narrow": Mutant(CELLS, "* (1 + 1e-5))", "* (1 - 1e-2))", NEIGHBOURS, DIFFERENT),
    "a window of two buckets": Mutant(CELLS, "start[min(from + 3,", "start[min(from + 2,", NEIGHBOURS, DIFFERENT),
    "rows read before all are there": Mutant(
        EDGE_ROWS, "  __syncwarp();\n  for (int lane", "  for (int lane", NEIGHBOURS, "data race", "folded"
    ),
    "removed __syncwarp between steps of a sort": Mutant(
        LISTS, "stride /= 2) {\n      __syncwarp();", "stride /= 2) {", NEIGHBOURS, "data race", "folded"
    ),
    "edges beyond the capacity": Mutant(
        EDGES, "  n = min(n, out.capacity - first);\n", "", ROOM, "heap-buffer-overflow", "address"
    ),
    "rows beyond the capacity": Mutant(
        EDGE_ROWS, "int(min(found, room))", "int(found)", ROOM, "heap-buffer-overflow", "address"
    ),
    "a strip counted twice": Mutant(SCAN, "s < int(blockIdx.x);", "s <= int(blockIdx.x);", BATCHES, DIFFERENT),
    "an unwritten end of jumps": Mutant(PACK, "if (c > packed) return;", "if (c >= packed) return;", EPOCHS, DIFFERENT),
    "the first of a segment by chance": Mutant(RANKS, "      atomicMin(slot + s, p);\n", "", EPOCHS, DIFFERENT),
    "rows of the segment past the last": Mutant(
        GATHER, "source[r] = m < chosen.starts.segments ? ", "source[r] = m <= chosen.starts.segments ? ", BATCHES,
        "AddressSanitizer", "address",
    ),
}  # fmt: skip


def copy_of_the_sources(copy: Path) -> None:
    """With its own build folder, which is kept, so that another mutant compiles one file."""
    copy.mkdir(parents=True, exist_ok=True)
    for name in ("CMakeLists.txt", "pyproject.toml"):
        mirror(ROOT / name, copy / name)
    for folder in ("csrc", "tests/native"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.is_file():
                mirror(path, copy / path.relative_to(ROOT))


def mirror(source: Path, copy: Path) -> None:
    """Leaves a copy that is equal alone, with its time stamp."""
    if not copy.exists() or copy.read_bytes() != source.read_bytes():
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, copy)


@pytest.mark.parametrize("name", MUTANTS)
@pytest.mark.timeout(1200)
def test_a_mutant_fails(name: str) -> None:
    mutant = MUTANTS[name]
    room = ROOT / "build" / f"mutants-{built_as(mutant.flavour)}"
    with only_process(room.with_suffix(".lock")):
        done = outcome(mutant, room)
    output = done.stdout + done.stderr
    assert done.returncode != 0, output
    assert re.search(mutant.symptom, output), output


def outcome(mutant: Mutant, copy: Path) -> subprocess.CompletedProcess[str]:
    copy_of_the_sources(copy)
    file = copy / "csrc" / mutant.file
    text = file.read_text()
    assert text.count(mutant.right) == 1
    file.write_text(text.replace(mutant.right, mutant.wrong))
    build(mutant.flavour, root=copy)
    done = run_tests(mutant, copy)
    mirror(ROOT / "csrc" / mutant.file, file)
    return done


def run_tests(mutant: Mutant, copy: Path) -> subprocess.CompletedProcess[str]:
    file, _, selected = mutant.tests.partition(" -k ")
    prefix, environment = under_sanitizer(mutant.flavour)
    command = [*prefix, sys.executable, "-m", "pytest", str(ROOT / "tests" / "ops" / file), "-k", selected, "-s"]
    return subprocess.run(
        [*command, "-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:randomly", "-o", "addopts="],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | environment | {"MOEYARD_EMULATION_ROOT": str(copy), "MOEYARD_EMULATION": mutant.flavour},
    )
