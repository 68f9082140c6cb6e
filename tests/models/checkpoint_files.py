"""Helpers for tests of checkpoint files: reading them, and writing wrong ones."""

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from orthrus.errors import CheckpointError
from orthrus.models.checkpoint import load_weights, save_checkpoint
from orthrus.models.config import ModelConfig
from orthrus.models.families import load_config
from tests.checkpoints import make_checkpoint


def load(path: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    config = load_config(path)
    return config, load_weights(path, config, "cpu", config.dtype)


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Apply `change` to the tensors in `path`/model.safetensors."""
    file = path / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file)


def sharded(path: Path) -> Path:
    """A copy of the tiny checkpoint in shards, in `path`."""
    config, weights = load(make_checkpoint(path / "whole"))
    save_checkpoint(path / "shards", config, weights, max_shard_bytes=60_000)
    return path / "shards"


def load_error(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(path)
    return str(caught.value)
