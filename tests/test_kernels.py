"""Every kernel's reference against plain arithmetic, and the rule they all obey: a row never notices its neighbours."""

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from kernels import (
    ROW_TILE,
    AttentionBatch,
    gumbel_noise,
    linear,
    pack_linear,
    paged_attention,
    rms_norm,
    silu_mul,
)
from kernels.attention import KV_SPLIT
from kernels.rope import apply_rope


@pytest.fixture(autouse=True, params=[1, 2], ids=["1 thread", "2 threads"])
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """However a kernel's work is shared out, a row's bits stay."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("outputs", "inputs"), [(96, 48), (640, 384), (384, 1152), (1000, 200), (256, 4096)])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_rows_are_the_same_bits_in_any_company(outputs: int, inputs: int, bias: bool) -> None:
    weight, offset = randn(outputs, inputs), randn(outputs, seed=1) if bias else None
    layer = pack_linear(weight, offset)
    x = randn(256, inputs, seed=2)
    full = linear(x, layer)
    exact = x.double() @ weight.double().T + (offset.double() if offset is not None else 0)
    torch.testing.assert_close(full.double(), exact, rtol=1e-4, atol=1e-3)
    for rows in (ROW_TILE, 8, 12, 20, 64, 100, 128):
        for start in (0, 3, 101):
            assert torch.equal(linear(x[start : start + rows], layer), full[start : start + rows])


def test_rms_norm_and_silu_mul_match_their_formulas() -> None:
    x, weight = randn(5, 3, 16), randn(3, 16, seed=1)
    expected = x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    torch.testing.assert_close(rms_norm(x, weight, 1e-6), expected)
    gate, up = randn(4, 8, seed=2), randn(4, 8, seed=3)
    torch.testing.assert_close(silu_mul(torch.cat([gate, up], -1)), gate * torch.sigmoid(gate) * up)


def test_rms_norm_rows_are_the_same_bits_in_any_company() -> None:
    x, weight = randn(64, 384), randn(384, seed=1)
    full = rms_norm(x, weight, 1e-6)
    for rows in (1, 4, 7, 32):
        assert torch.equal(rms_norm(x[5 : 5 + rows], weight, 1e-6), full[5 : 5 + rows])


def test_rope_rotates_pairs_of_halves() -> None:
    x = randn(3, 2, 8)
    angles = randn(3, 4, seed=1)
    cos, sin = angles.cos(), angles.sin()
    out = apply_rope(x, torch.cat([cos, cos], -1)[:, None], torch.cat([-sin, sin], -1)[:, None])
    first, second = x[..., :4], x[..., 4:]
    cos, sin = cos[:, None], sin[:, None]
    expected = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    torch.testing.assert_close(out, expected)


def attention_case(
    groups: int,
    rows: int,
    starts: list[int],
    diffusion: bool,
    pages_wide: int,
    page: int = 16,
    per_kv: int = 3,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, AttentionBatch]:
    """q, caches and batch; group g's pages and queries depend on g alone, so that cases of different size share values."""
    kv_heads, dim, total = 2, 16, 256
    q = torch.stack([randn(64, kv_heads * per_kv, dim, seed=100 + g)[:rows] for g in range(groups)])
    keys, values = randn(kv_heads, total, page, dim, seed=1), randn(kv_heads, total, page, dim, seed=2)
    tables = torch.stack(
        [torch.randperm(255, generator=torch.Generator().manual_seed(g))[:48] + 1 for g in range(groups)]
    )
    width = -(-pages_wide * page // KV_SPLIT) * (KV_SPLIT // page)
    table = torch.zeros(groups, width, dtype=torch.int64)
    table[:, :pages_wide] = tables[:, :pages_wide]
    start = torch.tensor(starts)[:, None]
    limits = start.expand(-1, rows) if diffusion else start + 1 + torch.arange(rows)
    return q, keys, values, AttentionBatch(0, table, limits, page, per_kv, diffusion)


@pytest.mark.parametrize("diffusion", [False, True])
@pytest.mark.parametrize("per_kv", [1, 3, 8])
def test_paged_attention_matches_a_loop_over_rows(diffusion: bool, per_kv: int) -> None:
    groups, rows, starts = 3, 5, [0, 37, 300]
    q, keys, values, batch = attention_case(groups, rows, starts, diffusion, 20, per_kv=per_kv)
    block_k, block_v = randn(groups, rows, 2, 16, seed=8), randn(groups, rows, 2, 16, seed=9)
    block = (block_k, block_v) if diffusion else (None, None)
    out = paged_attention(q, keys, values, batch, 0.25, *block)
    for g in range(groups):
        flat_k = keys[:, batch.page_table[g]].flatten(1, 2)
        flat_v = values[:, batch.page_table[g]].flatten(1, 2)
        for r in range(rows):
            seen = int(batch.limits[g, r])
            for head in range(q.shape[2]):
                kv = head // per_kv
                k, v = flat_k[kv, :seen], flat_v[kv, :seen]
                if diffusion:
                    k, v = torch.cat([k, block_k[g, :, kv]]), torch.cat([v, block_v[g, :, kv]])
                weights = (k @ q[g, r, head] * 0.25).softmax(0)
                torch.testing.assert_close(out[g, r, head], weights @ v, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("per_kv", [1, 3, 4])
def test_attention_rows_are_the_same_bits_in_any_company(per_kv: int) -> None:
    """Alone or among others, as one row or within a block, with tables of any length."""
    starts = [300 + 11 * g for g in range(6)]
    q, keys, values, batch = attention_case(6, 32, starts, False, 26, per_kv=per_kv)
    full = paged_attention(q, keys, values, batch, 0.25)
    for groups in (1, 2, 6):
        for rows in (1, 2, 5, 8, 32):
            for wide in (26, 32, 48):
                _, _, _, part = attention_case(groups, rows, starts[:groups], False, wide, per_kv=per_kv)
                out = paged_attention(q[:groups, :rows], keys, values, part, 0.25)
                assert torch.equal(out, full[:groups, :rows]), (groups, rows, wide)


@pytest.mark.parametrize("wide", [16, 48])
def test_pages_in_a_row_are_read_in_place_with_the_same_bits(wide: int) -> None:
    """Reading where they lie also puts other pages behind the table's end: hidden keys, whatever they hold."""
    q, keys, values, batch = attention_case(1, 8, [wide * 16 - 20], False, wide)
    gathered = paged_attention(q, keys, values, batch, 0.25)
    for cache in (keys, values):
        cache[:, 3 : 3 + wide] = cache[:, batch.page_table[0, :wide]].clone()
    for first_page, total in ((3, 256), (3, 3 + wide)):
        in_place = replace(batch, first_page=first_page)
        assert torch.equal(paged_attention(q, keys[:, :total], values[:, :total], in_place, 0.25), gathered)


def test_gumbel_noise_is_gumbel_and_a_function_of_seed_position_and_token() -> None:
    device = torch.device("cpu")
    noise = gumbel_noise([1, 1, 2, 2**63 - 1], [10, 11, 10, 0], 50_000, device)
    assert torch.equal(noise[2:3], gumbel_noise([2], [10], 50_000, device))
    assert torch.equal(noise[0, :100], gumbel_noise([1], [10], 100, device)[0])
    euler, spread = 0.5772156649, math.pi / math.sqrt(6)
    for row in noise:
        assert abs(row.mean().item() - euler) < 0.03
        assert abs(row.std().item() - spread) < 0.03
        # Kolmogorov-Smirnov against exp(-exp(-x)): 1.95 / sqrt(n) is exceeded once in a thousand.
        cdf = torch.exp(-torch.exp(-row.double().sort().values))
        steps = torch.arange(1, row.numel() + 1) / row.numel()
        assert (cdf - steps).abs().max().item() < 1.95 / math.sqrt(row.numel())
    correlation = torch.corrcoef(noise)
    assert (correlation - torch.eye(4)).abs().max().item() < 0.02
