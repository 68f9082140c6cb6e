"""The kernel that norms and rotates queries and keys, in the emulator."""

import pytest

from tests.ptx.machine import FEW_WAYS
from tests.ptx.own_process import emulated


@pytest.mark.parametrize(("views", "num_ar", "dim"), [(0, 5, 128), (1, 5, 80), (2, 3, 128)])
@emulated
def test_qk_norm_rope(views: int, num_ar: int, dim: int) -> None:
    from tests.ptx import rows

    rows.check_qk_norm_rope(FEW_WAYS[0], views, num_ar, dim)
