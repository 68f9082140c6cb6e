"""Triton kernels on a GPU at Qwen3-8B's shapes in bfloat16: near float64, and batch-invariant."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from torch import Tensor

from orthrus.kernels.attention import AttentionGroup, AttentionPlan, paged_attention
from orthrus.kernels.attention.moving_blocks import MovingBlock, block_list
from orthrus.kernels.attention.place_blocks import place_blocks
from orthrus.kernels.bench import HEAD_DIM, KV_HEADS, PAGE, device_plan, linear_tiles
from orthrus.kernels.linear import hopper as linear_stream
from orthrus.kernels.linear.gpu import TritonWeight
from orthrus.kernels.linear.reference import DenseWeight
from orthrus.kernels.rows import sampling_triton
from orthrus.kernels.rows.embedding import embed
from orthrus.kernels.rows.qk_norm_rope import qk_norm_rope
from orthrus.kernels.rows.sampling import gumbel_argmax, gumbel_noise, noise_keys
from orthrus.kernels.rows.types import NO_TOKEN, KVWrites
from orthrus.kernels.rows.upload import upload

DEVICE = torch.device("cuda")
ROWS = (1, 2, 8, 17, 32, 33, 64, 100, 128, 200, 256, 300, 512)


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=DEVICE, dtype=torch.bfloat16)


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def layer_of(outs: int, ins: int, views: int = 1) -> TritonWeight:
    return TritonWeight((randn(views, outs, ins) * ins**-0.5).unbind())


def double(layer: TritonWeight) -> DenseWeight:
    return DenseWeight(tuple(w.double() for w in layer.weights), None, layer.interleaved)


def error(got: Tensor, exact: Tensor) -> float:
    """Relative Frobenius norm of the error; NaN if got has a NaN."""
    return ((got.double() - exact.double()).norm() / exact.double().norm()).item()


@pytest.mark.parametrize(("outs", "ins", "views"), [(6144, 4096, 1), (6144, 4096, 2), (152_000, 1024, 1)])
def test_linear_is_batch_invariant(outs: int, ins: int, views: int) -> None:
    layer, x = layer_of(outs, ins, views), randn(2048, ins, seed=1)
    num_ar = int32(700)
    full = layer.linear(x, num_ar)
    for start in (0, 650, 1948):
        part = slice(start, start + 100)
        split = int32(max(0, 700 - start))
        assert error(full[part], double(layer).linear(x[part].double(), split)) < 3e-3
    for rows in ROWS:
        for start in (0, 690, 2048 - rows):
            got = layer.linear(x[start : start + rows], int32(max(0, min(rows, 700 - start))))
            assert torch.equal(got, full[start : start + rows]), (rows, start)


def test_gated_linear_is_batch_invariant() -> None:
    layer, x = replace(layer_of(24576, 4096), interleaved=True), randn(2048, 4096, seed=1)
    full = layer.linear_silu_mul(x)
    assert error(full[:64], double(layer).linear_silu_mul(x[:64].double())) < 4e-3
    for rows in ROWS:
        for start in (0, 2048 - rows):
            assert torch.equal(layer.linear_silu_mul(x[start : start + rows]), full[start : start + rows])


@pytest.mark.parametrize(("outs", "ins", "views"), [(4096, 4096, 2), (4096, 12288, 1)])
def test_residual_linear_is_batch_invariant(outs: int, ins: int, views: int) -> None:
    layer, x, residual = layer_of(outs, ins, views), randn(2048, ins, seed=1), randn(2048, outs, seed=2)
    norm, num_ar = randn(outs, seed=3), int32(700)
    full = layer.linear_add_rms_norm(x, residual, norm, 1e-6, num_ar)
    exact = double(layer).linear_add_rms_norm(
        x[650:750].double(), residual[650:750].double(), norm.double(), 1e-6, int32(50)
    )
    for ours, other in zip(full, exact, strict=True):
        assert error(ours[650:750], other) < 5e-3
    for rows in ROWS:
        for start in (0, 690, 2048 - rows):
            part = slice(start, start + rows)
            split = int32(max(0, min(rows, 700 - start)))
            got = layer.linear_add_rms_norm(x[part], residual[part], norm, 1e-6, split)
            assert torch.equal(got[0], full[0][part]), (rows, start)
            assert torch.equal(got[1], full[1][part]), (rows, start)


@pytest.mark.parametrize(("outs", "ins"), [(6144, 4096), (4096, 12288)])
def test_tiles_do_not_change_a_bit(outs: int, ins: int) -> None:
    layer, x = layer_of(outs, ins), randn(2048, ins, seed=1)
    residual, norm = torch.zeros(2048, outs, device=DEVICE, dtype=torch.bfloat16), randn(outs, seed=3)
    expected = layer.linear(x)
    by_leaves: dict[int, Tensor] = {}
    for rows in (1, 32, 64, 128, 256, 2048):
        for tiles in linear_tiles(rows):
            assert torch.equal(layer.linear(x[:rows], tiles=tiles), expected[:rows]), tiles
            for leaves in (1, 2):
                got, _ = layer.linear_add_rms_norm(
                    x[:rows], residual[:rows], norm, 1e-6, tiles=replace(tiles, split=rows <= 64), leaves=leaves
                )  # fmt: skip
                if leaves not in by_leaves:
                    by_leaves[leaves], _ = layer.linear_add_rms_norm(x, residual, norm, 1e-6, leaves=leaves)
                assert torch.equal(got, by_leaves[leaves][:rows]), (leaves, tiles)


Shape = tuple[int, int, bool]
"""Rows, start and whether it is a diffusion block, of a group of rows."""


def attention_inputs(
    shapes: Sequence[Shape], per_kv: int, dim: int
) -> tuple[Tensor, Tensor, Tensor, AttentionPlan]:
    """qkv, caches and the plan of groups of rows."""
    used = [-(-(start + rows) // PAGE) for rows, start, _ in shapes]
    order = torch.randperm(sum(used), generator=torch.Generator().manual_seed(3)) + 1
    plan: list[AttentionGroup] = []
    at = 0
    for (rows, start, diffusion), pages in zip(shapes, order.split(used), strict=True):
        plan.append(AttentionGroup(at, rows, start, pages.tolist(), diffusion))
        at += rows
    qkv = randn(at, KV_HEADS * (per_kv + 2), dim, seed=7)
    keys, values = (randn(KV_HEADS, sum(used) + 1, PAGE, dim, seed=seed) for seed in (4, 5))
    return qkv, keys, values, AttentionPlan(tuple(plan), PAGE, per_kv, DEVICE)


def alone(qkv: Tensor, plan: AttentionPlan, group: AttentionGroup) -> tuple[Tensor, AttentionPlan]:
    """A group's rows, and a plan for these only."""
    rows = slice(group.first_row, group.first_row + group.num_rows)
    return qkv[rows], device_plan(replace(plan, groups=(replace(group, first_row=0),)))


MIXED: tuple[Shape, ...] = (
    (1, 9000, False), (17, 1000, False), (16, 300, False), (32, 2100, False), (1, 0, False), (5, 1023, False),
    (70, 940, False), (33, 0, False), (32, 1500, True), (8, 129, True), (33, 700, True), (16, 0, True),
)  # fmt: skip
"""With every number of query heads per KV head from 1 to 8, rows that fill one tile, shared tiles, or both."""


@pytest.mark.parametrize(
    ("shapes", "per_kv", "dim"),
    [
        *((MIXED, per_kv, dim) for per_kv in (1, 2, 4, 5, 8) for dim in (64, 128)),
        ([(1, 999, False)], 4, 128),
        ([(32, 1000, False)], 4, 128),
        ([(300, 900, False)], 4, 128),
        ([(300, 900, True)], 4, 128),
        ([(3, 90, False), (200, 500, True)], 4, 128),
        ([(32, 9200, False)] * 2, 4, 128),
        ([(1, 700 + 11 * i, False) for i in range(64)], 4, 128),
        ([(32, 32_736, False)], 4, 128),
        ([(32, 32_736, True)], 4, 128),
    ],
)
def test_attention_is_batch_invariant_however_the_work_is_divided(
    shapes: Sequence[Shape], per_kv: int, dim: int
) -> None:
    qkv, keys, values, plan = attention_inputs(shapes, per_kv, dim)
    scale = dim**-0.5
    full = paged_attention(qkv, keys, values, device_plan(plan), scale)
    exact = paged_attention(qkv.double(), keys.double(), values.double(), plan, scale)
    for group in plan.groups:
        rows = slice(group.first_row, group.first_row + group.num_rows)
        assert error(full[rows], exact[rows]) < 6e-3, group
    for programs in (0, 4, 64):
        for _ in range(3):
            got = paged_attention(qkv, keys, values, device_plan(plan, programs), scale)
            assert torch.equal(got, full), programs
    for group in plan.groups:
        first = group.first_row
        part, own = alone(qkv, plan, group)
        got = paged_attention(part, keys, values, own, scale)
        assert torch.equal(got, full[first : first + group.num_rows]), group
        if group.diffusion:
            continue
        for row in sorted({0, group.num_rows // 2, group.num_rows - 1}):
            single = replace(group, first_row=first + row, num_rows=1, start=group.start + row)
            part, own = alone(qkv, plan, single)
            got = paged_attention(part, keys, values, own, scale)
            assert torch.equal(got[0], full[first + row]), (group, row)


@pytest.mark.parametrize("missing", [1, 60, 127])
@pytest.mark.parametrize("programs", [0, 4, 64])
def test_a_block_that_is_moved_back_has_the_bits_of_one_planned_there(programs: int, missing: int) -> None:
    furthest, drafts = 1040, list(range(127))
    qkv, keys, values, plan = attention_inputs([(8, 300, True), (32, furthest, True)], 4, 128)
    other, block = plan.groups
    known = replace(plan, groups=(other, replace(block, start=furthest - missing)))
    exact = paged_attention(qkv, keys, values, device_plan(known), 0.1)
    moved = device_plan(plan, programs)
    assert moved.work is not None
    moving = MovingBlock(8, 32, 7, 31, 0, drafts, 127, noise_keys([3] * 158, range(900, 1058)))
    listed = torch.from_numpy(block_list([moving])).to(DEVICE)
    picks = int32(*drafts[: 127 - missing], *[-5] * (missing + 1))
    tokens, positions = int32(*[6] * 40), int32(*range(300, 308), *range(furthest, furthest + 32))
    noise = torch.zeros(38, 2, dtype=torch.int32, device=DEVICE)
    place_blocks(listed, 1, picks, tokens, positions, noise, moved.work.numbers)
    assert torch.equal(paged_attention(qkv, keys, values, moved, 0.1), exact)
    assert positions.tolist() == [*range(300, 308), *range(furthest - missing, furthest - missing + 32)]
    assert tokens.tolist() == [6] * 8 + [-1 - (127 - missing)] + [6] * 31
    assert torch.equal(
        noise[7:].cpu(), torch.from_numpy(noise_keys([3] * 31, range(1027 - missing, 1058 - missing)))
    )


def test_a_plan_is_uploaded_from_page_locked_memory() -> None:
    source = torch.arange(70_001, dtype=torch.int32).pin_memory()
    target = torch.zeros(80_000, dtype=torch.int32, device=DEVICE)
    upload(source, target[:70_001])
    assert torch.equal(target[:70_001].cpu(), source)
    assert not target[70_001:].any()


def test_row_kernels_match_their_references() -> None:
    table, weight = randn(500, 4096), randn(4096, seed=1)
    cos, sin = randn(64, HEAD_DIM // 2, seed=4), randn(64, HEAD_DIM // 2, seed=5)
    tokens, positions, picks = int32(*range(30), -1, -2, -3), int32(*range(33)), int32(7, 8, 9)
    rows = embed(tokens, positions, picks, table, weight, 1e-6, cos, sin)
    exact = embed(tokens, positions, picks, table.double(), weight.double(), 1e-6, cos.double(), sin.double())
    for name, value in vars(rows).items():
        assert error(value, getattr(exact, name)) < 5e-3, name
    qkv, heads = randn(33, 48, HEAD_DIM, seed=2), randn(2, 40, HEAD_DIM, seed=3)
    slots = torch.randperm(64, device=DEVICE).int()
    # Row 3 writes to three slots, and row 19 to two. Rows behind the AR rows have no further slots.
    ends = int32(*[0] * 3, *[2] * 16, *[3] * 14)
    writes = KVWrites(slots[:33], ends, slots[40:])
    keys, values = (torch.zeros(8, 64, HEAD_DIM, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    exact_keys, exact_values, wide = keys.double(), values.double(), qkv.double()
    got, alone = qkv.clone(), qkv[7:8].clone()
    qk_norm_rope(got, heads, rows.cos, rows.sin, 1e-6, int32(20), writes, keys, values)
    qk_norm_rope(
        wide, heads.double(), rows.cos.double(), rows.sin.double(), 1e-6, int32(20), writes, exact_keys, exact_values
    )  # fmt: skip
    assert error(got, wide) < 6e-3
    assert error(keys, exact_keys) < 6e-3
    assert torch.equal(values.double(), exact_values)
    qk_norm_rope(
        alone, heads, rows.cos[7:8], rows.sin[7:8], 1e-6, int32(1), KVWrites.single(slots[7:8]), keys, values
    )
    assert torch.equal(alone[0], got[7])


def test_noise_and_picks_are_those_of_the_cpu() -> None:
    keys = torch.from_numpy(noise_keys([5, 5, 2**63 - 1, 8], [9, 10, 0, 1]))
    expected = gumbel_noise(keys, 151_936)
    torch.testing.assert_close(gumbel_noise(keys.to(DEVICE), 151_936).cpu(), expected, rtol=1e-5, atol=5e-6)
    logits, temperatures = torch.randn(4, 151_936) * 3, torch.tensor([0.0, 0.7, 1.0, 0.0])
    logits[3, [70, 150_000]] = 60.0
    picks = [torch.zeros(9, dtype=torch.int32, device=device) for device in (DEVICE, torch.device("cpu"))]
    gumbel_argmax(logits.to(DEVICE), temperatures.to(DEVICE), keys.to(DEVICE), picks[0], int32(2))
    gumbel_argmax(logits, temperatures, keys, picks[1], torch.tensor([2]))
    assert torch.equal(picks[0].cpu(), picks[1])
    assert picks[1][5] == 70


def test_picks_for_any_rows_of_a_pass_need_no_recompilation() -> None:
    """A request would wait for the compilation of another kernel."""
    kernels = (
        sampling_triton._block_argmax_kernel,
        sampling_triton._argmax_kernel,
        sampling_triton._scores_kernel,
    )
    logits, temperatures = torch.randn(9, 20_032, device=DEVICE), torch.full((9,), 0.7, device=DEVICE)
    keys = torch.from_numpy(noise_keys([5] * 9, range(9))).to(DEVICE)
    picks, found = torch.zeros(9, dtype=torch.int32, device=DEVICE), []
    for first in range(8):
        rows = slice(first, None)
        gumbel_argmax(logits[rows], temperatures[rows], keys[rows], picks[first:], int32(0))
        sampling_triton.best_tokens(logits[rows], temperatures[rows], keys[rows], 4)
        found.append([len(kernel.device_caches[0][0]) for kernel in kernels])
    assert found == [found[0]] * 8


@pytest.mark.parametrize(("rows", "ins"), [(1, 1024), (17, 1024), (33, 200), (64, 1024), (100, 1024)])
def test_picks_from_a_layer_are_those_from_its_outputs(rows: int, ins: int) -> None:
    """Greedy and sampled rows; a vocabulary and inputs that tiles don't divide; with logits and without."""
    layer, x = layer_of(20_010, ins), randn(rows, ins, seed=1)
    streamed = linear_stream.streams(x)
    logits = layer.linear(x, out=torch.empty(rows, 20_010, device=DEVICE))
    temperatures = torch.arange(rows, device=DEVICE) % 3 * 0.7
    for seed in range(20):
        keys = torch.from_numpy(noise_keys([seed] * rows, range(rows))).to(DEVICE)
        expected, got = (torch.zeros(rows + 2, device=DEVICE, dtype=torch.int32) for _ in range(2))
        gumbel_argmax(logits, temperatures, keys, expected, int32(2))
        out = torch.zeros_like(logits)
        layer.linear_gumbel_argmax(x, out, int32(seed % 2), temperatures, keys, got, int32(2))
        assert torch.equal(got, expected), seed
        assert torch.equal(out, logits if seed % 2 or not streamed else torch.zeros_like(out))
        if streamed:  # The scores of the picks have the same bits too.
            tiles, _ = layer.best_of_tiles(x, out, int32(0), temperatures, keys)
            blocks, _ = sampling_triton.best_of_blocks(logits, temperatures, keys)
            assert torch.equal(tiles.amax(1), blocks.amax(1)), seed
    # Of equal scores the lowest token wins. Here all are equal, within tiles and between tiles.
    same = torch.zeros_like(x)
    layer.linear_gumbel_argmax(same, out, int32(0), torch.zeros(rows, device=DEVICE), keys, got, int32(2))
    assert not got.any()


@pytest.mark.parametrize("rows", [3, 100])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_row_of_nan_has_no_pick(rows: int, temperature: float) -> None:
    layer, x = layer_of(20_010, 256), randn(rows, 256, seed=1)
    out, picks = torch.zeros(rows, 20_010, device=DEVICE), torch.zeros(rows, device=DEVICE, dtype=torch.int32)
    keys, none = (
        torch.zeros(rows, 2, device=DEVICE, dtype=torch.int32),
        torch.full((rows,), temperature, device=DEVICE),
    )
    layer.linear_gumbel_argmax(x, out, int32(0), none, keys, picks, int32(0))
    expected = picks.clone()
    x[rows - 1] = float("nan")
    layer.linear_gumbel_argmax(x, out, int32(0), none, keys, picks, int32(0))
    assert torch.equal(picks[:-1], expected[:-1])
    assert int(picks[-1]) == NO_TOKEN
    # A row with a single NaN, in any tile, has no pick either. The embedding of such a pick can be looked up.
    x[rows - 1] = 1.0
    layer.weights[0][20_003] = float("nan")
    layer.linear_gumbel_argmax(x, out, int32(0), none, keys, picks, int32(0))
    assert (picks == NO_TOKEN).all()
    tokens = torch.full((rows,), -1, device=DEVICE, dtype=torch.int32)
    table, norm = randn(8, 256, seed=2), torch.ones(256, device=DEVICE, dtype=torch.bfloat16)
    angles = torch.zeros(1, 32, device=DEVICE, dtype=torch.bfloat16)
    places = torch.zeros_like(tokens)
    rows_of_0 = embed(tokens, places, picks, table, norm, 1e-6, angles, angles).hidden
    assert torch.equal(rows_of_0, table[:1].expand(rows, -1))


@pytest.mark.parametrize("start", [1, 100, 2000])
def test_a_block_reads_the_keys_that_rows_of_its_own_pass_write(start: int) -> None:
    """A draft block behind verify rows of its own pass, in a graph whose kernels start before the previous one has ended."""
    rows, block, heads, per_kv = 32, 16, 32, 4
    qkv, pages = (
        randn(rows + block, heads + 2 * KV_HEADS, HEAD_DIM),
        list(range(1, 2 + (start + rows) // PAGE)),
    )
    keys, values = (randn(KV_HEADS, len(pages) + 1, PAGE, HEAD_DIM, seed=seed) for seed in (4, 5))
    group = AttentionGroup(0, rows, start, pages, False)
    behind = AttentionGroup(rows, block, start + rows, pages, True, writes_from=start)
    plan = AttentionPlan((group, behind), PAGE, per_kv, DEVICE)
    weight = torch.ones(2, heads + KV_HEADS, HEAD_DIM, device=DEVICE, dtype=torch.bfloat16)
    cos, sin = (randn(rows + block, 1, HEAD_DIM // 2, seed=seed) for seed in (6, 7))
    cos, sin = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
    slots = int32(*(pages[p // PAGE] * PAGE + p % PAGE for p in range(start, start + rows)), *[0] * block)
    num_ar, work = int32(rows), device_plan(plan)
    cache = [keys.clone(), values.clone()]

    def run(qkv: Tensor, cache: Sequence[Tensor], plan: AttentionPlan) -> Tensor:
        angles, norms = (cos.to(qkv.dtype), sin.to(qkv.dtype)), weight.to(qkv.dtype)
        k_cache, v_cache = cache
        k_slots, v_slots = k_cache.flatten(1, 2), v_cache.flatten(1, 2)
        qk_norm_rope(qkv, norms, *angles, 1e-6, num_ar, KVWrites.single(slots), k_slots, v_slots)
        return paged_attention(qkv, k_cache, v_cache, plan, HEAD_DIM**-0.5)

    # The exact result, from the numbers that the norm kernel writes in bfloat16.
    written, wide = qkv.clone(), [keys.clone(), values.clone()]
    expected = run(written, wide, work)
    torch.cuda.synchronize()
    exact = paged_attention(written.double(), wide[0].double(), wide[1].double(), plan, HEAD_DIM**-0.5)
    assert error(expected, exact) < 6e-3
    mine, graph = qkv.clone(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run(mine, cache, work)
    for _ in range(20):  # Before each replay, the slots to which the rows write hold other numbers.
        mine.copy_(qkv)
        for part, other in zip(cache, (keys, values), strict=True):
            part.copy_(other)
        graph.replay()
        assert torch.equal(result, expected)
