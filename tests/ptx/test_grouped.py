"""The stream kernel for weights with scales of groups, in the emulator: FP8 and integers of 4 bits."""

import pytest

from tests.ptx.machine import FEW_WAYS, Way
from tests.ptx.own_process import emulated

few_ways = pytest.mark.parametrize("way", FEW_WAYS, ids=str)
two_ways = pytest.mark.parametrize("way", FEW_WAYS[:2], ids=str)


@few_ways
@pytest.mark.parametrize(
    ("kind", "rows", "ins", "group"),
    [
        ("fp8", 8, 512, 128),
        ("integers", 8, 512, 128),
        ("integers", 33, 1024, 512),
    ],
)
@emulated
def test_layers(kind: str, rows: int, ins: int, group: int, way: Way) -> None:
    from tests.ptx import grouped

    grouped.check_layer(way, kind, rows, 192, ins, group)


@two_ways
@pytest.mark.parametrize(("kind", "rows"), [("fp8", 64), ("integers", 150)])
@emulated
def test_many_rows(kind: str, rows: int, way: Way) -> None:
    from tests.ptx import grouped

    grouped.check_layer(way, kind, rows, 128, 512)


@two_ways
@pytest.mark.parametrize("kind", ["fp8", "integers"])
@emulated
def test_gated(kind: str, way: Way) -> None:
    from tests.ptx import grouped

    grouped.check_gated(way, kind)


@two_ways
@emulated
def test_parts_of_the_sum(way: Way) -> None:
    from tests.ptx import grouped

    grouped.check_parts(way, "integers", 2)
