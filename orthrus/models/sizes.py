"""How much memory a model's weights take, and in which dtype it runs: known from its config alone, without torch."""

import math

from orthrus.errors import ConfigError
from orthrus.kernels.lossless_sizes import LOSSLESS_BYTES, can_pack
from orthrus.models.config import DTYPE_SIZES, ModelConfig
from orthrus.models.families import family_of


def weight_bytes(
    config: ModelConfig, item_bytes: int, copy_bytes: float | None = None, *, lossless: bool = False
) -> int:
    """Bytes that the weights take. item_bytes: of one number that is stored in full.

    With numbers of 16 bits, quantised weights take as little as a GPU keeps of them. With wider ones they are dequantised.
    copy_bytes: the same in the drafts' own weights, if they have any (`LayerStack.pack_apart`). They replace the projections of
    the diffusion view, and are copies of what else a draft pass multiplies. The model must have a diffusion view then.
    lossless: whether linear layers are kept in 12 bits, as far as their shapes allow (kernels/linear/lossless).
    """
    family = family_of(config)
    shapes = family.dense_shapes(config)
    numbers = sum(map(math.prod, shapes.values()))
    how, saved = config.quantization, 0.0
    if how is not None and item_bytes <= 2:
        quantised = sum(math.prod(shape) for name, shape in shapes.items() if how.covers(name))
        saved = quantised * (item_bytes - how.number_bytes)
    if lossless:
        saved += _saved_by_12_bits(config, shapes, item_bytes, replaced=copy_bytes is not None)
    if copy_bytes is None:
        return math.ceil(numbers * item_bytes - saved)
    suffix = config.view_suffixes[1]
    matrices = {name: math.prod(shape) for name, shape in shapes.items() if len(shape) == 2}
    replaced = [name for name in matrices if f"{suffix}." in name]
    of_ar_rows = {name.replace(f"{suffix}.", ".") for name in replaced} | {family.embedding, family.head}
    copied = sum(count for name, count in matrices.items() if name not in of_ar_rows)
    head = matrices[family.embedding]
    numbers -= sum(matrices[name] for name in replaced)
    return math.ceil(numbers * item_bytes - saved) + math.ceil((copied + head) * copy_bytes)


def _saved_by_12_bits(
    config: ModelConfig, shapes: dict[str, tuple[int, ...]], item_bytes: int, *, replaced: bool
) -> float:
    """replaced: whether the projections of the diffusion view are not kept in 12 bits, since copies take their place."""
    family = family_of(config)
    saved = 0.0
    for name, shape in shapes.items():
        if len(shape) != 2 or not can_pack(*shape):
            continue
        if config.quantization is not None and config.quantization.covers(name):
            continue  # Counted already.
        if replaced and f"{config.view_suffixes[-1]}." in name:
            continue
        size = math.prod(shape) * LOSSLESS_BYTES + shape[0] * 4
        if name != family.embedding:
            saved += math.prod(shape) * item_bytes - size
        elif config.tie_word_embeddings:
            saved -= size  # The embedding stays in full beside the head.
    return saved


def dtype_name(dtype: str, config: ModelConfig, device: str) -> str:
    """The dtype to run in. "auto" is the saved one on an accelerator, and float32 on a CPU, where 16-bit dtypes are slow.

    device: "cpu" or another kind. Raises ConfigError for any name but "auto" and the supported ones.
    """
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else config.dtype
    if dtype not in DTYPE_SIZES:
        raise ConfigError(f"dtype {dtype!r} is not supported: use auto or one of {', '.join(DTYPE_SIZES)}")
    return dtype
