"""What every op must survive. A test file subclasses `OpContract` once per public op; pytest then lists each row.

A subclass says how to make inputs and which of them carry a gradient; everything else is inherited. Inputs are plain
keyword arguments of the public function, so that a case reads like a call.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset

from emulation import set_options
from engines import SCHEDULES, engine
from ops.compare import assert_equal
from ops.cuda_contract import CudaContract

Inputs = dict[str, Any]


class OpContract(CudaContract):
    """Rows that hold for all ops. Override what is marked; skip nothing."""

    #: the public function; wrap in staticmethod
    function: Callable[..., Any]
    #: the slow, obvious implementation with the same signature and return fields
    reference: Callable[..., Any]
    #: dtypes of the main input that the forward takes, and those of them that carry a gradient
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    #: names of the inputs that get a gradient; () for ops without one
    differentiable: tuple[str, ...] = ()
    #: gradients of gradients are right, too
    double_backward: bool = False
    #: comparison with the reference, per dtype: torch.testing's defaults where a dtype is missing
    tolerance: ClassVar[dict[torch.dtype, tuple[float, float]]] = {}

    def inputs(self, dtype: torch.dtype, size: str = "small", seed: int = 0) -> Inputs:
        """Keyword arguments; size "small" (gradcheck), "large" (past the thread threshold)."""
        raise NotImplementedError

    def empty_inputs(self) -> list[Inputs]:
        """Calls on nothing: zero rows, zero columns, whatever the op takes."""
        raise NotImplementedError

    # ---- helpers -------------------------------------------------------------------------------------------------

    @classmethod
    def run(cls, inputs: Inputs) -> tuple[Tensor, ...]:
        return as_tuple(cls.function(**inputs))

    @classmethod
    def expected(cls, inputs: Inputs) -> tuple[Tensor, ...]:
        return as_tuple(cls.reference(**inputs))

    def main_dtype(self) -> torch.dtype:
        return self.dtypes[0]

    def grad_dtype(self) -> torch.dtype:
        return next(d for d in self.dtypes if d.is_floating_point)

    def with_grad(self, inputs: Inputs) -> tuple[Inputs, list[Tensor]]:
        inputs = dict(inputs)
        leaves = []
        for name in self.differentiable:
            inputs[name] = inputs[name].detach().clone().requires_grad_()
            leaves.append(inputs[name])
        return inputs, leaves

    def run_with_gradients(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """Outputs, then the gradient of a fixed weighted sum of the differentiable outputs."""
        if not self.differentiable:
            return self.run(inputs)
        inputs, leaves = self.with_grad(inputs)
        out = self.run(inputs)
        return (*(o.detach() for o in out), *torch.autograd.grad(weighted_sum(out), leaves))

    def assert_close(self, got: tuple[Tensor, ...], want: tuple[Tensor, ...], dtype: torch.dtype) -> None:
        assert len(got) == len(want)
        for g, w in zip(got, want, strict=True):
            if g.dtype.is_floating_point and dtype in self.tolerance:
                rtol, atol = self.tolerance[dtype]
                torch.testing.assert_close(g, w, rtol=rtol, atol=atol, equal_nan=True)
            else:
                torch.testing.assert_close(g, w, equal_nan=True)

    # ---- the rows ------------------------------------------------------------------------------------------------

    def test_dtypes(self, dtype_case: torch.dtype) -> None:
        inputs = self.inputs(dtype_case)
        self.assert_close(self.run(inputs), self.expected(inputs), dtype_case)

    def test_gradient(self) -> None:
        """float64 gradcheck (and gradgradcheck); an op without a gradient must say so by its outputs."""
        if not self.differentiable:
            assert not any(o.requires_grad for o in self.run(self.inputs(self.main_dtype())))
            return
        inputs, leaves = self.with_grad(self.inputs(torch.float64))
        function = self.of_leaves(inputs)
        # Emulated kernels are slow: products with random vectors, instead of whole Jacobians.
        assert torch.autograd.gradcheck(function, leaves, fast_mode=engine.is_emulated)
        if self.double_backward:
            assert torch.autograd.gradgradcheck(function, leaves, fast_mode=engine.is_emulated)

    def test_gradient_dtypes(self, dtype_case: torch.dtype) -> None:
        """In every float dtype the gradient is the reference's; no other dtype may claim to have one."""
        inputs = self.inputs(dtype_case)
        if not self.differentiable or not dtype_case.is_floating_point:
            assert not any(o.requires_grad for o in self.run(inputs))
            return
        want = type(self)._with_function(self.reference).run_with_gradients(inputs)
        self.assert_close(self.run_with_gradients(inputs), want, dtype_case)

    def test_second_derivative(self) -> None:
        """Either right (gradgradcheck, above) or refused; never silently wrong or silently zero."""
        if not self.differentiable or self.double_backward:
            return
        inputs, leaves = self.with_grad(self.inputs(self.grad_dtype()))
        first = torch.autograd.grad(weighted_sum(self.run(inputs)), leaves, create_graph=True)
        assert all(g.requires_grad for g in first)
        with pytest.raises(NotImplementedError, match="second derivatives are not supported"):
            torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    def of_leaves(self, inputs: Inputs) -> Callable[..., tuple[Tensor, ...]]:
        def function(*leaves: Tensor) -> tuple[Tensor, ...]:
            out = self.run({**inputs, **dict(zip(self.differentiable, leaves, strict=True))})
            return tuple(o for o in out if o.requires_grad)

        return function

    def test_fake(self, dtype_case: torch.dtype) -> None:
        """Fake outputs have the dtype, device, rank and strides of the real ones, and every size that is known."""
        for op, args in self.recorded_calls(dtype_case):
            real = as_tuple(op(*args))
            mode = torch._subclasses.FakeTensorMode(shape_env=torch.fx.experimental.symbolic_shapes.ShapeEnv())
            with mode:
                fake_args = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args]
                fake = as_tuple(op(*fake_args))
            assert len(real) == len(fake)
            for r, f in zip(real, fake, strict=True):
                assert (r.dtype, r.device, r.dim()) == (f.dtype, f.device, f.dim())
                for have, promised in zip((*r.shape, *r.stride()), (*f.shape, *f.stride()), strict=True):
                    known = promised if isinstance(promised, int) else hint(promised)
                    assert known is None or have == known

    def test_opcheck(self) -> None:
        for op, args in self.recorded_calls(self.grad_dtype() if self.differentiable else self.main_dtype()):
            torch.library.opcheck(op, args)

    def test_one_device(self) -> None:
        """Called through torch.ops, too, where nobody else has looked: a tensor elsewhere is an error that names it."""
        for op, args in self.recorded_calls(self.grad_dtype() if self.differentiable else self.main_dtype()):
            tensors = [i for i, a in enumerate(args) if isinstance(a, Tensor)]
            for i in tensors[1:]:
                elsewhere = (*args[:i], args[i].to("meta"), *args[i + 1 :])
                name = op._schema.arguments[i].name
                with pytest.raises(ValueError, match=f"^{name}: expected device {engine.device}.* .*, got meta"):
                    op(*elsewhere)

    def recorded_calls(self, dtype: torch.dtype) -> list[tuple[Any, tuple[Any, ...]]]:
        """Every moeyard op that one forward (and backward, where the dtype has one) calls, with its arguments."""
        inputs = self.inputs(dtype)
        with record() as calls:
            self.run_with_gradients(inputs) if dtype.is_floating_point else self.run(inputs)
        assert calls
        return calls

    # Neither a compiled graph nor an exported one can tell which kernels run below it.
    @pytest.mark.engines("cpu", "cuda")
    @pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
    @pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
    def test_compile(self, backend: str, dynamic: bool) -> None:
        """One graph, static and dynamic shapes, values and gradients equal to eager."""
        dtype = self.grad_dtype() if self.differentiable else self.main_dtype()
        with compiling():
            compiled = torch.compile(self.function, fullgraph=True, backend=backend, dynamic=dynamic)
            for seed in (0, 1):
                inputs = self.inputs(dtype, seed=seed)
                eager = self.run_with_gradients(inputs)
                with engine.without_mode():
                    got = type(self)._with_function(compiled).run_with_gradients(inputs)
                self.assert_close(got, eager, dtype)

    @pytest.mark.engines("cpu", "cuda")
    def test_export(self) -> None:
        """torch.export gives a program with the same results, tensors as inputs, options baked in."""
        inputs = self.inputs(self.main_dtype())
        names = [k for k, v in inputs.items() if isinstance(v, Tensor)]
        options = {k: v for k, v in inputs.items() if k not in names}
        module = _Module(lambda tensors: self.run({**options, **dict(zip(names, tensors, strict=True))}))
        tensors = [inputs[n] for n in names]
        with engine.without_mode():
            program = torch.export.export(module, (tensors,), strict=False)
            assert_equal(as_tuple(program.module()(tensors)), self.run(inputs))

    def test_autocast(self) -> None:
        """The policy of every op: dtypes are the caller's choice, autocast changes nothing."""
        inputs = self.inputs(self.grad_dtype() if self.differentiable else self.main_dtype())
        expected = self.run_with_gradients(inputs)
        with torch.autocast(engine.device, dtype=torch.bfloat16):
            assert_equal(self.run_with_gradients(inputs), expected)

    @classmethod
    def _with_function(cls, function: Callable[..., Any]) -> OpContract:
        return type(cls.__name__ + "Compiled", (cls,), {"function": staticmethod(function)})()

    def test_empty(self) -> None:
        for inputs in self.empty_inputs():
            self.assert_close(self.run(inputs), self.expected(inputs), self.main_dtype())
            if self.differentiable:
                leaves_in, leaves = self.with_grad(inputs)
                total = weighted_sum(self.run(leaves_in))
                for leaf, grad in zip(leaves, torch.autograd.grad(total, leaves), strict=True):
                    assert grad.shape == leaf.shape

    def test_strided(self) -> None:
        """Non-contiguous inputs, and a stride-0 incoming gradient, give what their contiguous copies give."""
        dtype = self.grad_dtype() if self.differentiable else self.main_dtype()
        inputs = self.inputs(dtype)
        strided = {k: scattered_fields(v) for k, v in inputs.items()}
        assert_equal(self.run(strided), self.run(inputs))
        if not self.differentiable:
            return
        results = []
        for case in (inputs, strided):
            # Not with_grad: a clone of a non-contiguous tensor is contiguous.
            leaves = [case[name].detach().requires_grad_() for name in self.differentiable]
            case = {**case, **dict(zip(self.differentiable, leaves, strict=True))}
            out = [o for o in self.run(case) if o.requires_grad]
            ones = [torch.ones((), dtype=o.dtype).expand_as(o) for o in out]
            results.append(torch.autograd.grad(out, leaves, ones))
        assert_equal(*results)

    def test_inputs_untouched(self) -> None:
        """Neither forward nor backward writes into what it is given: inputs (fields of plans too), incoming gradients,
        and what the forward returned."""
        inputs = self.inputs(self.grad_dtype() if self.differentiable else self.main_dtype())
        inputs, leaves = self.with_grad(inputs)
        watched = [t for v in inputs.values() for t in (v if isinstance(v, tuple) else (v,)) if isinstance(t, Tensor)]
        before = [t.detach().clone() for t in watched]
        out = self.run(inputs)
        if leaves:
            differentiable = [o for o in out if o.requires_grad]
            grads = [torch.full_like(o, 0.5) for o in differentiable]
            watched += [*out, *grads]
            before += [t.detach().clone() for t in (*out, *grads)]
            torch.autograd.grad(differentiable, leaves, grads)
        assert_equal(tuple(watched), tuple(before))

    @pytest.mark.engines("emulated")
    def test_schedules(self) -> None:
        """The same bits in whatever order threads, warps and blocks run; and no thread waits in vain."""
        for size, seeds in (("small", range(1, SCHEDULES + 2)), ("large", [SCHEDULES])):
            inputs = self.inputs(self.grad_dtype() if self.differentiable else self.main_dtype(), size)
            set_options(seed=0)
            first = self.run_with_gradients(inputs)
            for seed in seeds:
                set_options(seed, poison=0x3C if seed % 4 < 2 else 0xFF)
                assert_equal(self.run_with_gradients(inputs), first)

    @pytest.mark.engines("cpu", "cuda")
    def test_determinism(self) -> None:
        """100 runs, bit for bit, 20 of them on a size that is really split over threads."""
        for size, runs in (("small", 80), ("large", 20)):
            inputs = self.inputs(self.grad_dtype() if self.differentiable else self.main_dtype(), size)
            first = self.run_with_gradients(inputs)
            for _ in range(runs - 1):
                assert_equal(self.run_with_gradients(inputs), first)

    @pytest.mark.engines("cpu")
    def test_threads(self) -> None:
        """1, 2 and 4 threads, bit for bit, on a size that is really split."""
        inputs = self.inputs(self.grad_dtype() if self.differentiable else self.main_dtype(), size="large")
        before = torch.get_num_threads()
        try:
            results = []
            for threads in (1, 2, 4):
                torch.set_num_threads(threads)
                results.append(self.run_with_gradients(inputs))
        finally:
            torch.set_num_threads(before)
        assert_equal(results[1], results[0])
        assert_equal(results[2], results[0])

    @pytest.mark.engines("cpu")
    def test_fork(self) -> None:
        """Forked DataLoader workers, after the parent has used its threads."""
        dtype = self.grad_dtype() if self.differentiable else self.main_dtype()
        expected = [self.run_with_gradients(self.inputs(dtype, "large", seed)) for seed in range(2)]
        loader = DataLoader(_Calls(self, dtype), batch_size=None, num_workers=2, multiprocessing_context="fork")
        for got, want in zip(loader, expected, strict=True):
            assert_equal(tuple(got), want)

    def test_vmap_is_refused(self) -> None:
        """A clear error instead of torch's loop or a crash."""
        inputs = self.inputs(self.main_dtype())
        names = [k for k, v in inputs.items() if isinstance(v, Tensor)][:1]
        stacked = [torch.stack([inputs[n], inputs[n]]) for n in names]

        def one(*args: Tensor) -> Any:
            return self.run({**inputs, **dict(zip(names, args, strict=True))})[0]

        with pytest.raises(NotImplementedError, match="vmap"):
            torch.vmap(one)(*stacked)


class _Module(torch.nn.Module):
    def __init__(self, function: Callable[[list[Tensor]], tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.function = function

    def forward(self, tensors: list[Tensor]) -> tuple[Tensor, ...]:
        return self.function(tensors)


class _Calls(Dataset):
    def __init__(self, contract: OpContract, dtype: torch.dtype) -> None:
        self.contract, self.dtype = contract, dtype

    def __len__(self) -> int:
        return 2

    def __getitem__(self, seed: int) -> tuple[Tensor, ...]:
        # DataLoader sets one thread, and torch's own OpenMP would hang with more after a fork; ours must not.
        torch.get_num_threads = lambda: 2
        return tuple(
            t.detach() for t in self.contract.run_with_gradients(self.contract.inputs(self.dtype, "large", seed))
        )


class record(TorchDispatchMode):
    """Collects calls of moeyard ops below autograd, each (op, detached arguments) once per op."""

    def __enter__(self) -> list[tuple[Any, tuple[Any, ...]]]:  # type: ignore[override]
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []
        super().__enter__()
        return self.calls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "moeyard" and all(func is not op for op, _ in self.calls):
            self.calls.append((func, tuple(a.detach().clone() if isinstance(a, Tensor) else a for a in args)))
        return func(*args, **(kwargs or {}))


@contextmanager
def compiling() -> Iterator[None]:
    """Outputs may have data-dependent sizes; no caches on disk, which do not know when an op has changed."""
    torch._dynamo.reset()
    with (
        functorch_config.patch(enable_autograd_cache=False),
        inductor_config.patch(fx_graph_cache=False),
        torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True),
    ):
        yield


def hint(size: torch.SymInt) -> int | None:
    """What a symbolic size stands for; None for one that depends on data."""
    return size.node.hint if size.node.has_hint() else None


def as_tuple(out: Any) -> tuple[Tensor, ...]:
    return (out,) if isinstance(out, Tensor) else tuple(out)


def weighted_sum(outputs: tuple[Tensor, ...]) -> Tensor:
    """A scalar that depends on every element of every differentiable output, with fixed, uneven weights."""
    total = None
    for o in outputs:
        if o.requires_grad:
            w = torch.linspace(0.5, 1.5, o.numel(), dtype=torch.float64).to(o.dtype).reshape(o.shape)
            total = (o * w).sum() if total is None else total + (o * w).sum()
    assert total is not None, "no output carries a gradient"
    return total


def scattered(x: Tensor) -> Tensor:
    """Equal values in a non-contiguous layout with poison between them."""
    if x.dim() == 0 or x.numel() == 0:
        return x
    wide = torch.full((*x.shape[:-1], x.shape[-1] * 2), 7, dtype=torch.int64).to(x.dtype)
    wide[..., ::2] = x.detach()
    return wide[..., ::2].requires_grad_(x.requires_grad)


def scattered_fields(x: Any) -> Any:
    """Tensors scattered, also those in a NamedTuple such as a plan; everything else as it is."""
    if isinstance(x, Tensor):
        return scattered(x)
    return type(x)(*map(scattered_fields, x)) if isinstance(x, tuple) else copy.copy(x)


def pytest_generate_dtypes(metafunc: pytest.Metafunc) -> None:
    """Turns a class's `dtypes` into one test id each; called from conftest."""
    if "dtype_case" in metafunc.fixturenames and metafunc.cls is not None:
        metafunc.parametrize("dtype_case", metafunc.cls.dtypes, ids=lambda d: str(d).removeprefix("torch."))
