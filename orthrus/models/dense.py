"""The tensors of a quantised checkpoint as those of one that is not: for copies of weights in other formats, and for training."""

from collections import defaultdict

import torch
from torch import Tensor

from orthrus.kernels.linear import dense


def dequantised(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """`tensors` by their Hugging Face names, with quantised weights in full, in `dtype`. Others are the same tensors.

    They are taken out of `tensors` projection by projection, so that only one of them is in memory twice.
    """
    modules: dict[str, list[str]] = defaultdict(list)
    for name in tensors:
        modules[name.rpartition(".")[0]].append(name)
    found: dict[str, Tensor] = {}
    for module, names in modules.items():
        parameters = {name.removeprefix(f"{module}."): tensors.pop(name) for name in names}
        whole = len(parameters) == 1
        for part, tensor in (parameters if whole else dense(parameters)).items():
            found[f"{module}.{part}"] = tensor if whole else tensor.to(dtype)
    return found
