"""What happens around a step: the record, evaluation, stopping, the checkpoint, in that order and in one place.

Lightning runs the loop, precision, accumulation and the processes; its own callbacks for these matters have no fixed
order among each other, and an exact resume depends on the order.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from moeyard.models.step import StepOutput
from moeyard.train.checkpoint import Checkpoints
from moeyard.train.evaluation import Judge, evaluate
from moeyard.train.loading import RepeatedEpochs
from moeyard.train.metrics import CollapseAlarm, MetricsFile, Record, Sink
from moeyard.train.module import SystemModule
from moeyard.train.system import Data


class Stop:
    """Why training is to end before its last step.

    The first Ctrl-C or SIGTERM and the time limit end it after the running step, a second Ctrl-C at once. Lightning's
    own way ends the process from inside `fit`; this one comes back, so that the results are still written.

    Args:
        seconds: time limit from `__enter__` on, None for none.
    """

    def __init__(self, seconds: float | None = None) -> None:
        self.seconds, self.reason = seconds, ""
        self._signalled: float | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        self._started = time.monotonic()
        self.catch()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def catch(self) -> None:
        """Puts the handlers in place; again when training starts, since Lightning brings one for SIGTERM."""
        # Signals belong to the main thread; elsewhere there is nothing to catch.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                previous = signal.signal(number, self._handle)
                self._previous.setdefault(number, previous)

    def _handle(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if self._signalled is None:
            self._signalled = now
        elif number == signal.SIGINT and now - self._signalled > 1.0:
            # Launchers pass on the Ctrl-C that the terminal has already sent to every process: within a second it is
            # the same one.
            raise KeyboardInterrupt

    def wanted(self) -> str:
        """ "interrupted", "time limit" or ""."""
        if self._signalled is not None:
            return "interrupted"
        over = self.seconds is not None and time.monotonic() - self._started >= self.seconds
        return "time limit" if over else ""

    @property
    def interrupted(self) -> bool:
        return self._signalled is not None


class Recorder:
    """Makes one record of the batches of a step, summed over all processes."""

    def __init__(self) -> None:
        self._outputs: list[StepOutput] = []
        self._ended = time.perf_counter()
        self._step_seconds = self._data_seconds = 0.0

    def start_clock(self) -> None:
        self._ended = time.perf_counter()

    def begin(self) -> None:
        self._started = time.perf_counter()
        self._data_seconds += self._started - self._ended

    def add(self, output: StepOutput) -> None:
        self._ended = time.perf_counter()
        self._step_seconds += self._ended - self._started
        self._outputs.append(output)

    def take(self, total: Callable[[Tensor], Tensor], processes: int) -> Record:
        """loss and metrics as means over the batches, sizes and usage as sums; then begins anew."""
        outputs, self._outputs = self._outputs, []
        first, count = outputs[0], len(outputs) * processes
        means = {"loss": [o.loss for o in outputs], **{n: [o.metrics[n] for o in outputs] for n in first.metrics}}
        fills = [o.batch_fill for o in outputs if o.batch_fill is not None]
        columns: list[float | Tensor] = [torch.stack(values).double().sum() for values in means.values()]
        columns += [sum(o.sizes[name] for o in outputs) for name in first.sizes]
        columns.append(float(sum(fills)))
        sums = total(_together(columns, first.loss.device)).tolist()
        record: Record = {name: value / count for name, value in zip(means, sums, strict=False)}
        sizes = {name: int(value) for name, value in zip(first.sizes, sums[len(means) :], strict=False)}
        seconds = max(self._step_seconds + self._data_seconds, 1e-9)
        record |= {"step_seconds": self._step_seconds, "data_seconds": self._data_seconds, **sizes}
        record |= {f"{name}_per_second": size / seconds for name, size in sizes.items()}
        if fills:
            record["batch_fill"] = sums[-1] / count
        if first.usage is not None:
            usage = torch.stack([o.usage for o in outputs if o.usage is not None]).sum(0)
            record["experts"] = total(usage).tolist()
        self._step_seconds = self._data_seconds = 0.0
        return record


def _together(values: Sequence[float | Tensor], device: torch.device) -> Tensor:
    """Numbers and scalar tensors as one float64 tensor, which only its reader has to wait for."""
    numbers = iter(torch.tensor([v for v in values if not isinstance(v, Tensor)], dtype=torch.float64).to(device))
    return torch.stack([v.to(device, torch.float64) if isinstance(v, Tensor) else next(numbers) for v in values])


class StepEnd(Callback):
    """Follows every optimizer step: record, moving average, evaluation, stop, checkpoint.

    Args:
        data: for the evaluations.
        batches: tells epochs and the position that a checkpoint keeps.
        judge: what evaluations lead to; also holds the best one.
        sinks: where records go; of the first process only.
        stop: Ctrl-C and the time limit.
        checkpoints: None keeps none.
    """

    def __init__(
        self,
        data: Data,
        batches: RepeatedEpochs,
        judge: Judge,
        *,
        sinks: Sequence[Sink] = (),
        stop: Stop,
        checkpoints: Checkpoints | None = None,
    ) -> None:
        self.data, self.batches, self.judge, self.sinks, self.stop = data, batches, judge, sinks, stop
        self.checkpoints, self.recorder, self._step = checkpoints, Recorder(), 0

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.stop.catch()
        self._step = trainer.global_step
        self.recorder.start_clock()

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.recorder.begin()

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(module, SystemModule)
        self.recorder.add(outputs["output"])
        if trainer.global_step > self._step:
            self._step = trainer.global_step
            self._after_step(trainer, module)
            self.recorder.start_clock()

    def _after_step(self, trainer: Trainer, module: SystemModule) -> None:
        config, step = module.config, self._step
        total = _total(trainer)
        place = {"step": step, "epoch": self.batches.position(step * config.accumulate - 1)[0]}
        record = self.recorder.take(total, trainer.world_size)
        self._emit({**place, **record, "learning_rate": module.learning_rate, "grad_norm": float(module.grad_norm)})
        module.end_step()
        last = step == config.max_steps
        if self.data.evaluation_batches and (last or step % config.eval_every == 0):
            last |= self._evaluate(trainer, module, place)
        # All processes end after the same step, whoever was told first.
        reason = self.stop.wanted()
        if trainer.strategy.reduce_boolean_decision(bool(reason), all=False) and not last:
            self.stop.reason = reason or "interrupted"
        trainer.should_stop = trainer.should_stop or last or bool(self.stop.reason)
        if self.checkpoints is not None and (trainer.should_stop or step % config.checkpoint_every == 0):
            for sink in self.sinks:
                if isinstance(sink, MetricsFile):
                    sink.sync()
            trainer.save_checkpoint(self.checkpoints.path(step))

    def _evaluate(self, trainer: Trainer, module: SystemModule, place: Record) -> bool:
        """Scores the evaluation batches; True when training is to end."""
        values = evaluate(
            module.evaluated_model(),
            self.data,
            module.config,
            device=module.device,
            rank=trainer.global_rank,
            processes=trainer.world_size,
            total=_total(trainer),
        )
        self._emit({**place, **values})
        best, reduce, stop = self.judge.observe(values, place["step"])
        if best and self.checkpoints is not None and trainer.is_global_zero:
            weights = {f"model.{name}": tensor for name, tensor in module.evaluated_model().state_dict().items()}
            self.checkpoints.save({"state_dict": weights}, place["step"], kind="best")
        if reduce:
            module.reduce_learning_rate()
        return stop

    def _emit(self, record: Record) -> None:
        for sink in self.sinks:
            sink.write(record)

    def on_save_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        batches = trainer.global_step * module.config.accumulate
        checkpoint["position"] = list(self.batches.position(batches))
        checkpoint["judge"] = self.judge.state_dict()
        for alarm in self._alarms():
            checkpoint["alarm"] = alarm.state_dict()

    def on_load_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.judge.load_state_dict(checkpoint["judge"])
        for alarm in self._alarms():
            alarm.load_state_dict(checkpoint["alarm"])

    def _alarms(self) -> list[CollapseAlarm]:
        return [sink for sink in self.sinks if isinstance(sink, CollapseAlarm)]


def _total(trainer: Trainer) -> Callable[[Tensor], Tensor]:
    """Sums a tensor over all processes."""
    if trainer.world_size == 1:
        return lambda tensor: tensor
    return lambda tensor: trainer.strategy.reduce(tensor, reduce_op="sum")
