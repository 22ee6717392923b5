"""Thin drop-ins for other libraries' functions. Sees `ops` and `nn`, and the library that it serves."""
