"""The plain cache format: keys and values as the model computes them, in its own dtype."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from orthrus.cache.kv_format import KVLayer
    from orthrus.models.config import ModelConfig


class PlainKVFormat:
    """See `KVFormat`."""

    def bytes_per_token(self, config: "ModelConfig", item_bytes: int) -> int:
        return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * item_bytes

    def allocate(
        self,
        config: "ModelConfig",
        num_pages: int,
        page_size: int,
        device: "torch.device",
        dtype: "torch.dtype",
    ) -> "list[KVLayer]":
        import torch

        from orthrus.cache.plain_layer import PlainLayer

        shape = (config.num_hidden_layers, config.num_key_value_heads, num_pages, page_size, config.head_dim)
        keys, values = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        return [PlainLayer(k, v) for k, v in zip(keys.unbind(), values.unbind(), strict=True)]
