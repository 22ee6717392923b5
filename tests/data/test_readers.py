"""Readers on small files written here: what enters the table, what does not, and that the reason is told."""

from __future__ import annotations

import gzip
import sys
from pathlib import Path
from typing import Any

import pytest
from rdkit import Chem
from rdkit.Chem import AllChem

from moeyard.data.structures import Skipped, StructureTable, read_structures


def pdb_line(
    name: str,
    residue: str = "ALA",
    number: str = "1",
    at: tuple[float, float, float] = (0.0, 0.0, 0.0),
    *,
    element: str = "C",
    chain: str = "A",
    altloc: str = " ",
    occupancy: float = 1.0,
    record: str = "ATOM",
) -> str:
    """One line in PDB columns; `number` may end in an insertion code."""
    icode = number[-1] if number[-1].isalpha() else " "
    padded = f" {name:<3}" if len(element) == 1 and len(name) < 4 else f"{name:<4}"
    x, y, z = at
    return (
        f"{record:<6}{1:>5} {padded}{altloc}{residue:>3} {chain}{number.rstrip(icode):>4}{icode}   "
        f"{x:8.3f}{y:8.3f}{z:8.3f}{occupancy:6.2f}{10.0:6.2f}          {element:>2}"
    )


def read(tmp_path: Path, files: dict[str, str | bytes], **options: Any) -> tuple[StructureTable, list[Skipped]]:
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_structures(tmp_path, **options)


def read_one(tmp_path: Path, lines: list[str], name: str = "x.pdb") -> StructureTable:
    table, skipped = read(tmp_path, {name: "\n".join([*lines, "END", ""])})
    assert skipped == []
    assert table.names == (name,)
    return table


def skipped_reason(tmp_path: Path, content: str | bytes, name: str = "x.pdb") -> str:
    table, skipped = read(tmp_path, {name: content})
    assert len(table) == 0
    assert [s.path for s in skipped] == [name]
    return skipped[0].reason


# ---- which atoms --------------------------------------------------------------------------------------------------


def test_hydrogens_deuterium_and_waters_stay_out(tmp_path: Path) -> None:
    table = read_one(
        tmp_path,
        [
            pdb_line("N", at=(1, 2, 3), element="N"),
            pdb_line("CA", at=(-4.125, 5, 6)),
            pdb_line("H", element="H"),
            pdb_line("HA", element="H"),
            pdb_line("D", element="D"),
            pdb_line("ZN", "ZN", "200", (7, 8, 9), element="ZN", record="HETATM"),
            pdb_line("O", "HOH", "301", element="O", record="HETATM"),
            pdb_line("O", "DOD", "302", element="O", record="HETATM"),
        ],
    )
    assert table.elements.tolist() == [7, 6, 30]
    assert table.positions.tolist() == [[1, 2, 3], [-4.125, 5, 6], [7, 8, 9]]


def test_altloc_keeps_exactly_one_of_every_atom(tmp_path: Path) -> None:
    table = read_one(
        tmp_path,
        [
            pdb_line("N", element="N", at=(1, 0, 0)),
            # B is the more occupied one, and comes second.
            pdb_line("CA", at=(2, 0, 0), altloc="A", occupancy=0.3),
            pdb_line("CA", at=(3, 0, 0), altloc="B", occupancy=0.7),
            # Equal occupancies: the first letter, wherever it stands.
            pdb_line("CB", at=(4, 0, 0), altloc="B", occupancy=0.5),
            pdb_line("CB", at=(5, 0, 0), altloc="A", occupancy=0.5),
            # An atom that only conformer B has, and one that only C has: both stay.
            pdb_line("OG", element="O", at=(6, 0, 0), altloc="B", occupancy=0.4),
            pdb_line("SG", element="S", at=(7, 0, 0), altloc="C", occupancy=0.0),
            # The main conformer may have no letter at all.
            pdb_line("O", element="O", at=(8, 0, 0), altloc=" ", occupancy=0.6),
            pdb_line("O", element="O", at=(9, 0, 0), altloc="B", occupancy=0.4),
        ],
    )
    assert table.positions[:, 0].tolist() == [1, 3, 5, 6, 7, 8]


def test_altlocs_of_whole_residues_written_one_after_the_other(tmp_path: Path) -> None:
    conformers = [
        pdb_line(name, "SER", "5", (x, 0, 0), altloc=letter, occupancy=occupancy)
        for letter, occupancy, shift in (("A", 0.45, 0), ("B", 0.55, 10))
        for x, name in enumerate(("CA", "C", "CB"), start=shift)
    ]
    assert read_one(tmp_path, conformers).positions[:, 0].tolist() == [10, 11, 12]


@pytest.mark.parametrize(("share", "kept"), [(0.4, 2), (0.6, 1)])
def test_two_residues_at_one_site(tmp_path: Path, share: float, kept: int) -> None:
    """Microheterogeneity, serine in two conformers, threonine in one: one residue is kept, whole."""
    serine = [
        pdb_line(name, "SER", "22", (1, 0, i), altloc=letter, occupancy=share / 2)
        for i, name in enumerate(("CA", "CB"))
        for letter in "AB"
    ]
    threonine = [
        pdb_line(name, "THR", "22", (2, 0, i), altloc="C", occupancy=1 - share) for i, name in enumerate(("CA", "CB"))
    ]
    assert read_one(tmp_path, serine + threonine).positions[:, 0].tolist() == [kept] * 2


def test_equal_names_without_altloc_all_stay(tmp_path: Path) -> None:
    """Ligands in the wild call every carbon C; that is no alternate location."""
    lines = [pdb_line("C", "LIG", "1", (i, 0, 0), record="HETATM") for i in range(4)]
    assert len(read_one(tmp_path, lines).elements) == 4


def test_insertion_codes_and_chains_are_different_residues(tmp_path: Path) -> None:
    lines = [
        pdb_line("CA", number=number, chain=chain, at=(i, 0, 0), altloc="A", occupancy=0.5)
        for i, (number, chain) in enumerate([("52", "A"), ("52A", "A"), ("52B", "A"), ("52", "B")])
    ]
    assert read_one(tmp_path, lines).positions[:, 0].tolist() == [0, 1, 2, 3]


def test_only_the_first_model(tmp_path: Path) -> None:
    lines: list[str] = []
    for model in (1, 2, 3):
        lines += [f"MODEL     {model:>4}", pdb_line("CA", at=(model, 0, 0)), "ENDMDL"]
    assert read_one(tmp_path, lines).positions.tolist() == [[1, 0, 0]]


def test_elements_are_inferred_from_atom_names(tmp_path: Path) -> None:
    """Columns 77 and 78 are blank: CA of alanine is carbon, CA of calcium is not, HG11 is a hydrogen."""
    lines = [
        pdb_line("CA"),
        pdb_line("HG11"),
        pdb_line("OXT", element="O"),
        pdb_line("CA", "CA", "9", element="CA", record="HETATM"),
    ]
    assert read_one(tmp_path, [line[:76] for line in lines]).elements.tolist() == [6, 8, 20]


# ---- domains --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("residues", "domain"),
    [
        (["ALA", "GLY"], "protein"),
        (["MSE", "ALA"], "protein"),
        (["A", "U", "PSU"], "nucleic acid"),
        (["DA", "DT"], "nucleic acid"),
        (["HEM"], "molecule"),
        (["GLY"], "molecule"),
        (["ALA", "GLY", "DA", "DT", "DC"], "nucleic acid"),
        (["ALA", "GLY", "VAL", "DT", "DC"], "protein"),
    ],
)
def test_domains(tmp_path: Path, residues: list[str], domain: str) -> None:
    lines = [pdb_line("C1", residue, str(i), (i, 0, 0)) for i, residue in enumerate(residues, start=1)]
    table = read_one(tmp_path, lines)
    assert table.domains == ("protein", "nucleic acid", "molecule")
    assert table.domains[int(table.domain[0])] == domain


# ---- mmCIF ----------------------------------------------------------------------------------------------------------

CIF_COLUMNS = """
group_PDB id type_symbol label_atom_id label_alt_id label_comp_id label_asym_id label_entity_id label_seq_id
pdbx_PDB_ins_code Cartn_x Cartn_y Cartn_z occupancy auth_seq_id auth_asym_id pdbx_PDB_model_num
"""


def cif_of(rows: list[str], block: str = "x") -> str:
    header = [f"data_{block}", "loop_", *(f"_atom_site.{column}" for column in CIF_COLUMNS.split())]
    return "\n".join([*header, *rows, "#", ""])


def cif_row(
    name: str, at: str = "1.0 2.0 3.0", *, element: str = "C", altloc: str = ".", occupancy: str = "1.0", model: int = 1
) -> str:
    return f"ATOM 1 {element} {name} {altloc} SER A 1 7 ? {at} {occupancy} 7 A {model}"


def test_pdb_and_mmcif_of_the_same_thing_agree(tmp_path: Path) -> None:
    pdb = [
        pdb_line("N", "SER", "7", (1, 2, 3), element="N"),
        pdb_line("CA", "SER", "7", (2, 2, 3), altloc="A", occupancy=0.4),
        pdb_line("CA", "SER", "7", (3, 2, 3), altloc="B", occupancy=0.6),
        pdb_line("HA", "SER", "7", (4, 2, 3), element="H"),
    ]
    cif = [
        cif_row("N", "1.0 2.0 3.0", element="N"),
        cif_row("CA", "2.0 2.0 3.0", altloc="A", occupancy="0.4"),
        cif_row("CA", "3.0 2.0 3.0", altloc="B", occupancy="0.6"),
        cif_row("HA", "4.0 2.0 3.0", element="H"),
        cif_row("N", "9.0 9.0 9.0", element="N", model=2),
    ]
    files: dict[str, str | bytes] = {"a.pdb": "\n".join(pdb) + "\n", "b.cif": cif_of(cif)}
    files |= {"c.ent.gz": gzip.compress(str(files["a.pdb"]).encode()), "d.mmcif": files["b.cif"]}
    files |= {"deep/e.cif.gz": gzip.compress(str(files["b.cif"]).encode()), "deep/F.PDB": files["a.pdb"]}
    table, skipped = read(tmp_path, files)
    assert skipped == []
    assert table.names == ("a.pdb", "b.cif", "c.ent.gz", "d.mmcif", "deep/F.PDB", "deep/e.cif.gz")
    assert table.sizes.tolist() == [2] * 6
    assert table.positions.tolist() == [[1, 2, 3], [3, 2, 3]] * 6
    assert table.elements.tolist() == [7, 6] * 6


def test_every_block_with_atoms_is_a_structure(tmp_path: Path) -> None:
    text = (
        cif_of([cif_row("CA")], "one") + "data_cell\n_cell.length_a 10\n" + cif_of([cif_row("C"), cif_row("O")], "two")
    )
    table, skipped = read(tmp_path, {"x.cif": text})
    assert skipped == []
    assert table.names == ("x.cif#1", "x.cif#3")
    assert table.sizes.tolist() == [1, 2]


# ---- what cannot be read --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("x.pdb", "", "the file is empty"),
        ("x.cif", " \n\n", "the file is empty"),
        ("x.pdb", "<html><body>404 Not Found</body></html>\n", "no atoms: the file has no ATOM or HETATM records"),
        ("x.cif", "<html><body>404 Not Found</body></html>\n", "gemmi cannot parse it: line 1:"),
        ("x.pdb", bytes(range(256)) * 20, "no atoms"),
        ("x.cif", bytes(range(256)) * 20, "gemmi cannot parse it"),
        ("x.cif", "data_x\n_cell.length_a 10\n", "no atoms: the file has no _atom_site category"),
        ("x.cif", cif_of([cif_row("CA", "1.0 2.0")]), "Wrong number of values in loop _atom_site"),
        ("x.cif", cif_of([cif_row("CA", "1.0 ? 3.0")]), "no position: atom CA of SER 7 in chain 'A'"),
        ("x.cif", cif_of([cif_row("CA", element="?")]), "unknown element: atom CA of SER 7 in chain 'A'"),
        ("x.pdb", pdb_line("CA")[:45] + "\n", "line 1: expected three coordinates in columns 31 to 54"),
        ("x.pdb", pdb_line("CA").replace("   0.000", "     abc", 1) + "\n", "line 1: expected three coordinates"),
        ("x.pdb", pdb_line("CA").replace("   0.000", "     nan", 1) + "\n", "line 1: expected three coordinates"),
        ("x.pdb", pdb_line("CA").replace("   0.000", "********", 1) + "\n", "line 1: expected three coordinates"),
        ("x.pdb", pdb_line("Q1", element="Q7") + "\n", "unknown element: atom Q1 of ALA 1 in chain 'A'"),
        ("x.pdb", pdb_line("H", element="H") + "\n", "all atoms are hydrogens or waters (1 of hydrogen)"),
        ("x.pdb", pdb_line("O", "HOH", element="O") + "\n", "all atoms are hydrogens or waters (1 of water)"),
        ("x.pdb.gz", b"no gzip at all", "cannot be read: Not a gzipped file"),
        ("x.pdb.gz", gzip.compress(b"ATOM" * 100, mtime=0)[:-12], "cannot be read: "),
        ("x.cif.gz", gzip.compress(b"", mtime=0), "the file is empty"),
        ("x.txt", "hello", "no structure file: expected one of .pdb, .ent, .cif"),
        ("README", "hello", "no structure file"),
        ("x.txt.gz", gzip.compress(b"hello", mtime=0), "no structure file"),
        ("x.sdf", "$$$$\n", "RDKit cannot parse the record (0 lines, too few"),
    ],
)
def test_skipped_with_the_true_reason(tmp_path: Path, name: str, content: str | bytes, reason: str) -> None:
    assert reason in skipped_reason(tmp_path, content, name)


def test_bytes_beyond_ascii_do_not_shift_columns(tmp_path: Path) -> None:
    line = pdb_line("CA", at=(1, 2, 3)).encode().replace(b"ALA", b"\xc4LA")
    table, skipped = read(tmp_path, {"x.pdb": b"REMARK  \xe9t\xe9\n" + line + b"\n"})
    assert skipped == []
    assert table.positions.tolist() == [[1, 2, 3]]


# ---- SDF ------------------------------------------------------------------------------------------------------------


def mol_block(smiles: str, dimensions: int, title: str = "") -> str:
    mol = Chem.AddHs(Chem.MolFromSmiles(smiles))
    if dimensions == 3:
        AllChem.EmbedMolecule(mol, randomSeed=1)
    else:
        AllChem.Compute2DCoords(mol)
    mol.SetProp("_Name", title)
    return str(Chem.MolToMolBlock(mol))


def sdf(*records: str) -> str:
    return "".join(record + "> <note>\nany\n\n$$$$\n" for record in records)


def test_sdf_records_one_by_one(tmp_path: Path) -> None:
    broken = mol_block("CCO", 3).replace(" C  ", " C9x", 1)
    text = sdf(mol_block("CCO", 3), broken, mol_block("C[C@H](N)C(=O)O", 2), mol_block("[H][H]", 3), mol_block("*C", 3))
    table, skipped = read(tmp_path, {"x.sdf": text})
    assert table.names == ("x.sdf#1", "x.sdf#3")
    assert table.sizes.tolist() == [3, 6]
    assert set(table.domain.tolist()) == {2}
    assert [s.path for s in skipped] == ["x.sdf#2", "x.sdf#4", "x.sdf#5"]
    assert "RDKit cannot parse the record" in skipped[0].reason
    assert skipped[1].reason == "no heavy atoms"
    assert skipped[2].reason == "atom 1 (R) has no element"  # as RDKit writes a placeholder


def test_drawings_are_embedded_with_their_stereo_centres_or_skipped(tmp_path: Path) -> None:
    files: dict[str, str | bytes] = {"x.sdf": sdf(mol_block("C[C@H](N)C(=O)O", 2))}
    table, skipped = read(tmp_path, files, seed=5)
    assert skipped == []
    cb, ca, n, c = table.positions[:4].double()
    assert float(torch_triple(n - ca, c - ca, cb - ca)) > 1  # L-alanine
    table, skipped = read(tmp_path, files, embed_2d=False)
    assert (len(table), skipped) == (0, [Skipped("x.sdf", "2-D: all z coordinates are 0, and embed_2d is off")])


def torch_triple(a: Any, b: Any, c: Any) -> Any:
    return a.cross(b, dim=0).dot(c)


def test_a_drawing_that_makes_no_chemistry_is_reported(tmp_path: Path) -> None:
    block = mol_block("C(F)(F)(F)F", 2).replace("  1  2  1  0", "  1  2  2  0")
    assert "2-D, and not to be embedded: Explicit valence for atom # 0 C" in skipped_reason(
        tmp_path, sdf(block), "x.sdf"
    )


def test_odd_valences_in_3d_do_no_harm(tmp_path: Path) -> None:
    block = mol_block("C(F)(F)(F)F", 3).replace("  1  2  1  0", "  1  2  2  0")
    table, skipped = read(tmp_path, {"x.sdf": sdf(block)})
    assert (table.sizes.tolist(), skipped) == ([5], [])


def test_molfile_gz_and_missing_last_separator(tmp_path: Path) -> None:
    two = sdf(mol_block("CCO", 3), mol_block("CCCO", 3)).removesuffix("$$$$\n")
    table, skipped = read(tmp_path, {"a.mol": mol_block("CO", 3), "b.sdf.gz": gzip.compress(two.encode())})
    assert skipped == []
    assert table.names == ("a.mol", "b.sdf.gz#1", "b.sdf.gz#2")
    assert table.sizes.tolist() == [2, 3, 4]


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda text: "\n".join(text.splitlines()[:3]) + "\n", "3 lines, too few for a header and a counts line"),
        (lambda text: text.replace("  9  8", " x9  8"), "the counts line is ' x9  8"),
        (lambda text: text.replace("M  END", ""), "it has no line M  END"),
        (
            lambda text: text.replace("  9  8", " 99  8"),
            "the counts line promises 99 atoms and 8 bonds, 17 lines follow",
        ),
    ],
)
def test_broken_molfiles(tmp_path: Path, spoil: Any, reason: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert reason in skipped_reason(tmp_path, spoil(mol_block("CCO", 3)), "x.mol")
    assert capfd.readouterr().err == ""


# ---- the folder -----------------------------------------------------------------------------------------------------


def test_progress_max_atoms_and_hidden_files(tmp_path: Path) -> None:
    big = "\n".join(pdb_line("C", "LIG", "1", (i, 0, 0)) for i in range(6))
    files: dict[str, str | bytes] = {"b.pdb": big, "a.pdb": pdb_line("CA"), ".hidden.pdb": big, ".git/x.pdb": big}
    files["z.sdf"] = sdf(mol_block("CCO", 3), mol_block("CO", 3))
    calls: list[tuple[int, int, str]] = []
    table, skipped = read(tmp_path, files, max_atoms=5, progress=lambda *call: calls.append(call))
    assert table.names == ("a.pdb", "z.sdf#1", "z.sdf#2")
    assert skipped == [Skipped("b.pdb", "6 heavy atoms, more than max_atoms = 5")]
    assert calls == [(1, 3, "a.pdb"), (2, 3, "b.pdb"), (2, 3, "z.sdf#1"), (2, 3, "z.sdf#2"), (3, 3, "z.sdf")]


def test_a_single_file_and_an_empty_folder(tmp_path: Path) -> None:
    assert len(read_structures(tmp_path)[0]) == 0
    (tmp_path / "x.pdb").write_text(pdb_line("CA"))
    assert read_structures(str(tmp_path / "x.pdb"))[0].names == ("x.pdb",)


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"directory: expected a folder or a file, but .*nowhere does not exist"
    ):
        read_structures(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="max_atoms: expected at least 1, got 0"):
        read_structures(tmp_path, max_atoms=0)
    with pytest.raises(TypeError, match="max_atoms: expected an int or None, got float"):
        read_structures(tmp_path, max_atoms=1.5)  # type: ignore[arg-type]


def test_missing_gemmi_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gemmi", None)
    with pytest.raises(ImportError, match=r"needs gemmi: pip install \"moeyard\[structures\]\""):
        read(tmp_path, {"x.pdb": pdb_line("CA")})
