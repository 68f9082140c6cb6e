"""The interface of a format of the KV cache: `KVFormat`, and `KVLayer` for one layer's part of the cache.

A new format is two files and an entry in `orthrus.cache.kv_formats`. One file has its `KVFormat`. Sizing a cache imports that
file, so it must import torch only where it allocates. The other has its `KVLayer`, which needs torch and kernels.
"""

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    # Only for annotations. Sizing a cache must not import torch, which takes seconds.
    import torch
    from torch import Tensor

    from orthrus.kernels.attention import AttentionPlan
    from orthrus.kernels.rounding import Rounding
    from orthrus.kernels.rows.types import KVWrites
    from orthrus.models.config import ModelConfig


class KVLayer(Protocol):
    """One layer's keys and values, in pages."""

    @property
    def nbytes(self) -> int:
        """Bytes that they take."""
        ...

    def write(
        self,
        qkv: "Tensor",
        qk_norm: "Tensor | None",
        cos: "Tensor",
        sin: "Tensor",
        eps: float,
        num_ar: "Tensor",
        writes: "KVWrites",
    ) -> None:
        """Norm and rotate the queries and keys of all rows in place, and write the AR rows' keys and values.

        qkv [rows, heads + 2 * kv_heads, head_dim]: queries, keys and values from the projection.
        qk_norm [views, heads + kv_heads, head_dim]: each head's norm weight; None to rotate only.
        cos, sin [rows, 1, head_dim]: the rows' rotary angles. eps: of the norm.
        num_ar int32 [1]: the number of AR rows, which come first.
        writes: where they go; a slot is page * page_size + offset in the page.
        """
        ...

    def attend(
        self, qkv: "Tensor", attention: "AttentionPlan", scale: float, rounding: "Rounding | None" = None
    ) -> "Tensor":
        """Attention of all rows to what `attention` says they see: [rows, heads * head_dim].

        It is in the dtype of `qkv`, or stored as `rounding` says.

        qkv: as `write` left it. scale: the factor on the products of queries and keys. rounding: that of the layer that takes the
        result.
        """
        ...

    @property
    def tensors(self) -> "tuple[Tensor, ...]":
        """All its tensors [kv_heads, pages, page_size, numbers of a position], contiguous, with the same shape in all layers."""
        ...


class KVFormat(Protocol):
    """How keys and values are stored."""

    def bytes_per_token(self, config: "ModelConfig", item_bytes: int) -> int:
        """Bytes that one position takes in all layers. item_bytes: bytes of one number of the model's dtype."""
        ...

    def allocate(
        self,
        config: "ModelConfig",
        num_pages: int,
        page_size: int,
        device: "torch.device",
        dtype: "torch.dtype",
    ) -> list[KVLayer]:
        """Memory for all layers, zero where nothing has been written. dtype: the model's."""
        ...
