"""The linear kernel for 4-bit codes, in the emulator."""

import pytest

from tests.ptx.machine import FEW_WAYS, Way
from tests.ptx.own_process import emulated

few_ways = pytest.mark.parametrize("way", FEW_WAYS, ids=str)
two_ways = pytest.mark.parametrize("way", FEW_WAYS[:2], ids=str)


@few_ways
@pytest.mark.parametrize(
    ("rows", "outs", "ins", "consumers"), [(8, 192, 512, 1), (17, 192, 384, 2), (33, 200, 768, 3)]
)
@emulated
def test_layers(rows: int, outs: int, ins: int, consumers: int, way: Way) -> None:
    """Also of numbers of outputs and inputs that are not whole tiles."""
    from tests.ptx import codes

    codes.check_layer(way, rows, outs, ins, consumers)


@two_ways
@emulated
def test_many_rows(way: Way) -> None:
    from tests.ptx import codes

    codes.check_layer(way, 150, 128, 512)


@two_ways
@pytest.mark.parametrize("consumers", [1, 3])
@emulated
def test_gated(consumers: int, way: Way) -> None:
    from tests.ptx import codes

    codes.check_gated(way, consumers)


@two_ways
@pytest.mark.parametrize("consumers", [1, 2])
@emulated
def test_parts_of_the_sum(consumers: int, way: Way) -> None:
    from tests.ptx import codes

    codes.check_parts(way, consumers)
