"""3-D coordinates for molecules that have none, by RDKit's ETKDGv3.

Source: Wang, Witek, Landrum, Riniker, "Improving Conformer Generation for Small Rings and Macrocycles Based on
Distance Geometry and Experimental Torsional-Angle Preferences", J. Chem. Inf. Model. 2020.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeyard.data._optional import require

#: Positions [m, 3] in angstrom and atomic numbers [m] of the heavy atoms.
Coordinates = tuple[NDArray[np.float32], NDArray[np.uint8]]

#: Attempts per way of starting; a molecule that has no coordinates after so many is reported, not tried for hours.
MAX_ATTEMPTS = 20


class EmbeddingError(ValueError):
    """RDKit found no coordinates; the message says what stood in the way."""


def embed(mol: Any, *, seed: int, random_start: bool = False) -> Coordinates:
    """Coordinates for an RDKit molecule: hydrogens are added for the embedding and taken out afterwards.

    Args:
        mol: a sanitized RDKit molecule.
        seed: of the embedding; the same seed gives the same coordinates, whatever the number of threads.
        random_start: begin at random coordinates at once, which long chains need; otherwise they are the second try.

    Returns:
        positions [m, 3] float32 in angstrom and atomic numbers [m] uint8 of the heavy atoms.

    Raises:
        EmbeddingError: there are no heavy atoms, or every attempt failed.
    """
    chem = _rdkit("rdkit.Chem")
    geometry = _rdkit("rdkit.Chem.rdDistGeom")
    elements = np.array([atom.GetAtomicNum() for atom in mol.GetAtoms()], dtype=np.int64)
    if not (elements > 1).any():
        raise EmbeddingError("no heavy atoms")
    if (elements == 0).any():
        raise EmbeddingError(f"atom {int(np.argmin(elements)) + 1} is a placeholder without an element")
    full = chem.AddHs(mol)
    parameters = geometry.ETKDGv3()
    parameters.randomSeed = seed
    parameters.maxIterations = MAX_ATTEMPTS
    parameters.trackFailures = True
    # Fragments embedded one by one all lie at the origin, on top of each other.
    parameters.embedFragmentsSeparately = len(chem.GetMolFrags(full)) == 1
    for start in (True,) if random_start else (False, True):
        parameters.useRandomCoords = start
        if geometry.EmbedMolecule(full, parameters) == 0:
            return heavy_atoms(full)
    causes = _obstacles(geometry, parameters)
    raise EmbeddingError(f"ETKDGv3 found no coordinates in {MAX_ATTEMPTS} attempts ({causes})")


def heavy_atoms(mol: Any) -> Coordinates:
    """Positions [m, 3] and atomic numbers [m] of the atoms of a conformer that are no hydrogens."""
    elements = np.array([atom.GetAtomicNum() for atom in mol.GetAtoms()], dtype=np.uint8)
    heavy = elements != 1
    positions = np.asarray(mol.GetConformer().GetPositions(), dtype=np.float32).reshape(-1, 3)
    return np.ascontiguousarray(positions[heavy]), elements[heavy]


def embed_all(
    mols: Sequence[Any], *, seed: int, random_start: bool = False, workers: int | None = None
) -> Generator[Coordinates | str, None, None]:
    """`embed` for many, by threads (RDKit works without the interpreter lock): coordinates, or why there are none.

    Args:
        mols: RDKit molecules; a string among them is a reason already, and comes back as it is.
        seed, random_start: as for `embed`.
        workers: the number of threads; None for one per core that this process may use, at most 16.

    Returns:
        One result per molecule, in order, as they become ready; the same for any number of workers.
    """

    def one(mol: Any) -> Coordinates | str:
        if isinstance(mol, str):
            return mol
        try:
            return embed(mol, seed=seed, random_start=random_start)
        except EmbeddingError as error:
            return str(error)

    count = workers or min(16, _cores())
    try:
        with ThreadPoolExecutor(max(1, min(count, len(mols)))) as pool:
            for result in pool.map(one, mols):
                _reinstall_interrupt()
                yield result
    finally:
        _reinstall_interrupt()


def _reinstall_interrupt() -> None:
    """Gives Ctrl-C back to Python: RDKit takes SIGINT while it embeds, and of several threads one may put back the
    other's handler instead of Python's, for good."""
    handler = signal.getsignal(signal.SIGINT)
    if handler is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, handler)


def quiet_rdkit() -> Any:
    """A context in which RDKit writes nothing to the terminal: what it has to say is in the reasons reported.

    Parse in the thread that opened it and before `embed_all`: while another thread embeds, RDKit lifts the block.
    """
    return _rdkit("rdkit.rdBase").BlockLogs()


def _rdkit(module: str) -> Any:
    return require(module, extra="structures", purpose="working with molecules")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def _obstacles(geometry: Any, parameters: Any) -> str:
    """The most frequent causes of failure, in RDKit's words."""
    names = {int(value): name for name, value in geometry.EmbedFailureCauses.names.items()}
    counts = {names.get(i, str(i)): count for i, count in enumerate(parameters.GetFailureCounts()) if count}
    worst = sorted(counts, key=lambda name: -counts[name])[:2]
    return ", ".join(f"{name.lower().replace('_', ' ')}: {counts[name]} times" for name in worst) or "no cause given"
