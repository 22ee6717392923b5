"""The emulation of CUDA itself: small kernels against tables by hand, and wrong kernels, each of which must be caught.

The kernels are in emulation_kernels.cu. ThreadSanitizer and AddressSanitizer run in that program, not in Python.
"""

from __future__ import annotations

import os
import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

from emulation import IDENTITIES, build, built_as, compiler, fixed_addresses

pytestmark = pytest.mark.timeout(300)
SEEDS = range(22)
KERNELS = Path(__file__).with_name("emulation_kernels.cu")
SANITIZERS = {"address": "-fsanitize=address,undefined", "thread": "-fsanitize=thread"}
LANES = range(32)


@cache
def program(flavour: str) -> list[str]:
    flavour = built_as(flavour)
    command = []
    if flavour in SANITIZERS:
        probe = [compiler(), SANITIZERS[flavour], "-x", "c++", "-", "-o", os.devnull]
        done = subprocess.run(probe, input="int main() {}", capture_output=True, text=True)
        if done.returncode != 0:
            pytest.skip(f"the compiler has no {SANITIZERS[flavour]}: {done.stderr}")
        command = fixed_addresses()
    return [*command, str(build(flavour, "emulation_kernels") / "emulation_kernels")]


def run(flavour: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    # What a failed launch abandons is no leak.
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1"}
    command = [*program(flavour), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)


def computed(case: str, seed: int = 0, *options: int, flavour: str = "plain") -> list[str]:
    done = run(flavour, case, seed, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def out(case: str, seed: int = 0, *options: int, flavour: str = "plain") -> list[int]:
    (line,) = computed(case, seed, *options, flavour=flavour)
    return [int(value) for value in line.removeprefix("out: ").split()]


def table(*rows: list[int]) -> dict[str, list[int]]:
    return {str(i): row for i, row in enumerate(rows)}


def signed(v: int) -> int:
    return v - 2**32 if v >= 2**31 else v


ABOVE = [[lane for lane in LANES if lane % 4 == remainder] for remainder in range(4)]
RIGHT = {
    "shuffles": table(
        [(lane + 3) % 32 * 10 for lane in LANES],
        [(lane // 8 * 8 + 5) * 10 for lane in LANES],
        [lane + 1 if lane % 2 == 0 else lane - 1 for lane in LANES],
        # Across parts of 8 a lane reads from an earlier part, never from a later one.
        [
            0,
            1,
            2,
            3,
            4,
            5,
            6,
            7,
            4,
            5,
            6,
            7,
            0,
            1,
            2,
            3,
            16,
            17,
            18,
            19,
            20,
            21,
            22,
            23,
            20,
            21,
            22,
            23,
            16,
            17,
            18,
            19,
        ],
        [0, 1, 2, *range(29)],
        [base + i for base in range(0, 32, 8) for i in (0, 1, 0, 1, 2, 3, 4, 5)],
        [*range(5, 32), 27, 28, 29, 30, 31],
        [base + i for base in range(0, 32, 8) for i in (3, 4, 5, 6, 7, 5, 6, 7)],
        [2 * lane + 5 if lane % 4 < 2 else 2 * lane - 3 for lane in LANES],
        [4] * 32,
        [-31] * 32,
        [0 if lane % 2 else lane + 2 if lane % 4 < 2 else lane - 2 for lane in LANES],
    ),
    "votes": table(
        [sum(1 << lane for lane in range(0, 32, 3))] * 32,
        [1] * 32,
        [0] * 32,
        [1] * 32,
        [0] * 32,
        [signed(sum(1 << other for other in ABOVE[lane % 4])) for lane in LANES],
        [signed(0xAAAAAAAA if lane % 2 else 0x55555555) for lane in LANES],
        [-16] * 32,
        [496] * 32,
        [-16] * 32,
        [0] * 32,
        [15] * 32,
        [-1] * 32,
        [sum(range(lane // 8 * 8, lane // 8 * 8 + 8)) for lane in LANES],
        [signed(0xAA << lane // 8 * 8) for lane in LANES],
    ),
    "barriers": table(list(range(95, -1, -1)), [32] * 96, [5] * 96, [0] * 96, [i * (i + 1) // 2 for i in range(96)]),
    "places": {"places": [1000 * block + thread for block in range(24) for thread in range(70)]},
    "transpose": {"transpose": [32 * row + column for column in range(32) for row in range(32)]},
    "atomics": {
        "int": [191 * 192 // 2, -2 * 192, 5 - 191, 191],
        "unsigned": [192, 2**32 - 1, 2**32 - 32, 0, 2**32 - 256, 9, 1],
        "swapped": [1],
        "wide": [192 << 33, 1 << 39],
    },
    "scalars": {
        "scalars": [
            *(8, 20, 5, 0, 31, 32, 0x60000000, 3, 0x3F800000, 3, -1, 2, 4321, 4),
            *(8 + 100 * 12 + 10000 * 16, 8 + 100 * 4 + 10000 * 16),  # sizes, alignments of uint2, float3, int4
            *(0x3F80, 0x3F82, 0x7BFF, 2, 3140, 5),  # 16-bit floats, to nearest
        ]
    },
    "streaming": {"streaming": [3, 2, 1, 0, 7, 6, 5, 4, 11, 10, 9, 8, 15, 14, 13, 12]},
}


EXPECTED = [
    line
    for case in sorted(RIGHT)
    for line in (case, *(f"{name}: {' '.join(map(str, row))}" for name, row in RIGHT[case].items()))
]


@pytest.mark.parametrize("seed", SEEDS)
def test_right_kernels_give_the_same_in_every_order(seed: int) -> None:
    assert computed("right", seed) == EXPECTED


@pytest.mark.parametrize("resident_blocks", [1, 3])
@pytest.mark.parametrize("seed", [0, 1, 4, 5])
@pytest.mark.parametrize("flavour", ["preempt", "address", "thread", *IDENTITIES])
def test_and_nothing_is_found_in_them(flavour: str, seed: int, resident_blocks: int) -> None:
    identities = IDENTITIES.get(flavour, 0)
    assert computed("right", seed, 0xFF, resident_blocks, 1, identities, flavour=flavour) == EXPECTED


@pytest.mark.parametrize("seed", [0, 4])
@pytest.mark.parametrize("poison", [0x3C, 0xFF])
def test_shared_memory_begins_poisoned_in_every_block(seed: int, poison: int) -> None:
    assert out("shared_at_first", seed, poison) == [poison * 0x01010101] * 8


def test_a_lane_outside_of_the_shuffle_gives_poison() -> None:
    assert out("undefined_shuffle", 0, 0x3C) == [0x3C3C3C3C] * 16


# ---- wrong kernels ---------------------------------------------------------------------------------------------------


def kernel_lines(kernel: str) -> range:
    lines = KERNELS.read_text().splitlines()
    first = next(i for i, line in enumerate(lines, 1) if f"__global__ void {kernel}(" in line)
    return range(first, next(i for i in range(first, len(lines)) if not lines[i - 1]))


CAUGHT = {
    "wrong_mask": r"thread \(16,0,0\): mask: the calling lane is not in that of __shfl_xor_sync at .*:(\d+)",
    "divergent_collective": r"divergence: a lane has left .* names of __ballot_sync at .*:(\d+)\n"
    r"  threads 20-31: left the kernel\n  threads 0-19: waits in __ballot_sync\(mask 0xffffffff\)",
    "divergent_branches": r"divergence: no thread can go on\n  threads 1 3 .*: waits in __any_sync.* at .*:(\d+)\n"
    r"  threads 0 2 .*: waits in __any_sync",
    "divergent_barriers": r"divergence: threads wait at different barriers\n"
    r"(?:  .*\n)*  threads 0-31: waits in __syncthreads at .*:(\d+)",
    "barrier_after_exit": r"divergence: a thread leaves the kernel while others wait at a barrier\n"
    r"(?:  .*\n)*  threads 0-31: waits in __syncthreads at .*:(\d+)",
    "barrier_against_collective": r"divergence: no thread can go on\n  threads 7: waits in __syncthreads at .*:(\d+)\n"
    r"  threads 0-6 8-31: waits in __syncwarp",
    "misaligned": r"misaligned access at .*:(\d+)",
    "misaligned_streaming": r"misaligned access at .*:(\d+)",
    "trap": r"thread \(33,0,0\): __trap\(\) at .*:(\d+)",
}


@pytest.mark.parametrize("case", CAUGHT)
def test_wrong_kernels_are_caught_at_their_line(case: str) -> None:
    done = run("plain", case)
    assert done.returncode == 1, done.stdout
    assert re.match(r"block \(0,0,0\) thread \(\d+,0,0\): ", done.stdout)
    found = re.search(CAUGHT[case], done.stdout)
    assert found, done.stdout
    assert int(found[1]) in kernel_lines(case)


@pytest.mark.parametrize("case", [c for c in CAUGHT if "misaligned" not in c])
def test_and_in_every_order(case: str) -> None:
    """What is wrong depends on the order, that something is does not."""
    for seed in SEEDS:
        done = run("plain", case, seed)
        assert done.returncode == 1, f"seed {seed}: {done.stdout}"
        assert re.match(r"block \(\d,0,0\) thread \(\d+,0,0\): (divergence|mask|__trap)", done.stdout), done.stdout


def test_threads_may_leave_before_others_wait_where_that_is_allowed() -> None:
    assert run("plain", "barrier_after_exit", 0, 255, 0, 0).returncode == 0


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("throws", r"block \(0,0,0\) thread \(2,0,0\): thrown by lane 2$"),
        ("launches", r"block \(0,0,0\) thread \(0,0,0\): a launch inside a kernel$"),
        ("too_many_threads", "kernel launch: invalid configuration$"),
        ("no_blocks", "kernel launch: invalid configuration$"),
        ("too_much_shared", "kernel launch: more than 227 KiB of dynamic shared memory$"),
        ("much_static", r".*: more than 16 KiB of static arrays beside dynamic shared memory"),
    ],
)
def test_errors_of_launches(case: str, message: str) -> None:
    done = run("plain", case)
    assert done.returncode == 1
    assert re.match(message, done.stdout.strip()), done.stdout


@pytest.mark.parametrize("case", ["missing_barrier", "missing_syncwarp"])
def test_a_missing_barrier_shows_in_some_order(case: str) -> None:
    right = [5] * 64 if case == "missing_barrier" else [lane ^ 1 for lane in LANES]
    wrong = [seed for seed in SEEDS if out(case, seed) != right]
    assert len(wrong) > len(SEEDS) / 2


def test_lost_updates_show_where_accesses_are_preempted() -> None:
    """Within a block, and with several blocks alive also between them."""
    assert all(out("plain_add", seed) == [64, 64] for seed in SEEDS)
    lost = [seed for seed in SEEDS if out("plain_add", seed, flavour="preempt") != [64, 64]]
    assert len(lost) > len(SEEDS) / 2
    counts = {out("plain_add_between_blocks", seed, flavour="preempt")[0] for seed in SEEDS}
    assert counts - {8}
    alone = {out("plain_add_between_blocks", seed, 255, 1, flavour="preempt")[0] for seed in SEEDS}
    assert alone == {8}


@pytest.mark.parametrize("case", ["missing_barrier", "missing_syncwarp", "plain_add"])
@pytest.mark.parametrize("resident_blocks", [1, 3])
def test_races_inside_a_block(case: str, resident_blocks: int) -> None:
    """In the forward order, where the result may well be right."""
    assert_race(run("thread", case, 0, 255, resident_blocks), case)
    assert run("thread", case, 0, 255, resident_blocks, 1, 1).returncode == 0  # a block is one thread


def test_races_between_blocks() -> None:
    assert_race(run("thread", "plain_add_between_blocks", 0, 255, 2), "plain_add_between_blocks")
    assert run("thread", "plain_add_between_blocks", 0, 255, 1).returncode == 0


@pytest.mark.parametrize(("case", "identities"), [("plain_add_between_blocks", 1), ("missing_barrier", 20)])
def test_races_of_threads_that_share_an_identity(case: str, identities: int) -> None:
    done = run("thread", case, 0, 255, 0, 1, identities)
    assert_found(done)
    assert len(set(re.findall(r"Thread T\d+ '(block \(\d,0,0\))'", done.stderr))) == (2 if identities == 1 else 1)
    assert re.search(r"^in block \(\d,0,0\) thread \(\d+,0,0\) of a kernel$", done.stderr, re.M)


def assert_found(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode != 0
    assert "ThreadSanitizer: data race" in done.stderr, done.stderr


def assert_race(done: subprocess.CompletedProcess[str], kernel: str) -> None:
    assert_found(done)
    lines = [int(line) for line in re.findall(rf"#0 {kernel}.* .*emulation_kernels\.cu:(\d+)", done.stderr)]
    assert len(lines) == 2
    assert set(lines) <= set(kernel_lines(kernel))
    assert len(set(re.findall(r"Thread T\d+ '(block \(\d,0,0\) thread \(\d+,0,0\))'", done.stderr))) == 2


@pytest.mark.parametrize("case", ["dynamic_out_of_bounds", "global_out_of_bounds"])
def test_out_of_bounds(case: str) -> None:
    done = run("address", case)
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr, done.stderr
    found = re.search(rf"#0 .* in {case}.* .*emulation_kernels\.cu:(\d+)", done.stderr)
    assert found
    assert int(found[1]) in kernel_lines(case)
    assert re.search(r"^in block \(0,0,0\) thread \(\d+,0,0\) of a kernel$", done.stderr, re.M)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("static_out_of_bounds", "index 32 out of bounds"),
        ("misaligned", "store to misaligned address .* 'struct uint4'"),
    ],
)
def test_undefined_behaviour(case: str, message: str) -> None:
    done = run("address", case)
    assert done.returncode != 0
    found = re.search(rf"emulation_kernels\.cu:(\d+):\d+: runtime error: {message}", done.stderr)
    assert found, done.stderr
    assert int(found[1]) in kernel_lines(case)
