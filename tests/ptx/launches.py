"""The project's launch functions with the emulator in place of a GPU: kernels are compiled for an H100, and run on CPU tensors.

Triton decides when it is imported whether it interprets kernels. So this needs a process of its own (own_process.py).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime import JITFunction

from tests.ptx.machine import Argument, TensorMap, Way, run_ptx

_H100 = GPUTarget("cuda", 90, 32)
_DTYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.uint8: "u8",
}
_LAUNCH_OPTIONS = ("num_warps", "maxnreg", "launch_pdl")
_compiled: dict[Any, Any] = {}

Edit = Callable[[str], str]
"""A change of a kernel's PTX."""


def _type_of(value: Any) -> str:
    """The type of a run-time argument, as Triton writes it."""
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{_DTYPES[value.base.dtype]}{list(value.block_shape)},{value.layout!r}>"
    if isinstance(value, Tensor):
        return "*" + _DTYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    assert isinstance(value, int) and -(2**31) <= value < 2**31, value
    return "i32"


def _divisible(value: Any) -> bool:
    """Whether Triton compiles for an address or a number that 16 divides."""
    if isinstance(value, Tensor):
        return value.data_ptr() % 16 == 0
    return isinstance(value, int) and value % 16 == 0


def _compile(kernel: Any, bound: dict[str, Any], options: dict[str, Any]) -> tuple[Any, list[str]]:
    """The kernel as a launch with these arguments compiles it, and the names of those that it is given at run time."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for number, parameter in enumerate(kernel.params):
        value = bound[parameter.name]
        specialises = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (specialises and type(value) is int and value == 1):
            signature[parameter.name], constants[(number,)] = "constexpr", value
            continue
        signature[parameter.name] = _type_of(value)
        if specialises and not parameter.do_not_specialize_on_alignment and _divisible(value):
            attributes[(number,)] = [["tt.divisibility", 16]]
    key = id(kernel), repr((signature, constants, attributes, options))
    if key not in _compiled:
        source = GluonASTSource if kernel.is_gluon() else ASTSource
        made = source(kernel, signature=signature, constexprs=constants, attrs=attributes)
        _compiled[key] = compile(made, target=_H100, options=options)
    return _compiled[key], [name for name, kind in signature.items() if kind != "constexpr"]


def _flat(values: list[Any], descriptors: list[Any]) -> list[Argument]:
    """Arguments as parameters. A tensor descriptor is a tensor map, then its shape and its strides."""
    rest = iter(descriptors)
    flat: list[Argument] = []
    for value in values:
        if not isinstance(value, TensorDescriptor):
            flat.append(value)
            continue
        meta = next(rest)
        shape, strides = list(value.shape), list(value.strides)
        flat += [
            TensorMap(value.base, shape, strides, list(meta["block_size"]), meta["swizzle"]),
            *shape,
            *strides,
        ]
    return flat


class _Emulated:
    """Stands for a kernel: `kernel[grid](...)` runs in the emulator."""

    def __init__(
        self, kernel: Any, programs: int | None, way: Way, chained: tuple[Tensor, ...], edit: Edit | None
    ) -> None:
        self.kernel, self.programs, self.way, self.chained, self.edit = kernel, programs, way, chained, edit

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            names = self.kernel.arg_names
            # An option may be an argument of the kernel too.
            options = {name: value for name, value in kwargs.items() if name in _LAUNCH_OPTIONS}
            bound = dict(zip(names, args, strict=False)) | {n: v for n, v in kwargs.items() if n in names}
            assert set(kwargs) <= {*options, *bound}
            compiled, given = _compile(self.kernel, bound, options)
            meta = compiled.metadata
            assert meta.global_scratch_size == 0
            ptx = compiled.asm["ptx"]
            size = (self.programs or grid[0], *grid[1:], 1, 1)
            flat = _flat([bound[name] for name in given], meta.tensordesc_meta or [])
            edited = ptx if self.edit is None else self.edit(ptx)
            run_ptx(edited, (size[0], size[1], size[2]), flat, meta.shared, self.way, self.chained)

        return launch


@contextmanager
def emulating(
    module: ModuleType,
    way: Way,
    *,
    programs: int | None = None,
    chained: tuple[Any, ...] = (),
    edit: Edit | None = None,
) -> Iterator[None]:
    """Within it, a module's `launch` runs its kernels in the emulator, and chains them to the launches before, as on Hopper.

    programs: how many to launch. None: as many as `launch` asks for.
    chained: the tensors among these may not be touched before griddepcontrol.wait.
    edit: makes the PTX that is run, to put a fault into it.
    """
    kernels = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, JITFunction) and name.endswith("_kernel")
    }
    tensors = tuple(value for value in chained if isinstance(value, Tensor))
    replaced: dict[str, Any] = {
        name: _Emulated(kernel, programs, way, tensors, edit) for name, kernel in kernels.items()
    }
    replaced["chaining"] = lambda: {"CHAINED": True, "launch_pdl": True}
    saved = {name: getattr(module, name) for name in replaced}
    try:
        for name, value in replaced.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in saved.items():
            setattr(module, name, value)
