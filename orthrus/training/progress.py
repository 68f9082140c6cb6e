"""The progress of a run, its metrics, and its state on disk, from which it resumes."""

import json
import os
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from orthrus.errors import ConfigError


class Budget:
    """How long a run lasts: `steps` optimiser steps, or `seconds` of wall clock if steps is None. `done` counts steps."""

    def __init__(self, steps: int | None, seconds: float | None) -> None:
        self.steps, self.seconds = steps, seconds
        self.done, self.spent = 0, 0.0
        self.start()

    def start(self) -> None:
        """Start the clock. Call it again to leave out what came before, such as compilation."""
        self._started = time.monotonic() - self.spent

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self._started

    @property
    def progress(self) -> float:
        """0 at the start, 1 at the end."""
        if self.steps is not None:
            return self.done / self.steps
        assert self.seconds is not None, "a run needs steps or seconds"
        return self.elapsed / self.seconds


class Display:
    """Shows a stage's metrics: in a JSONL file, and as a progress bar, or as lines if there is no terminal."""

    def __init__(self, file: Path, budget: Budget, *, writes: bool) -> None:
        """Removes the lines of `file` after step `budget.done`. The run that wrote them had stopped before it saved its state."""
        self._file, self._budget, self._writes = file, budget, writes
        if writes:
            file.parent.mkdir(parents=True, exist_ok=True)
            old = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
            kept = [line for line in old if line.endswith("\n") and json.loads(line)["step"] <= budget.done]
            file.write_text("".join(kept), encoding="utf-8")
        self._bar = tqdm(
            desc=file.stem,
            total=budget.steps or budget.seconds,
            initial=self._position,
            # With None, tqdm shows no bar if there is no terminal.
            disable=None if writes else True,
            dynamic_ncols=True,
            bar_format="{desc} {percentage:3.0f}% {bar:20} {elapsed}<{remaining} {postfix}",
        )

    @property
    def _position(self) -> float:
        budget = self._budget
        return budget.done if budget.steps is not None else min(budget.elapsed, budget.seconds or 0.0)

    def advance(self) -> None:
        self._bar.update(self._position - self._bar.n)

    def write(self, **values: Any) -> None:
        """One line of metrics at the current step."""
        if not self._writes:
            return
        values = {"step": self._budget.done, "seconds": round(self._budget.elapsed, 1)} | values
        # Opened and closed for each line, so that an interrupted run loses none.
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
        text = "  ".join(f"{key} {_short(value)}" for key, value in values.items())
        if self._bar.disable:
            progress = self._budget.progress
            left = self._budget.elapsed * (1 - progress) / progress if progress else 0.0
            print(f"{text}  left {max(left, 0.0):.0f} s", flush=True)
        else:
            self._bar.set_postfix_str(text)

    def close(self) -> None:
        self._bar.close()


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        # Values by depth: on a terminal, depths 1, 2, 4, 8, ... are enough.
        depths = [1 << i for i in range(len(value).bit_length())]
        return " ".join(f"{depth}:{_short(value[depth - 1])}" for depth in depths)
    return str(value)


def peak_memory_gib(device: torch.device) -> float:
    """The most memory that this process has held so far: on the accelerator, or on the host if there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


@dataclass(frozen=True)
class State:
    """Everything that a run needs to resume, in one file, which `save` replaces atomically.

    origin: plain values that identify the run.
    """

    file: Path
    origin: dict[str, Any]
    parameters: dict[str, nn.Parameter]
    optimizers: list[torch.optim.Optimizer]
    budget: Budget

    def save(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.file.with_name(self.file.name + ".tmp")
        state = {
            "origin": self.origin,
            "parameters": {name: p.detach() for name, p in self.parameters.items()},
            "optimizers": [o.state_dict() for o in self.optimizers],
            "done": self.budget.done,
            "spent": self.budget.elapsed,
        }
        torch.save(state, temporary)
        os.replace(temporary, self.file)

    def load(self) -> None:
        """Restore what `save` wrote, if there is a file. Raises ConfigError for the state of another run."""
        if not self.file.exists():
            return
        state = torch.load(self.file, map_location="cpu", weights_only=True)
        check_origin(self.file, state.get("origin", {}), self.origin)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state["parameters"][name])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.budget.done, self.budget.spent = state["done"], state["spent"]
        self.budget.start()


def check_origin(file: Path, found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raise ConfigError that names the differences if the origin `found` in `file` is not the `expected` one."""
    different = sorted(key for key in {*found, *expected} if found.get(key) != expected.get(key))
    if different:
        listed = ", ".join(f"{key} {found.get(key)!r} there, {expected.get(key)!r} now" for key in different)
        raise ConfigError(f"{file} was begun with other settings ({listed}): put them back, or delete it")
