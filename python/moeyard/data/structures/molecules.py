"""The embedded list: real molecules by SMILES and real peptides by sequence, for work without any files.

`molecules.tsv` holds name, class, molecular formula and SMILES; the formulas were written down independently of the
SMILES, and the tests compare the two. `peptides.tsv` holds name, sequence and what was left out of the natural form.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from importlib import resources
from typing import Any, NamedTuple

from moeyard.data._optional import require
from moeyard.data.structures.embedding import embed_all, quiet_rdkit
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
    small = molecule_list() if molecules is None else molecules
    chains = peptide_list() if peptides is None else peptides
    names = [item.name for item in small] + [chain.name for chain in chains]
    domains = [item.domain for item in small] + ["peptide"] * len(chains)
    found: list[Structure] = []
    skipped: list[Skipped] = []
    with quiet_rdkit():
        mols = [_from_smiles(item.smiles) for item in small], [_from_sequence(chain.sequence) for chain in chains]
        results = itertools.chain(
            embed_all(mols[0], seed=seed, workers=workers),
            # Only random starts lead long chains anywhere.
            embed_all(mols[1], seed=seed, workers=workers, random_start=True),
        )
        for done, (name, domain, result) in enumerate(zip(names, domains, results, strict=True), start=1):
            if isinstance(result, str):
                skipped.append(Skipped(name, result))
            else:
                found.append(Structure(name, domain, *result))
            if progress is not None:
                progress(done, len(names), name)
    return StructureTable.from_structures(found, DOMAINS), skipped


def _from_smiles(smiles: str) -> Any:
    """The molecule, or the reason why there is none."""
    return _chem().MolFromSmiles(smiles) or f"RDKit cannot read the SMILES {smiles!r}"


def _from_sequence(sequence: str) -> Any:
    """The chain of L-amino acids, or the reason why there is none."""
    mol = _chem().MolFromSequence(sequence)
    return mol if mol is not None and mol.GetNumAtoms() else f"RDKit cannot read the sequence {sequence!r}"


def _chem() -> Any:
    return require("rdkit.Chem", extra="structures", purpose="embedding molecules")


def _rows(file: str) -> list[list[str]]:
    text = resources.files(__package__).joinpath(file).read_text(encoding="utf-8")
    return [line.split("\t") for line in text.splitlines()[1:]]
