"""The readers on real files: nothing lost, PDB and mmCIF agree, counts as an independent reading of the text."""

from __future__ import annotations

import gzip
from collections import Counter
from pathlib import Path
from typing import Any

import gemmi
import pytest
import torch
from torch import Tensor

from moeyard.data.structures import Skipped, StructureTable, read_structures

FOLDERS = ("alphafold", "proteins", "pairs_pdb_cif", "rna")
WATERS = {"HOH", "DOD", "WAT", "H2O"}
# Sites where a crystal holds a mixture of residues; the most occupied one is read. The counts below go by atom names
# within a residue and know nothing of that, so the atoms of the others are listed here.
MIXED_SITES = {
    "1pfe.cif.gz": 7 + 7,  # B 3 and B 7: N2C or NCY, 56 % and 44 %
    "3JQH.cif": 6 + 9 + 9,  # A 1: Pro 83 %, Ser 17 %; A 15: Arg 50 %, Gln 33 %, Glu 17 %
    "altloc.cif": 6,  # A 22: Pro 60 %, Ser 40 % in two conformers
}
Found = tuple[StructureTable, list[Skipped]]


@pytest.fixture(scope="module")
def found(data_dir: Path) -> dict[str, Found]:
    return {folder: read_structures(data_dir / "structures" / folder) for folder in FOLDERS}


def sizes(found: Found) -> dict[str, int]:
    return dict(zip(found[0].names, found[0].sizes.tolist(), strict=True))


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_file_is_read_or_skipped_with_a_reason(found: dict[str, Found], data_dir: Path, folder: str) -> None:
    table, skipped = found[folder]
    files = {path.name for path in (data_dir / "structures" / folder).iterdir()}
    assert Counter([*table.names, *(s.path for s in skipped)]) == Counter(files)
    assert all(len(s.reason) > 10 for s in skipped)
    assert int(table.sizes.min()) > 0
    assert 1 not in table.elements.tolist()


def test_what_is_skipped_and_why(found: dict[str, Found]) -> None:
    reasons = {s.path: s.reason for folder in FOLDERS for s in found[folder][1]}
    assert {name: reason.split(":")[0] for name, reason in reasons.items()} == {
        "3eiy_stripped_ele.cif": "gemmi cannot parse it",
        "4Q9R_min.cif": "no atoms",
        "d256ba_.ent": "no atoms",
        "eol-test.cif": "no atoms",
    }


def test_domains(found: dict[str, Found]) -> None:
    def of(folder: str) -> dict[str, str]:
        table = found[folder][0]
        return {name: table.domains[i] for name, i in zip(table.names, table.domain.tolist(), strict=True)}

    assert set(of("alphafold").values()) == {"protein"}
    assert set(of("rna").values()) == {"nucleic acid"}
    others = {name: domain for name, domain in of("proteins").items() if domain != "protein"}
    assert others == {
        "1pfe.cif.gz": "nucleic acid",
        "HEM.pdb": "molecule",
        "hetatm.pdb": "molecule",
        "ions.pdb": "molecule",
    }


@pytest.mark.parametrize(("folder", "count"), [("alphafold", 2), ("pairs_pdb_cif", 17), ("proteins", 4)])
def test_pdb_and_mmcif_agree(found: dict[str, Found], folder: str, count: int) -> None:
    """The same entry in both formats: the same elements, in the same shape."""
    table = found[folder][0]
    ids = {name: i for i, name in enumerate(table.names)}
    pairs = [
        (i, ids[f"{name[:-4]}.cif"]) for name, i in ids.items() if f"{name[:-4]}.cif" in ids and name[-4:] == ".pdb"
    ]
    assert len(pairs) == count
    for pdb, cif in pairs:
        (elements, shape), (others, other_shape) = content(table, pdb), content(table, cif)
        assert elements == others, table.names[pdb]
        if folder != "pairs_pdb_cif":  # those are two predictions for one sequence
            torch.testing.assert_close(shape, other_shape, rtol=0, atol=2e-3, msg=table.names[pdb])


def content(table: StructureTable, i: int) -> tuple[Counter[int], Tensor]:
    """How often each element occurs, and the sorted distances from the centre: 4hhb.pdb lies in an older frame."""
    atoms = slice(int(table.ptr[i]), int(table.ptr[i + 1]))
    x = table.positions[atoms].double()
    return Counter(table.elements[atoms].tolist()), (x - x.mean(0)).norm(dim=1).sort().values


def test_alphafold_counts_by_text(found: dict[str, Found], data_dir: Path) -> None:
    """An AlphaFold file has no alternates, waters or hydrogens: each ATOM line is one heavy atom."""
    got = sizes(found["alphafold"])
    for path in sorted((data_dir / "structures" / "alphafold").glob("*.pdb")):
        lines = [line for line in path.read_text().splitlines() if line.startswith("ATOM")]
        assert got[path.name] == len(lines) > 0, path.name
        assert {line[76:78].strip() for line in lines} <= {"C", "N", "O", "S"}, path.name


@pytest.mark.parametrize("folder", ["proteins", "rna", "pairs_pdb_cif"])
def test_pdb_counts_by_text(found: dict[str, Found], data_dir: Path, folder: str) -> None:
    """First model, without waters and hydrogens; one for each (chain, number, residue, name) that has alternates."""
    got = sizes(found[folder])
    checked = 0
    for path in sorted((data_dir / "structures" / folder).iterdir()):
        if ".pdb" in path.suffixes and path.name in got and path.name != "3eiy_stripped_no_ele.pdb":
            assert got[path.name] == count_pdb(text_of(path)), path.name
            checked += 1
    assert checked >= 9


def count_pdb(text: str) -> int:
    alternates: set[str] = set()
    names: list[str] = []
    for line in text.splitlines():
        if line.startswith("ENDMDL"):
            break
        element = line[76:78].strip() or line[12:16].strip(" 0123456789")[:1]
        if line.startswith(("ATOM", "HETATM")) and line[17:20] not in WATERS and element not in {"H", "D"}:
            names.append(line[12:16] + line[17:27])
            if line[16] != " ":
                alternates.add(names[-1])
    return sum(count if name not in alternates else 1 for name, count in Counter(names).items())


@pytest.mark.parametrize("folder", FOLDERS)
def test_mmcif_counts_by_table(found: dict[str, Found], data_dir: Path, folder: str) -> None:
    """The same from the rows of the _atom_site table, without gemmi's hierarchy."""
    got = sizes(found[folder])
    checked = 0
    for path in sorted((data_dir / "structures" / folder).iterdir()):
        if ".cif" in path.suffixes and path.name in got:
            expected = count_cif(gemmi.cif.read_string(text_of(path))) - MIXED_SITES.get(path.name, 0)
            assert got[path.name] == expected, path.name
            checked += 1
    assert checked >= 7


def count_cif(document: Any) -> int:
    tags = ["label_alt_id", "type_symbol", "label_comp_id", "label_atom_id", "label_asym_id", "?auth_seq_id"]
    tags += ["?pdbx_PDB_ins_code", "?pdbx_PDB_model_num"]
    rows = [list(row) for block in document for row in block.find("_atom_site.", tags)]
    alternates: set[tuple[str, ...]] = set()
    names: list[tuple[str, ...]] = []
    for altloc, element, *name, model in rows:
        if model == rows[0][-1] and element not in {"H", "D"} and name[0] not in WATERS:
            names.append(tuple(name))
            if altloc not in {".", "?"}:
                alternates.add(names[-1])
    return sum(count if name not in alternates else 1 for name, count in Counter(names).items())


def text_of(path: Path) -> str:
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8", errors="replace")


def test_ligands_of_the_binding_sets(data_dir: Path) -> None:
    """SDF ligands beside protein files; what is no structure file is listed, too."""
    table, skipped = read_structures(data_dir / "structures" / "lba")
    files = [path for path in (data_dir / "structures" / "lba").rglob("*") if path.is_file()]
    assert len(table) + len(skipped) == len(files)
    assert {s.reason.split(":")[0] for s in skipped} == {"no structure file"}
    assert len(table) >= 20


def test_qm9_records(data_dir: Path) -> None:
    table, skipped = read_structures(data_dir / "structures" / "qm9" / "qm9_mini.sdf")
    assert len(table) == 20
    assert [s.path for s in skipped] == ["qm9_mini.sdf#20"]
    assert "no atom line" in skipped[0].reason


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_natural_products_are_embedded(data_dir: Path) -> None:
    """Two files of drawings: almost all get coordinates, the rest a reason."""
    folder = data_dir / "structures" / "coconut"
    table, skipped = read_structures(folder)
    drawings = [s for s in skipped if "#" in s.path]
    text = "".join(path.read_text() for path in sorted(folder.glob("*.sdf")))
    assert len(table) + len(drawings) == text.count("$$$$")
    assert len(drawings) <= 5
    assert all(s.reason.startswith("2-D, and not to be embedded: ") for s in drawings)
