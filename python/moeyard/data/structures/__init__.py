"""Structures: columnar tables of atoms, readers of real files, and an embedded list of molecules and peptides.

Atoms are heavy atoms: hydrogens and deuterium never enter a table, and neither do waters. Whatever does not enter one
for another reason is reported as `Skipped(path, reason)`.
"""

from moeyard.data.structures.molecules import (
    Molecule,
    Peptide,
    embed_molecules,
    molecule_list,
    peptide_list,
)
from moeyard.data.structures.readers import read_structures
from moeyard.data.structures.table import Progress, Skipped, Structure, StructureTable

__all__ = [
    "Molecule",
    "Peptide",
    "Progress",
    "Skipped",
    "Structure",
    "StructureTable",
    "embed_molecules",
    "molecule_list",
    "peptide_list",
    "read_structures",
]
