"""Views of the parts of a work list."""

import numpy as np

from orthrus.kernels.attention.work_list import DIVIDED_ROW, HEADER, ITEM, header_of


def items_of(numbers: np.ndarray) -> np.ndarray:
    """The list's items: `ITEM` [num_items]."""
    first = HEADER.itemsize // 4
    return numbers[first : first + header_of(numbers)["num_items"] * (ITEM.itemsize // 4)].view(ITEM)


def divided_rows_of(numbers: np.ndarray) -> np.ndarray:
    """The list's divided rows: `DIVIDED_ROW` [num_divided]."""
    header = header_of(numbers)
    first = header["divided_at"]
    return numbers[first : first + header["num_divided"] * (DIVIDED_ROW.itemsize // 4)].view(DIVIDED_ROW)
