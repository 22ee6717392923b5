"""Reads folders of structure files. Which atoms enter the table is decided in `macromolecules.py` and `sdf.py`."""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from moeyard.data.structures import macromolecules, sdf
from moeyard.data.structures.table import Progress, Skipped, Structure, StructureTable

#: The domains of real files, in the order of their ids.
DOMAINS = ("protein", "nucleic acid", "molecule")

#: What one file holds, in file order: structures, and what could not be one.
Found = list[Structure | Skipped]
Reader = Callable[[str, str], Found]


def read_structures(
    directory: str | os.PathLike[str],
    progress: Progress | None = None,
    max_atoms: int | None = None,
    *,
    embed_2d: bool = True,
    seed: int = 0,
) -> tuple[StructureTable, list[Skipped]]:
    """All structures of a folder and the folders below it, in the sorted order of their paths.

    Files: PDB (.pdb, .ent) and mmCIF (.cif, .mmcif) by gemmi, SDF and molfiles (.sdf, .mol) by RDKit, each also as .gz.
    One structure per PDB file, per mmCIF block that has atoms, and per SDF record.

    - Only the first model of an NMR ensemble is read.
    - Hydrogens, deuterium and waters are left out; ligands, ions and modified residues stay.
    - Alternate locations: exactly one per atom, the one with the highest occupancy (the first letter among equals).
      Where a site holds a mixture of different residues, only the most occupied residue.
    - Elements missing in a PDB file are inferred by gemmi from the atom names. A file with an element that stays
      unknown is skipped with a reason that names the atom.
    - The domain is "protein" or "nucleic acid" where at least two residues make a polymer (the more frequent kind
      counts), else "molecule".
    - SDF records whose z coordinates are all 0 are drawings. They get 3-D coordinates by ETKDGv3, or are skipped.

    Args:
        directory: a folder, or a single file.
        progress: called as `progress(done, total, path)` after each file, and with the files done so far after each
            record of an SDF file, which may have to be embedded.
        max_atoms: structures with more heavy atoms than this are skipped, with that reason.
        embed_2d: embed 2-D SDF records in 3-D; False skips them.
        seed: of that embedding.

    Returns:
        The table, its names being paths relative to `directory` (`#number` marks the record or block of a file with
        several), positions in angstrom; and everything that is not in it: `Skipped(path, reason)`. Files of other kinds
        are listed there too. Only hidden files and folders (a leading dot) are passed over.

    Raises:
        FileNotFoundError: `directory` does not exist.
        TypeError, ValueError: a bad `max_atoms`.
        ImportError: gemmi or RDKit is needed and missing; `pip install "moeyard[structures]"` brings both.
    """
    root = Path(directory)
    if not root.exists():
        raise FileNotFoundError(f"directory: expected a folder or a file, but {root} does not exist")
    if max_atoms is not None and (isinstance(max_atoms, bool) or not isinstance(max_atoms, int)):
        raise TypeError(f"max_atoms: expected an int or None, got {type(max_atoms).__name__}")
    if max_atoms is not None and max_atoms < 1:
        raise ValueError(f"max_atoms: expected at least 1, got {max_atoms}")
    found: list[Structure] = []
    skipped: list[Skipped] = []
    paths = [root] if root.is_file() else list(_files(root))
    done = 0

    def within_file(record: str) -> None:
        if progress is not None:
            progress(done - 1, len(paths), record)

    readers = _readers(embed_2d, seed, within_file)
    for done, path in enumerate(paths, start=1):
        name = path.name if path == root else path.relative_to(root).as_posix()
        for item in _read_file(path, name, readers):
            if isinstance(item, Structure) and max_atoms is not None and len(item.elements) > max_atoms:
                item = Skipped(item.name, f"{len(item.elements):,} heavy atoms, more than max_atoms = {max_atoms:,}")
            if isinstance(item, Structure):
                found.append(item)
            else:
                skipped.append(item)
        if progress is not None:
            progress(done, len(paths), name)
    return StructureTable.from_structures(found, DOMAINS), skipped


def _readers(embed_2d: bool, seed: int, tick: Callable[[str], None]) -> dict[str, Reader]:
    def molecules(text: str, name: str) -> Found:
        return sdf.read_sdf(text, name, embed_2d=embed_2d, seed=seed, tick=tick)

    pdb, cif = macromolecules.read_pdb, macromolecules.read_mmcif
    return {".pdb": pdb, ".ent": pdb, ".cif": cif, ".mmcif": cif, ".sdf": molecules, ".mol": molecules}


def _files(root: Path) -> Iterator[Path]:
    """The files below `root`, sorted by path; links to folders are not followed, so that no loop can arise."""
    paths = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths += [Path(folder, name) for name in files if not name.startswith(".")]
    yield from sorted(paths, key=lambda path: path.relative_to(root).as_posix())


def _read_file(path: Path, name: str, readers: dict[str, Reader]) -> Found:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = suffixes[-1:] == [".gz"]
    kind = (suffixes[:-1] if packed else suffixes)[-1:]
    reader = readers.get(kind[0]) if kind else None
    if reader is None:
        return [Skipped(name, f"no structure file: expected one of {', '.join(readers)}, or one of these with .gz")]
    try:
        data = path.read_bytes()
        text = _decoded(gzip.decompress(data) if packed else data)
    except (OSError, EOFError, zlib.error) as error:
        return [Skipped(name, f"cannot be read: {error}")]
    if not text.strip():
        return [Skipped(name, "the file is empty")]
    return reader(text, name)


def _decoded(data: bytes) -> str:
    """UTF-8, or else ASCII with a question mark for every other byte: PDB columns must not shift."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("ascii", errors="replace").replace("\ufffd", "?")
