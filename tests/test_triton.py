"""The Triton kernels in Triton's interpreter on the CPU, each against its plain PyTorch version, and a row against its company.

The interpreter multiplies tiles with numpy, so bits are compared between launches whose tiles have one shape; all shapes, in
bfloat16 on the matrix units, are compared in tests/gpu.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from kernels import (
    AttentionGroup,
    AttentionPlan,
    embed,
    gumbel_argmax,
    gumbel_noise,
    paged_attention,
    qk_norm_rope,
    upload,
)
from kernels.attention import AttentionWork, work_list
from kernels.attention import gpu as attention_gpu
from kernels.attention.work_list import (
    SPAN,
    Item,
    divided_rows_of,
    header_of,
    items_of,
    plan_work,
    segment_start,
    work_size,
)
from kernels.linear.gpu import TritonWeight
from kernels.linear.reference import DenseWeight
from kernels.linear.tiles import num_segments
from kernels.linear.types import LinearTiles
from kernels.rows import embedding_triton, qk_norm_rope_triton, sampling_triton, upload_triton
from kernels.rows.sampling import NO_TOKEN, noise_keys

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="Triton compiles here: tests/gpu checks the kernels"
)

DTYPES = [torch.float16, torch.float32]
CPU = torch.device("cpu")


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def assert_near(got: torch.Tensor, exact: torch.Tensor) -> None:
    """Relative Frobenius error within a few units of got's dtype."""
    error = (got.double() - exact.double()).norm() / exact.double().norm()
    assert error < 4 * torch.finfo(got.dtype).eps, error


def layer_of(
    outs: int, ins: int, views: int = 1, bias: bool = False, dtype: torch.dtype = torch.float32
) -> tuple[TritonWeight, DenseWeight]:
    """A layer in dtype, its views one behind the other, and the same numbers in float64."""
    weights = torch.stack([randn(outs, ins, seed=100 + v, dtype=dtype) for v in range(views)])
    offsets = randn(views, outs, seed=200, dtype=dtype) if bias else None
    exact = DenseWeight(weights.double().unbind(), None if offsets is None else offsets.double())
    return TritonWeight(weights.unbind(), offsets), exact


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("outs", "ins", "bias"), [(72, 296, True), (200, 136, False)])
def test_linear_is_the_product(outs: int, ins: int, bias: bool, dtype: torch.dtype) -> None:
    """Edges that no tile divides, a bias, more row tiles than a band."""
    layer, exact = layer_of(outs, ins, bias=bias, dtype=dtype)
    x = randn(260, ins, seed=2, dtype=dtype)
    expected = exact.linear(x.double())
    tiles = LinearTiles(64, 16, 128, stages=2)
    full = layer.linear(x, tiles=tiles)
    assert_near(full, expected)
    assert_near(layer.linear(x, tiles=LinearTiles(128, 32, 64)), expected)
    wide = torch.empty(260, outs)
    assert layer.linear(x, out=wide) is wide
    assert_near(wide, expected.float())
    for rows in (slice(0, 1), slice(3, 4), slice(3, 19)):
        assert torch.equal(layer.linear(x[rows], tiles=tiles), full[rows])


@pytest.mark.parametrize("num_ar", [0, 1, 16, 19, 40])
def test_rows_below_num_ar_use_the_first_view(num_ar: int) -> None:
    layer, exact = layer_of(136, 96, views=2, bias=True)
    x = randn(40, 96, seed=2)
    got = layer.linear(x, int32(num_ar), tiles=LinearTiles(64, 16, 32))
    assert_near(got, exact.linear(x.double(), int32(num_ar)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_silu_mul_matches_its_reference(dtype: torch.dtype) -> None:
    layer, exact = (replace(layer, interleaved=True) for layer in layer_of(2 * 72, 200, dtype=dtype))
    x = randn(20, 200, seed=2, dtype=dtype) / 8
    got = layer.linear_silu_mul(x)
    assert_near(got, exact.linear_silu_mul(x.double()))
    gate, up = (exact.weights[0].unflatten(0, (-1, 2, 8))[:, i].flatten(0, 1) for i in (0, 1))
    plain = DenseWeight((torch.cat([gate, up]),)).linear_silu_mul(x.double())
    assert_near(got, plain)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("ins", "segments", "views", "bias"), [(1064, 2, 2, True), (2048, 4, 1, False), (96, 1, 2, True)]
)
def test_linear_add_rms_norm_has_one_tree(
    ins: int, segments: int, views: int, bias: bool, dtype: torch.dtype
) -> None:
    """Segments split and walked: equal bits; near the reference."""
    layer, exact = layer_of(72, ins, views, bias, dtype)
    x, residual, norm = (randn(*s, seed=i, dtype=dtype) for i, s in enumerate([(20, ins), (20, 72), (72,)]))
    num_ar = int32(7)
    expected = exact.linear_add_rms_norm(x.double(), residual.double(), norm.double(), 1e-6, num_ar)

    def run(split: bool, rows: slice = slice(0, 20)) -> tuple[torch.Tensor, torch.Tensor]:
        return layer.linear_add_rms_norm(
            x[rows], residual[rows], norm, 1e-6, num_ar, tiles=LinearTiles(64, 16, 128, split), segments=segments
        )  # fmt: skip

    split = run(True)
    for got, other, walked, few in zip(split, expected, run(False), run(True, slice(0, 9)), strict=True):
        assert_near(got, other)
        assert torch.equal(walked, got)
        assert torch.equal(few, got[:9])


def test_segments_depend_on_the_weight_and_fill_the_gpu() -> None:
    shapes = [(4096, 4096), (4096, 12288), (1024, 2048), (5120, 25600), (8192, 29568)]
    assert [num_segments(*shape) for shape in shapes] == [2, 2, 2, 2, 1]


def test_linear_refuses_rows_that_the_copy_engine_cannot_read() -> None:
    with pytest.raises(ValueError, match="50 inputs"):
        layer_of(8, 50)[0].linear(randn(4, 50))


PAGE, KV_HEADS = 64, 2


def attention_case(
    groups: list[tuple[int, int, bool]], per_kv: int, dtype: torch.dtype, dim: int = 16, padding: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, AttentionPlan]:
    """qkv, the caches, and a plan for groups (rows, start, diffusion); a group's numbers depend on its start alone."""
    heads = KV_HEADS * (per_kv + 2)
    rows: list[torch.Tensor] = []
    plan: list[AttentionGroup] = []
    for count, start, diffusion in groups:
        pages = torch.randperm(99, generator=torch.Generator().manual_seed(start))[
            : (start + count) // PAGE + 1
        ]
        first_row = sum(len(part) for part in rows)
        plan.append(AttentionGroup(first_row, count, start, (pages + 1).tolist(), diffusion))
        rows.append(randn(150, heads, dim, seed=20 + start)[:count])
    rows.append(torch.full((padding, heads, dim), float("nan")))
    keys, values = (randn(KV_HEADS, 100, PAGE, dim, seed=s, dtype=dtype) for s in (1, 2))
    return torch.cat(rows).to(dtype), keys, values, AttentionPlan(tuple(plan), PAGE, per_kv, CPU)


def with_work(plan: AttentionPlan, tile_rows: int, programs: int) -> AttentionPlan:
    """More programs: items of fewer segments. With 0, every tile is one item."""
    capacity = 1000 if programs else 0
    numbers = plan_work(
        plan.groups, tile_rows=tile_rows, shared=False, programs=max(1, programs), capacity=capacity
    )
    return replace(plan, work=AttentionWork(torch.from_numpy(numbers), capacity))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("groups", "per_kv"),
    [
        ([(4, 0, False), (2, 37, False), (1, 260, False)], 3),
        ([(3, 1022, False), (3, 140, True)], 2),
        ([(4, 0, True), (2, 1, True), (2, 1100, True)], 2),
        ([(1, 40, False)], 5),
        ([(3, 2046, False), (2, 4100, True), (1, 2048, True)], 2),
    ],
)
def test_attention_matches_its_reference_however_the_work_is_divided(
    groups: list[tuple[int, int, bool]], per_kv: int, dtype: torch.dtype
) -> None:
    qkv, keys, values, plan = attention_case(groups, per_kv, dtype, padding=3)
    num_rows = qkv.shape[0]
    exact = paged_attention(qkv.double(), keys.double(), values.double(), plan, 0.25)[: num_rows - 3]
    results = [
        attention_gpu.paged_attention(qkv, keys, values, with_work(plan, 3, programs), 0.25)
        for programs in (100, 3, 0)
    ]
    for result in results:
        assert torch.equal(result[: num_rows - 3], results[0][: num_rows - 3])
    assert_near(results[0][: num_rows - 3], exact)


def test_attention_rows_are_the_same_bits_in_any_company() -> None:
    """Alone, on either side of a segment's end within a group, and beside other groups."""
    qkv, keys, values, plan = attention_case([(12, 250, False), (12, 300, False)], 4, torch.float16)
    full = attention_gpu.paged_attention(qkv, keys, values, with_work(plan, 4, 4), 0.25)
    for g, row in ((0, 0), (0, 5), (0, 6), (0, 11), (1, 3)):
        group = plan.groups[g]
        alone = replace(plan, groups=(replace(group, first_row=0, num_rows=1, start=group.start + row),))
        at = 12 * g + row
        out = attention_gpu.paged_attention(qkv[at : at + 1], keys, values, with_work(alone, 4, 4), 0.25)
        assert torch.equal(out[0], full[at]), (g, row)


def test_a_block_longer_than_a_segment_leaves_one_record() -> None:
    qkv, keys, values, plan = attention_case([(2, 90, False), (130, 500, True)], 2, torch.float16)
    whole, divided = (
        attention_gpu.paged_attention(qkv, keys, values, with_work(plan, 32, programs), 0.25)
        for programs in (0, 20)
    )
    assert torch.equal(divided, whole)
    assert_near(whole, paged_attention(qkv.double(), keys.double(), values.double(), plan, 0.25))


def test_attention_refuses_pages_that_tiles_of_keys_would_straddle() -> None:
    qkv, keys, values, plan = attention_case([(1, 40, False)], 2, torch.float16)
    keys, values = (cache.view(KV_HEADS, 200, 32, 16) for cache in (keys, values))
    with pytest.raises(ValueError, match="page_size must be a multiple of 64"):
        attention_gpu.paged_attention(qkv, keys, values, with_work(plan, 4, 4), 0.25)


@pytest.mark.parametrize("programs", [0, 3])
def test_a_block_reads_the_keys_that_rows_of_its_own_pass_write(programs: int) -> None:
    """A draft block anchored behind 6 verify rows of the same pass sees these rows' keys, as in two passes."""
    rows, block, start, per_kv, dim = 6, 5, 200, 2, 16
    pages = [4, 2, 7, 5]
    heads = KV_HEADS * (per_kv + 2)
    group = AttentionGroup(0, rows, start, pages, False)
    behind = AttentionGroup(rows, block, start + rows, pages, True, writes_from=start)
    plan = AttentionPlan((group, behind), PAGE, per_kv, CPU)
    inputs = randn(rows + block, heads, dim)
    weight, angles = torch.ones(2, heads - KV_HEADS, dim), torch.ones(rows + block, 1, dim)
    slots = torch.tensor(
        [pages[p // PAGE] * PAGE + p % PAGE for p in range(start, start + rows)] + [0] * block
    ).int()

    def run(
        attend: Callable[..., torch.Tensor],
        norm: Callable[..., None],
        plan: AttentionPlan,
        stale: bool = False,
    ) -> torch.Tensor:
        qkv = inputs.clone()
        caches = [randn(KV_HEADS, 8, PAGE, dim, seed=s) for s in (1, 2)]
        written = [cache.clone() if stale else cache for cache in caches]
        norm(qkv, weight, angles, 0 * angles, 1e-6, int32(rows), slots, *(c.flatten(1, 2) for c in written))
        return attend(qkv, *caches, plan, 0.25)

    work = with_work(plan, 4, programs)
    assert work.work is not None
    items = items_of(work.work.numbers.numpy())
    assert (items["writes_from"] == start).all()
    together = run(attention_gpu.paged_attention, qk_norm_rope_triton.qk_norm_rope, work)
    assert_near(together, run(paged_attention, qk_norm_rope, plan))
    # The cache as it was before the pass would have given something else.
    assert (together[rows:] - run(paged_attention, qk_norm_rope, plan, stale=True)[rows:]).abs().max() > 0.05


def test_segments_tile_the_positions() -> None:
    edges = [0, *range(128, 1025, 128), *range(1536, 8193, 512), *range(9216, 32769, 1024), 34816, 36864]
    for index, (begin, end) in enumerate(pairwise(edges)):
        assert work_list.segment_start(index) == begin
        assert work_list.num_segments(begin + 1) == work_list.num_segments(end) == index + 1


WORK_GROUPS = [
    (32, 5000, False), (16, 0, False), (17, 300, True), (1, 9000, False), (70, 200, False), (33, 0, True), (20, 40_000, True)
]  # fmt: skip


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("programs", "capacity"), [(1, 0), (33, 1 << 15), (33, 900), (500, 1 << 15)])
def test_every_row_meets_every_key_once(shared: bool, programs: int, capacity: int) -> None:
    """Whatever the tiles; and the records of a divided tile are as many as its items leave, in no other row's way."""
    groups: list[AttentionGroup] = []
    rows = 0
    for count, start, diffusion in WORK_GROUPS:
        groups.append(AttentionGroup(rows, count, start, [len(groups) + 1] * (start // 64 + 2), diffusion))
        rows += count
    work = plan_work(groups, tile_rows=16, shared=shared, programs=programs, capacity=capacity)
    assert len(work) <= work_size(
        rows=rows, programs=programs, capacity=capacity, pages=sum(len(g.pages) for g in groups)
    )
    seen, own = np.zeros((rows, 40_001), int), np.zeros((rows, 33), int)
    items, divided = items_of(work), divided_rows_of(work)
    first_records = {row: record for row, record, _, _ in divided.tolist()}
    lengths = []
    for item in map(Item._make, items.tolist()):
        first, count = item.first_row, item.num_rows
        group = next(g for g in groups if g.first_row <= first < g.first_row + g.num_rows)
        at = slice(segment_start(item.first_segment), segment_start(item.end_segment))
        assert (item.writes_from, item.block_row, item.causal) == (
            group.start,
            group.first_row,
            not group.diffusion,
        )
        assert item.num_keys == group.limits[first + count - 1 - group.first_row]
        assert work[item.table_at] == group.pages[0]
        assert 0 < count <= (32 if shared else 16)
        seen[first : first + count, at.start : min(at.stop, item.num_keys)] += 1
        own[first : first + count, : item.block_rows] += 1
        assert (item.record >= 0) == (first in first_records) == (first + count - 1 in first_records)
        if item.record >= 0:
            assert first_records[first + count - 1] == first_records[first] + item.num_records * (count - 1)
        lengths.append(at.stop - at.start)
    for group in groups:
        for row, limit in enumerate(group.limits, group.first_row):
            assert (seen[row, :limit] == 1).all()
            assert own[row].sum() == (group.num_rows if group.diffusion else 0)
    # Shared items come first, and of either kind the longest.
    big = int((items["num_rows"] > 16).sum())
    assert header_of(work)["num_shared"] == big
    assert (big > 0) == shared
    assert all(list(kind) == sorted(kind, reverse=True) for kind in (lengths[:big], lengths[big:]))
    # The last record of a row ends its last span.
    assert bool(len(divided)) == (capacity > 0)
    spans = sorted((record, record + count) for _, record, count, _ in divided.tolist())
    assert all(a[1] <= b[0] for a, b in pairwise(spans))
    assert not spans or spans[-1][1] <= capacity
    for _, _, count, bits in divided.tolist():
        assert work[bits + (count - 1) // 32] >> (count - 1) % 32 & 1


def test_work_is_shared_out_evenly_and_whole_spans_leave_one_record() -> None:
    group = AttentionGroup(0, 32, 32_736, range(512), False)
    work = plan_work([group], tile_rows=16, shared=True, programs=33, capacity=1000)
    runs = items_of(work)[["first_segment", "end_segment"]].tolist()
    assert [segment_start(end) - segment_start(begin) for begin, end in runs] == [SPAN] * 16
    assert divided_rows_of(work)[["row", "record", "num_records"]].tolist()[0] == (0, 0, 16)


@pytest.mark.parametrize("keys", [200, 900, 1000, 1026, 2000])
def test_a_short_context_has_an_item_for_each_segment(keys: int) -> None:
    group = AttentionGroup(0, 1, keys - 1, range(40), False)
    work = plan_work([group], tile_rows=16, shared=True, programs=33, capacity=1000)
    segments = work_list.num_segments(keys)
    runs = items_of(work)[["first_segment", "end_segment"]].tolist()
    assert sorted(runs) == [(i, i + 1) for i in range(segments)]


def test_a_block_is_an_item_of_its_own_where_items_are_short() -> None:
    for start, blocks in ((992, [0] * 8 + [32]), (32_736, [0] * 15 + [32])):
        group = AttentionGroup(0, 32, start, range(512), True)
        work = plan_work([group], tile_rows=16, shared=True, programs=33, capacity=1000)
        assert sorted(items_of(work)["block_rows"].tolist()) == blocks


@pytest.mark.parametrize("copy", [upload, upload_triton.upload])
@pytest.mark.parametrize("count", [1, 1024, 1500])
def test_upload_copies_all_and_nothing_else(copy: Callable[..., None], count: int) -> None:
    source, target = torch.arange(1, 2001, dtype=torch.int32), torch.zeros(2000, dtype=torch.int32)
    copy(source[:count], target[:count])
    assert torch.equal(target[:count], source[:count])
    assert not target[count:].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_embed_matches_its_reference_and_takes_tokens_from_picks(dtype: torch.dtype) -> None:
    table, weight = randn(50, 40, dtype=dtype), randn(40, seed=1, dtype=dtype)
    cos, sin = randn(30, 6, seed=2, dtype=dtype), randn(30, 6, seed=3, dtype=dtype)
    tokens, positions, picks = int32(7, -1, 49, -3), int32(0, 29, 3, 3), int32(11, 12, 13)
    got = embedding_triton.embed(tokens, positions, picks, table, weight, 1e-6, cos, sin)
    exact = embed(tokens, positions, picks, table.double(), weight.double(), 1e-6, cos.double(), sin.double())
    assert torch.equal(got.hidden, table[[7, 11, 49, 13]])
    for name, value in vars(got).items():
        assert_near(value, getattr(exact, name))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_ar", [0, 2, 3])
@pytest.mark.parametrize("norms", [True, False])
def test_qk_norm_rope_matches_its_reference_and_writes_the_cache(
    norms: bool, num_ar: int, dtype: torch.dtype
) -> None:
    rows, heads, kv_heads, dim = 3, 4, 2, 16
    qkv = randn(rows, heads + 2 * kv_heads, dim, dtype=dtype)
    weight = randn(2, heads + kv_heads, dim, seed=1, dtype=dtype) if norms else None
    cos, sin = randn(rows, 1, dim, seed=2, dtype=dtype), randn(rows, 1, dim, seed=3, dtype=dtype)
    slots = int32(7, 0, 33)
    caches = [torch.zeros(kv_heads, 40, dim, dtype=dtype) for _ in range(2)]
    exact = [cache.double() for cache in caches]
    qkv[0, -1, 3] = float("inf")
    got, wide = qkv.clone(), qkv.nan_to_num(posinf=0.0).double()
    split = int32(num_ar)
    qk_norm_rope_triton.qk_norm_rope(got, weight, cos, sin, 1e-6, split, slots, caches[0], caches[1])
    widened = None if weight is None else weight.double()
    qk_norm_rope(wide, widened, cos.double(), sin.double(), 1e-6, split, slots, exact[0], exact[1])
    assert_near(got, wide)
    for cache, other in zip(caches, exact, strict=True):
        if num_ar:
            assert_near(cache, other)
        assert torch.equal(cache == 0, other == 0)


def keys_of(seeds: list[int], positions: list[int]) -> torch.Tensor:
    return torch.from_numpy(noise_keys(seeds, positions))


def test_gumbel_noise_has_the_counters_of_the_cpu() -> None:
    keys = keys_of([5, 5, 2**63 - 1], [9, 10, 0])
    got, expected = sampling_triton.gumbel_noise(keys, 3000), gumbel_noise(keys, 3000)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=5e-6)


def test_gumbel_argmax_picks_what_its_reference_picks() -> None:
    """Greedy rows, sampled rows, equal logits, a vocabulary that no block divides, places in the middle of the picks."""
    logits = randn(4, 9000) * 3
    logits[1, [40, 8999]] = 50.0
    temperatures, keys = torch.tensor([0.0, 0.0, 0.7, 1.3]), keys_of([1, 2, 3, 4], [5, 6, 7, 8])
    got, expected = torch.zeros(9, dtype=torch.int32), torch.zeros(9, dtype=torch.int32)
    sampling_triton.gumbel_argmax(logits, temperatures, keys, got, int32(3))
    gumbel_argmax(logits, temperatures, keys, expected, int32(3))
    assert torch.equal(got, expected)
    assert got[4] == 40
    assert not got[:3].any() and not got[7:].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_with_a_score_that_is_no_number_has_no_pick(bad: float) -> None:
    logits = randn(4, 9000) * 3
    logits[2, :] = float("-inf")
    temperatures, keys = torch.tensor([0.0, 0.7, 0.0, 0.7]), keys_of([1, 2, 3, 4], [5, 6, 7, 8])
    good = torch.zeros(4, dtype=torch.int32)
    gumbel_argmax(logits, temperatures, keys, good, int32(0))
    assert good.min() >= 0
    for place in (0, 4095, 8999):
        for rows in ([0], [1], [0, 1]):
            broken = logits.clone()
            broken[rows, place] = bad
            got, expected = torch.zeros(4, dtype=torch.int32), good.clone()
            expected[rows] = NO_TOKEN
            for pick in (sampling_triton.gumbel_argmax, gumbel_argmax):
                pick(broken, temperatures, keys, got.zero_(), int32(0))
                assert torch.equal(got, expected), (place, rows)


def test_a_row_without_a_pick_embeds_a_token() -> None:
    tokens, picks = int32(-1, -2, 5), int32(NO_TOKEN, 3)
    table, angles = randn(8, 32), torch.zeros(1, 8)
    for embedding in (embedding_triton.embed, embed):
        rows = embedding(tokens, torch.zeros_like(tokens), picks, table, torch.ones(32), 1e-6, angles, angles)
        assert torch.equal(rows.hidden, table[[0, 3, 5]])


def test_picks_from_a_layer_are_those_from_its_outputs() -> None:
    weight, x = randn(700, 48) * 2, randn(3, 48, seed=1)
    temperatures, keys = torch.tensor([0.0, 0.7, 1.3]), keys_of([1, 2, 3], [5, 6, 7])
    results = []
    for layer in (TritonWeight((weight,)), DenseWeight((weight,))):
        logits, picks = torch.zeros(3, 700), torch.zeros(5, dtype=torch.int32)
        layer.linear_gumbel_argmax(x, logits, int32(1), temperatures, keys, picks, int32(2))
        results.append((logits, picks))
    assert torch.equal(results[0][1], results[1][1])
    assert_near(results[0][0], results[1][0])
    assert results[1][1][2] == (x[0] @ weight.T).argmax()
