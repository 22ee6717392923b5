"""Generated inputs of real size: molecules, protein-like blobs, sample sizes; and real proteins where they are.

`protein`: an even cloud in a ball, 25 atoms within 5 angstrom inside and fewer at the surface, as in folded proteins;
the atoms come strand by strand, so that neighbours in the chain are neighbours in space. `molecules`: about 18 atoms
each, of which about 15.6 see one another within 5 angstrom.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

CUTOFF = 5.0
_NEIGHBOURS = 24.7  # within the cutoff, in the inside of a protein
_STRAND = 6.0  # angstrom between the strands that a chain runs up and down


@dataclass(frozen=True)
class Points:
    """pos [N, 3] float32, all coordinates >= 0; ptr [G + 1], batch [N] int64; the largest number of neighbours."""

    pos: Tensor
    ptr: Tensor
    batch: Tensor
    most: int = 64

    @property
    def graphs(self) -> list[tuple[int, int]]:
        ends = self.ptr.tolist()
        return list(itertools.pairwise(ends))


def batched(clouds: list[np.ndarray]) -> Points:
    sizes = torch.tensor([len(cloud) for cloud in clouds])
    ptr = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
    pos = torch.from_numpy(np.concatenate([cloud - cloud.min(0) for cloud in clouds]).astype(np.float32))
    return Points(pos, ptr, torch.repeat_interleave(torch.arange(len(clouds)), sizes))


def protein(random: np.random.Generator, atoms: int) -> np.ndarray:
    density = (_NEIGHBOURS + 1) / (4 / 3 * math.pi * CUTOFF**3)
    step = density ** (-1 / 3)
    radius = (3 * atoms / (4 * math.pi * density)) ** (1 / 3)
    axis = np.arange(-radius - 2 * step, radius + 2 * step, step)
    grid = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)
    grid = grid + random.uniform(-0.4, 0.4, grid.shape) * step
    inside = grid[np.argpartition((grid * grid).sum(1), atoms)[:atoms]]
    x, y = (np.floor(inside[:, i] / _STRAND).astype(np.int64) for i in (0, 1))
    y = np.where(x % 2 == 0, y, -y)
    up = np.where((x + np.abs(y)) % 2 == 0, inside[:, 2], -inside[:, 2])
    return inside[np.lexsort((up, y, x))]


def molecules(random: np.random.Generator, count: int, atoms: int) -> list[np.ndarray]:
    """`count` molecules with `atoms` atoms in all."""
    sizes = parts(random, count, atoms, spread=0.2)
    return [random.normal(size=(n, 3)) * (1.25, 1.25, 1.75) for n in sizes]


def parts(random: np.random.Generator, count: int, total: int, spread: float) -> list[int]:
    """`count` sizes around their mean that add up to `total`."""
    raw = random.lognormal(0, spread, count)
    sizes = np.maximum(2, np.floor(raw * total / raw.sum())).astype(np.int64)
    sizes[: total - sizes.sum()] += 1
    return [int(n) for n in sizes]


def make_molecules(seed: int, count: int = 1000, atoms: int = 17_784) -> Points:
    return batched(molecules(np.random.default_rng(seed), count, atoms))


def make_proteins(seed: int, count: int = 64, atoms: int = 123_803) -> Points:
    random = np.random.default_rng(seed)
    return batched([protein(random, n) for n in parts(random, count, atoms, spread=0.5)])


def make_protein(seed: int, atoms: int = 5000) -> Points:
    return batched([protein(np.random.default_rng(seed), atoms)])


def shuffled(points: Points, seed: int) -> Points:
    """The same atoms in random order within their graphs."""
    noise = torch.rand(len(points.pos), generator=torch.Generator().manual_seed(seed))
    order = (points.batch.double() + noise).argsort()
    return Points(points.pos[order].contiguous(), points.ptr, points.batch, points.most)


@functools.cache
def real_proteins() -> Points | str:
    """The AlphaFold models of $MOEYARD_DATA (default ../shared/data, as in the tests), or why there are none."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("MOEYARD_DATA", default)) / "structures" / "alphafold"
    if not folder.is_dir():
        return "no structures/alphafold below MOEYARD_DATA"
    try:
        from moeyard.data.structures import read_structures

        found, _ = read_structures(folder)
    except ImportError:
        return "gemmi or rdkit is not installed"
    clouds = [found.positions[a:b].numpy() for a, b in itertools.pairwise(found.ptr.tolist()) if b - a > 1]
    return batched(clouds) if clouds else "no structures in MOEYARD_DATA"


def sample_sizes(seed: int, count: int) -> np.ndarray:
    """Atoms per sample: log-normal, 20 to 2,000, mean about 380, as in a mix of molecules and proteins."""
    random = np.random.default_rng(seed)
    return np.clip(random.lognormal(5.65, 0.75, count), 20, 2000).astype(np.int64)
