"""The loop of all kinds of training: accumulate gradients, add them over processes, clip, step, log, save."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from orthrus.training.distributed import Processes
from orthrus.training.optim import build_optimizers, learning_rate, set_learning_rate
from orthrus.training.progress import Budget, Display, State, peak_memory_gib
from orthrus.training.settings import TrainingSettings

# Settings that may change when a run resumes, because they don't change what a step does.
_FREE = {
    *("steps", "epochs", "seconds", "micro_batch", "recompute", "compile"),
    *("log_every", "eval_every", "save_every"),
}


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 on an accelerator. float32 on a CPU, where tests compare bits."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type != "cpu")


def _budget(settings: TrainingSettings, steps_per_epoch: float) -> Budget:
    steps = settings.steps
    if settings.epochs is not None:
        steps = max(1, round(settings.epochs * steps_per_epoch))
    return Budget(steps, settings.seconds)


def _forget_gradients(optimizers: Sequence[Optimizer]) -> None:
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)


def _step(
    named: dict[str, nn.Parameter],
    optimizers: Sequence[Optimizer],
    settings: TrainingSettings,
    processes: Processes,
) -> Tensor:
    """Add the gradients of all processes and step. Returns the norm of the gradient before it was clipped."""
    processes.add([p.grad for p in named.values() if p.grad is not None])
    norm = nn.utils.clip_grad_norm_(named.values(), settings.clip)
    for optimizer in optimizers:
        optimizer.step()
    _forget_gradients(optimizers)
    return norm


class _Log:
    """Writes the metrics of the steps since the last line, and their speed."""

    def __init__(self, display: Display, budget: Budget, tokens_per_step: int) -> None:
        self._display = display
        self._budget = budget
        self._tokens_per_step = tokens_per_step
        self._time = time.monotonic()
        # How many steps had been done when the last line was written.
        self.logged = budget.done

    def write(self, values: dict[str, Any], norm: Tensor, optimizer: Optimizer) -> None:
        """values: the metrics. norm: gradient norm of the newest step. optimizer: the one whose learning rate is shown."""
        now, done = time.monotonic(), self._budget.done
        tokens = (done - self.logged) * self._tokens_per_step
        self._display.write(
            tokens=done * self._tokens_per_step,
            **values,
            gradient_norm=norm.item(),
            lr=optimizer.param_groups[0]["lr"],
            tokens_per_second=round(tokens / max(now - self._time, 1e-9)),
            peak_memory_gib=round(peak_memory_gib(norm.device), 2),
        )
        self.logged, self._time = done, now


def optimise(
    named: dict[str, nn.Parameter],
    settings: TrainingSettings,
    processes: Processes,
    file: Path,
    *,
    origin: dict[str, Any],
    steps_per_epoch: float,
    backward: Callable[[int, range], None],
    report: Callable[[], dict[str, Any]],
    evaluate: Callable[[], dict[str, Any]] | None = None,
    eval_every: int = 0,
) -> None:
    """Train the parameters `named` in place. If there is a state in `file`, training resumes from it.

    backward(step, rows): adds the gradient of these rows' part of the step's loss. report(): metrics since the last call;
    all processes call it. evaluate(): metrics, every `eval_every` steps and at the end. Metrics go to a .jsonl beside
    `file`. origin: what the state depends on besides the settings. Raises ConfigError for the state of another run.
    """
    device = next(iter(named.values())).device
    optimizers = build_optimizers(named, settings)
    budget = _budget(settings, steps_per_epoch)
    fixed = settings.model_dump(mode="json", exclude=_FREE)
    state = State(file, origin | fixed, named, optimizers, budget)
    state.load()
    parts = processes.share(settings.rows, settings.micro_batch)

    def progress() -> float:  # Clocks differ: one process decides for all.
        return budget.progress if budget.steps is not None else processes.first(budget.progress, device)

    if progress() >= 1.0:
        return
    if settings.compile:  # Compilation is not training time.
        backward(budget.done, parts[0])
        _forget_gradients(optimizers)
        report()
        budget.start()
    display = Display(file.with_suffix(".jsonl"), budget, writes=processes.writes)
    log = _Log(display, budget, settings.rows * settings.row_length)
    while (done := progress()) < 1.0:
        set_learning_rate(optimizers, learning_rate(done, warmup=settings.warmup, final=settings.final_lr))
        for rows in parts:
            backward(budget.done, rows)
        norm = _step(named, optimizers, settings, processes)
        budget.done += 1
        display.advance()
        if budget.done % settings.log_every == 0:
            log.write(report(), norm, optimizers[-1])
        if evaluate is not None and budget.done % eval_every == 0:
            display.write(**evaluate())
        if budget.done % settings.save_every == 0 and processes.writes:
            state.save()
    if log.logged < budget.done:
        log.write(report(), norm, optimizers[-1])
    if evaluate is not None and budget.done % eval_every:
        display.write(**evaluate())
    if processes.writes:
        state.save()
    display.close()
