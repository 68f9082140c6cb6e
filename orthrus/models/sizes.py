"""How much memory a model's weights take, and in which dtype it runs: known from its config alone, without torch."""

import math
from typing import NamedTuple

from orthrus.errors import ConfigError
from orthrus.kernels.int4_sizes import GROUP
from orthrus.kernels.lossless_sizes import LOSSLESS_BYTES, can_pack
from orthrus.models.config import DTYPE_SIZES, ModelConfig
from orthrus.models.families import family_of
from orthrus.models.shard import Shard


class CopyBytes(NamedTuple):
    """Bytes of one number in the drafts' own weights."""

    mlp: float
    """In the layers of the MLPs."""
    others: float
    """In the projections of attention, and in the LM head."""


NO_BYTES = CopyBytes(0.0, 0.0)


def weight_bytes(
    shard: Shard, item_bytes: int, copies: CopyBytes | None = None, *, lossless: bool = False
) -> int:
    """Bytes that a rank's part of the weights takes, without Medusa heads (`MedusaConfig.num_weights`).

    item_bytes: bytes of one number that is stored in full. If it is at most 2, quantised weights stay quantised. If it is more,
    they are dequantised.
    copies: bytes of one number in the drafts' own weights, if they have any (`LayerStack.pack_apart`). These replace the
    projections of the diffusion view, and copy all other weights of a draft pass. The model must then have a diffusion view.
    lossless: whether linear layers are kept in 12 bits, as far as their shapes allow (kernels/linear/lossless).
    """
    config, shapes = shard.model, _shapes(shard)
    family = family_of(config)
    numbers = sum(map(math.prod, shapes.values()))
    how, saved = config.quantization, 0.0
    if how is not None and item_bytes <= 2:
        quantised = sum(math.prod(shape) for name, shape in shapes.items() if how.covers(name))
        saved = quantised * (item_bytes - how.number_bytes)
    if lossless:
        saved += _saved_by_12_bits(shard, shapes, item_bytes, replaced=copies is not None)
    if copies is None:
        return math.ceil(numbers * item_bytes - saved)
    suffix = config.view_suffixes[1]
    matrices = {name: math.prod(shape) for name, shape in shapes.items() if len(shape) == 2}
    replaced = [name for name in matrices if f"{suffix}." in name]
    of_ar_rows = {name.replace(f"{suffix}.", ".") for name in replaced} | {family.embedding, family.head}
    copied = {name: count for name, count in matrices.items() if name not in of_ar_rows}
    in_mlp = sum(count for name, count in copied.items() if _in_mlp(name))
    others = sum(copied.values()) - in_mlp + math.prod(_head_shape(shard))
    numbers -= sum(matrices[name] for name in replaced)
    return math.ceil(numbers * item_bytes - saved) + math.ceil(in_mlp * copies.mlp + others * copies.others)


def ungrouped(shard: Shard) -> str | None:
    """An MLP of any rank whose inputs can't be cut into the groups of the format "int4", in words. None if there is none."""
    for rank in range(shard.size):
        for name, shape in _shapes(Shard(shard.model, rank, shard.size)).items():
            if len(shape) == 2 and _in_mlp(name) and shape[1] % GROUP:
                where = "" if shard.size == 1 else f" on rank {rank} of {shard.size}"
                return f"{name} of {shard.model.name} has {shape[1]} inputs{where}, which is not a multiple of {GROUP}"
    return None


def _in_mlp(name: str) -> bool:
    """Whether a tensor belongs to the MLP of a layer."""
    return ".mlp." in name


def _shapes(shard: Shard) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the rank's parts of the model's tensors, as if no weight were quantised."""
    family = family_of(shard.model)
    return {
        name: shard.shape(shape, family.division(name))
        for name, shape in family.dense_shapes(shard.model).items()
    }


def _head_shape(shard: Shard) -> tuple[int, int]:
    """[tokens, hidden_size] of the rank's LM head. A tied model has no tensor for it."""
    return shard.vocabulary_widths[shard.rank], shard.model.hidden_size


def _saved_by_12_bits(
    shard: Shard, shapes: dict[str, tuple[int, ...]], item_bytes: int, *, replaced: bool
) -> float:
    """Bytes that 12 bits save in the linear layers.

    replaced: whether the projections of the diffusion view are not kept in 12 bits, since copies take their place.
    """
    config = shard.model
    family = family_of(config)
    saved = 0.0
    for name, shape in shapes.items():
        if len(shape) != 2 or name == family.embedding or not can_pack(*shape):
            continue
        if config.quantization is not None and config.quantization.covers(name):
            continue  # Counted already.
        if replaced and f"{config.view_suffixes[-1]}." in name:
            continue
        saved += math.prod(shape) * item_bytes - _packed_bytes(*shape)
    if config.tie_word_embeddings and can_pack(*(head := _head_shape(shard))):
        saved -= _packed_bytes(*head)  # The embedding stays in full beside the head.
    return saved


def _packed_bytes(outs: int, ins: int) -> float:
    """Bytes of a weight [outs, ins] in 12 bits."""
    return outs * ins * LOSSLESS_BYTES + outs * 4


def dtype_name(dtype: str, config: ModelConfig, device: str) -> str:
    """The dtype to run in. "auto" is the saved one on an accelerator, and float32 on a CPU, where 16-bit dtypes are slow.

    device: "cpu" or another kind. Raises ConfigError for any name but "auto" and the supported ones.
    """
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else config.dtype
    if dtype not in DTYPE_SIZES:
        raise ConfigError(f"dtype {dtype!r} is not supported: use auto or one of {', '.join(DTYPE_SIZES)}")
    return dtype
