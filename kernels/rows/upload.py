"""Copying the plan of a pass to its device."""

from torch import Tensor

from orthrus.kernels.device import runs_triton


def upload(source: Tensor, target: Tensor) -> None:
    """target[:] = source, both contiguous [count].

    For a GPU, source is in page-locked memory, and must not change before the copy is done. A kernel copies little data in a
    third of the time that the GPU's DMA engine needs, because the kernels before and after wait for the engine.
    """
    if runs_triton(target):
        from orthrus.kernels.rows import upload_triton

        upload_triton.upload(source, target)
        return
    target.copy_(source)
