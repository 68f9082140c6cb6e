"""The epilogue of the linear kernels in Triton: a tile of sums is stored."""

import triton
import triton.language as tl

from orthrus.kernels.rounding_triton import stored_place, stored_value


@triton.jit
def store_tile(
    total, out, row_at, row_end, out_at, num_rows, num_outs, factor,
    OUTS: tl.constexpr, ROWS: tl.constexpr, GATED: tl.constexpr, SPLIT: tl.constexpr, IN_WORDS: tl.constexpr,
):  # fmt: skip
    """Write the sums total [OUTS, ROWS], which begin at output out_at and row row_at, to out [rows, outs].

    GATED: store silu(gate) * up, which has half as many outputs. SPLIT: out is [parts, rows, outs]; program_id(1) is the part.
    factor, IN_WORDS: how they are stored if `out` is e4m3, see `Rounding`.
    """
    width = num_outs
    if GATED:
        # Blocks of 8 outputs: gate, up, gate, ... (see `alternate`); a thread holds both of a pair.
        gate, up = tl.split(tl.reshape(total, (OUTS // 16, 2, 8, ROWS)).permute(0, 2, 3, 1))
        total = tl.reshape(gate / (1.0 + tl.exp(-gate)) * up, (OUTS // 2, ROWS))
        out_at, width = out_at // 2, num_outs // 2
    row_index = row_at + tl.arange(0, ROWS)
    out_index = out_at + tl.arange(0, total.shape[0])
    inside = (row_index < row_end)[None, :] & (out_index < width)[:, None]
    offset = row_index[None, :].to(tl.int64) * width + stored_place(out_index, IN_WORDS)[:, None]
    if SPLIT:
        offset += tl.program_id(1) * num_rows.to(tl.int64) * num_outs
    tl.store(out + offset, stored_value(total, factor, out.dtype.element_ty), mask=inside)
