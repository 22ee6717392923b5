"""Argument checks shared by the ops: each error names the argument, what was expected and what came.

Everything here looks at types, shapes, dtypes and devices only, so the same checks run for real and for fake tensors.
Values are checked by the native code, which reads them anyway.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor


def tensor(name: str, value: Any, *, optional: bool = False) -> None:
    """TypeError unless `value` is a plain strided (dense) tensor, or None where that is allowed."""
    if value is None and optional:
        return
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor{' or None' if optional else ''}, got {type(value).__name__}")
    if value.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense (strided) tensor, got layout {value.layout}")
    # Both call themselves strided, but no kernel of ours would see them.
    if value.is_nested or value.is_quantized:
        kind = "nested" if value.is_nested else "quantized"
        raise TypeError(f"{name}: expected a dense (strided) tensor, got a {kind} one")


def dtype(name: str, value: Tensor, allowed: Collection[torch.dtype]) -> None:
    if value.dtype not in allowed:
        expected = ", ".join(str(d).removeprefix("torch.") for d in allowed)
        raise TypeError(f"{name}: expected dtype {expected}, got {str(value.dtype).removeprefix('torch.')}")


def rank(name: str, value: Tensor, letters: tuple[str, ...]) -> None:
    """`shape` for letters alone: any sizes, as many as there are letters."""
    if value.dim() != len(letters):
        shape(name, value, letters)


def shape(name: str, value: Tensor, expected: Sequence[int | str]) -> None:
    """ValueError unless the shape fits; a letter stands for any size: `shape("x", x, ("T", 3))`."""
    actual = value.shape
    if len(actual) == len(expected):
        for i, want in enumerate(expected):
            if not isinstance(want, str) and actual[i] is not want and _differ(actual[i], want):
                break
        else:
            return
    wanted = ", ".join(str(e) for e in expected)
    raise ValueError(f"{name}: expected shape [{wanted}], got {list(actual)}")


def _differ(size: int | torch.SymInt, expected: int | torch.SymInt) -> bool:
    """Sizes that `torch.compile` cannot compare, because data decide on them, pass: they are compared at run time."""
    different = size != expected
    if isinstance(different, bool):
        return different
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    return bool(guard_or_false(different))


def one_device(names: Sequence[str], values: Sequence[Any]) -> None:
    """ValueError unless all tensors among the values lie on the device of the first."""
    first: tuple[str, torch.device] | None = None
    for name, value in zip(names, values, strict=True):
        if isinstance(value, Tensor):
            first = first or (name, value.device)
            if value.device != first[1]:
                raise ValueError(f"{name}: expected device {first[1]} (that of {first[0]}), got {value.device}")


def integer(name: str, value: Any, *, minimum: int | None = None, optional: bool = False) -> None:
    """TypeError unless `value` is an int (bool is not; a symbolic int is), ValueError below `minimum`."""
    if value is None and optional:
        return
    if type(value) is int and (minimum is None or minimum <= value) and -(2**63) <= value < 2**63:
        return
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: expected an int{' or None' if optional else ''}, got {type(value).__name__}")
    if minimum is not None and value < minimum:
        raise ValueError(f"{name}: expected at least {minimum}, got {value}")
    if type(value) is int and not -(2**63) <= value < 2**63:
        bound = "at most 2^63 - 1" if value > 0 else "at least -2^63"
        raise ValueError(f"{name}: expected {bound}, got {value}")


def number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")


def flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {type(value).__name__} {value!r}")


def option(name: str, value: Any, allowed: Sequence[str]) -> None:
    # Not `value in allowed` alone: that asks an array for its truth.
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(repr(a) for a in allowed)}, got {value!r}")


def argument(name: str, kind: str, optional: bool, value: Any, options: Sequence[str] = ()) -> None:
    """Refuses a value that does not fit the type which a torch schema gives the argument: "Tensor", "int", "bool", ...

    `options` are the strings that a "str" may be.
    """
    if kind == "Tensor":
        tensor(name, value, optional=optional)
    elif kind == "int":
        integer(name, value, optional=optional)
    elif kind == "float":
        number(name, value)
    elif kind == "bool":
        flag(name, value)
    elif kind == "str":
        option(name, value, options)
