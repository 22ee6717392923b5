"""The fuzz's own instruments notice what they are there for."""

from __future__ import annotations

import ctypes

import pytest
import torch

from fuzz import guards


@pytest.mark.skipif(guards._PAD == 0, reason="under AddressSanitizer its own guards take over")
@pytest.mark.parametrize("offset", [-1, 12])
def test_a_byte_beside_an_output_is_noticed(offset: int) -> None:
    def write_beside() -> None:
        with guards.guarded(0xA5):
            x = torch.empty(3)
            ctypes.memset(x.data_ptr() + offset, 0, 1)

    with pytest.raises(AssertionError, match="memory beside 12 fresh bytes"):
        write_beside()


def test_fresh_memory_is_garbage_and_zeros_are_zero() -> None:
    with guards.guarded(0xA5):
        like = torch.ones(2, 3)
        for x in (torch.empty(2, 3), torch.empty_like(like), like.new_empty((2, 3))):
            assert x.is_contiguous()
            assert x.data_ptr() % 64 == 0
            assert (x.view(torch.uint8) == 0xA5).all()
        assert (torch.zeros(2, 3) == 0).all()
        assert (like.new_zeros(4) == 0).all()
    assert torch.zeros(2).sum() == 0
