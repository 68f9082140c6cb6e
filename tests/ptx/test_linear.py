"""The stream kernel for bfloat16 and FP8 weights, in the emulator."""

import pytest

from tests.ptx.machine import FEW_WAYS, WAYS, Way
from tests.ptx.own_process import emulated

few_ways = pytest.mark.parametrize("way", FEW_WAYS, ids=str)
two_ways = pytest.mark.parametrize("way", FEW_WAYS[:2], ids=str)


@few_ways
@pytest.mark.parametrize(("rows", "views"), [(16, 1), (33, 2)])
@emulated
def test_bfloat16(rows: int, views: int, way: Way) -> None:
    from tests.ptx import linear

    linear.check_layer(way, rows, views, fp8=False, bias=True)


@few_ways
@emulated
def test_fp8(way: Way) -> None:
    from tests.ptx import linear

    linear.check_layer(way, 9, 2, fp8=True)


@two_ways
@pytest.mark.parametrize("words", [False, True])
@emulated
def test_results_in_e4m3(words: bool, way: Way) -> None:
    from orthrus.kernels.rounding import Rounding
    from tests.ptx import linear

    linear.check_results_in_e4m3(way, 20, Rounding(256.0, words))


@two_ways
@pytest.mark.parametrize("warm", [False, True])
@emulated
def test_picks(warm: bool, way: Way) -> None:
    from tests.ptx import linear

    linear.check_picks(way, warm, wanted=not warm)


@two_ways
@pytest.mark.parametrize("parts", [1, 4])
@emulated
def test_trees(parts: int, way: Way) -> None:
    from tests.ptx import linear

    linear.check_tree(way, 8, 4, 4, parts, fp8=False)


@emulated
def test_programs_without_work() -> None:
    from tests.ptx import linear

    linear.check_layer(WAYS[2], 20, 2, fp8=False, outs=200, ins=520, programs=5)


@emulated
def test_a_row_has_the_same_bits_among_any_number_of_rows() -> None:
    from tests.ptx import linear

    linear.check_same_bits(WAYS[2], fp8=True)
