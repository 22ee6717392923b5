"""The embedded list: every formula, the stereo centres, and the coordinates that come out."""

from __future__ import annotations

import signal
import sys
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from rdkit import Chem
from rdkit.Chem import rdCIPLabeler, rdMolDescriptors

from data.stereo import STEREODESCRIPTORS
from moeyard.data.structures import Molecule, Peptide, embed_molecules, molecule_list, peptide_list
from moeyard.data.structures.embedding import EmbeddingError, embed

MOLECULES = {molecule.name: molecule for molecule in molecule_list()}
PEPTIDES = {peptide.name: peptide for peptide in peptide_list()}
SMALL = [MOLECULES[name] for name in ("aspirin", "caffeine", "L-alanine", "penicillin G")]

# Heavy atoms of each residue within a chain: 4 of the backbone and the side chain.
HEAVY = dict(
    zip("GASCTVPDNILEQMKHFRYW", (4, 5, 6, 6, 7, 7, 7, 8, 8, 8, 8, 9, 9, 8, 9, 10, 11, 11, 12, 14), strict=True)
)


@pytest.mark.parametrize("name", MOLECULES)
def test_formula(name: str) -> None:
    """The formula was written down independently of the SMILES."""
    molecule = MOLECULES[name]
    mol = Chem.MolFromSmiles(molecule.smiles)
    assert mol is not None
    assert rdMolDescriptors.CalcMolFormula(mol) == molecule.formula


@pytest.mark.parametrize("name", STEREODESCRIPTORS)
def test_stereo_centres(name: str) -> None:
    """As many R and S centres as the systematic name has."""
    mol = Chem.MolFromSmiles(MOLECULES[name].smiles)
    rdCIPLabeler.AssignCIPLabels(mol)
    labels = [atom.GetProp("_CIPCode") for atom in mol.GetAtoms() if atom.HasProp("_CIPCode")]
    assert Counter(labels) == Counter(STEREODESCRIPTORS[name])


def test_the_list_is_long_and_without_repeats() -> None:
    classes = Counter(molecule.domain for molecule in MOLECULES.values())
    assert set(classes) == {"drug", "metabolite", "natural product"}
    assert len(molecule_list()) >= 220
    assert min(classes.values()) >= 60
    assert len(MOLECULES) == len(molecule_list())
    smiles = Counter(Chem.CanonSmiles(molecule.smiles) for molecule in molecule_list())
    assert [s for s, count in smiles.items() if count > 1] == []


def test_peptides_are_short_chains_of_the_twenty() -> None:
    assert len(PEPTIDES) == len(peptide_list()) >= 24
    assert len({peptide.sequence for peptide in PEPTIDES.values()}) == len(PEPTIDES)
    for peptide in PEPTIDES.values():
        assert 3 <= len(peptide.sequence) <= 20, peptide.name
        assert set(peptide.sequence) <= set(HEAVY), peptide.name
    assert "disulfide" in PEPTIDES["oxytocin"].note


@pytest.fixture(scope="module")
def everything() -> Any:
    calls: list[tuple[int, int, str]] = []
    table, skipped = embed_molecules(progress=lambda done, total, what: calls.append((done, total, what)))
    return table, skipped, calls


def test_everything_embeds_or_is_reported(everything: Any) -> None:
    table, skipped, calls = everything
    names = [*MOLECULES, *PEPTIDES]
    assert [*table.names] == [name for name in names if name not in {s.path for s in skipped}]
    assert skipped == []
    assert calls == [(i, len(names), name) for i, name in enumerate(names, start=1)]
    assert table.domains == ("drug", "metabolite", "natural product", "peptide")
    assert int(table.sizes.min()) >= 4


def test_bonds_have_the_lengths_of_bonds(everything: Any) -> None:
    """Every bond of every molecule: the atoms come in the order of the SMILES, at chemical distances."""
    table, _, _ = everything
    for i, name in enumerate(table.names):
        x = table.positions[table.ptr[i] : table.ptr[i + 1]].numpy()
        mol = skeleton(name)
        assert [a.GetAtomicNum() for a in mol.GetAtoms()] == table.elements[table.ptr[i] : table.ptr[i + 1]].tolist()
        ends = np.array([(b.GetBeginAtomIdx(), b.GetEndAtomIdx()) for b in mol.GetBonds()])
        lengths = np.linalg.norm(x[ends[:, 0]] - x[ends[:, 1]], axis=1)
        assert lengths.min() > 1.0, name
        assert lengths.max() < 2.3, name
        others = np.linalg.norm(x[:, None] - x[None], axis=2) + 9 * np.eye(len(x))
        assert others.min() > 1.0, f"{name}: two atoms on one spot"


@pytest.mark.parametrize("name", PEPTIDES)
def test_peptide_chains(everything: Any, name: str) -> None:
    """The right number of heavy atoms, and L at every alpha carbon."""
    table, _, _ = everything
    i = table.names.index(name)
    x = table.positions[table.ptr[i] : table.ptr[i + 1]].numpy().astype(np.float64)
    sequence = PEPTIDES[name].sequence
    assert len(x) == sum(HEAVY[letter] for letter in sequence) + 1  # the second oxygen of the C terminus
    atoms: dict[int, dict[str, int]] = {}
    for atom in skeleton(name).GetAtoms():
        info = atom.GetPDBResidueInfo()
        atoms.setdefault(info.GetResidueNumber(), {})[info.GetName().strip()] = atom.GetIdx()
    assert len(atoms) == len(sequence)
    for residue in atoms.values():
        if "CB" in residue:
            n, ca, c, cb = (x[residue[key]] for key in ("N", "CA", "C", "CB"))
            assert np.dot(np.cross(n - ca, c - ca), cb - ca) > 1


def test_seed_and_threads_decide_nothing_but_what_they_should() -> None:
    one, _ = embed_molecules(SMALL, [PEPTIDES["tuftsin"]], seed=3, workers=1)
    two, _ = embed_molecules(SMALL, [PEPTIDES["tuftsin"]], seed=3, workers=2)
    other, _ = embed_molecules(SMALL, [], seed=4)
    assert torch.equal(one.positions, two.positions)
    assert not torch.equal(one.positions[: other.n_atoms], other.positions)


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        (Molecule("nonsense", "drug", "", "C1CC("), "RDKit cannot read the SMILES 'C1CC('"),
        (Molecule("pentavalent", "drug", "", "C(C)(C)(C)(C)C"), "RDKit cannot read the SMILES"),
        (Molecule("hydrogen", "drug", "H2", "[H][H]"), "no heavy atoms"),
        (Molecule("placeholder", "drug", "", "CC*"), "atom 3 is a placeholder without an element"),
        # Two bridges of one atom on trans sides of a ring cannot close.
        (Molecule("strained", "drug", "", "C1C[C@@H]2C[C@@]3(C1)C[C@]2(C)C3"), "ETKDGv3 found no coordinates"),
        (Molecule("empty", "drug", "", ""), "no heavy atoms"),
        (Peptide("unknown letter", "AXB", ""), "RDKit cannot read the sequence 'AXB'"),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_failures_are_reported_by_name(
    item: Molecule | Peptide, reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    peptide = isinstance(item, Peptide)
    table, skipped = embed_molecules(SMALL[:1] + ([] if peptide else [item]), [item] if peptide else [])
    assert table.names == ("aspirin",)
    assert [s.path for s in skipped] == [item.name]
    assert reason in skipped[0].reason
    assert capfd.readouterr().err == ""


def test_fragments_do_not_overlap() -> None:
    positions, elements = embed(Chem.MolFromSmiles("CC(=O)[O-].[Na+].CCO"), seed=0)
    assert sorted(elements.tolist()) == [6, 6, 6, 6, 8, 8, 8, 11]
    sodium = int(np.argmax(elements))
    others = np.delete(positions, sodium, axis=0)
    assert np.linalg.norm(others - positions[sodium], axis=1).min() > 1.5


def test_unknown_domain_follows_the_known_ones() -> None:
    table, _ = embed_molecules([Molecule("ethanol", "solvent", "C2H6O", "CCO")], [])
    assert table.domains == ("drug", "metabolite", "natural product", "peptide", "solvent")
    assert table.domain.tolist() == [4]


def test_nothing_to_embed() -> None:
    table, skipped = embed_molecules([], [])
    assert (len(table), skipped) == (0, [])


def test_missing_rdkit_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [name for name in sys.modules if name.split(".")[0] == "rdkit"]:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"needs rdkit: pip install \"moeyard\[structures\]\""):
        embed_molecules(SMALL, [])


def test_error_type() -> None:
    with pytest.raises(EmbeddingError, match="no heavy atoms"):
        embed(Chem.MolFromSmiles("[H][H]"), seed=0)


def skeleton(name: str) -> Any:
    if name in PEPTIDES:
        return Chem.MolFromSequence(PEPTIDES[name].sequence)
    return Chem.MolFromSmiles(MOLECULES[name].smiles)


def test_interrupt_belongs_to_python_again_after_embedding() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        embed_molecules(molecule_list()[:24], [], seed=0, workers=4)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
