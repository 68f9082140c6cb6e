"""Engines of several ranks, and the processes of their ranks."""

import multiprocessing
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path

from orthrus.engine import Engine, EngineConfig
from orthrus.engine.rank_processes import start_ranks
from orthrus.engine.rank_worker import rank_device
from orthrus.kernels.ranks.collective import Backend
from orthrus.models.checkpoint import open_weights
from orthrus.models.families import load_config
from orthrus.models.shard import Shard


def engine_over(config: EngineConfig, backend: Backend | None) -> Engine:
    """The engine of a checkpoint. backend: what its ranks exchange through; None: as the engine chooses."""
    if backend is None:
        return Engine.from_pretrained(config)
    path = Path(config.model)
    model = config.with_settings(load_config(path))
    read = partial(open_weights, path, model)
    with start_ranks(config, model, read, backend) as ranks:
        shard = Shard(model, 0, config.tensor_parallel_size)
        weights = read(rank_device(config.device, 0), config.dtype, shard=shard, check=ranks.check)
        return Engine(config, model, weights, ranks=ranks)


def running_ranks() -> list[BaseProcess]:
    """The processes of ranks that this process has started. Other tests may have processes of their own."""
    return [child for child in multiprocessing.active_children() if child.name.startswith("orthrus-rank-")]
