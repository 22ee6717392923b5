"""Data: from files to batches. Sees `ops` only, never `nn`.

`structures/` reads molecules and macromolecules into columnar tables; `batching/` plans batches by a budget of atoms
and collates them with `gather_segments`. Optional packages (gemmi, RDKit) are imported when a function needs them.
"""
