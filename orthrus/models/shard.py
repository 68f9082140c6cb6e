"""Which part of a model a rank has, under tensor parallelism: whole key heads with their queries, a run of the MLP's inner width,
and a run of the vocabulary in the LM head. Norms and the embedding are whole on every rank.

The leaves of the tree in which the ranks' sums are added (`orthrus.kernels.linear.tree`) are parts of the same widths. They are
decided here, by the model's shape and `ModelConfig.sum_leaves`, and never by the number of ranks.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from orthrus.errors import ConfigError
from orthrus.kernels.leaves import Leaves
from orthrus.models.config import ModelConfig

Axis = Literal["queries", "keys", "inner", "vocabulary"]
"""What a dimension of a tensor consists of, where it is divided among ranks: heads of queries, or of keys and values; the MLP's
inner width; tokens."""
_LEAF_UNITS = (128, 64)
"""Leaves begin at multiples of the first of these numbers of inputs if possible, else of the second. GPUs need the first."""
_TOKEN_UNIT = 64
"""The same for the parts of the vocabulary."""
_DEFAULT_LEAVES = 2
"""Leaves if `sum_leaves` is not set, in a model that can be cut so on a GPU. They cost a GPU nothing."""


@dataclass(frozen=True)
class Division:
    """How a tensor is divided among ranks."""

    axis: Axis
    dim: int
    """The dimension of the tensor that is divided."""


def num_leaves(config: ModelConfig) -> int:
    """Into how many leaves the inputs of layers that add to the residual stream are cut. At most so many ranks share a model."""
    if config.sum_leaves is not None:
        return config.sum_leaves
    return _DEFAULT_LEAVES if _can_cut(config, _DEFAULT_LEAVES, _LEAF_UNITS[0]) else 1


def check_ranks(config: ModelConfig, size: int) -> None:
    """Raise ConfigError if a model's sums can't be cut as `ModelConfig.sum_leaves` says, or if `size` ranks can't share it."""
    name, leaves = config.name or "this model", num_leaves(config)
    if config.quantization is not None and size > 1:
        raise ConfigError(f"{name} is quantised, and only one GPU can run it: set tensor_parallel_size to 1")
    possible = [count for count in (1, 2, 4, 8) if _can_cut(config, count, _LEAF_UNITS[-1])]
    wanted = leaves if config.sum_leaves is not None else size
    if wanted not in possible:
        raise ConfigError(
            f"{name} can't be shared by {wanted} ranks, with {config.num_key_value_heads} key heads, "
            f"{config.num_attention_heads * config.head_dim} attention outputs, an intermediate_size of "
            f"{config.intermediate_size} and {config.vocab_size} tokens: set tensor_parallel_size and sum_leaves to "
            f"{' or '.join(map(str, possible))}"
        )
    if size > leaves:
        raise ConfigError(
            f"tensor_parallel_size {size} needs sums of {size} leaves, and those of {name} have {leaves}: set sum_leaves to "
            f"{size}, on every replica whose texts must be the same"
        )


def _can_cut(config: ModelConfig, leaves: int, unit: int) -> bool:
    return leaves == 1 or (
        config.num_key_value_heads % leaves == 0
        and config.num_attention_heads * config.head_dim % (leaves * unit) == 0
        and config.intermediate_size >= leaves * unit
        and config.vocab_size >= leaves * _TOKEN_UNIT
    )


@dataclass(frozen=True)
class Shard:
    """The part of a model that one rank has."""

    model: ModelConfig
    """The whole model."""
    rank: int = 0
    size: int = 1
    """Number of ranks. The model can be divided among them: see `check_ranks`."""

    @cached_property
    def config(self) -> ModelConfig:
        """The part as a model with fewer heads and a smaller MLP. Its vocabulary is whole, since the embedding is not divided."""
        if self.size == 1:
            return self.model
        begin, end = self.span("inner")
        return replace(
            self.model,
            num_attention_heads=self.model.num_attention_heads // self.size,
            num_key_value_heads=self.model.num_key_value_heads // self.size,
            intermediate_size=end - begin,
        )

    def span(self, axis: Axis) -> tuple[int, int]:
        """Where this rank's part of a dimension begins and ends: [begin, end)."""
        leaves = self.leaves(axis)
        return leaves.begin, leaves.end

    def part(self, division: Division | None) -> tuple[int, int, int] | None:
        """The dimension in which a checkpoint's tensor is divided, and the begin and end of this rank's part. None: all of it.

        division: `Family.division` of the tensor.
        """
        if division is None or self.size == 1:
            return None
        return division.dim, *self.span(division.axis)

    def shape(self, whole: tuple[int, ...], division: Division | None) -> tuple[int, ...]:
        """The shape of this rank's part of a tensor of shape `whole`. division: see `part`."""
        found = self.part(division)
        if found is None:
            return whole
        dim, begin, end = found
        return (*whole[:dim], end - begin, *whole[dim + 1 :])

    def leaves(self, axis: Axis) -> Leaves:
        """The leaves of a dimension, and which of them are this rank's."""
        model, total = self.model, num_leaves(self.model)
        unit = next((unit for unit in _LEAF_UNITS if _can_cut(model, total, unit)), _LEAF_UNITS[-1])
        widths: Mapping[Axis, tuple[int, int]] = {
            "queries": (model.num_attention_heads * model.head_dim, unit),
            "keys": (model.num_key_value_heads * model.head_dim, model.head_dim),
            "inner": (model.intermediate_size, unit),
            "vocabulary": (model.vocab_size, _TOKEN_UNIT),
        }
        each = total // self.size
        return Leaves(*widths[axis], total, self.rank * each, each)

    @property
    def vocabulary_widths(self) -> list[int]:
        """How many tokens each rank has in its LM head."""
        spans = [replace(self, rank=rank).span("vocabulary") for rank in range(self.size)]
        return [end - begin for begin, end in spans]
