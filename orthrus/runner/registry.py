"""All runners: which one runs a model on its device.

A runner's code is loaded only when the runner is used: the runner for GPUs needs Triton, which machines without a GPU may lack.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pkgutil import resolve_name

import torch

from orthrus.runner.protocol import RunnerFactory


@dataclass(frozen=True)
class RunnerEntry:
    """One runner."""

    factory: str
    """The runner's class, as "module:class": it is imported when it is first used. See `RunnerFactory`."""
    fits: Callable[[torch.device, torch.dtype], bool]
    """Whether it can run a model whose weights are on this device, in this dtype."""


RUNNERS: list[RunnerEntry] = [
    RunnerEntry(
        "orthrus.runner.cuda_graphs:CudaGraphRunner",
        fits=lambda device, dtype: device.type == "cuda" and dtype != torch.float64,
    ),
    RunnerEntry("orthrus.runner.eager:EagerRunner", fits=lambda device, dtype: True),
]
"""The first that fits is used."""


def load_runner(device: torch.device, dtype: torch.dtype) -> RunnerFactory:
    """Import the class of the runner for models whose weights are on this device, in this dtype."""
    entry = next(entry for entry in RUNNERS if entry.fits(device, dtype))
    factory: RunnerFactory = resolve_name(entry.factory)
    return factory
