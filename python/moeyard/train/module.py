"""The one LightningModule: wraps any system's model, and owns optimizer, schedule, clipping and moving average."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from moeyard.models.step import StepOutput
from moeyard.nn import ExpertOptimizer, Router, expert_parameters
from moeyard.train.config import TrainConfig
from moeyard.train.schedule import Factor

#: What random numbers are drawn for: training and evaluation never share a batch's numbers.
TRAINING, EVALUATION = 0, 1


def batch_generator(
    seed: int, batch: int, purpose: int = TRAINING, device: torch.device | str = "cpu"
) -> torch.Generator:
    """The generator of one batch. torch keeps 32 bits of a CPU seed, so the numbers are mixed into those."""
    return torch.Generator(device).manual_seed(_mixed(seed, batch, purpose))


def _mixed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


class SystemModule(LightningModule):
    """Trains the model of a system.

    Args:
        model: see `moeyard.train.system.Model`.
        config: the trainer's settings.

    `training_step` returns the loss and, for the callbacks, the whole `StepOutput` under "output". `grad_norm` is that
    of the last optimizer step, over all parameters and before clipping; `learning_rate` the one it was taken with.
    """

    def __init__(self, model: nn.Module, config: TrainConfig) -> None:
        super().__init__()
        self.model, self.config = model, config
        self.factor = Factor(config.schedule, learning_rate=config.optimizer.learning_rate, max_steps=config.max_steps)
        self.ema: AveragedModel | None = None
        if config.ema_decay is not None:
            self.ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay))
            # Not trained: DDP would wait for its gradients.
            self.ema.requires_grad_(False)
        self.grad_norm: float | Tensor = float("nan")
        self.learning_rate = float("nan")

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        number = batch_idx * self.trainer.world_size + self.trainer.global_rank
        output = scored(self.model, batch, self.config.seed, number)
        if self.trainer.progress_bar_callback is not None:
            self.log("loss", output.loss.detach(), prog_bar=True, batch_size=1)
        return {"loss": output.loss, "output": detached(output)}

    def evaluated_model(self) -> nn.Module:
        """The model that evaluations use: the moving average where there is one."""
        return self.model if self.ema is None else self.ema.module

    def end_step(self) -> None:
        """What follows an optimizer step: the routers' biases, and the step's weights into the moving average."""
        for module in self.model.modules():
            if isinstance(module, Router):
                module.update_selection_bias()
        if self.ema is not None:
            self.ema.update_parameters(self.model)

    def configure_optimizers(self) -> dict[str, Any]:
        settings = self.config.optimizer
        stock = torch.optim.AdamW(
            parameter_groups(self.model, settings.weight_decay),
            lr=settings.learning_rate,
            betas=settings.betas,
            eps=settings.eps,
        )
        stacked = expert_parameters(self.model)
        optimizer = ExpertOptimizer(stock, stacked) if stacked else stock
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": LambdaLR(optimizer, self.factor), "interval": "step"},
        }

    def configure_gradient_clipping(
        self, optimizer: torch.optim.Optimizer, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """Measures the gradient's norm, and scales it down where the settings say so."""
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.config.gradient_clip is not None:
            nn.utils.clip_grads_with_norm_(parameters, self.config.gradient_clip, norm)
        self.grad_norm, self.learning_rate = norm, float(optimizer.param_groups[0]["lr"])

    def reduce_learning_rate(self) -> None:
        """For the plateau schedule: one reduction, from the next step on."""
        if self.factor.reduce():
            schedule = self.lr_schedulers()
            for group, first in zip(schedule.optimizer.param_groups, schedule.base_lrs, strict=True):
                group["lr"] = first * self.factor(schedule.last_epoch)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices only: pulling norms, biases and embeddings to zero buys nothing."""
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        # A stack of biases, one per expert, is no matrix either.
        plain = parameter.dim() >= 2 and "embedding" not in name and not name.endswith("bias")
        (decayed if plain else kept).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def scored(model: nn.Module, batch: Any, seed: int, number: int, purpose: int = TRAINING) -> StepOutput:
    """What the model says of batch `number`. Its random numbers depend on the seed and the batch alone: not on what ran
    before, so a resumed run and a run on more processes draw the same."""
    step: Any = model.training_step
    if purpose == EVALUATION:
        step = getattr(model, "evaluation_step", step)
    # Whoever draws from the global generator, as dropout does, gets the batch's numbers too.
    _seed_everywhere(_mixed(seed, number, purpose))
    # On the model's device, so that nothing has to be drawn on the host and copied.
    device = next((p.device for p in model.parameters()), "cpu")
    output: StepOutput = step(batch, batch_generator(seed, number, purpose, device))
    return output


def _seed_everywhere(seed: int) -> None:
    # What torch.manual_seed does for the CPU and CUDA, without the 0.1 ms that it takes to look for other devices.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


def random_state_apart() -> AbstractContextManager[Any]:
    """What is seeded and drawn inside leaves no trace outside, on the CPU and on a GPU that is in use."""
    return torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_initialized() else [])


def detached(output: StepOutput) -> StepOutput:
    """The same numbers without the graph."""
    metrics = {name: value.detach() for name, value in output.metrics.items()}
    return output._replace(loss=output.loss.detach(), metrics=metrics)


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """What Lightning puts around a training step, for evaluations outside of it."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()
