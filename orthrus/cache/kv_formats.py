"""The formats of the KV cache, by name."""

from typing import TYPE_CHECKING

from orthrus.cache.plain import PlainFormat

if TYPE_CHECKING:
    from orthrus.cache.kv_format import KVFormat
    from orthrus.models.config import ModelConfig

KV_FORMATS: "dict[str, KVFormat]" = {"plain": PlainFormat()}


def kv_bytes_per_token(config: "ModelConfig", item_bytes: int, kv_format: str = "plain") -> int:
    """Memory that one position takes in the KV cache. item_bytes: bytes of one number of the model's dtype."""
    return KV_FORMATS[kv_format].bytes_per_token(config, item_bytes)
