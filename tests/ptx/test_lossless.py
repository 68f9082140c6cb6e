"""The stream kernel for 12-bit weights, in the emulator."""

import pytest

from tests.ptx.machine import FEW_WAYS, Way
from tests.ptx.own_process import emulated

few_ways = pytest.mark.parametrize("way", FEW_WAYS, ids=str)
two_ways = pytest.mark.parametrize("way", FEW_WAYS[:2], ids=str)


@few_ways
@pytest.mark.parametrize(("rows", "views", "exceptions"), [(16, 2, 9)])
@emulated
def test_layers(rows: int, views: int, exceptions: int, way: Way) -> None:
    from tests.ptx import lossless

    lossless.check_layer(way, rows, views, 640, exceptions)


@two_ways
@pytest.mark.parametrize(("rows", "views"), [(100, 1), (128, 2)])
@emulated
def test_more_rows(rows: int, views: int, way: Way) -> None:
    from tests.ptx import lossless

    lossless.check_layer(way, rows, views, 384, 3)


@two_ways
@pytest.mark.parametrize("rows", [16, 128])
@emulated
def test_bits_are_those_of_bfloat16_weights(rows: int, way: Way) -> None:
    from tests.ptx import lossless

    lossless.check_bits(way, rows)


@two_ways
@emulated
def test_trees_with_empty_leaves(way: Way) -> None:
    from tests.ptx import lossless

    lossless.check_tree(way, 16, 0, 16, 2)
