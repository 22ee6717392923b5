"""The embedded list: real molecules by SMILES and real peptides by sequence, for work without any files.

`molecules.tsv` holds name, class, molecular formula and SMILES; the formulas were written down independently of the
SMILES, and the tests compare the two. `peptides.tsv` holds name, sequence and what was left out of the natural form.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from typing import NamedTuple

from moeyard.data._optional import require
from moeyard.data.structures.embedding import EmbeddingError, embed, parallel_map, quiet_rdkit
from moeyard.data.structures.table import Progress, Skipped, Structure, StructureTable

#: The domains of the embedded list, in the order of their ids.
DOMAINS = ("drug", "metabolite", "natural product", "peptide")


class Molecule(NamedTuple):
    name: str
    domain: str
    formula: str
    smiles: str


class Peptide(NamedTuple):
    """A chain of L-amino acids in one-letter code, with free ends; `note` says how the natural form differs."""

    name: str
    sequence: str
    note: str


def molecule_list() -> tuple[Molecule, ...]:
    """The embedded molecules: drugs, metabolites and natural products."""
    return tuple(Molecule(*row) for row in _rows("molecules.tsv"))


def peptide_list() -> tuple[Peptide, ...]:
    """The embedded peptides, 3 to 20 residues."""
    return tuple(Peptide(*row) for row in _rows("peptides.tsv"))


def embed_molecules(
    molecules: Sequence[Molecule] | None = None,
    peptides: Sequence[Peptide] | None = None,
    *,
    seed: int = 0,
    workers: int | None = None,
    progress: Progress | None = None,
) -> tuple[StructureTable, list[Skipped]]:
    """3-D structures of molecules and peptides, without hydrogens, by RDKit's ETKDGv3.

    Args:
        molecules: what to embed; None for the whole embedded list.
        peptides: likewise; an empty list for none.
        seed: of the embedding.
        workers: threads; None for one per core.
        progress: called as `progress(done, total, name)` after each structure, in order.

    Returns:
        The table (molecules, then peptides, in the given order; positions in angstrom; domains drug, metabolite,
        natural product, peptide, then any others) and what could not be embedded, with its name and the reason.

    Raises:
        ImportError: RDKit is missing; `pip install "moeyard[structures]"` brings it.

    Determinism: the same list, seed and RDKit version give the same coordinates for any number of workers.
    """
    require("rdkit.Chem", extra="structures", purpose="embedding molecules")
    items: list[Molecule | Peptide] = [*(molecule_list() if molecules is None else molecules)]
    items += peptide_list() if peptides is None else peptides
    found: list[Structure] = []
    skipped: list[Skipped] = []
    with quiet_rdkit():
        results = parallel_map(lambda item: _embed_one(item, seed), items, workers)
        for done, (item, result) in enumerate(zip(items, results, strict=True), start=1):
            if isinstance(result, Structure):
                found.append(result)
            else:
                skipped.append(Skipped(item.name, result))
            if progress is not None:
                progress(done, len(items), item.name)
    return StructureTable.from_structures(found, DOMAINS), skipped


def _embed_one(item: Molecule | Peptide, seed: int) -> Structure | str:
    """The structure, or the reason why there is none."""
    chem = require("rdkit.Chem", extra="structures", purpose="embedding molecules")
    chain = isinstance(item, Peptide)
    mol = chem.MolFromSequence(item.sequence) if isinstance(item, Peptide) else chem.MolFromSmiles(item.smiles)
    if mol is None or mol.GetNumAtoms() == 0:
        what = f"sequence {item.sequence!r}" if isinstance(item, Peptide) else f"SMILES {item.smiles!r}"
        return f"RDKit cannot read the {what}"
    try:
        positions, elements = embed(mol, seed=seed, random_start=chain)
    except EmbeddingError as error:
        return str(error)
    domain = "peptide" if isinstance(item, Peptide) else item.domain
    return Structure(item.name, domain, positions, elements)


def _rows(file: str) -> list[list[str]]:
    text = resources.files(__package__).joinpath(file).read_text(encoding="utf-8")
    return [line.split("\t") for line in text.splitlines()[1:]]
