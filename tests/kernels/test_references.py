"""Every kernel's reference against plain arithmetic, and the rule that all obey: they are batch-invariant."""

import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from orthrus.kernels.attention import AttentionGroup, AttentionPlan, paged_attention
from orthrus.kernels.linear import Parameters, Weight, pack_weight
from orthrus.kernels.rows.activation import silu_mul
from orthrus.kernels.rows.rms_norm import rms_norm
from orthrus.kernels.rows.rope import apply_rope
from orthrus.kernels.rows.sampling import gumbel_argmax, gumbel_noise, noise_keys


@pytest.fixture(autouse=True, params=[1, 2], ids=["1 thread", "2 threads"])
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """A row's bits must not depend on how work is divided among threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def packed(*weights: torch.Tensor, bias: torch.Tensor | None = None) -> Weight:
    """A layer with a weight for each view; of one view, with a bias."""
    views: list[list[Parameters]] = [[{"weight": weight.clone()}] for weight in weights]
    if bias is not None:
        views[0][0]["bias"] = bias
    return pack_weight(views)


@pytest.mark.parametrize(("outputs", "inputs"), [(96, 48), (640, 384), (384, 1152), (1000, 200), (256, 4096)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("saved", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_linear_is_batch_invariant(outputs: int, inputs: int, bias: bool, saved: torch.dtype) -> None:
    """For weights of every dtype: FBGEMM packs those that float16 holds, oneDNN other float32 weights. float64 is not packed."""
    compute = torch.promote_types(saved, torch.float32)
    weight = randn(outputs, inputs).to(saved).to(compute)
    offset = randn(outputs, seed=1).to(compute) if bias else None
    layer = packed(weight, bias=offset)
    x = randn(256, inputs, seed=2).to(compute)
    full = layer.linear(x)
    exact = x.double() @ weight.double().T + (offset.double() if offset is not None else 0)
    torch.testing.assert_close(full.double(), exact, rtol=1e-4, atol=1e-3)
    for rows in (1, 2, 3, 4, 8, 13, 20, 64, 101, 128):
        for start in (0, 3, 101):
            assert torch.equal(layer.linear(x[start : start + rows]), full[start : start + rows])


@pytest.mark.skipif(platform.machine() != "x86_64", reason="FBGEMM's choice of instructions is of x86-64")
@pytest.mark.parametrize("_threads", [1], ids=["1 and 2 threads"], indirect=True)
def test_linear_is_batch_invariant_without_avx512() -> None:
    """FBGEMM chooses its instructions once in a process. With AVX2 it has different kernels for each number of rows up to six."""
    code = """
import torch
from orthrus.kernels.linear import pack_weight
weight, x = torch.randn(640, 384).bfloat16().float(), torch.randn(130, 384)
layer = pack_weight([[{"weight": weight.clone()}]])
full = layer.linear(x)
torch.testing.assert_close(full, x @ weight.T, rtol=1e-4, atol=1e-3)
for threads in (1, 2):
    torch.set_num_threads(threads)
    for rows in (1, 2, 7, 14, 31, 32, 67, 121):
        assert torch.equal(layer.linear(x[:rows]), full[:rows]), (threads, rows)
"""
    environment = os.environ | {"FBGEMM_ENABLE_INSTRUCTIONS": "AVX2"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=120)


def test_a_weight_that_is_not_finite_stays_so() -> None:
    weight = torch.eye(16)
    weight[3, 3] = float("inf")
    assert packed(weight).linear(torch.eye(16))[3, 3] == float("inf")


@pytest.mark.parametrize("factor", [1.0, 2.0**-60, 2.0**60])
def test_weights_that_16_bits_hold_are_multiplied_exactly(factor: float) -> None:
    """Also small weights together with large ones. Every product here is a power of two or zero."""
    weight = torch.diag(2.0 ** -torch.arange(32.0)) * factor
    assert torch.equal(packed(weight).linear(torch.eye(32)), weight.T)


def test_rms_norm_and_silu_mul_match_their_formulas() -> None:
    x, weight = randn(5, 3, 16), randn(3, 16, seed=1)
    expected = x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    torch.testing.assert_close(rms_norm(x, weight, 1e-6), expected)
    gate, up = randn(4, 8, seed=2), randn(4, 8, seed=3)
    torch.testing.assert_close(silu_mul(torch.cat([gate, up], -1)), gate * torch.sigmoid(gate) * up)


def test_rms_norm_is_batch_invariant() -> None:
    x, weight = randn(64, 384), randn(384, seed=1)
    full = rms_norm(x, weight, 1e-6)
    for rows in (1, 4, 7, 32):
        assert torch.equal(rms_norm(x[5 : 5 + rows], weight, 1e-6), full[5 : 5 + rows])


@pytest.mark.parametrize("width", [200, 1152, 40_000])
def test_silu_mul_is_batch_invariant_on_many_threads(width: int) -> None:
    gate_up = randn(61, 2 * width)
    full = silu_mul(gate_up)
    torch.set_num_threads(5)
    for rows in (1, 3, 31, 57, 61):
        assert torch.equal(silu_mul(gate_up[:rows]), full[:rows])
        assert torch.equal(silu_mul(gate_up[-rows:].clone()), full[-rows:])


def test_rope_rotates_pairs_of_halves() -> None:
    x = randn(3, 2, 8)
    angles = randn(3, 4, seed=1)
    cos, sin = angles.cos(), angles.sin()
    twice, out = torch.stack([x, x], 2), torch.empty_like(x)
    apply_rope(twice, torch.cat([cos, cos], -1)[:, None], torch.cat([-sin, sin], -1)[:, None], out)
    first, second = x[..., :4], x[..., 4:]
    cos, sin = cos[:, None], sin[:, None]
    expected = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    torch.testing.assert_close(out, expected)


def test_rows_use_the_weight_of_their_view_in_fused_operations() -> None:
    weights, x, residual, norm = (
        [randn(24, 16, seed=s) for s in (1, 2)],
        randn(12, 16),
        randn(12, 24),
        randn(24),
    )
    both = packed(*weights)
    num_ar = torch.tensor([8], dtype=torch.int32)
    parts = [
        packed(weights[0]).linear(x[:8]),
        packed(weights[1]).linear(x[8:]),
    ]
    assert torch.equal(both.linear(x, num_ar), torch.cat(parts))
    hidden, normed = both.linear_add_rms_norm(x, residual, norm, 1e-6, num_ar)
    assert torch.equal(hidden, residual + torch.cat(parts))
    assert torch.equal(normed, rms_norm(hidden, norm, 1e-6))
    gate, up = weights
    gated = pack_weight([[{"weight": gate}, {"weight": up}]], gated=True).linear_silu_mul(x)
    torch.testing.assert_close(gated, silu_mul(torch.cat([x @ gate.T, x @ up.T], -1)))


def attention_case(
    groups: list[tuple[int, int]], diffusion: bool, table: int = 48, page: int = 16, per_kv: int = 3
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, AttentionPlan]:
    """qkv, caches and plan of groups (rows, start). The numbers of a group depend on its index alone, not on the other groups."""
    kv_heads, dim, total = 2, 16, 256
    heads = kv_heads * (per_kv + 2)
    qkv = torch.cat([randn(64, heads, dim, seed=100 + g)[:rows] for g, (rows, _) in enumerate(groups)])
    keys, values = randn(kv_heads, total, page, dim, seed=1), randn(kv_heads, total, page, dim, seed=2)
    plan = []
    for g, (rows, start) in enumerate(groups):
        pages = (torch.randperm(255, generator=torch.Generator().manual_seed(g))[:table] + 1).tolist()
        plan.append(AttentionGroup(sum(r for r, _ in groups[:g]), rows, start, pages, diffusion))
    return qkv, keys, values, AttentionPlan(tuple(plan), page, per_kv, torch.device("cpu"))


@pytest.mark.parametrize("diffusion", [False, True])
@pytest.mark.parametrize("per_kv", [1, 3, 8])
def test_paged_attention_matches_a_loop_over_rows(diffusion: bool, per_kv: int) -> None:
    qkv, keys, values, plan = attention_case([(5, 0), (5, 37), (3, 300)], diffusion, per_kv=per_kv)
    out = paged_attention(qkv, keys, values, plan, 0.25).unflatten(1, (-1, 16))
    heads = 2 * per_kv
    for group in plan.groups:
        flat_k, flat_v = (cache[:, group.pages].flatten(1, 2) for cache in (keys, values))
        own = slice(group.first_row, group.first_row + group.num_rows)
        for row, seen in enumerate(group.limits, group.first_row):
            for head in range(heads):
                kv = head // per_kv
                k, v = flat_k[kv, :seen], flat_v[kv, :seen]
                if diffusion:
                    k, v = torch.cat([k, qkv[own, heads + kv]]), torch.cat([v, qkv[own, heads + 2 + kv]])
                weights = (k @ qkv[row, head] * 0.25).softmax(0)
                torch.testing.assert_close(out[row, head], weights @ v, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("per_kv", [1, 3, 4])
def test_attention_is_batch_invariant(per_kv: int) -> None:
    """Rows alone or among others, as one row or in a longer group, and together with longer contexts."""
    starts = [300 + 11 * g for g in range(6)]
    whole = attention_case([(32, start) for start in starts], False, per_kv=per_kv)
    full = paged_attention(*whole, 0.25).unflatten(0, (6, 32))
    for count in (1, 2, 6):
        for rows in (1, 2, 5, 8, 32):
            for company in ([], [(4, 600)]):
                cut = [(rows, start) for start in starts[:count]]
                part = attention_case(cut + company, False, per_kv=per_kv)
                out = paged_attention(*part, 0.25)[: count * rows].unflatten(0, (count, rows))
                assert torch.equal(out, full[:count, :rows]), (count, rows, company)


@pytest.mark.parametrize("start", [236, 748])
def test_consecutive_pages_are_read_in_place_with_the_same_bits(start: int) -> None:
    """A slice of the cache may end with pages that are not in the table. Their keys are masked, whatever they hold."""
    qkv, keys, values, plan = attention_case([(8, start)], False)
    gathered = paged_attention(qkv, keys, values, plan, 0.25)
    count = -(-(start + 8) // 16)
    for cache in (keys, values):
        cache[:, 3 : 3 + count] = cache[:, plan.groups[0].pages[:count]].clone()
    for total in (256, 3 + count):
        in_place = replace(plan, groups=(replace(plan.groups[0], pages=range(3, 3 + count)),))
        cut_keys, cut_values = (cache[:, :total].contiguous() for cache in (keys, values))
        assert torch.equal(paged_attention(qkv, cut_keys, cut_values, in_place, 0.25), gathered)


def test_gumbel_noise_is_gumbel_and_a_function_of_seed_position_and_token() -> None:
    def noise_of(seeds: list[int], positions: list[int], vocab: int) -> torch.Tensor:
        return gumbel_noise(torch.from_numpy(noise_keys(seeds, positions)), vocab)

    noise = noise_of([1, 1, 2, 2**63 - 1], [10, 11, 10, 0], 50_000)
    assert torch.equal(noise[2:3], noise_of([2], [10], 50_000))
    assert torch.equal(noise[0, :100], noise_of([1], [10], 100)[0])
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


def test_gumbel_argmax_draws_from_the_softmax_and_is_greedy_at_zero() -> None:
    rows = 4000
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0]).repeat(rows, 1)
    keys = torch.from_numpy(noise_keys([7] * rows, range(rows)))
    picks = torch.full((rows + 2,), -1, dtype=torch.int32)
    first = torch.tensor([1], dtype=torch.int32)
    gumbel_argmax(logits, torch.full((rows,), 2.0), keys, picks, first)
    assert picks[0] == picks[-1] == -1
    shares = torch.bincount(picks[1:-1], minlength=4) / rows
    # Three standard deviations of a share of 4,000 draws.
    assert ((shares - (logits[0] / 2).softmax(0)).abs() < 0.024).all()
    gumbel_argmax(logits, torch.zeros(rows), keys, picks, first)
    assert (picks[1:-1] == 2).all()
