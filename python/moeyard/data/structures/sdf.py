"""SDF and molfiles, parsed by RDKit: one structure per record."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from moeyard.data._optional import require
from moeyard.data.structures.embedding import Coordinates, embed_all, heavy_atoms, quiet_rdkit
from moeyard.data.structures.table import Skipped, Structure

DOMAIN = "molecule"


def read_sdf(
    text: str, name: str, *, embed_2d: bool = True, seed: int = 0, tick: Callable[[str], None] | None = None
) -> list[Structure | Skipped]:
    """All records of an SDF file, in order; the label of one is `name#number`, counted from 1.

    Args:
        text: the file.
        name: its name, for labels.
        embed_2d: give records without a third dimension 3-D coordinates; False skips them.
        seed: of the embedding.
        tick: called with the label of each record that is done.

    Returns:
        For each record its structure (positions in angstrom), or its label and the reason why there is none.
    """
    records = _records(text)
    if not records:
        return [Skipped(name, "no records")]
    labels = [name if len(records) == 1 else f"{name}#{i}" for i in range(1, len(records) + 1)]
    found: list[Structure | Skipped] = []
    with quiet_rdkit():
        parsed = [_parse(record, embed_2d) for record in records]
        drawings = [item for item in parsed if not isinstance(item, (str, tuple))]
        embedded = embed_all(drawings, seed=seed)
        for label, item in zip(labels, parsed, strict=True):
            result = item if isinstance(item, (str, tuple)) else _of_drawing(next(embedded))
            found.append(Skipped(label, result) if isinstance(result, str) else Structure(label, DOMAIN, *result))
            if tick is not None:
                tick(label)
        embedded.close()
    return found


def _records(text: str) -> list[str]:
    """The texts between the $$$$ lines; what follows the last one counts only if there is something in it."""
    records: list[str] = []
    lines: list[str] = []
    for line in text.splitlines():
        if line.startswith("$$$$"):
            records.append("".join(lines))
            lines = []
        else:
            lines.append(f"{line}\n")
    return [*records, "".join(lines)] if any(line.strip() for line in lines) else records


def _parse(record: str, embed_2d: bool) -> Any:
    """Coordinates, the reason why there are none, or an RDKit molecule that has yet to be embedded."""
    chem = require("rdkit.Chem", extra="structures", purpose="reading SDF files")
    # A valence that RDKit finds odd does not matter for coordinates: sanitizing waits until an embedding needs it.
    mol = chem.MolFromMolBlock(record, sanitize=False, removeHs=False)
    if mol is None:
        return f"RDKit cannot parse the record ({_complaint(record)})"
    numbers = [atom.GetAtomicNum() for atom in mol.GetAtoms()]
    if not any(number != 1 for number in numbers):
        return "no heavy atoms" if numbers else "no atoms"
    if 0 in numbers:
        return f"atom {numbers.index(0) + 1} ({mol.GetAtomWithIdx(numbers.index(0)).GetSymbol()}) has no element"
    coordinates = mol.GetConformer().GetPositions()
    if not np.isfinite(coordinates).all():
        return "a coordinate is not finite"
    if not (coordinates[:, 2] == 0).all():
        return heavy_atoms(mol)
    if not embed_2d:
        return "2-D: all z coordinates are 0, and embed_2d is off"
    # Read once more, this time in full: stereo centres and double bonds come from the drawing.
    return chem.MolFromMolBlock(record) or _of_drawing(_sanitizing_error(chem, mol))


def _of_drawing(result: Coordinates | str) -> Coordinates | str:
    return f"2-D, and not to be embedded: {result}" if isinstance(result, str) else result


def _sanitizing_error(chem: Any, raw: Any) -> str:
    try:
        chem.SanitizeMol(raw)
    except ValueError as error:
        return " ".join(str(error).split())
    return "RDKit cannot make sense of its stereochemistry"


def _complaint(record: str) -> str:
    """What is wrong with a molfile that RDKit refuses, as far as the counts line tells."""
    lines = record.splitlines()
    if len(lines) < 4:
        return f"{len(lines)} lines, too few for a header and a counts line"
    counts = lines[3]
    if "V3000" in counts:
        return "V3000 block"
    try:
        atoms, bonds = int(counts[0:3]), int(counts[3:6])
    except ValueError:
        return f"the counts line is {counts[:12]!r}"
    end = next((i for i, line in enumerate(lines) if line.startswith("M  END")), None)
    if end is None:
        return "it has no line M  END"
    if end - 4 < atoms + bonds:
        return f"the counts line promises {atoms} atoms and {bonds} bonds, {end - 4} lines follow"
    wrong = next((i for i in range(4, 4 + atoms) if not _is_atom_line(lines[i])), None)
    if wrong is not None:
        return f"its line {wrong + 1} is no atom line: {lines[wrong][:40]!r}"
    return "a bond or property line is malformed, or an element is unknown"


def _is_atom_line(line: str) -> bool:
    """x, y, z in ten columns each, a blank, then the symbol in three."""
    try:
        float(line[0:10]), float(line[10:20]), float(line[20:30])
    except ValueError:
        return False
    return line[30:31] == " " and line[31:32].isalpha()
