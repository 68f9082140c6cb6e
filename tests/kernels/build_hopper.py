"""Compile the Gluon kernels for an H100 with the installed Triton. No GPU is needed, and no interpreter must be asked for.

`python -m tests.kernels.build_hopper`; prints a line for each kernel.
"""

import time
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.compiler import compile
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from orthrus.kernels.attention import hopper as attention
from orthrus.kernels.linear import hopper as linear

H100 = GPUTarget("cuda", 90, 32)
DTYPES = {"bf16": gl.bfloat16, "fp8e4nv": gl.float8e4nv}


def tile(dtype: str, *block: int) -> str:
    """The type of a tensor that the copy engine reads tile by tile."""
    layout = gl.NVMMASharedLayout.get_default_for(list(block), DTYPES[dtype])
    return f"tensordesc<{dtype}{list(block)},{layout!r}>"


def build(name: str, kernel: Any, types: dict[str, str], constants: dict[str, Any]) -> None:
    """types: of the arguments that are not constants, as Triton writes them. All pointers are aligned to 16 bytes."""
    begin = time.monotonic()
    names = kernel.arg_names
    aligned = [["tt.divisibility", 16]]
    source = GluonASTSource(
        kernel,
        signature={argument: types.get(argument, "constexpr") for argument in names},
        constexprs={(names.index(argument),): value for argument, value in constants.items()},
        attrs={(i,): aligned for i, argument in enumerate(names) if types.get(argument, "").startswith("*")},
    )
    compile(source, target=H100, options={"num_warps": 4, "launch_pdl": True})
    print(f"{name}: {time.monotonic() - begin:.1f} s", flush=True)


def build_linear(dtype: str, rows: int, *, gated: bool = False, tree: int = 1, picks: bool = False) -> None:
    depth = 256 if dtype == "fp8e4nv" else 128
    pointers = {
        "w_scales": "*fp32",
        "x_scales": "*fp32",
        "bias": "*bf16",
        "out": "*bf16",
        "num_ar": "*i32",
        "temperatures": "*fp32",
        "keys": "*i32",
        "out_wanted": "*i32",
        "values": "*fp32",
        "indices": "*i32",
    }
    numbers = ("num_rows", "num_outs", "parts", "units", "leaves", "first_leaf", "first_token")
    build(
        f"linear, {dtype}, {rows} rows",
        linear._stream_kernel,
        {"w": tile(dtype, 64, depth), "x": tile(dtype, rows, depth)}
        | pointers
        | dict.fromkeys(numbers, "i32"),
        {
            "OUTS": 64,
            "ROWS": rows,
            "DEPTH": depth,
            "RING": 6,
            "TREE": tree,
            "TWO_VIEWS": not gated,
            "GATED": gated,
            "SCALED": dtype == "fp8e4nv",
            "SPLIT": False,
            "WHOLE": tree == 1,
            "HAS_BIAS": False,
            "PICKS": picks,
            "CHAINED": True,
            "num_warps": 4,
        },
    )


def build_attention() -> None:
    whole, piece = tile("bf16", 64, 128), tile("bf16", 16, 64)
    tiles = {"k_pages": whole, "v_pages": whole, "k_pieces": piece, "v_pieces": piece, "rows_desc": whole}
    pointers = {
        "qkv": "*bf16",
        "work": "*i32",
        "out": "*bf16",
        "accs": "*fp32",
        "tops": "*fp32",
        "norms": "*fp32",
    }
    build(
        "attention",
        attention._attention_kernel,
        tiles | pointers | {"slots": "i32", "scale": "fp32", "spare": "i32"},
        {
            "PER_KV": 4,
            "KV_HEADS": 8,
            "PAGE": 64,
            "DIM": 128,
            "WIDTH": 128,
            "QUERIES": 64,
            "KEYS": 64,
            "PLACES": 6,
            "PROGRAMS": 132,
            "QUERY_TILE": gl.NVMMASharedLayout.get_default_for([64, 128], gl.bfloat16),
            "TRIMS_END": True,
            "CHAINED": True,
        },
    )


if __name__ == "__main__":
    build_linear("bf16", 16, picks=True)
    build_linear("bf16", 32, gated=True)
    build_linear("fp8e4nv", 32, tree=2)
    build_attention()
