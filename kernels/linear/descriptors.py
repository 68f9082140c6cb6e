"""Tensors as the copy engine of Hopper fetches them, tile by tile."""

from functools import cache

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

_DTYPES = {
    torch.bfloat16: gl.bfloat16,
    torch.float16: gl.float16,
    torch.float8_e4m3fn: gl.float8e4nv,
    torch.int32: gl.int32,
}


@cache
def tile_layout(block: tuple[int, ...], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """How a tile lies in shared memory for the copy engine, and for the matrix unit where it takes it from there."""
    if len(block) == 1:
        return gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=dtype.itemsize * 8, rank=1)
    return gl.NVMMASharedLayout.get_default_for(list(block), _DTYPES[dtype])


def tiles_of(tensor: Tensor, *block: int, rows: int | None = None) -> TensorDescriptor:
    """A tensor [n] or [rows, n] in tiles of the shape `block`. rows: more than its own, where others lie behind it in memory."""
    layout = tile_layout(block, tensor.dtype)
    if tensor.dim() == 1:
        return TensorDescriptor(tensor, list(tensor.shape), [1], list(block), layout)
    shape = [tensor.shape[0] if rows is None else rows, tensor.shape[1]]
    return TensorDescriptor(tensor, shape, [tensor.stride(0), 1], list(block), layout)
