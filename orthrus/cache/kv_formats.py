"""The formats of the KV cache, by name. No format's code is loaded, nor torch, before it is used."""

from pkgutil import resolve_name
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from orthrus.cache.kv_format import KVFormat
    from orthrus.models.config import ModelConfig

DEFAULT_KV_FORMAT = "plain"
KV_FORMATS: dict[str, str] = {"plain": "orthrus.cache.plain:PlainKVFormat"}
"""Each format's class, as "module:class"."""


def load_kv_format(name: str) -> "KVFormat":
    """Import the class of a format that `KV_FORMATS` names, and make one."""
    kv_format: KVFormat = resolve_name(KV_FORMATS[name])()
    return kv_format


def kv_bytes_per_token(config: "ModelConfig", item_bytes: int, kv_format: str = DEFAULT_KV_FORMAT) -> int:
    """Bytes that one position takes in the KV cache. item_bytes: bytes of one number of the model's dtype."""
    return load_kv_format(kv_format).bytes_per_token(config, item_bytes)
