"""Paged attention on a GPU: chooses the kernel, allocates the partial results, and merges those of divided tiles."""

import torch
import triton
from torch import Tensor

from orthrus.kernels.attention import hopper
from orthrus.kernels.attention import triton as portable
from orthrus.kernels.attention.merge import merge_records
from orthrus.kernels.attention.types import AttentionPlan
from orthrus.kernels.device import has_warpgroup_mma, num_sms
from orthrus.kernels.rounding import Rounding, is_fixed
from orthrus.kernels.workspace import empty, scratch

_LOG2_E = 1.4426950408889634


def paged_attention(
    qkv: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    plan: AttentionPlan,
    scale: float,
    rounding: Rounding | None = None,
) -> Tensor:
    """`paged_attention` (kernels/attention/__init__.py) for contiguous tensors in float16, bfloat16 or float32.

    `plan.work` must be set. Raises ValueError if page_size is not a multiple of the kernels' key tile.
    """
    work = plan.work
    assert work is not None, "a plan for a GPU has a work list"
    kv_heads, _, page_size, dim = k_cache.shape
    rows, heads = qkv.shape[0], qkv.shape[1] - 2 * kv_heads
    keys = 32 if qkv.dtype == torch.float32 else 64
    if page_size % keys:
        raise ValueError(
            f"pages of {page_size} tokens can't be read on a GPU: page_size must be a multiple of {keys}"
        )
    queries = _queries(qkv.dtype)
    width = max(16, triton.next_power_of_2(dim))
    programs = attention_programs(qkv.device)
    if rounding is not None and rounding.words and dim % 16:
        rounding = None  # A word has inputs of one head alone only if 16 divides its width.
    out = empty((rows, heads * dim), torch.float8_e4m3fn if is_fixed(rounding) else qkv.dtype, qkv.device)
    spare = work.capacity * heads
    num_records = _num_records(work.capacity, heads, qkv.dtype, qkv.device)
    accs = scratch((num_records, dim), torch.float32, qkv.device)
    tops, norms = torch.empty(2, num_records, device=qkv.device, dtype=torch.float32)
    records = accs, tops, norms
    # The softmax is to base 2, because exp2 is one instruction.
    shape = {"spare": spare, "queries": queries, "keys": keys, "width": width}
    if shares_tiles(qkv.dtype, dim):
        launch, programs_launched = hopper.launch, programs // 2
    else:
        launch, programs_launched = portable.launch, programs
    launch(
        qkv,
        k_cache,
        v_cache,
        plan,
        scale * _LOG2_E,
        out,
        records,
        rounding,
        programs=programs_launched,
        **shape,
    )
    if work.capacity:
        merge_records(work, out, records, rounding, dim=dim, width=width, programs=4 * programs)
    return out


def _num_records(capacity: int, heads: int, dtype: torch.dtype, device: torch.device) -> int:
    """Records of divided tiles, and then scratch records of each program, one for each of its queries."""
    return capacity * heads + attention_programs(device) * _queries(dtype)


def scratch_bytes(capacity: int, heads: int, dim: int, dtype: torch.dtype, device: torch.device) -> int:
    """Bytes of `scratch` memory that `paged_attention` takes for `AttentionWork.capacity` records of each head."""
    return _num_records(capacity, heads, dtype, device) * dim * torch.float32.itemsize


def _queries(dtype: torch.dtype) -> int:
    return 16 if dtype == torch.float32 else 64


def attention_programs(device: torch.device) -> int:
    """How many workers share the work list: two per SM. They are two programs, or the two lanes of one program of `hopper`."""
    return 2 * num_sms(device)


def tile_rows(heads_per_kv: int, dtype: torch.dtype) -> int:
    """Rows of a tile of the work list: as many as fit into a kernel's query tile with `heads_per_kv` queries each."""
    return max(1, _queries(dtype) // heads_per_kv)


def shares_tiles(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether `hopper` runs the pass, so that its work list has shared tiles. Wider heads would not fit its ring buffer."""
    return has_warpgroup_mma() and dtype.itemsize == 2 and head_dim <= 128
