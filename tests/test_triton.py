"""The Triton kernels in Triton's interpreter on the CPU, each against its plain PyTorch version, and a row against its company.

The interpreter multiplies tiles with numpy, so bits are compared between launches whose tiles have one shape; all shapes, in
bfloat16 on the matrix units, are compared in tests/gpu.
"""

from itertools import pairwise

import pytest
import torch

pytest.importorskip("triton")

from kernels import (
    AttentionBatch,
    PackedLinear,
    activation_triton,
    attention_triton,
    linear_triton,
    paged_attention,
    qk_norm_rope,
    qk_norm_rope_triton,
    rms_norm,
    rms_norm_triton,
    sampling_triton,
    silu_mul,
)
from kernels.attention import KV_SPLIT
from kernels.linear_triton import LinearTiles
from kernels.sampling import gumbel_noise, noise_keys

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="Triton compiles here: tests/gpu checks the kernels"
)

DTYPES = [torch.float16, torch.float32]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_near(got: torch.Tensor, exact: torch.Tensor) -> None:
    """Relative Frobenius error within a few units of got's dtype."""
    error = (got.double() - exact.double()).norm() / exact.double().norm()
    assert error < 4 * torch.finfo(got.dtype).eps, error


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("outs", "ins", "segments"), [(72, 1064, 2), (200, 320, 1), (64, 520, 4), (96, 2048, 4)]
)
def test_linear_is_the_product_whatever_the_tiles(
    outs: int, ins: int, segments: int, dtype: torch.dtype
) -> None:
    """Edges that no tile divides, a bias, more row tiles than a band, segments split and walked: one tree, equal bits."""
    weight, bias, x = randn(outs, ins, dtype=dtype), randn(outs, seed=1, dtype=dtype), randn(20, ins, seed=2)
    layer, x = PackedLinear(weight, bias, False), x.to(dtype)
    exact = x.double() @ weight.double().T + bias.double()
    tiles = LinearTiles(64, 16, 128, split=True, warps=4, stages=2)
    split = linear_triton.linear(x, layer, tiles, segments)
    assert_near(split, exact)
    tiles = LinearTiles(64, 16, 128, split=False, warps=4, stages=2)
    assert torch.equal(linear_triton.linear(x, layer, tiles, segments), split)
    assert_near(linear_triton.linear(x, layer, LinearTiles(128, 32, 64, False, 4, 2), segments), exact)
    for rows in (slice(0, 1), slice(3, 4), slice(3, 19)):
        assert torch.equal(linear_triton.linear(x[rows], layer, tiles, segments), split[rows])
    assert not linear_triton._arrivals(x.device).any()


def test_linear_without_bias_over_many_row_tiles() -> None:
    x, weight = randn(300, 32), randn(70, 32, seed=1)
    tiles = LinearTiles(64, 16, 32, False, 4, 2)
    assert_near(
        linear_triton.linear(x, PackedLinear(weight, None, False), tiles), x.double() @ weight.double().T
    )


def test_segments_depend_on_the_weight_and_fill_the_gpu() -> None:
    shapes = [(6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288), (151936, 4096), (1024, 1024)]
    assert [linear_triton.num_segments(*shape) for shape in shapes] == [2, 4, 1, 4, 1, 2]


def test_linear_refuses_rows_that_the_copy_engine_cannot_read() -> None:
    with pytest.raises(ValueError, match="50 inputs"):
        linear_triton.linear(randn(4, 50), PackedLinear(randn(8, 50), None, False))


def attention_case(
    groups: int, rows: int, starts: list[int], diffusion: bool, per_kv: int, dtype: torch.dtype, dim: int = 16
) -> tuple[list[torch.Tensor], AttentionBatch]:
    """q, caches with NaN where nothing was written, block keys and values, and the batch. Groups depend on their index alone."""
    kv_heads, page = 2, 16
    used = max(1, max(starts) + (0 if diffusion else rows))
    width = -(-used // KV_SPLIT) * (KV_SPLIT // page)
    q = torch.stack([randn(40, kv_heads * per_kv, dim, seed=10 + g)[:rows] for g in range(groups)])
    keys, values = randn(kv_heads, 400, page, dim, seed=1), randn(kv_heads, 400, page, dim, seed=2)
    table = torch.zeros(groups, width, dtype=torch.int64)
    for g, start in enumerate(starts):
        pages = torch.randperm(399, generator=torch.Generator().manual_seed(g))[:width] + 1
        if groups * width < 300:
            pages = torch.arange(width) + 1 + g * width
        count = -(-(start + (0 if diffusion else rows)) // page)
        table[g, :count] = pages[:count]
    first = torch.tensor(starts)[:, None]
    limits = first.expand(-1, rows).contiguous() if diffusion else first + 1 + torch.arange(rows)
    block_k = torch.stack([randn(40, kv_heads, dim, seed=20 + g)[:rows] for g in range(groups)])
    block_v = torch.stack([randn(40, kv_heads, dim, seed=30 + g)[:rows] for g in range(groups)])
    tensors = [t.to(dtype) for t in (q, keys, values, block_k, block_v)]
    return tensors, AttentionBatch(0, table, limits, page, per_kv, diffusion)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("starts", "rows", "diffusion", "per_kv"),
    [([0, 37, 260], 5, False, 3), ([1020], 5, False, 2), ([0, 1, 260], 7, True, 2), ([40], 1, True, 5)],
)
def test_attention_matches_its_reference(
    starts: list[int], rows: int, diffusion: bool, per_kv: int, dtype: torch.dtype
) -> None:
    (q, keys, values, block_k, block_v), batch = attention_case(
        len(starts), rows, starts, diffusion, per_kv, dtype
    )
    block = (block_k, block_v) if diffusion else (None, None)
    exact_block = (block_k.double(), block_v.double()) if diffusion else (None, None)
    exact = paged_attention(q.double(), keys.double(), values.double(), batch, 0.25, *exact_block)
    # Keys that no row sees may be anything, page 0 too.
    seen = torch.zeros(400 * 16, dtype=torch.bool)
    for g in range(len(starts)):
        positions = torch.arange(int(batch.limits[g].max()))
        seen[batch.page_table[g, positions // 16] * 16 + positions % 16] = True
    for cache in (keys, values):
        cache.flatten(1, 2)[:, ~seen] = float("nan")
    split = attention_triton.paged_attention(q, keys, values, batch, 0.25, *block, split=True)
    assert_near(split, exact)
    walked = attention_triton.paged_attention(q, keys, values, batch, 0.25, *block, split=False)
    assert torch.equal(walked, split)


def test_attention_rows_are_the_same_bits_in_any_company() -> None:
    """Alone, in a group of rows on either side of a segment's end, and beside other groups."""
    starts = [250, 300]
    (q, keys, values, *_), batch = attention_case(2, 12, starts, False, 4, torch.float16)
    full = attention_triton.paged_attention(q, keys, values, batch, 0.25)
    for g, row in ((0, 0), (0, 5), (0, 6), (0, 11), (1, 3)):
        alone = AttentionBatch(
            0, batch.page_table[g : g + 1], batch.limits[g : g + 1, row : row + 1], 16, 4, False
        )
        out = attention_triton.paged_attention(q[g : g + 1, row : row + 1], keys, values, alone, 0.25)
        assert torch.equal(out[0, 0], full[g, row]), (g, row)


def test_segments_tile_the_positions() -> None:
    edges = [0, *(256 * i for i in range(1, 5)), *(1024 + 512 * i for i in range(1, 15)), 9216, 10240]
    for index, (begin, end) in enumerate(pairwise(edges)):
        assert attention_triton.num_segments(begin + 1) == attention_triton.num_segments(end) == index + 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_row_kernels_match_their_references(dtype: torch.dtype) -> None:
    x, weight = randn(5, 40, dtype=dtype), randn(40, seed=1, dtype=dtype)
    assert_near(rms_norm_triton.rms_norm(x, weight, 1e-6), rms_norm(x.double(), weight.double(), 1e-6))
    assert_near(activation_triton.silu_mul(x), silu_mul(x.double()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_qk_norm_rope_matches_its_reference_and_writes_the_cache(dtype: torch.dtype) -> None:
    rows, heads, kv_heads, dim = 3, 4, 2, 16
    qkv, weight = randn(rows, heads + 2 * kv_heads, dim, dtype=dtype), randn(heads + kv_heads, dim, seed=1)
    cos, sin = randn(rows, 1, dim, seed=2), randn(rows, 1, dim, seed=3)
    weight, cos, sin = weight.to(dtype), cos.to(dtype), sin.to(dtype)
    slots = torch.tensor([7, 0, 33])
    caches = [torch.zeros(kv_heads, 40, dim, dtype=dtype) for _ in range(2)]
    exact = [cache.double() for cache in caches]
    out = qk_norm_rope_triton.qk_norm_rope(qkv, weight, cos, sin, 1e-6, slots, *caches)
    rope = cos.double(), sin.double()
    assert_near(out, qk_norm_rope(qkv.double(), weight.double(), *rope, 1e-6, slots, exact[0], exact[1]))
    for cache, other in zip(caches, exact, strict=True):
        assert_near(cache, other)
    assert torch.equal(qk_norm_rope_triton.qk_norm_rope(qkv, weight, cos, sin, 1e-6), out)


def test_gumbel_noise_has_the_counters_of_the_cpu() -> None:
    seeds, positions = [5, 5, 2**63 - 1], [9, 10, 0]
    keys = torch.tensor([noise_keys(s, p) for s, p in zip(seeds, positions, strict=True)])
    expected = gumbel_noise(seeds, positions, 3000, torch.device("cpu"))
    torch.testing.assert_close(sampling_triton.gumbel_noise(keys, 3000), expected, rtol=1e-5, atol=5e-6)
