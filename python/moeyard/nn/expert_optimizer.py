"""ExpertOptimizer: any torch optimizer, made to leave the experts alone that had nothing to learn from.

Stacked weights [E,...] always have a gradient, zero where an expert got no token. A zero gradient is not "no gradient":
Adam goes on along its momentum, decay pulls the weights down, and the moments fade. Here every expert's slice is a
parameter of its own to the optimizer, and a slice without a gradient is skipped: weights, moments and step count keep
their bits, and the bias correction counts the steps that this expert took.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from moeyard.nn.experts import Experts


def expert_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The stacked weights of every `Experts` in a model."""
    return [p for module in model.modules() if isinstance(module, Experts) for p in module.parameters(recurse=False)]


class ExpertOptimizer(torch.optim.Optimizer):
    """Wraps an optimizer that has not stepped yet.

        optimizer = ExpertOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-3), expert_parameters(model))

    An expert is idle when its slice of the gradient is zero throughout. Looking at the gradient itself, instead of
    counting tokens, holds for accumulated gradients, for any number of ranks after their reduction, for sharded weights
    and under recomputation, without a word between ranks. (An expert whose tokens all had a zero gradient is idle too.)

    Args:
        optimizer: any optimizer over the model's parameters that steps without a closure of its own. Use the wrapper
            from here on: schedulers, clipping and `GradScaler` see the parameters and options that they expect.
        stacked: the parameters whose first dimension counts experts. Under FSDP2, which shards that dimension, the
            wrapper is made after `fully_shard`, and each rank steps the experts that it holds.

    Raises:
        ValueError: a stacked parameter that the optimizer does not have; an optimizer that has already stepped.

    The state dict is that of the inner optimizer, with E entries for a stacked parameter: `state_dict` and
    `load_state_dict` go together, the helpers of torch.distributed.checkpoint do not know these entries.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, stacked: Iterable[nn.Parameter]) -> None:
        if optimizer.state:
            raise ValueError("optimizer: expected one that has not stepped yet, got one with state")
        self.inner = optimizer
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self._rows: list[tuple[nn.Parameter, list[Tensor]]] = []
        for i, parameter in enumerate(stacked):
            if id(parameter) not in known:
                shape = list(parameter.shape)
                raise ValueError(f"stacked: expected parameters of the optimizer, got another at {i} of shape {shape}")
            self._rows.append((parameter, [row.requires_grad_() for row in _local(parameter).detach().unbind()]))
        super().__init__([dict(group) for group in optimizer.param_groups], dict(optimizer.defaults))
        self._groups: list[dict[str, Any]] = []  # for every group of the inner optimizer, that of mine
        self._split_groups()
        self.state = optimizer.state

    def _split_groups(self) -> None:
        """Gives the inner optimizer slices for stacked parameters, in groups of their own: the others may be DTensors,
        which fused and foreach steps do not take beside plain tensors."""
        rows_of = {id(parameter): rows for parameter, rows in self._rows}
        inner = self.inner.param_groups[:]
        self.inner.param_groups.clear()
        for mine, group in zip(self.param_groups, inner, strict=True):
            others = [p for p in group["params"] if id(p) not in rows_of]
            rows = [row for p in group["params"] for row in rows_of.get(id(p), [])]
            for params in filter(None, (others, rows)):
                self.inner.param_groups.append({**group, "params": params})
                self._groups.append(mine)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__.copy()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters that are stepped as they are."""
        super().add_param_group(param_group)
        if hasattr(self, "_groups"):  # else this is the base class at work in the constructor
            mine = self.param_groups[-1]
            self.inner.add_param_group(dict(mine))
            self._groups.append(mine)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of the inner optimizer, on the experts that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._pass_options_on()
        self._hand_gradients_over()
        self.inner.step()
        for _, rows in self._rows:
            for row in rows:
                row.grad = None
        return loss

    def _pass_options_on(self) -> None:
        for mine, inner in zip(self._groups, self.inner.param_groups, strict=True):
            inner.update({name: value for name, value in mine.items() if name != "params"})

    def _follow_memory(self) -> None:
        """Whoever moved a parameter's memory (`module.to`, `p.data = ...`) moved its slices too."""
        for parameter, rows in self._rows:
            for row, value in zip(rows, _local(parameter).detach(), strict=True):
                row.data = value

    def _hand_gradients_over(self) -> None:
        self._follow_memory()
        graded = [(rows, _local(parameter.grad)) for parameter, rows in self._rows if parameter.grad is not None]
        if not graded:
            return
        # In one piece, so that the device is waited for once.
        device = graded[0][1].device
        busy = iter(torch.cat([_rows_with_values(grad).to(device) for _, grad in graded]).tolist())
        for rows, grads in graded:
            for row, grad in zip(rows, grads, strict=True):
                row.grad = grad if next(busy) else None

    def state_dict(self) -> dict[str, Any]:
        self._pass_options_on()
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._follow_memory()
        self.inner.load_state_dict(state_dict)
        self.state = self.inner.state
        for mine, inner in zip(self._groups, self.inner.param_groups, strict=True):
            mine.update({name: value for name, value in inner.items() if name != "params"})


def _local(tensor: Any) -> Tensor:
    """This rank's part of a sharded tensor (DTensor), or the tensor."""
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local


def _rows_with_values(grad: Tensor) -> Tensor:
    """[E] bool: which slices hold anything but zeros, NaN included; one pass."""
    largest: Tensor = torch.linalg.vector_norm(grad.flatten(1), ord=float("inf"), dim=1)
    return largest != 0
