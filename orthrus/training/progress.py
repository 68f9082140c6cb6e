"""How far a run is, what it measured, and how it goes on after a stop."""

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn


@dataclass
class Budget:
    """A run's length: optimiser `steps`, or `seconds` of wall clock where steps is None.

    Only a run counted in steps gives the same weights twice; one counted in seconds fills a machine lent for a time.
    """

    steps: int | None = None
    seconds: float | None = None
    done: int = 0
    spent: float = 0.0
    _started: float = field(default_factory=time.monotonic, repr=False)

    def start(self) -> None:
        """Start the clock, after compilation say."""
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

    @property
    def finished(self) -> bool:
        return self.progress >= 1.0


class Metrics:
    """One JSON object a line, and the same on the terminal."""

    def __init__(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self._path = file

    def write(self, **values: Any) -> None:
        # Opened for each line: an interrupted run leaves nothing open and nothing unwritten.
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
        print("  ".join(f"{key} {_short(value)}" for key, value in values.items()), flush=True)


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return "[" + " ".join(_short(v) for v in value) + "]"
    return str(value)


def save_state(
    file: Path, parameters: dict[str, nn.Parameter], optimizers: list[torch.optim.Optimizer], budget: Budget
) -> None:
    """Everything a run needs to go on, in one file that is either the old or the new one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(file.name + ".tmp")
    state = {
        "parameters": {name: p.detach() for name, p in parameters.items()},
        "optimizers": [o.state_dict() for o in optimizers],
        "done": budget.done,
        "spent": budget.elapsed,
    }
    torch.save(state, temporary)
    os.replace(temporary, file)


def load_state(
    file: Path, parameters: dict[str, nn.Parameter], optimizers: list[torch.optim.Optimizer], budget: Budget
) -> bool:
    """Take up what `save_state` left; whether there was anything."""
    if not file.exists():
        return False
    state = torch.load(file, map_location="cpu", weights_only=True)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state["parameters"][name])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    budget.done, budget.spent = state["done"], state["spent"]
    return True
