"""The kernels for Hopper in the emulator of PTX (tests/ptx), in all ways, in many sizes and with many seeds: `make test-ptx`."""

import pytest

from tests.ptx.machine import WAYS, CopyTime, Way
from tests.ptx.own_process import emulated

all_ways = pytest.mark.parametrize("way", WAYS, ids=str)
FP8 = pytest.mark.parametrize("fp8", [False, True], ids=["bfloat16", "fp8"])
KINDS = pytest.mark.parametrize("kind", ["fp8", "integers", "codes"])
SEEDS = range(100, 148)


@all_ways
@FP8
@pytest.mark.parametrize(("rows", "views"), [(16, 1), (9, 2), (40, 1), (33, 2)])
@emulated
def test_linear(rows: int, views: int, fp8: bool, way: Way) -> None:
    from tests.ptx import linear

    linear.check_layer(way, rows, views, fp8, bias=rows == 9)


@all_ways
@FP8
@pytest.mark.parametrize(("rows", "ins"), [(16, 512), (60, 1280)])
@emulated
def test_linear_gated(rows: int, ins: int, fp8: bool, way: Way) -> None:
    from tests.ptx import linear

    linear.check_gated(way, rows, ins, fp8)


@all_ways
@FP8
@pytest.mark.parametrize(
    ("leaves", "first", "count", "parts"),
    [(2, 0, 2, 1), (4, 0, 4, 2), (8, 0, 8, 1), (8, 4, 4, 4), (4, 2, 2, 1), (3, 0, 1, 1)],
)
@emulated
def test_linear_trees(leaves: int, first: int, count: int, parts: int, fp8: bool, way: Way) -> None:
    from tests.ptx import linear

    linear.check_tree(way, leaves, first, count, parts, fp8)


@all_ways
@pytest.mark.parametrize("wanted", [False, True])
@pytest.mark.parametrize("warm", [False, True])
@emulated
def test_linear_picks(warm: bool, wanted: bool, way: Way) -> None:
    from tests.ptx import linear

    linear.check_picks(way, warm, wanted)


@all_ways
@pytest.mark.parametrize("programs", [1, 5, 7])
@pytest.mark.parametrize(("fp8", "views"), [(False, 1), (True, 2)])
@emulated
def test_linear_odd_sizes(fp8: bool, views: int, programs: int, way: Way) -> None:
    """Programs without work; outputs and inputs that tiles do not divide; no rows of one view."""
    from tests.ptx import linear

    linear.check_layer(way, 20, views, fp8, outs=200, ins=1040 if fp8 else 520, programs=programs)


@all_ways
@FP8
@emulated
def test_linear_bits(fp8: bool, way: Way) -> None:
    from tests.ptx import linear

    linear.check_same_bits(way, fp8)


@all_ways
@KINDS
@pytest.mark.parametrize(
    ("rows", "outs", "ins"),
    [(8, 192, 512), (3, 128, 4096), (33, 192, 1024), (64, 128, 1536), (150, 192, 512)],
)
@emulated
def test_grouped(rows: int, outs: int, ins: int, kind: str, way: Way) -> None:
    """Integers have groups of 128 to 512 inputs, the others of 128."""
    from tests.ptx import grouped

    if kind == "integers" and rows == 150:
        rows = 16
    group = {4096: 256, 1024: 512}.get(ins, 128) if kind == "integers" else 128
    grouped.check_layer(way, kind, rows, outs, ins, group)


@all_ways
@KINDS
@pytest.mark.parametrize("parts", [0, 2, 4], ids=["gated", "2 parts", "4 parts"])
@emulated
def test_grouped_parts(parts: int, kind: str, way: Way) -> None:
    from tests.ptx import grouped

    if parts:
        grouped.check_parts(way, kind, parts)
    else:
        grouped.check_gated(way, kind)


@all_ways
@pytest.mark.parametrize(
    ("rows", "views", "ins", "exceptions"),
    [
        (8, 1, 512, 0),
        (8, 1, 512, 5),
        (16, 2, 640, 9),
        (33, 1, 2048, 3),
        (64, 2, 384, 20),
        (100, 1, 640, 5),
        (128, 2, 384, 9),
    ],
)
@emulated
def test_lossless(rows: int, views: int, ins: int, exceptions: int, way: Way) -> None:
    from tests.ptx import lossless

    lossless.check_layer(way, rows, views, ins, exceptions)


@all_ways
@pytest.mark.parametrize("rows", [0, 16, 100], ids=["gated", "16", "100"])
@emulated
def test_lossless_bits(rows: int, way: Way) -> None:
    from tests.ptx import lossless

    if rows:
        lossless.check_bits(way, rows)
    else:
        lossless.check_gated(way)


@all_ways
@pytest.mark.parametrize(
    ("leaves", "first", "count", "parts"),
    [(2, 0, 2, 1), (4, 0, 4, 2), (8, 0, 8, 1), (8, 4, 4, 4), (8, 0, 2, 1), (16, 0, 16, 2)],
)
@emulated
def test_lossless_trees(leaves: int, first: int, count: int, parts: int, way: Way) -> None:
    from tests.ptx import lossless

    lossless.check_tree(way, leaves, first, count, parts)


SHAPES = [
    ([(1, 300, False)], 4, 128),
    ([(20, 200, False), (3, 129, True)], 4, 128),
    ([(1, 0, False), (5, 1023, False), (32, 150, True)], 2, 64),
    ([(40, 400, False), (1, 90, False), (16, 0, True)], 4, 128),
    ([(2, 2500, False), (8, 129, True)], 8, 64),
    ([(17, 600, False)], 5, 128),
]


@all_ways
@pytest.mark.parametrize("divide", [0, 8], ids=["whole", "divided"])
@pytest.mark.parametrize("number", range(len(SHAPES)))
@emulated
def test_attention(number: int, divide: int, way: Way) -> None:
    from tests.ptx import attention

    shapes, per_kv, dim = SHAPES[number]
    attention.check_shapes(way, shapes, per_kv, dim, divide)


MIXED = [
    (1, 900, False), (17, 1000, False), (16, 300, False), (32, 210, False), (1, 0, False), (5, 1023, False),
    (70, 94, False), (33, 0, False), (32, 150, True), (8, 129, True), (33, 70, True), (16, 0, True),
]  # fmt: skip


@pytest.mark.parametrize("way", [WAYS[2], WAYS[7]], ids=str)
@pytest.mark.parametrize("divide", [0, 2, 32])
@pytest.mark.parametrize(("per_kv", "dim"), [(1, 64), (4, 128), (8, 128), (5, 64), (2, 80)])
@emulated
def test_attention_of_many_sequences(per_kv: int, dim: int, divide: int, way: Way) -> None:
    from tests.ptx import attention

    attention.check_shapes(way, MIXED, per_kv, dim, divide, programs=3)


@all_ways
@pytest.mark.parametrize("divide", [0, 2, 32])
@pytest.mark.parametrize(
    ("start", "per_kv", "longest"), [(20, 4, 40), (170, 4, 20), (1090, 4, 5), (2100, 8, 33)]
)
@emulated
def test_attention_of_trees(start: int, per_kv: int, longest: int, divide: int, way: Way) -> None:
    from tests.ptx import attention

    attention.check_tree(way, start, per_kv, divide, longest)


@all_ways
@pytest.mark.parametrize("divide", [0, 8], ids=["whole", "divided"])
@pytest.mark.parametrize("right", [0, 1, 2, 3])
@pytest.mark.parametrize("furthest", [66, 129, 258, 1025])
@emulated
def test_attention_of_moved_blocks(furthest: int, right: int, divide: int, way: Way) -> None:
    """Blocks move over the edges of pages, of segments and of items."""
    from tests.ptx import attention

    attention.check_moved_block(way, furthest, right, divide)


@pytest.mark.parametrize("seed", SEEDS)
@emulated
def test_more_seeds(seed: int) -> None:
    """Faults that need a rare order, such as a ring buffer that is one stage too short, show with some seeds only."""
    from tests.ptx import attention, grouped, linear, lossless

    copies: tuple[CopyTime, ...] = ("late", "late", "random", "early")
    way = Way("early" if seed % 3 == 2 else "late", copies[seed % 4], seed)
    linear.check_layer(way, 20, 2, fp8=False, outs=320, ins=2048, programs=1)
    linear.check_tree(way, 8, 0, 8, 1, fp8=True)
    for kind in ("fp8", "integers", "codes"):
        grouped.check_layer(way, kind, 16, 192, 2048, programs=1)
    for rows in (8, 64):
        lossless.check_layer(way, rows, 1, 1536, 3)
    attention.check_shapes(way, [(20, 1500, False), (3, 129, True), (1, 700, False)], 4, 128, seed % 3 * 4)
