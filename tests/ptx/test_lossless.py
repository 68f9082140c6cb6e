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
@emulated
def test_two_tiles_of_rows(way: Way) -> None:
    from tests.ptx import lossless

    lossless.check_layer(way, 100, 1, 384, 3)


@two_ways
@emulated
def test_bits_are_those_of_bfloat16_weights(way: Way) -> None:
    from tests.ptx import lossless

    lossless.check_bits(way, 16)


@two_ways
@emulated
def test_trees_with_empty_leaves(way: Way) -> None:
    from tests.ptx import lossless

    lossless.check_tree(way, 16, 0, 16, 2)
