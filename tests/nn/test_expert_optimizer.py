"""ExpertOptimizer: idle experts keep their bits, busy ones step as stock optimizers do."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from moeyard.nn import ExpertOptimizer, Experts, MoE, expert_parameters

DIM, EXPERTS = 6, 4
MAKERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
    "adamw_foreach": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, foreach=True),
    "adamw_amsgrad": lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
    "sgd_momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.5),
}


def layer() -> MoE:
    torch.manual_seed(0)
    return MoE(DIM, 5, EXPERTS, 1, routing="forced")


def backward(moe: MoE, experts: list[int], seed: int) -> None:
    """One pass in which just these experts get tokens."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.tensor(experts).repeat(3)
    moe(torch.randn(len(ids), DIM, generator=g), forced_experts=ids).output.square().sum().backward()


def slices(optimizer: ExpertOptimizer, parameter: nn.Parameter, e: int) -> list[Tensor]:
    """Expert e's weights and everything that the optimizer keeps for them."""
    (rows,) = [rows for p, rows in optimizer._rows if p is parameter]
    return [parameter.detach()[e], *(v for v in optimizer.state[rows[e]].values() if isinstance(v, Tensor))]


@pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS)
def test_idle_experts_keep_their_bits(maker: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> None:
    moe = layer()
    optimizer = ExpertOptimizer(maker(list(moe.parameters())), expert_parameters(moe))
    backward(moe, [0, 1, 2, 3], 1)
    optimizer.step()
    kept = {(p, e): [t.clone() for t in slices(optimizer, p, e)] for p in moe.parameters() for e in (1, 3)}
    moved = {p: p.detach()[0].clone() for p in moe.parameters()}
    for step in range(5):
        optimizer.zero_grad()
        backward(moe, [0, 2], 2 + step)
        optimizer.step()
    for (p, e), before in kept.items():
        after = slices(optimizer, p, e)
        assert len(after) == len(before) >= 2
        assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert all(not torch.equal(p.detach()[0], before) for p, before in moved.items())


def test_the_stock_optimizer_would_move_them() -> None:
    moe = layer()
    optimizer = MAKERS["adamw"](list(moe.parameters()))
    backward(moe, [0, 1, 2, 3], 1)
    optimizer.step()
    before = moe.experts.up.detach()[1].clone()
    optimizer.zero_grad()
    backward(moe, [0, 2], 2)
    optimizer.step()
    assert not torch.equal(moe.experts.up.detach()[1], before)


@pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS)
def test_busy_experts_step_as_ever(maker: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> None:
    mine, stock = layer(), layer()
    wrapped = ExpertOptimizer(maker(list(mine.parameters())), expert_parameters(mine))
    plain = maker(list(stock.parameters()))
    for step in range(4):
        for moe, optimizer in ((mine, wrapped), (stock, plain)):
            optimizer.zero_grad()
            backward(moe, [0, 1, 2, 3], step)
            optimizer.step()
    for a, b in zip(mine.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_each_expert_has_steps_of_its_own() -> None:
    """An expert that wakes late steps as one that starts: its bias correction counts its own steps."""
    late, fresh = layer(), layer()
    optimizers = [ExpertOptimizer(MAKERS["adamw"](list(m.parameters())), expert_parameters(m)) for m in (late, fresh)]
    for step in range(20):
        optimizers[0].zero_grad()
        backward(late, [0], step)
        optimizers[0].step()
    for moe, optimizer in zip((late, fresh), optimizers, strict=True):
        optimizer.zero_grad()
        backward(moe, [3], 99)
        optimizer.step()
    assert torch.equal(late.experts.up[3], fresh.experts.up[3])


def test_accumulated_gradients_count_as_one_step() -> None:
    moe = layer()
    optimizer = ExpertOptimizer(MAKERS["adamw"](list(moe.parameters())), expert_parameters(moe))
    before = moe.experts.up.detach().clone()
    backward(moe, [0], 1)
    backward(moe, [2], 2)
    backward(moe, [0], 3)
    optimizer.step()
    moved = [not torch.equal(a, b) for a, b in zip(moe.experts.up.detach(), before, strict=True)]
    assert moved == [True, False, True, False]


def test_a_nan_gradient_is_not_idle() -> None:
    moe = layer()
    optimizer = ExpertOptimizer(MAKERS["adamw"](list(moe.parameters())), expert_parameters(moe))
    for p in moe.parameters():
        p.grad = torch.zeros_like(p)
        p.grad[2, 0, 0] = torch.nan
    optimizer.step()
    assert moe.experts.up[2].isnan().any()
    assert not moe.experts.up[[0, 1, 3]].isnan().any()


def test_without_any_gradient_nothing_moves() -> None:
    moe = layer()
    optimizer = ExpertOptimizer(MAKERS["adamw"](list(moe.parameters())), expert_parameters(moe))
    before = copy.deepcopy(moe.state_dict())
    optimizer.step()
    assert all(torch.equal(v, before[n]) for n, v in moe.state_dict().items())
    assert not optimizer.state


def test_schedulers_clipping_and_groups() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(DIM, DIM), nn.LayerNorm(DIM))
    moe = layer()
    groups = [{"params": list(model.parameters()), "lr": 0.2}, {"params": list(moe.parameters()), "weight_decay": 0.0}]
    optimizer = ExpertOptimizer(torch.optim.AdamW(groups, lr=0.1), expert_parameters(moe))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    shown = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert shown == {id(p) for p in (*model.parameters(), *moe.parameters())}
    before = moe.experts.up.detach().clone()
    for step in range(2):
        optimizer.zero_grad()
        model(torch.randn(3, DIM)).sum().backward()
        backward(moe, [1], step)
        nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1e-3)
        assert float(moe.experts.up.grad.norm()) <= 1e-3  # type: ignore[union-attr]
        optimizer.step()
        schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.05, 0.025])
    # Adam's first step is lr whatever the gradient's size: the second ran at half of it.
    assert float((moe.experts.up.detach() - before).abs().max()) == pytest.approx(0.15, rel=0.01)


def test_state_survives_a_checkpoint(tmp_path: object) -> None:
    def run(moe: MoE, optimizer: ExpertOptimizer, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            backward(moe, [step % EXPERTS, 0], step)
            optimizer.step()

    def fresh() -> tuple[MoE, ExpertOptimizer]:
        moe = layer()
        return moe, ExpertOptimizer(MAKERS["adamw"](list(moe.parameters())), expert_parameters(moe))

    whole, optimizer = fresh()
    run(whole, optimizer, range(6))
    first, optimizer = fresh()
    run(first, optimizer, range(3))
    optimizer.param_groups[0]["lr"] = 0.1
    saved = copy.deepcopy((first.state_dict(), optimizer.state_dict()))
    second, optimizer = fresh()
    optimizer.param_groups[0]["lr"] = 7.0
    second.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    assert optimizer.param_groups[0]["lr"] == 0.1
    run(second, optimizer, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True))


def test_parameters_whose_memory_moved() -> None:
    moe = layer()
    optimizer = ExpertOptimizer(MAKERS["adamw"](list(moe.parameters())), expert_parameters(moe))
    for p in moe.parameters():
        p.data = p.data.clone()
    before = moe.experts.up.detach().clone()
    backward(moe, [1], 0)
    optimizer.step()
    assert not torch.equal(moe.experts.up.detach()[1], before[1])


def test_a_closure_runs_before_the_step() -> None:
    moe = layer()
    optimizer = ExpertOptimizer(MAKERS["adamw"](list(moe.parameters())), expert_parameters(moe))
    before = moe.experts.up.detach().clone()

    def closure() -> float:
        assert torch.is_grad_enabled()
        backward(moe, [1], 0)
        return 3.0

    assert optimizer.step(closure) == 3.0
    assert not torch.equal(moe.experts.up.detach()[1], before[1])


def test_which_parameters_are_stacked() -> None:
    model = nn.ModuleList([MoE(DIM, 5, 3, 2, shared_hidden=4), nn.Linear(2, 2), Experts(2, DIM, 4)])
    assert [list(p.shape[:1]) for p in expert_parameters(model)] == [[3], [3], [1], [1], [2], [2]]


def test_groups_that_are_added_later() -> None:
    moe, head = layer(), nn.Linear(DIM, 2)
    optimizer = ExpertOptimizer(MAKERS["adamw"](list(moe.parameters())), expert_parameters(moe))
    optimizer.add_param_group({"params": list(head.parameters()), "lr": 0.5})
    before = head.weight.detach().clone()
    backward(moe, [1], 0)
    head(torch.ones(1, DIM)).sum().backward()
    optimizer.step()
    torch.testing.assert_close(before - head.weight, before * 0.05 + 0.5)
    optimizer.param_groups[1]["lr"] = 0.0
    before = head.weight.detach().clone()
    optimizer.step()
    assert torch.equal(head.weight, before)


def stepped() -> tuple[MoE, ExpertOptimizer]:
    """A layer whose experts all have moments."""
    moe = layer()
    optimizer = ExpertOptimizer(MAKERS["adamw"](list(moe.parameters())), expert_parameters(moe))
    backward(moe, [0, 1, 2, 3], 1)
    optimizer.step()
    return moe, optimizer


def test_a_copy_steps_its_own_model() -> None:
    moe, optimizer = stepped()
    before = copy.deepcopy(moe.state_dict())
    for p in moe.parameters():
        p.grad = None
    other, twin = copy.deepcopy((moe, optimizer))
    backward(other, [1], 2)
    twin.step()
    assert all(torch.equal(v, before[n]) for n, v in moe.state_dict().items())
    assert not torch.equal(other.experts.up[1], moe.experts.up[1])
    assert torch.equal(other.experts.up[0], moe.experts.up[0])


def test_state_is_loaded_for_where_the_model_is_now() -> None:
    moe, optimizer = stepped()
    saved = copy.deepcopy(optimizer.state_dict())
    moe.double()
    optimizer.load_state_dict(saved)
    assert all(v.dtype == torch.float64 for t in slices(optimizer, moe.experts.up, 1)[1:] for v in [t] if v.dim())
    optimizer.step()


def test_bad_arguments() -> None:
    moe, other = layer(), layer()
    with pytest.raises(ValueError, match=r"stacked: expected parameters of the optimizer, got another at 0 of shape"):
        ExpertOptimizer(MAKERS["adamw"](list(moe.parameters())), expert_parameters(other))
    used = MAKERS["adamw"](list(moe.parameters()))
    backward(moe, [0], 0)
    used.step()
    with pytest.raises(ValueError, match="optimizer: expected one that has not stepped yet"):
        ExpertOptimizer(used, expert_parameters(moe))
