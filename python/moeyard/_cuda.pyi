"""CUDA kernels on raw addresses; `stream` is a cudaStream_t as an integer."""

runtime_version: int

def identity(input: int, out: int, bytes: int, device: int, stream: int) -> None: ...
