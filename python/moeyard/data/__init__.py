"""Data: batching and structures. Sees `ops` only, never `nn`."""
