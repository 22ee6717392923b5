"""Hostile arguments, drawn by hypothesis: values, layouts, and wrong things in the place of right ones.

Every tensor lies in a storage of its own, which a call must leave as it was: `Hostile.storages` remembers them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTS = (torch.int64, torch.int32)
#: every dtype of 1, 2, 4 and 8 bytes that a forward that only copies must take
COPIED = (*FLOATS, *INTS, torch.int8, torch.uint8, torch.int16, torch.bool, torch.complex64, torch.uint16)
_WRONG_DTYPES = (torch.float32, torch.int64, torch.bool, torch.complex128, torch.int8, torch.float8_e4m3fn)
#: Nothing between what is quick and what no machine holds: a size that only lacks memory is not an error of the caller.
_WRONG_NUMBERS = (-1, 0, -(2**63), 2**62, 2**63 - 1, 2**63, -(2**63) - 1, 2**70, True, 1.5, float("nan"), None, "3")
_LAYOUTS = ("contiguous", "offset", "every other", "transposed", "expanded")


class Hostile:
    """One example's source of choices. The first option of each choice is the tame one: hypothesis shrinks to it."""

    def __init__(self, data: st.DataObject) -> None:
        self._draw = data.draw
        self.storages: list[tuple[Tensor, Tensor]] = []
        self._numbers = torch.Generator()
        self._numbers.manual_seed(self._draw(st.integers(0, 2**32 - 1)))

    # ---- choices -------------------------------------------------------------------------------------------------

    def pick(self, *options: Any) -> Any:
        return options[self._draw(st.integers(0, len(options) - 1))]

    def number(self, low: int, high: int) -> int:
        return self._draw(st.integers(low, max(low, high)))

    def rarely(self, one_in: int = 12) -> bool:
        return self.number(0, one_in - 1) == one_in - 1

    def size(self, usual: int, rare: int) -> int:
        return self.number(0, rare) if self.rarely(20) else self.number(0, usual)

    # ---- values --------------------------------------------------------------------------------------------------

    def floats(self, shape: Sequence[int], dtype: torch.dtype, *, specials: bool = True) -> Tensor:
        """Ordinary, tied, tiny or huge numbers, and now and then NaN, infinities, subnormals and negative zero."""
        x = torch.randn(tuple(shape), generator=self._numbers, dtype=torch.float64)
        kind = self.pick("normal", "normal", "normal", "ties", "equal", "tiny", "huge")
        if kind == "ties":
            x = x.round()
        elif kind == "equal":
            x = torch.zeros_like(x) + 0.5
        elif kind in ("tiny", "huge"):
            info = torch.finfo(dtype)
            x = x * (info.tiny if kind == "tiny" else info.max / 8)
        x = x.to(dtype)
        if specials and self.rarely(3):
            info = torch.finfo(dtype)
            odd = (float("nan"), float("inf"), float("-inf"), info.max, info.min, info.tiny / 4, -0.0)
            self._scatter(x, [self.pick(*odd) for _ in range(self.number(1, 4))])
        return self.laid_out(x)

    def ints(self, shape: Sequence[int], low: int, high: int, *, dtype: torch.dtype | None = None) -> Tensor:
        """Integers in [low, high), and now and then one from outside."""
        dtype = self.pick(*INTS) if dtype is None else dtype
        x = torch.randint(low, max(high, low + 1), tuple(shape), generator=self._numbers).to(dtype)
        if self.rarely():
            info = torch.iinfo(dtype)
            odd = (low - 1, high, info.max, info.min, info.max - 1, -1)
            self._scatter(x, [max(info.min, min(info.max, self.pick(*odd)))])
        return self.laid_out(x)

    def of_dtype(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        if dtype in FLOATS:
            return self.floats(shape, dtype)
        x = torch.randint(0, 2 if dtype == torch.bool else 120, tuple(shape), generator=self._numbers)
        return self.laid_out(x.to(dtype))

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self._numbers, dtype=torch.float64)

    def order(self, n: int) -> Tensor:
        return torch.randperm(n, generator=self._numbers)

    def sorted_cuts(self, n: int, pieces: int) -> Tensor:
        """[pieces + 1] ascending from 0 to n; now and then not."""
        cuts = torch.randint(0, n + 1, (max(pieces - 1, 0),), generator=self._numbers).sort().values
        ptr = torch.cat(
            [torch.zeros(1, dtype=torch.int64), cuts, torch.tensor([n] if pieces else [], dtype=torch.int64)]
        )
        if self.rarely():
            self._scatter(ptr, [self.pick(-1, n + 1, 2**62, -(2**63), 0)])
        return self.laid_out(ptr.to(self.pick(*INTS)) if ptr.abs().max() < 2**31 else ptr)

    def _scatter(self, x: Tensor, values: list[Any]) -> None:
        if x.numel():
            for value in values:
                x.view(-1)[self.number(0, x.numel() - 1)] = value

    # ---- layouts -------------------------------------------------------------------------------------------------

    def laid_out(self, x: Tensor) -> Tensor:
        """Equal values (of one row everywhere, when expanded) in any strides and at any offset, poison around them."""
        layout = self.pick(*_LAYOUTS) if self.rarely(3) else "contiguous"
        if x.dim() == 0 or x.numel() == 0:
            layout = "contiguous"
        if layout == "contiguous":
            out = x.clone(memory_format=torch.contiguous_format)
        elif layout == "offset":
            out = _poison(x.numel() + 3, x.dtype)[3:].view(x.shape)
        elif layout == "every other":
            out = _poison(2 * x.numel(), x.dtype).view(*x.shape[:-1], -1)[..., ::2]
        elif layout == "transposed":
            out = _poison(x.numel(), x.dtype).view(x.shape[::-1]).permute(*reversed(range(x.dim())))
        else:
            out = x[:1].clone().expand(x.shape)
        if layout not in ("contiguous", "expanded"):
            out.copy_(x)
        storage = torch.empty(0, dtype=torch.uint8).set_(out.untyped_storage())
        self.storages.append((storage, storage.clone()))
        return out

    # ---- wrong things --------------------------------------------------------------------------------------------

    def spoil(self, arguments: dict[str, Any], *, types: bool = True) -> dict[str, Any]:
        """Puts something wrong in the place of one argument; with `types=False` only what a schema lets through."""
        name = self.pick(*arguments)
        value = arguments[name]
        if isinstance(value, Tensor):
            wrong = self._wrong_tensor(value, types)
        elif isinstance(value, tuple) and hasattr(value, "_replace"):
            field = self.pick(*value._fields)
            wrong = value._replace(**{field: self._wrong_tensor(getattr(value, field), types)})
        elif types:
            wrong = self.pick(*_WRONG_NUMBERS, torch.ones(2), [1])
        else:
            wrong = self.pick(-1, 0, 2**62, -(2**63), 2**63 - 1) if type(value) is int else value
        return {**arguments, name: wrong}

    def _wrong_tensor(self, x: Tensor, types: bool) -> Any:
        kinds = ["dtype", "rank", "rows", "scalar", "columns", "empty"]
        kind = self.pick(*kinds, "list", "sparse", "none") if types else self.pick(*kinds)
        if kind == "dtype":
            return x.detach().to(self.pick(*_WRONG_DTYPES))
        if kind == "rank":
            return x.detach()[None]
        if kind == "rows" and x.dim():
            return torch.cat([x.detach(), x.detach()[:1]])
        if kind == "columns" and x.dim() > 1:
            return x.detach()[:, : x.shape[1] // 2]
        if kind == "empty":
            return x.detach().new_zeros(0)
        if kind == "list":
            return [1, 2]
        if kind == "sparse" and x.dtype in (torch.float32, torch.int64):
            return x.detach().to_sparse()
        return None if kind == "none" else x.new_zeros(())


def _poison(items: int, dtype: torch.dtype) -> Tensor:
    return torch.full((items * dtype.itemsize,), 0x5A, dtype=torch.uint8).view(dtype)
