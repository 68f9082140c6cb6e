"""The emulator as a Python function: PTX, a grid and arguments, all on the CPU. The C++ in emulator/ is built on first use."""

import ctypes
import hashlib
import os
import shutil
import struct
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, get_args

from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
_SOURCES = Path(__file__).resolve().parent / "emulator"
_FLAGS = ("-O2", "-Wall", "-Wextra", "-std=c++17", "-ffp-contract=off", "-shared", "-fPIC")
_TENSOR_MAP_MAGIC = 0x54454E534D415031
_REPORT_BYTES = 1 << 18


CopyTime = Literal["early", "late", "random"]
"""See `Way.copies`."""


class EmulationError(Exception):
    """What the emulator has found, with the lines of the PTX and of the kernel's source."""


@dataclass(frozen=True)
class Way:
    """One of the orders in which a GPU might do things. A kernel is right if its results are right in all of them."""

    products: Literal["early", "late"] = "late"
    """When a wgmma reads its operands and writes its sums: when it is issued, or when it is waited for."""
    copies: CopyTime = "late"
    """When a bulk copy is done: when it is issued, when all warps wait (in any order, if there is a seed), or at any time."""
    seed: int = 0
    """0: warps run in turn, each until it waits. Odd: in random order. Even: by priorities, so that some wait for long."""

    def __str__(self) -> str:
        return f"{self.products} products, {self.copies} copies, seed {self.seed}"


WAYS = (
    Way("early", "early"),
    Way("late", "early"),
    Way("late", "late"),
    Way("early", "late"),
    Way("late", "random", 1),
    Way("late", "random", 2),
    Way("late", "early", 3),
    Way("late", "late", 4),
    Way("late", "early", 6),
    *(Way("late", "late", seed) for seed in (5, 9, 10)),
)
"""Together they find every fault that test_faults.py puts into kernels."""
FEW_WAYS = WAYS[0], WAYS[2], WAYS[4]
"""What finds most faults, for tests that must be quick."""


@dataclass(frozen=True)
class TensorMap:
    """An argument that copies read tile by tile."""

    tensor: Tensor
    shape: list[int]
    strides: list[int]
    # Innermost dimension last.
    box: list[int]
    # 0, or 1, 2, 3 for 32, 64 and 128 bytes.
    swizzle: int

    def pack(self) -> bytes:
        """The map as `TensorMap` in emulator/machine.h. Asserts what cuTensorMapEncodeTiled demands."""
        size, rank = self.tensor.itemsize, len(self.shape)
        assert len(self.box) == rank and 1 <= rank <= 5
        assert self.strides[-1] == 1
        assert self.tensor.data_ptr() % 16 == 0, "the tensor is not aligned to 16 bytes"
        assert all(1 <= length <= 256 for length in self.box), self.box
        assert self.box[-1] * size % 16 == 0, f"rows of {self.box} are no multiple of 16 bytes"
        assert all(0 < length <= 2**32 for length in self.shape), self.shape
        assert all(s * size % 16 == 0 and 0 < s * size < 2**40 for s in self.strides[:-1]), self.strides
        dimensions = [*self.shape[::-1], *[1] * (5 - rank)]
        strides = [*(stride * size for stride in self.strides[-2::-1]), *[0] * (5 - rank)]
        box = [*self.box[::-1], *[1] * (5 - rank)]
        numbers = (self.tensor.data_ptr(), *dimensions, *strides, *box, rank, size, self.swizzle, 0)
        return struct.pack("<QQ5Q4Q5I4H", _TENSOR_MAP_MAGIC, *numbers).ljust(128, b"\0")


Argument = Tensor | TensorMap | int | float


class _Options(ctypes.Structure):
    """`Options` in emulator/machine.h."""

    _fields_ = (
        ("late_products", ctypes.c_int32),
        ("copies", ctypes.c_int32),
        ("seed", ctypes.c_int32),
    )


class _Buffer(ctypes.Structure):
    """`Buffer` in emulator/machine.h."""

    _fields_ = (
        ("begin", ctypes.c_uint64),
        ("end", ctypes.c_uint64),
        ("chained", ctypes.c_int32),
        ("name", ctypes.c_char_p),
    )


def compiler() -> str | None:
    """The C++ compiler: $CXX, g++ or clang++."""
    return next(
        (name for name in (os.environ.get("CXX"), "g++", "clang++") if name and shutil.which(name)), None
    )


@cache
def _library() -> ctypes.CDLL:
    """The built emulator, from .cache/ if its sources, the flags and the compiler are the same."""
    name = compiler()
    assert name is not None, "no C++ compiler"
    files = sorted(_SOURCES.iterdir())
    key = hashlib.sha256(repr((name, _FLAGS)).encode())
    for file in files:
        key.update(file.read_bytes())
    built = ROOT / ".cache" / f"ptx-{key.hexdigest()[:16]}.so"
    if not built.exists():
        built.parent.mkdir(exist_ok=True)
        # Another process may build it at the same time.
        part = built.with_suffix(f".{os.getpid()}")
        sources = [str(file) for file in files if file.suffix == ".cpp"]
        subprocess.run([name, *_FLAGS, "-o", str(part), *sources], check=True)
        part.replace(built)
    library = ctypes.CDLL(str(built))
    library.ptx_load.restype = ctypes.c_void_p
    library.ptx_error.restype = ctypes.c_char_p
    return library


@cache
def _load(ptx: str) -> ctypes.c_void_p:
    """The parsed PTX. It is kept, because the tests run a kernel many times."""
    library = _library()
    loaded = ctypes.c_void_p(library.ptx_load(ptx.encode()))
    if error := library.ptx_error(loaded):
        raise EmulationError(error.decode())
    return loaded


def _packed(argument: Argument, size: int) -> bytes:
    """An argument as the bytes of a parameter."""
    if isinstance(argument, TensorMap):
        return argument.pack()
    if isinstance(argument, Tensor):
        assert argument.device.type == "cpu"
        return struct.pack("<Q", argument.data_ptr())
    if isinstance(argument, float):
        return struct.pack("<f", argument)
    return (argument % (1 << 8 * size)).to_bytes(size, "little")


def _buffers(arguments: list[Argument], chained: tuple[Tensor, ...]) -> list[_Buffer]:
    """The memory that the kernel may touch: the storages of its tensors."""
    names: dict[int, list[str]] = {}
    ends: dict[int, int] = {}
    for number, argument in enumerate(arguments):
        tensor = argument.tensor if isinstance(argument, TensorMap) else argument
        if isinstance(tensor, Tensor):
            begin = tensor.untyped_storage().data_ptr()
            names.setdefault(begin, []).append(f"argument {number} {tuple(tensor.shape)}")
            ends[begin] = begin + tensor.untyped_storage().nbytes()
    late = {tensor.untyped_storage().data_ptr() for tensor in chained}
    return [_Buffer(begin, ends[begin], begin in late, ", ".join(names[begin]).encode()) for begin in names]


def run_ptx(
    ptx: str,
    grid: tuple[int, int, int],
    arguments: list[Argument],
    shared_bytes: int,
    way: Way,
    chained: tuple[Tensor, ...] = (),
) -> None:
    """Run PTX, and raise EmulationError if it does anything that a GPU might do otherwise.

    arguments: in the order of the parameters. Parameters without one are 0.
    chained: tensors that nothing may touch before griddepcontrol.wait.
    """
    library, loaded = _library(), _load(ptx)
    count = library.ptx_parameter_count(loaded)
    sizes = [library.ptx_parameter_size(loaded, number) for number in range(count)]
    values = [*arguments, *[0] * (count - len(arguments))]
    packed = [_packed(value, size) for value, size in zip(values, sizes, strict=True)]
    assert [len(value) for value in packed] == sizes, "the arguments are not those of the kernel"
    buffers = _buffers(arguments, chained)
    options = _Options(way.products == "late", get_args(CopyTime).index(way.copies), way.seed)
    report = ctypes.create_string_buffer(_REPORT_BYTES)
    threads = library.ptx_threads(loaded)
    assert threads > 0 and threads % 32 == 0
    fine = library.ptx_run(
        loaded,
        b"".join(packed),
        (ctypes.c_uint32 * 3)(*grid),
        threads,
        shared_bytes,
        (_Buffer * max(1, len(buffers)))(*buffers),
        len(buffers),
        ctypes.byref(options),
        report,
        len(report),
    )
    if not fine:
        raise EmulationError(f"{way}\n{report.value.decode()}")
