"""The rows of the op contract that only a GPU can show: streams, graphs, synchronisation, several devices."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from engines import no_synchronisation
from ops.compare import assert_equal

if TYPE_CHECKING:
    from ops.contract import Inputs, OpContract

on_a_gpu = pytest.mark.engines("cuda")


class Step:
    """Forward and backward of an op, with nothing left to be made or copied but what the op itself makes."""

    def __init__(self, contract: OpContract, inputs: Inputs) -> None:
        self.contract, self.inputs = contract, inputs
        inputs, leaves = contract.with_grad(inputs)
        out = [o for o in contract.run(inputs) if o.requires_grad] if leaves else []
        self.grads = [torch.linspace(0.5, 1.5, o.numel(), dtype=o.dtype).reshape(o.shape) for o in out]

    def __call__(self) -> tuple[Tensor, ...]:
        inputs, leaves = self.contract.with_grad(self.inputs)
        out = self.contract.run(inputs)
        if not leaves:
            return out
        differentiable = [o for o in out if o.requires_grad]
        return (*(o.detach() for o in out), *torch.autograd.grad(differentiable, leaves, self.grads))

    def change(self) -> None:
        """Other contents in the same tensors; a plan stays what it is."""
        for value in self.inputs.values():
            if isinstance(value, Tensor) and value.dim():
                value.copy_(value.roll(1, 0))


class CudaContract:
    """Inherited by OpContract."""

    def step(self: OpContract, size: str = "large") -> Step:
        return Step(self, self.inputs(self.grad_dtype() if self.differentiable else self.main_dtype(), size))

    @on_a_gpu
    def test_the_current_stream_is_used(self: OpContract) -> None:
        """On a side stream, where the inputs arrive late."""
        step = self.step()
        want = step()
        kept = {name: value.clone() for name, value in step.inputs.items() if isinstance(value, Tensor)}
        for name in kept:
            step.inputs[name].zero_()
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            for name, value in kept.items():
                step.inputs[name].copy_(value)
            got = step()
        stream.synchronize()
        assert_equal(got, want)

    @on_a_gpu
    def test_no_hidden_synchronisation(self: OpContract) -> None:
        step = self.step()
        with no_synchronisation():
            step()

    @on_a_gpu
    def test_graph(self: OpContract) -> None:
        """A captured graph that is replayed with other contents gives what they give."""
        step = self.step()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        for _ in range(3):
            step.change()
            graph.replay()
            assert_equal(captured, step())

    @on_a_gpu
    def test_several_devices(self: OpContract) -> None:
        """An op runs where its tensors are, whatever device is current, and leaves that as it was."""
        if torch.cuda.device_count() < 2:
            pytest.skip("needs two GPUs")
        inputs = self.inputs(self.main_dtype(), "large")
        want = self.run(inputs)
        with torch.cuda.device(0):
            got = self.run({name: to_device(value, "cuda:1") for name, value in inputs.items()})
            assert torch.cuda.current_device() == 0
        assert {o.device for o in got} == {torch.device("cuda:1")}
        assert_equal(tuple(o.to(w.device) for o, w in zip(got, want, strict=True)), want)


def to_device(value: object, device: str) -> object:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        moved = [to_device(v, device) for v in value]
        return type(value)(*moved) if hasattr(value, "_fields") else tuple(moved)
    return value
