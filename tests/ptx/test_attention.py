"""The attention kernel and the kernel that merges its records, in the emulator."""

import pytest

from tests.ptx.machine import FEW_WAYS, WAYS, Way
from tests.ptx.own_process import emulated

few_ways = pytest.mark.parametrize("way", FEW_WAYS, ids=str)


@few_ways
@pytest.mark.parametrize("divide", [0, 8], ids=["whole", "divided"])
@emulated
def test_causal_rows_and_a_diffusion_block(divide: int, way: Way) -> None:
    from tests.ptx import attention

    attention.check_shapes(way, [(20, 200, False), (3, 129, True)], 4, 128, divide)


@pytest.mark.parametrize("words", [False, True])
@pytest.mark.parametrize("divide", [0, 8], ids=["whole", "divided"])
@emulated
def test_results_in_e4m3(divide: int, words: bool) -> None:
    from orthrus.kernels.rounding import Rounding
    from tests.ptx import attention

    attention.check_results_in_e4m3(FEW_WAYS[0], divide, Rounding(64.0, words))


@pytest.mark.parametrize("divide", [0, 8], ids=["whole", "divided"])
@emulated
def test_tree_of_drafts(divide: int) -> None:
    """Its groups share the pages before it."""
    from tests.ptx import attention

    attention.check_tree(WAYS[2], 170, 4, divide)


@pytest.mark.parametrize("right", [0, 2])
@emulated
def test_moved_block(right: int) -> None:
    """It moves over the edge of a segment of keys."""
    from tests.ptx import attention

    attention.check_moved_block(WAYS[2], 258, right, 8)


@emulated
def test_program_without_items() -> None:
    from tests.ptx import attention

    attention.check_shapes(WAYS[2], [(1, 300, False)], 4, 128, 0, programs=5)
