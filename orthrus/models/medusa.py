"""Medusa heads (Cai et al., 2024, arXiv 2401.10774): they draft the tokens after the next one from a final hidden state.

From the hidden state h at position t, the LM head picks the token at t + 1. Head k (from 1 on) picks the one at t + 1 + k:

    logits_k = P_k (h + silu(W_k h))

W_k is [hidden_size, hidden_size] without a bias, as in the paper. P_k is a vocabulary projection of the head's own, as in
Medusa-1, or the model's LM head for all heads: "shared". Sharing it makes the heads a thousandth of the model rather than a
third of it (8B, five heads), and costs some acceptance.

The heads of a model are stored as two files in one folder, which may be the model's own: the tensors, and a description of them
(`MedusaConfig`).
"""

import json
from collections.abc import Mapping, MutableMapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from orthrus.errors import CheckpointError
from orthrus.kernels.linear import Weight
from orthrus.models.checkpoint import check_finite
from orthrus.models.config import ModelConfig
from orthrus.models.medusa_config import (
    CONFIG_FILE,
    MedusaConfig,
    linear_name,
    projection_name,
    read_medusa,
)

WEIGHTS_FILE = "medusa.safetensors"


def _stack(names: list[str], tensors: MutableMapping[str, Tensor]) -> Tensor:
    """Stack tensors by name. They are taken out of `tensors` one by one, so that only one of them is in memory twice."""
    first = tensors[names[0]]
    stacked = first.new_empty(len(names), *first.shape)
    for place, name in zip(stacked, names, strict=True):
        place.copy_(tensors.pop(name))
    return stacked


@dataclass(frozen=True)
class MedusaHeads:
    """The Medusa heads of a loaded model."""

    linears: Tensor
    """[heads, hidden_size, hidden_size]: W of each head."""
    projections: Tensor | None
    """[heads, vocab_size, hidden_size]. None: the heads share the LM head."""

    @property
    def num_heads(self) -> int:
        return self.linears.shape[0]

    @property
    def num_weights(self) -> int:
        """How many numbers the heads' weights have."""
        return self.linears.numel() + (0 if self.projections is None else self.projections.numel())

    @staticmethod
    def take(tensors: MutableMapping[str, Tensor]) -> "MedusaHeads | None":
        """Take the heads' tensors out of `tensors`, and return the heads; None if there are none."""
        count = 0
        while linear_name(count) in tensors:
            count += 1
        if count == 0:
            return None
        own = projection_name(0) in tensors
        linears = _stack([linear_name(index) for index in range(count)], tensors)
        names = [projection_name(index) for index in range(count)]
        return MedusaHeads(linears, _stack(names, tensors) if own else None)

    def logits(self, hidden: Tensor, head: Weight) -> Tensor:
        """The logits of all heads from final hidden states [rows, hidden_size]: [rows, heads, vocab_size]. head: the LM head."""
        states = hidden + F.silu(hidden @ self.linears.mT)  # [heads, rows, hidden_size]
        if self.projections is not None:
            return (states @ self.projections.mT).transpose(0, 1)
        return head.linear(states.transpose(0, 1).flatten(0, 1)).unflatten(0, (-1, self.num_heads))


def load_medusa(
    folder: Path, model: ModelConfig, device: str | torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The tensors of the heads in `folder` by name. Raises ConfigError if there are none, CheckpointError if they don't fit."""
    expected = read_medusa(folder, model)
    file = folder / WEIGHTS_FILE
    found: dict[str, Tensor] = {}
    try:
        with safe_open(file, framework="pt", device=str(device)) as tensors:
            names = set(tensors.keys())
            for name, shape in expected.tensor_shapes().items():
                read = tensors.get_tensor(name) if name in names else torch.empty(0)
                if tuple(read.shape) != shape:
                    raise CheckpointError(
                        f"{file}: tensor {name}: expected shape {list(shape)}, found {list(read.shape)}"
                    )
                found[name] = read.to(dtype, copy=True)
                check_finite(found[name], f"{file}: tensor {name}", read)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} can't be read: {error}") from error
    return found


def save_medusa(folder: Path, config: MedusaConfig, tensors: Mapping[str, Tensor]) -> None:
    """Write the heads to `folder`. tensors: those of `MedusaConfig.tensor_shapes`."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensors[name].cpu().contiguous() for name in config.tensor_shapes()}, folder / WEIGHTS_FILE
    )
    (folder / CONFIG_FILE).write_text(json.dumps(asdict(config), indent=2) + "\n", encoding="utf-8")
