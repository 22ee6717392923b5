"""PDB and mmCIF, parsed by gemmi: which atoms count, which alternate location is taken, what kind of polymer it is."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from typing import Any, NamedTuple

import numpy as np

from moeyard.data._optional import require
from moeyard.data.structures.table import Skipped, Structure

#: How gemmi writes "no alternate location".
BLANK = "\0"


#: Chain, subchain (mmCIF), segment (PDB), number with insertion code: a residue's place, whoever stands there.
_Site = tuple[str, str, str, str]


class _Atom(NamedTuple):
    """One heavy atom."""

    site: _Site
    residue: str
    name: str
    altloc: str
    occupancy: float
    element: int
    position: list[float]


class _Unusable(ValueError):
    """The file cannot become a structure; the message says why."""


def read_pdb(text: str, name: str) -> list[Structure | Skipped]:
    """The first model of a PDB file, or the reason why there is none."""
    try:
        _check_pdb_columns(text)
        structure = _gemmi().read_pdb_string(text)
        return [_first_model(structure, name)]
    except (ValueError, RuntimeError) as error:
        return [Skipped(name, _one_line(error))]


def read_mmcif(text: str, name: str) -> list[Structure | Skipped]:
    """The first model of each block that holds atoms; a file without any such block is skipped."""
    gemmi = _gemmi()
    try:
        blocks = list(gemmi.cif.read_string(text))
    except (ValueError, RuntimeError) as error:
        return [Skipped(name, f"gemmi cannot parse it: {_one_line(error)}")]
    with_atoms = [(i, block) for i, block in enumerate(blocks, start=1) if block.find_mmcif_category("_atom_site.")]
    if not with_atoms:
        return [Skipped(name, "no atoms: the file has no _atom_site category")]
    found: list[Structure | Skipped] = []
    for i, block in with_atoms:
        label = name if len(with_atoms) == 1 else f"{name}#{i}"
        try:
            found.append(_first_model(gemmi.make_structure_from_block(block), label))
        except (ValueError, RuntimeError) as error:
            found.append(Skipped(label, _one_line(error)))
    return found


def _first_model(structure: Any, name: str) -> Structure:
    if len(structure) == 0 or structure[0].count_atom_sites() == 0:
        raise _Unusable("no atoms: the file has no ATOM or HETATM records")
    atoms, left_out = _heavy_atoms(structure[0])
    if not atoms:
        what = ", ".join(f"{count} of {kind}" for kind, count in left_out.items() if count)
        raise _Unusable(f"no heavy atoms: all atoms are hydrogens or waters ({what})")
    atoms = _one_location_each(_one_residue_per_site(atoms))
    return Structure(
        name=name,
        domain=_polymer_kind(structure[0]),
        positions=np.array([atom.position for atom in atoms], dtype=np.float32).reshape(-1, 3),
        elements=np.array([atom.element for atom in atoms], dtype=np.uint8),
    )


def _heavy_atoms(model: Any) -> tuple[list[_Atom], dict[str, int]]:
    """All atoms but hydrogens, deuterium and waters, and how many of those there were."""
    atoms: list[_Atom] = []
    left_out = {"water": 0, "hydrogen": 0}
    for chain in model:
        for residue in chain:
            if residue.is_water():
                left_out["water"] += len(residue)
                continue
            site = (chain.name, residue.subchain, residue.segment, str(residue.seqid))
            for atom in residue:
                element, position = atom.element, atom.pos.tolist()
                if element.is_hydrogen:
                    left_out["hydrogen"] += 1
                    continue
                if element.atomic_number == 0:
                    where = f"{atom.name} of {residue.name} {residue.seqid} in chain {chain.name!r}"
                    raise _Unusable(f"unknown element: atom {where} (number {atom.serial})")
                if not all(map(math.isfinite, position)):
                    where = f"{atom.name} of {residue.name} {residue.seqid} in chain {chain.name!r}"
                    raise _Unusable(f"no position: atom {where} (number {atom.serial}) has coordinates {position}")
                atoms.append(
                    _Atom(site, residue.name, atom.name, atom.altloc, atom.occ, element.atomic_number, position)
                )
    return atoms, left_out


def _one_residue_per_site(atoms: list[_Atom]) -> list[_Atom]:
    """Where a crystal holds a mixture of two residues at one site, keeps the more occupied one.

    Only residues all of whose atoms are marked as alternates compete: ligands that merely share a number both stay.
    """
    alternates: dict[_Site, dict[str, list[_Atom]]] = defaultdict(lambda: defaultdict(list))
    fixed: set[tuple[_Site, str]] = set()
    for atom in atoms:
        if atom.altloc == BLANK:
            fixed.add((atom.site, atom.residue))
        else:
            alternates[atom.site][atom.residue].append(atom)
    dropped: set[tuple[_Site, str]] = set()
    for site, residues in alternates.items():
        rivals = {name: group for name, group in residues.items() if (site, name) not in fixed}
        if len(rivals) > 1:
            best = max(rivals, key=lambda name: _share(rivals[name]))
            dropped |= {(site, name) for name in rivals if name != best}
    return [atom for atom in atoms if (atom.site, atom.residue) not in dropped] if dropped else atoms


def _share(residue: list[_Atom]) -> float:
    """The occupancy of a residue: that of all its conformers together, as a mean over its atoms."""
    return sum(atom.occupancy for atom in residue) / len({atom.name for atom in residue})


def _one_location_each(atoms: list[_Atom]) -> list[_Atom]:
    """One location per (residue, atom name): the highest occupancy, among equals the first letter.

    Atoms without any alternate are never compared: ligands in the wild give several atoms the same name.
    """
    rivals: dict[tuple[_Site, str, str], list[int]] = defaultdict(list)
    for i, atom in enumerate(atoms):
        rivals[atom.site, atom.residue, atom.name].append(i)
    keep = set(range(len(atoms)))
    for group in rivals.values():
        if len(group) > 1 and any(atoms[i].altloc != BLANK for i in group):
            best = min(group, key=lambda i: (-atoms[i].occupancy, atoms[i].altloc, i))
            keep -= set(group) - {best}
    return atoms if len(keep) == len(atoms) else [atom for i, atom in enumerate(atoms) if i in keep]


def _polymer_kind(model: Any) -> str:
    """By the residues that are amino acids or nucleotides in gemmi's table, modified ones included."""
    gemmi = _gemmi()
    amino = nucleic = 0
    for chain in model:
        for residue in chain:
            info = gemmi.find_tabulated_residue(residue.name)
            amino += info.is_amino_acid()
            nucleic += info.is_nucleic_acid()
    if max(amino, nucleic) < 2:
        return "molecule"
    return "protein" if amino >= nucleic else "nucleic acid"


def _check_pdb_columns(text: str) -> None:
    """gemmi reads letters in a coordinate column as 0; a file with such a line is refused here."""
    for number, line in enumerate(text.splitlines(), start=1):
        if line.startswith("ENDMDL"):
            return
        if line.startswith(("ATOM  ", "HETATM")):
            try:
                usable = all(map(math.isfinite, map(float, (line[30:38], line[38:46], line[46:54]))))
            except ValueError:
                usable = False
            if not usable:
                raise _Unusable(f"line {number}: expected three coordinates in columns 31 to 54, got {line[30:54]!r}")


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    # gemmi calls what it was given "string" and adds the byte.
    return re.sub(r"^string:(\d+):\d+(\(\d+\))?:", r"line \1:", text)


def _gemmi() -> Any:
    return require("gemmi", extra="structures", purpose="reading PDB and mmCIF files")
