"""Triton kernels on a GPU at Qwen3-8B's shapes in bfloat16: near float64, and the same bits for a row in any launch."""

from collections.abc import Callable

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from torch import Tensor

from kernels import (
    AttentionBatch,
    PackedLinear,
    attention_triton,
    gumbel_noise,
    linear,
    linear_triton,
    paged_attention,
    qk_norm_rope,
    rms_norm,
    silu_mul,
)
from kernels.bench import HEAD_DIM, HEADS, KV_HEADS, PAGE, SHAPES, variants

DEVICE = torch.device("cuda")
SCALE = HEAD_DIM**-0.5


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=DEVICE, dtype=torch.bfloat16)


def error(got: Tensor, exact: Tensor) -> float:
    """Relative Frobenius norm; NaN where got has one."""
    return ((got.double() - exact.double()).norm() / exact.double().norm()).item()


@pytest.mark.parametrize("name", SHAPES)
def test_linear_rows_are_the_same_bits_in_any_launch(name: str) -> None:
    outs, ins = SHAPES[name]
    weight, x = randn(outs, ins), randn(2048, ins, seed=1)
    layer = PackedLinear(weight, None, False)
    full = linear(x, layer)
    assert error(full[:128], x[:128].double() @ weight[:, :].double().T) < 3e-3
    assert error(full[-8:], x[-8:].double() @ weight.double().T) < 3e-3
    for rows in (1, 2, 8, 17, 32, 33, 64, 100, 128, 200, 256, 300, 512):
        for start in (0, 2048 - rows):
            assert torch.equal(linear(x[start : start + rows], layer), full[start : start + rows]), (
                rows,
                start,
            )


@pytest.mark.parametrize("name", ["qkv", "o", "down"])
def test_tiles_do_not_change_a_bit(name: str) -> None:
    outs, ins = SHAPES[name]
    layer, x = PackedLinear(randn(outs, ins), None, False), randn(2048, ins, seed=1)
    differing: list[str] = []
    expected: dict[int, Tensor] = {}
    for rows in (1, 32, 64, 128, 256, 2048):
        for segments, tiles in variants(outs, ins, rows):
            got = linear_triton.linear(x[:rows], layer, tiles, segments)
            if segments not in expected:
                cut = linear_triton.LinearTiles(128, 128, 64, False, 8, 4)
                expected[segments] = linear_triton.linear(x, layer, cut, segments)
            if not torch.equal(got, expected[segments][:rows]):
                differing.append(f"{rows} rows, {segments} segments, {tiles}")
    assert not differing


def attention_inputs(rows: int, start: int, groups: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Queries, page table, caches (NaN where no row of theirs sees them) and limits for causal rows from `start` on."""
    used = -(-(start + rows) // PAGE)
    width = -(-used // 8) * 8
    table = torch.zeros(groups, width, dtype=torch.int64, device=DEVICE)
    order = torch.randperm(groups * used, generator=torch.Generator(DEVICE).manual_seed(3), device=DEVICE) + 1
    table[:, :used] = order.view(groups, used)
    shape = (KV_HEADS, groups * used + 1, PAGE, HEAD_DIM)
    k_cache, v_cache = randn(*shape, seed=4), randn(*shape, seed=5)
    for cache in (k_cache, v_cache):
        cache[:, 0] = float("nan")
        tail = (start + rows) % PAGE
        if tail:
            cache[:, table[:, used - 1], tail:] = float("nan")
    limits = (torch.arange(rows, device=DEVICE) + start + 1).repeat(groups, 1)
    return randn(groups, rows, HEADS, HEAD_DIM, seed=6), table, k_cache, v_cache, limits


def batch_of(table: Tensor, limits: Tensor, diffusion: bool = False) -> AttentionBatch:
    return AttentionBatch(0, table, limits, PAGE, HEADS // KV_HEADS, diffusion)


@pytest.mark.parametrize(
    ("rows", "start", "groups"), [(1, 999, 1), (32, 1000, 1), (5, 200, 3), (300, 900, 1), (32, 9200, 2)]
)
def test_attention_rows_are_the_same_bits_in_any_launch(rows: int, start: int, groups: int) -> None:
    q, table, k_cache, v_cache, limits = attention_inputs(rows, start, groups)
    full = paged_attention(q, k_cache, v_cache, batch_of(table, limits), SCALE)
    keys, values = (c.nan_to_num(0.0).double() for c in (k_cache, v_cache))
    assert error(full, paged_attention(q.double(), keys, values, batch_of(table, limits), SCALE)) < 6e-3
    for split in (True, False):
        for queries in (64, 128):
            got = attention_triton.paged_attention(
                q, k_cache, v_cache, batch_of(table, limits), SCALE, split=split, queries=queries
            )
            assert torch.equal(got, full), (split, queries)
    group = groups - 1
    for row in sorted({0, rows // 2, rows - 1}):
        alone = batch_of(table[group : group + 1], limits[group : group + 1, row : row + 1])
        got = paged_attention(q[group : group + 1, row : row + 1], k_cache, v_cache, alone, SCALE)
        assert torch.equal(got[0, 0], full[group, row]), row


@pytest.mark.parametrize(("rows", "start", "groups"), [(32, 1000, 1), (8, 0, 2), (32, 9200, 1)])
def test_diffusion_blocks_see_the_cache_and_themselves(rows: int, start: int, groups: int) -> None:
    q, table, k_cache, v_cache, limits = attention_inputs(rows, start, groups)
    batch = batch_of(table, torch.full_like(limits, start), diffusion=True)
    block_k = randn(groups, rows, HEADS + KV_HEADS, HEAD_DIM, seed=7)[:, :, HEADS:]
    block_v = randn(groups, rows, KV_HEADS, HEAD_DIM, seed=8)
    full = paged_attention(q, k_cache, v_cache, batch, SCALE, block_k, block_v)
    keys, values = (c.nan_to_num(0.0).double() for c in (k_cache, v_cache))
    exact = paged_attention(q.double(), keys, values, batch, SCALE, block_k.double(), block_v.double())
    assert error(full, exact) < 6e-3
    for split in (True, False):
        got = attention_triton.paged_attention(
            q, k_cache, v_cache, batch, SCALE, block_k, block_v, split=split
        )
        assert torch.equal(got, full), split


def test_row_kernels_match_their_references() -> None:
    x, weight = randn(33, 4096), randn(4096, seed=1)
    assert error(rms_norm(x, weight, 1e-6), rms_norm(x.double(), weight.double(), 1e-6)) < 5e-3
    assert error(silu_mul(x), silu_mul(x.double())) < 3e-3
    qkv, heads = randn(33, 48, HEAD_DIM, seed=2), randn(40, HEAD_DIM, seed=3)
    cos, sin = randn(33, 1, HEAD_DIM, seed=4), randn(33, 1, HEAD_DIM, seed=5)
    slots = torch.randperm(64, device=DEVICE)[:33]
    caches = [torch.zeros(8, 64, HEAD_DIM, device=DEVICE, dtype=torch.bfloat16) for _ in range(2)]
    expected = [cache.double() for cache in caches]
    out = qk_norm_rope(qkv, heads, cos, sin, 1e-6, slots, *caches)
    rope = cos.double(), sin.double()
    exact = qk_norm_rope(qkv.double(), heads.double(), *rope, 1e-6, slots, expected[0], expected[1])
    assert error(out, exact) < 6e-3
    assert error(caches[0], expected[0]) < 6e-3
    assert torch.equal(caches[1].double(), expected[1])

    def alone(kernel: Callable[[Tensor], Tensor], rows: Tensor) -> None:
        assert torch.equal(kernel(rows[7:8]), kernel(rows)[7:8])

    alone(lambda rows: rms_norm(rows, weight, 1e-6), x)
    alone(silu_mul, x)


def test_gumbel_noise_has_the_counters_of_the_cpu() -> None:
    arguments = ([5, 5, 2**63 - 1], [9, 10, 0], 151_936)
    expected = gumbel_noise(*arguments, torch.device("cpu"))
    torch.testing.assert_close(gumbel_noise(*arguments, DEVICE).cpu(), expected, rtol=1e-5, atol=5e-6)
