"""Tensors are loaded when they are used, and a model is packed layer by layer."""

import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor

from orthrus.models.checkpoint import open_weights
from orthrus.models.families import load_config
from orthrus.models.forward import LayerParallelForward
from orthrus.models.lazy_tensors import LazyTensors
from tests.checkpoints import make_checkpoint

LAYERS = 3


def layer_of(name: str) -> str:
    """The number of the layer that a tensor belongs to; "" for the embedding, the head and the last norm."""
    return name.partition("model.layers.")[2].partition(".")[0]


def test_a_tensor_is_loaded_once_when_it_is_read() -> None:
    loaded: list[str] = []

    def load(name: str) -> Tensor:
        loaded.append(name)
        return torch.ones(1)

    tensors = LazyTensors(["a", "b", "c"], load)
    assert "a" in tensors and "d" not in tensors and tensors.get("d") is None
    assert list(tensors) == ["a", "b", "c"] and len(tensors) == 3
    assert loaded == []
    assert tensors["b"] is tensors["b"] is tensors.pop("b")
    del tensors["c"]
    tensors["d"] = torch.zeros(1)
    assert list(dict(tensors)) == ["a", "d"]
    assert loaded == ["b", "a"]


@pytest.mark.parametrize("draft_format", [None, "fp8"])
def test_one_layer_at_a_time_is_loaded_and_packed(tmp_path: Path, draft_format: str | None) -> None:
    path = make_checkpoint(tmp_path, layers=LAYERS, dtype=torch.bfloat16)
    config = load_config(path)
    stored = open_weights(path, config, "cpu", "float32")
    loaded: list[tuple[str, weakref.ref[Tensor]]] = []
    kept: dict[str, set[str]] = {}

    def load(name: str) -> Tensor:
        # Norms are kept as they are. All matrices are packed to others.
        alive = {layer_of(n) for n, tensor in loaded if (t := tensor()) is not None and t.dim() == 2}
        kept[name] = alive - {layer_of(name), ""}
        tensor = stored.pop(name)
        loaded.append((name, weakref.ref(tensor)))
        return tensor

    LayerParallelForward(config, LazyTensors(list(stored), load), "plain", draft_format)
    assert not stored, "every tensor is used"
    assert {layer_of(name) for name in kept} == {"", *map(str, range(LAYERS))}
    for name, others in kept.items():
        # The norm behind a layer belongs to the next one.
        matrix = "norm" not in name
        assert not (matrix and others), (
            f"{name} was loaded while matrices of the layers {others} were not packed yet"
        )
