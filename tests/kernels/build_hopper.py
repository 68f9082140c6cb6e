"""Compile the Gluon kernels for an H100 with the installed Triton. No GPU is needed. TRITON_INTERPRET must not be set.

`python -m tests.kernels.build_hopper`; prints a line for each kernel.
"""

import time
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import compile
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from orthrus.kernels.attention import hopper as attention
from orthrus.kernels.linear import codes_hopper as codes
from orthrus.kernels.linear import grouped_hopper as grouped
from orthrus.kernels.linear import hopper as linear
from orthrus.kernels.linear import lossless_hopper as lossless
from orthrus.kernels.linear.descriptors import tile_layout
from orthrus.kernels.linear.stream import REGISTERS

H100 = GPUTarget("cuda", 90, 32)
DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp8e4nv": torch.float8_e4m3fn,
    "i32": torch.int32,
    "u8": torch.uint8,
}


def tile(dtype: str, *block: int, swizzled: bool = True) -> str:
    """The type of a tensor that TMA loads tile by tile."""
    layout = tile_layout(block, DTYPES[dtype], swizzled)
    return f"tensordesc<{dtype}{list(block)},{layout!r}>"


def build(
    name: str, kernel: Any, types: dict[str, str], constants: dict[str, Any], registers: int | None = None
) -> None:
    """Compile a kernel, and print how long it takes. All pointers are aligned to 16 bytes.

    types: the types of the arguments that are not constants, as Triton writes them. constants: the other arguments.
    registers: registers per thread when a program begins; None if the compiler chooses them.
    """
    begin = time.monotonic()
    names = kernel.arg_names
    aligned = [["tt.divisibility", 16]]
    source = GluonASTSource(
        kernel,
        signature={argument: types.get(argument, "constexpr") for argument in names},
        constexprs={(names.index(argument),): value for argument, value in constants.items()},
        attrs={(i,): aligned for i, argument in enumerate(names) if types.get(argument, "").startswith("*")},
    )
    compile(source, target=H100, options={"num_warps": 4, "launch_pdl": True, "maxnreg": registers})
    print(f"{name}: {time.monotonic() - begin:.1f} s", flush=True)


def build_linear(
    dtype: str,
    rows: int,
    *,
    gated: bool = False,
    part_leaves: int = 1,
    picks: bool = False,
    stored: str = "bf16",
) -> None:
    """stored: the dtype of the results; those in e4m3 are in the order of words."""
    depth = 256 if dtype == "fp8e4nv" else 128
    pointers = {
        "w_scales": "*fp32",
        "bias": "*bf16",
        "out": f"*{stored}",
        "num_ar": "*i32",
        "temperatures": "*fp32",
        "keys": "*i32",
        "out_wanted": "*i32",
        "values": "*fp32",
        "indices": "*i32",
    }
    numbers = ("num_rows", "num_outs", "parts", "all_steps", "all_leaves", "first_leaf", "first_token")
    build(
        f"linear, {dtype}, {rows} rows",
        linear._stream_kernel,
        {"w": tile(dtype, 64, depth), "x": tile(dtype, rows, depth)}
        | pointers
        | dict.fromkeys(numbers, "i32")
        | {"factor": "fp32"},
        {
            "OUTS": 64,
            "ROWS": rows,
            "DEPTH": depth,
            "STAGES": 6,
            "PART_LEAVES": part_leaves,
            "TWO_VIEWS": not gated,
            "GATED": gated,
            "SCALED": dtype == "fp8e4nv",
            "SPLIT": False,
            "WHOLE": part_leaves == 1,
            "HAS_BIAS": False,
            "PICKS": picks,
            "IN_WORDS": stored == "fp8e4nv",
            "CHAINED": True,
            "num_warps": 4,
        },
    )


def build_codes(rows: int, consumers: int, *, gated: bool = False, split: bool = False) -> None:
    stored = "*fp8e4nv" if gated else "*fp32" if split else "*bf16"
    pointers = {"scales": "*fp32", "bias": "*bf16", "out": stored}
    tiles = {
        "codes": tile("i32", 8, 256, swizzled=False),
        "tables": tile("i32", 256),
        "x": tile("fp8e4nv", rows, 256),
    }
    numbers = ("num_rows", "num_outs", "parts", "all_steps")
    build(
        f"codes, {rows} rows, {consumers} consumers",
        codes._codes_kernel,
        tiles | pointers | dict.fromkeys(numbers, "i32") | {"factor": "fp32"},
        {
            "ROWS": rows,
            "STAGES": 3,
            "CONSUMERS": consumers,
            "REGISTERS": codes._REGISTERS[rows],
            "WORDS": codes.words_layout(),
            "GATED": gated,
            "SPLIT": split,
            "HAS_BIAS": False,
            "CHAINED": True,
        },
        codes.launch_registers(rows, consumers),
    )


def build_grouped(bits: int, rows: int, *, gated: bool = False, split: bool = False) -> None:
    """bits: 4, or 0 for FP8."""
    inputs = "bf16" if bits else "fp8e4nv"
    scales = "fp16" if bits else "fp32"
    groups = tile(scales, 64)
    types = {
        "w": tile("i32", 64, 32) if bits else tile("fp8e4nv", 64, 128),
        "x": tile(inputs, rows, 128),
        "scales": groups,
        "zeros": groups if inputs == "fp8e4nv" else tile("u8", 128),
        "x_scales": groups if inputs == "bf16" else tile("fp32", max(32, rows)),
        "bias": "*bf16",
        "out": "*fp32" if split else "*bf16",
    }
    numbers = ("num_rows", "num_outs", "x_stride", "steps", "parts")
    build(
        f"grouped, {bits} bits, {rows} rows",
        grouped._grouped_stream_kernel,
        types | dict.fromkeys(numbers, "i32"),
        {
            "OUTS": 64,
            "ROWS": rows,
            "DEPTH": 128,
            "STAGES": 4,
            "CONSUMERS": 2 if bits else 1,
            "GROUP_DEPTHS": 1,
            "BITS": bits,
            "WORDS": grouped._words_layout(4),
            "SUMS": grouped._SUMS,
            "GATED": gated,
            "SPLIT": split,
            "HAS_BIAS": False,
            "CHAINED": True,
        },
        grouped._TWO_CONSUMER_REGISTERS if bits else REGISTERS,
    )


def build_lossless(rows: int, *, gated: bool = False, part_leaves: int = 1, picks: bool = False) -> None:
    pointers = {
        "scales": "*fp32",
        "bias": "*bf16",
        "out": "*bf16",
        "num_ar": "*i32",
        "temperatures": "*fp32",
        "keys": "*i32",
        "out_wanted": "*i32",
        "values": "*fp32",
        "indices": "*i32",
    }
    tiles = {
        "high": tile("i32", 64, 32),
        "low": tile("i32", 64, 16),
        "exceptions": tile("i32", 32),
        "x": tile("bf16", rows, 128),
    }
    numbers = (
        "num_rows",
        "num_outs",
        "parts",
        "all_steps",
        "all_leaves",
        "first_leaf",
        "row_steps",
        "first_token",
    )
    build(
        f"lossless, {rows} rows",
        lossless._lossless_stream_kernel,
        tiles | pointers | dict.fromkeys(numbers, "i32"),
        {
            "OUTS": 64,
            "ROWS": rows,
            "DEPTH": 128,
            "PACKED_STAGES": lossless.num_stages(rows)[0],
            "WIDE_STAGES": lossless.num_stages(rows)[1],
            "WIDE_TILE": lossless.WIDE_TILE,
            "HIGH": lossless.words_layout(8),
            "LOW": lossless.words_layout(4),
            "PART_LEAVES": part_leaves,
            "TWO_VIEWS": not gated,
            "GATED": gated,
            "SPLIT": False,
            "HAS_BIAS": False,
            "PICKS": picks,
            "CHAINED": True,
        },
        lossless.REGISTERS,
    )


def build_attention(words: bool = False) -> None:
    """words: whether results are stored as e4m3 in the order of words."""
    whole, piece = tile("bf16", 64, 128), tile("bf16", 16, 64)
    tiles = {"k_pages": whole, "v_pages": whole, "k_pieces": piece, "v_pieces": piece, "rows_desc": whole}
    pointers = {
        "qkv": "*bf16",
        "work": "*i32",
        "out": "*fp8e4nv" if words else "*bf16",
        "accs": "*fp32",
        "tops": "*fp32",
        "norms": "*fp32",
    }
    build(
        "attention",
        attention._attention_kernel,
        tiles | pointers | {"num_slots": "i32", "scale": "fp32", "spare": "i32", "factor": "fp32"},
        {
            "PER_KV": 4,
            "KV_HEADS": 8,
            "PAGE": 64,
            "DIM": 128,
            "WIDTH": 128,
            "QUERIES": 64,
            "KEYS": 64,
            "STAGES": 6,
            "PROGRAMS": 132,
            "QUERY_TILE": gl.NVMMASharedLayout.get_default_for([64, 128], gl.bfloat16),
            "TRIMS_END": True,
            "IN_WORDS": words,
            "CHAINED": True,
        },
    )


if __name__ == "__main__":
    build_linear("bf16", 16, picks=True)
    build_linear("bf16", 32, gated=True)
    build_linear("fp8e4nv", 32, part_leaves=2)
    build_linear("fp8e4nv", 32, gated=True, stored="fp8e4nv")
    build_grouped(4, 8, gated=True)
    build_codes(16, 1)
    build_codes(32, 3, gated=True)
    build_codes(32, 2, split=True)
    build_codes(64, 3)
    build_codes(128, 1)
    build_grouped(0, 16, split=True)
    build_grouped(0, 64)
    build_lossless(8, picks=True)
    build_lossless(64, gated=True, part_leaves=8)
    build_lossless(128, part_leaves=2)
    build_attention()
    build_attention(words=True)
