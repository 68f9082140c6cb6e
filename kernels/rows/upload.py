"""The way of a pass's plan to the device that runs it."""

from torch import Tensor

from kernels.device import runs_triton


def upload(source: Tensor, target: Tensor) -> None:
    """target[:] = source, both contiguous [count]; source: in page-locked memory, not to be changed before that is done.

    Between other kernels a small copy by a kernel takes a third of the time of one by a GPU's copy engine, which the
    kernels before and after it wait for.
    """
    if runs_triton(target):
        from kernels.rows import upload_triton

        upload_triton.upload(source, target)
        return
    target.copy_(source)
