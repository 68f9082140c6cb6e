"""TMA descriptors of tensors that the Hopper kernels load tile by tile."""

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
def tile_layout(block: tuple[int, ...], dtype: torch.dtype, swizzled: bool = True) -> gl.NVMMASharedLayout:
    """The shared memory layout of a tile that TMA writes. The tensor cores can read it if it is swizzled."""
    if len(block) == 1 or not swizzled:
        bits = dtype.itemsize * 8
        return gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=bits, rank=len(block))
    return gl.NVMMASharedLayout.get_default_for(list(block), _DTYPES[dtype])


def tiles_of(tensor: Tensor, *block: int, rows: int | None = None, swizzled: bool = True) -> TensorDescriptor:
    """The descriptor of a tensor [n] or [rows, n] with tiles of shape `block`. rows: with those that follow it in memory."""
    layout = tile_layout(block, tensor.dtype, swizzled)
    if tensor.dim() == 1:
        return TensorDescriptor(tensor, list(tensor.shape), [1], list(block), layout)
    shape = [tensor.shape[0] if rows is None else rows, tensor.shape[1]]
    return TensorDescriptor(tensor, shape, [tensor.stride(0), 1], list(block), layout)
