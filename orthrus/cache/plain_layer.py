"""One layer of the plain cache format, for the kernels that read and write it."""

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from orthrus.kernels.attention import AttentionPlan, paged_attention
from orthrus.kernels.rounding import Rounding
from orthrus.kernels.rows.qk_norm_rope import qk_norm_rope
from orthrus.kernels.rows.types import KVWrites


@dataclass(frozen=True)
class PlainLayer:
    """See `KVLayer`."""

    keys: Tensor
    """[kv_heads, pages, page_size, head_dim]."""
    values: Tensor
    """[kv_heads, pages, page_size, head_dim]."""

    @cached_property
    def slots(self) -> tuple[Tensor, Tensor]:
        """The same memory by slot: keys and values [kv_heads, pages * page_size, head_dim]."""
        return self.keys.flatten(1, 2), self.values.flatten(1, 2)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.keys, self.values

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def write(
        self,
        qkv: Tensor,
        qk_norm: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        eps: float,
        num_ar: Tensor,
        writes: KVWrites,
    ) -> None:
        qk_norm_rope(qkv, qk_norm, cos, sin, eps, num_ar, writes, *self.slots)

    def attend(
        self, qkv: Tensor, attention: AttentionPlan, scale: float, rounding: Rounding | None = None
    ) -> Tensor:
        return paged_attention(qkv, self.keys, self.values, attention, scale, rounding)
