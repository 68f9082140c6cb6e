"""How much memory a model's weights take, and in which dtype it runs: known from its config alone, without torch."""

import math

from orthrus.errors import ConfigError
from orthrus.models.config import DTYPE_SIZES, ModelConfig
from orthrus.models.families import family_of


def weight_bytes(config: ModelConfig, item_bytes: int) -> int:
    """Bytes that the weights take. item_bytes: of one number."""
    return sum(math.prod(shape) for shape in family_of(config).tensor_shapes(config).values()) * item_bytes


def dtype_name(dtype: str, config: ModelConfig, device: str) -> str:
    """The dtype to run in. "auto" is the saved one on an accelerator, and float32 on a CPU, where 16-bit dtypes are slow.

    device: "cpu" or another kind. Raises ConfigError for any name but "auto" and the supported ones.
    """
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else config.dtype
    if dtype not in DTYPE_SIZES:
        raise ConfigError(f"dtype {dtype!r} is not supported: use auto or one of {', '.join(DTYPE_SIZES)}")
    return dtype
