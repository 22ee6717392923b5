"""A generated table of small rigid molecules: enough to learn from in a few steps, without any extra package."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moeyard.data.structures import StructureTable

WATER = ([8, 1, 1], [[0.0, 0.0, 0.0], [0.96, 0.0, 0.0], [-0.24, 0.93, 0.0]])
METHANE = (
    [6, 1, 1, 1, 1],
    [[0.0, 0.0, 0.0], [0.63, 0.63, 0.63], [-0.63, -0.63, 0.63], [-0.63, 0.63, -0.63], [0.63, -0.63, -0.63]],
)
BENZENE = (
    [6] * 6 + [1] * 6,
    [[r * math.cos(a), r * math.sin(a), 0.0] for r in (1.39, 2.48) for a in (i * math.pi / 3 for i in range(6))],
)


def tiny_table(copies: int = 20, seed: int = 0) -> StructureTable:
    """`copies` of each molecule, each turned and moved at random; benzene is a domain of its own."""
    generator = torch.Generator().manual_seed(seed)
    positions: list[Tensor] = []
    elements: list[int] = []
    ptr, domain = [0], []
    for i in range(3 * copies):
        numbers, places = (WATER, METHANE, BENZENE)[i % 3]
        turn = torch.linalg.qr(torch.randn(3, 3, generator=generator))[0]
        positions.append(torch.tensor(places) @ turn.T + torch.randn(3, generator=generator))
        elements += numbers
        ptr.append(len(elements))
        domain.append(int(i % 3 == 2))
    return StructureTable(
        positions=torch.cat(positions),
        elements=torch.tensor(elements, dtype=torch.uint8),
        ptr=torch.tensor(ptr),
        names=tuple(f"molecule {i}" for i in range(3 * copies)),
        domain=torch.tensor(domain),
        domains=("small", "ring"),
    )
