"""Models: one file per model, its config on top. Sees `nn`, `data` and `ops`."""
